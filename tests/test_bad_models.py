"""Damaged and hostile models through `Model.load`: each is refused by a typed error that names file and place.

Each case breaks one thing of a folder that loads, so that a refusal shows that rule at work. Afterwards the good
folder loads and answers as before.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from fabula._native import Weight
from fabula.engine.sampling import SamplingParams
from fabula.errors import (
    EngineError,
    InvalidArgument,
    ModelFileError,
    NonFinite,
    TemplateError,
    TokenizerError,
    Unsupported,
)
from fabula.model import Model
from fabula.models import builder
from fabula.models.builder import DamagedWeightWarning

Q0 = "model.layers.0.self_attn.q_proj.weight"
NORM0 = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
Refuse = Callable[..., None]
SHORT = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Iterator[Model]:
    with Model.load(tiny_folder, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def answer(model: Model) -> list[int]:
    generation = model.generate("the winter", SHORT)
    generation.text()
    return generation.token_ids


@pytest.fixture
def refuse(tiny_folder: Path, answer: list[int], monkeypatch: pytest.MonkeyPatch) -> Refuse:
    def refuse_(folder: Path, *words: str, error: type[EngineError] = ModelFileError, field: str = "") -> None:
        """Loading fails as wanted, takes little memory, keeps none, and leaves the good model as it was."""
        packed: list[weakref.ref[Weight]] = []

        class Counted(Weight):
            def __init__(self, dtype: int, n_rows: int, n_cols: int, *rest: Any, **options: Any) -> None:
                assert n_rows * n_cols <= 1 << 16, "memory was taken for a size that only the config claims"
                super().__init__(dtype, n_rows, n_cols, *rest, **options)
                packed.append(weakref.ref(self))

        monkeypatch.setattr(builder, "Weight", Counted)
        try:
            Model.load(folder, threads=1)
            pytest.fail("it was loaded")
        except error as failure:
            refusal = failure.with_traceback(None)
        monkeypatch.undo()
        gc.collect()
        assert not any(weight() for weight in packed)
        for word in (folder.name, *words):
            assert word in str(refusal)
        if field:
            assert isinstance(refusal, ModelFileError)
            assert refusal.field == field
            assert folder.name in refusal.path
        with Model.load(tiny_folder, threads=1) as again:
            generation = again.generate("the winter", SHORT)
            generation.text()
            assert generation.token_ids == answer

    return refuse_


# ---- config.json

YARN = {"rope_type": "yarn", "factor": 4.0}
ROPE_64 = {"rope_type": "longrope", "short_factor": [1] * 3, "long_factor": [1], "original_max_position_embeddings": 64}
ROPE_1 = ROPE_64 | {"long_factor": [1] * 3, "original_max_position_embeddings": 1}
BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "kv heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "head_dim 0": ({"head_dim": 0}, "head_dim"),
    "head_dim odd": ({"head_dim": 5}, "head_dim"),
    "hidden not divisible": ({"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size"),
    "too many layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "hidden negative": ({"hidden_size": -24}, "hidden_size"),
    "hidden text": ({"hidden_size": "24"}, "hidden_size"),
    "hidden a bool": ({"hidden_size": True}, "hidden_size"),
    "hidden a float": ({"hidden_size": 24.0}, "hidden_size"),
    "hidden missing": ({"hidden_size": None}, "hidden_size"),
    "hidden absurd": ({"hidden_size": 10**12}, "hidden_size"),
    "inner absurd": ({"intermediate_size": 2**40}, "intermediate_size"),
    "vocabulary absurd": ({"vocab_size": 10**15}, "vocab_size"),
    "context absurd": ({"max_position_embeddings": 10**9}, "max_position_embeddings"),
    "theta 0": ({"rope_theta": 0}, "rope_theta"),
    "theta negative": ({"rope_theta": -10000.0}, "rope_theta"),
    "theta a list": ({"rope_theta": [1]}, "rope_theta"),
    "theta so small that frequencies overflow": ({"rope_theta": 1e-300}, "rope_theta"),
    "eps 0": ({"rms_norm_eps": 0}, "rms_norm_eps"),
    "eps that float32 makes 0": ({"rms_norm_eps": 1e-60}, "rms_norm_eps"),
    "eps negative": ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    "scaling a list": ({"rope_scaling": [1]}, "rope_scaling"),
    "scaling without factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    "factor overflows": ({"rope_scaling": {"rope_type": "linear", "factor": 1e-60}}, "rope_theta"),
    "yarn with theta 1": ({"rope_theta": 1, "rope_scaling": YARN}, "rope_theta"),
    "yarn beta too large": ({"rope_scaling": YARN | {"beta_fast": 1e308}}, "rope_theta"),
    "longrope of length 1": ({"rope_scaling": ROPE_1}, "rope_theta"),
    "longrope too few": ({"rope_scaling": ROPE_64}, "long_factor"),
    "tied a text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    "biases that are not there": ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias"),
    "window 0": ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
    "layer kinds a list": ({"model_type": "qwen2", "sliding_window": 4, "layer_types": [[], {}]}, "layer_types"),
    "no family": ({"model_type": None}, "model_type"),
    "family a number": ({"model_type": 3}, "model_type"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_config(name: str, tmp_path: Path, refuse: Refuse) -> None:
    changes, field = BAD_CONFIGS[name]
    refuse(tiny.write_model(tmp_path / "bad", config=changes), field, field=field)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "rwkv"}, "rwkv"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "linear"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_unknown_kinds(changes: dict[str, Any], word: str, tmp_path: Path, refuse: Refuse) -> None:
    refuse(tiny.write_model(tmp_path / "bad", config=changes), word, error=Unsupported)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (None, "holds no model"),
        ("", "not JSON"),
        ("[]", "not an object"),
        ("rubbish", "not JSON"),
        (json.dumps({**tiny.CONFIG, "rope_theta": float("nan")}), "NaN"),
        (json.dumps({**tiny.CONFIG, "rope_theta": float("inf")}), "Infinity"),
        (json.dumps({**tiny.CONFIG, "num_hidden_layers": 10**30}), "64 bits"),
        ('{"hidden_size": 24, "hidden_size": 25}', "twice"),
    ],
)
def test_config_text(text: str | None, word: str, tmp_path: Path, refuse: Refuse) -> None:
    folder = tiny.write_model(tmp_path / "bad")
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    refuse(folder, "config.json", word)


# ---- Sizes of the config and of the tensors


@pytest.mark.parametrize(
    ("changes", "tensor", "expected", "found"),
    [
        ({"vocab_size": tiny.VOCAB + 1}, EMBEDDING, [tiny.VOCAB + 1, 24], [tiny.VOCAB, 24]),
        ({"vocab_size": 1 << 22}, EMBEDDING, [1 << 22, 24], [tiny.VOCAB, 24]),
        ({"hidden_size": 1 << 20}, EMBEDDING, [tiny.VOCAB, 1 << 20], [tiny.VOCAB, 24]),
        ({"head_dim": 1024, "num_attention_heads": 1024}, Q0, [1 << 20, 24], [24, 24]),
        ({"intermediate_size": 1 << 20}, "model.layers.0.mlp.gate_proj.weight", [1 << 20, 24], [40, 24]),
    ],
)
def test_sizes_that_the_file_does_not_have(
    changes: dict[str, int], tensor: str, expected: list[int], found: list[int], tmp_path: Path, refuse: Refuse
) -> None:
    folder = tiny.write_model(tmp_path / "bad", config=changes)
    refuse(folder, tensor, f"needs {expected}", f"has shape {found}", field=tensor)


def test_more_layers_than_tensors(tmp_path: Path, refuse: Refuse) -> None:
    folder = tiny.write_model(tmp_path / "bad", config={"num_hidden_layers": 3})
    refuse(folder, "missing", field="model.layers.2.input_layernorm.weight")


@pytest.mark.parametrize("name", [EMBEDDING, Q0, NORM0, "model.norm.weight", "lm_head.weight"])
def test_missing_tensor(name: str, tmp_path: Path, refuse: Refuse) -> None:
    tensors = tiny.random_tensors()
    del tensors[name]
    refuse(tiny.write_model(tmp_path / "bad", tensors=tensors), "missing", field=name)


@pytest.mark.parametrize("name", [EMBEDDING, "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"])
def test_transposed_tensor(name: str, tmp_path: Path, refuse: Refuse) -> None:
    tensors = tiny.random_tensors()
    rows, columns = tensors[name].shape
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    folder = tiny.write_model(tmp_path / "bad", tensors=tensors)
    refuse(folder, f"has shape {[columns, rows]}", f"needs {[rows, columns]}", field=name)


@pytest.mark.parametrize("name", [Q0, NORM0])
def test_integer_tensor(name: str, tmp_path: Path, refuse: Refuse) -> None:
    tensors = tiny.random_tensors()
    tensors[name] = tensors[name].astype(np.int64)
    refuse(tiny.write_model(tmp_path / "bad", tensors=tensors), name, "I64", error=Unsupported)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_weights(keep: int, tmp_path: Path, refuse: Refuse) -> None:
    folder = tiny.write_model(tmp_path / "bad")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    refuse(folder, "model.safetensors")


# ---- Numbers that are none


@pytest.mark.parametrize(
    ("name", "value"),
    [(Q0, np.nan), ("model.layers.1.mlp.up_proj.weight", np.inf), (NORM0, np.inf), ("model.norm.weight", np.nan)],
)
def test_damaged_weights(name: str, value: float, tmp_path: Path) -> None:
    """Loading warns; every turn fails and gives its pages back."""
    tensors = tiny.random_tensors()
    tensors[name][...] = value
    folder = tiny.write_model(tmp_path / "bad", tensors=tensors)
    with pytest.warns(DamagedWeightWarning, match=name) as warned:
        model = Model.load(folder, threads=1)
    assert str(folder) in str(warned[0].message)
    with model:
        pool = model._runner.pool
        for _ in range(2):
            with pytest.raises(NonFinite):
                model.logits([5, 6, 7])
            generation = model.generate([5, 6, 7], SHORT)
            with pytest.raises(NonFinite):
                next(generation)
            assert generation.finish_reason == "cancelled"
            model.clear_cache()
            assert pool.n_free == pool.n_pages


def test_numbers_beyond_f16(tmp_path: Path) -> None:
    tensors = tiny.random_tensors()
    tensors[Q0][3, 4] = 1e6
    folder = tiny.write_model(tmp_path / "bad", tensors=tensors)
    with pytest.warns(DamagedWeightWarning, match=Q0):
        Model.load(folder, threads=1, weights="f16").close()
    Model.load(folder, threads=1, weights="f32").close()


# ---- Tokenizer and template


def test_tokenizer_with_more_ids_than_the_model(tmp_path: Path, refuse: Refuse) -> None:
    folder = tiny.write_model(tmp_path / "bad", n_more_tokens=2)
    refuse(folder, str(tiny.VOCAB), str(tiny.VOCAB + 2), error=TokenizerError, field="vocab_size")


def test_tokenizer_missing(tmp_path: Path, refuse: Refuse) -> None:
    folder = tiny.write_model(tmp_path / "bad")
    (folder / "tokenizer.json").unlink()
    refuse(folder, "tokenizer.json is missing", error=TokenizerError)


@pytest.mark.parametrize("text", ["", "{}", '{"model": 3}'])
def test_tokenizer_damaged(text: str, tmp_path: Path, refuse: Refuse) -> None:
    folder = tiny.write_model(tmp_path / "bad")
    (folder / "tokenizer.json").write_text(text)
    refuse(folder, "tokenizer.json")


def test_end_token_outside_the_vocabulary(tmp_path: Path, refuse: Refuse) -> None:
    folder = tiny.write_model(tmp_path / "bad", config={"eos_token_id": 10**6})
    refuse(folder, "1000000", error=TokenizerError, field="eos_token_id")


MESSAGE = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("template", "line", "word"),
    [
        (None, None, "no chat template"),
        ("{{ messages }}\n{{ raise_exception('only one system message') }}", 2, "only one system message"),
        ("a\n\n{{ messages[7]['content'] }}", 3, "line 3"),
        ("a\n{% for %}", 2, "line 2"),
    ],
)
def test_template(template: str | None, line: int | None, word: str, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "bad", template=template)
    with Model.load(folder, threads=1) as model:
        with pytest.raises(TemplateError, match=word) as caught:
            model.chat(MESSAGE)
        assert caught.value.line == line
        assert str(folder) in str(caught.value)
        assert len(model.generate("hello", SHORT).text()) > 0


# ---- What callers give


@pytest.mark.parametrize(
    "ids",
    [
        *([], [tiny.VOCAB], [-1], [2**31], [2**70], [5, tiny.VOCAB]),
        *([1.0], [True], [True, 2], [None], ["a"], [[1, 2]], [[1], [1, 2]], "", b"ab", 5, None),
        *(np.array([1.0]), np.array([True]), np.array([[1, 2]])),
    ],
)
def test_token_ids(ids: Any, model: Model) -> None:
    for call in (model.logits, model.generate):
        with pytest.raises(InvalidArgument):
            call(ids)


@pytest.mark.parametrize(
    "options",
    [
        *({"context": value} for value in (0, -1, 1.5, "8", True, 2**25)),
        *({"threads": value} for value in (0, -1, 1.5, "8", True, 2**25)),
        *({"weights": "q9"}, {"weights": ["f16"]}, {"kv": "q4"}, {"kv": "q8:"}, {"kv": ["f16"]}),
    ],
)
def test_options(options: dict[str, Any], tiny_folder: Path) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        Model.load(tiny_folder, **options)
