"""`fabula quantize`: files that hold the same model, that llama.cpp reads, and that appear whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from fabula import Model
from fabula.choices import FILE_TYPES
from fabula.cli.main import run
from fabula.errors import InvalidArgument, ModelFileError, NonFinite, TokenizerError, Unsupported
from fabula.export import quantize as export
from fabula.export.losses import differences
from fabula.export.quantize import quantize_model
from fabula.formats.checkpoint import Checkpoint, DType
from fabula.formats.gguf import BLOCKS, GgufFile
from fabula.formats.gguf_write import GgufWriter, NewTensor
from fabula.formats.open import open_checkpoint
from fabula.models.families import family_of
from fabula.models.recipe import KINDS, Shape, dtype_for, role_of
from fabula.models.rope import make_rope
from fabula.text.tokenizer import Tokenizer
from llama_peer import LlamaCpp

# Rows of 256 and 512, so that K blocks fit; nine layers, so that every rule about layers shows.
WIDE: Mapping[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "llama-linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "llama-yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 150, "beta_fast": 16.0}
    },
    "llama-yarn-attention": {
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 150, "attention_factor": 1.3
        }
    },
    "llama-llama3": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "llama-yarn-betas": {
        "num_attention_heads": 4, "head_dim": 16, "rope_theta": 100.0,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 150, "beta_fast": 9.0,
            "beta_slow": 2.5,
        },
    },
    "llama-yarn-mscale": {
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 150, "mscale": 1.0,
            "mscale_all_dim": 0.7,
        }
    },
    "llama-wide-heads": {"head_dim": 14},
    "mistral": {"model_type": "mistral", "sliding_window": 40},
    "mistral-of-one": {"model_type": "mistral", "sliding_window": 1},
    "mistral-llama3": {"model_type": "mistral", "sliding_window": 40, "rope_scaling": LLAMA3},
    "mistral-no-window": {"model_type": "mistral", "sliding_window": None},
    "qwen2-yarn": {
        "model_type": "qwen2",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 150},
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
}  # fmt: skip

# What llama.cpp does not read, or reads otherwise, and a word of the note that says so.
NOTED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "qwen3-llama3": ({"model_type": "qwen3", "head_dim": 6, "rope_scaling": LLAMA3}, "llama.cpp refuses"),
    "qwen3-output-bias": ({"model_type": "qwen3", "attention_bias": True}, "llama.cpp refuses"),
    "qwen2-wide-heads": ({"model_type": "qwen2", "head_dim": 8}, "llama.cpp refuses"),
    "qwen2-betas": (
        {"model_type": "qwen2", "num_attention_heads": 4, "hidden_size": 64, "head_dim": 16, "rope_theta": 100.0,
         "rope_scaling": CASES["llama-yarn-betas"]["rope_scaling"]},
        "ignores beta_fast and beta_slow",
    ),
    "mistral-betas": (
        {"model_type": "mistral", "sliding_window": 40, "head_dim": 16, "rope_theta": 100.0,
         "rope_scaling": CASES["llama-yarn-betas"]["rope_scaling"]},
        "ignores beta_fast and beta_slow",
    ),
}  # fmt: skip


def tensors_of(config: Mapping[str, Any]) -> tiny.Tensors:
    """Every tensor that a config needs."""
    tensors = tiny.random_tensors(config)
    rng = np.random.default_rng(5)
    qkv_bias = config["model_type"] == "qwen2" or config.get("attention_bias", False)
    for name in list(tensors):
        biased = qkv_bias and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        biased |= bool(config.get("attention_bias")) and name.endswith("o_proj.weight")
        biased |= bool(config.get("mlp_bias")) and ".mlp." in name
        if biased:
            tensors[name.replace(".weight", ".bias")] = rng.standard_normal(len(tensors[name])).astype(np.float32)
    if config["model_type"] == "qwen3":
        for layer in range(config["num_hidden_layers"]):
            for part in ("q_norm", "k_norm"):
                scale = rng.uniform(0.5, 1.5, config["head_dim"]).astype(np.float32)
                tensors[f"model.layers.{layer}.self_attn.{part}.weight"] = scale
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    return tensors


def make_folder(folder: Path, settings: Mapping[str, Any]) -> Path:
    config = {**tiny.CONFIG, **settings}
    tensors = tensors_of(config)
    for name, tensor in tensors.items():
        if tensor.ndim > 1:  # as much gain as the narrow ones have, or every small error would grow
            tensors[name] = tensor * np.float32((24 / config["hidden_size"]) ** 0.5)
    return tiny.write_model(folder, config=settings, tensors=tensors)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder and the f32 file made of it."""
    folder = make_folder(tmp_path_factory.mktemp("export") / "model", CASES[request.param])
    target = folder.parent / "out.gguf"
    quantize_model(folder, target, "f32")
    return folder, target


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("wide") / "model", WIDE)


def logits(path: Path, ids: list[int]) -> np.ndarray:
    with Model.load(path, weights="f32", kv="f32") as model:
        return model.logits(ids)


def read_config(checkpoint: Checkpoint) -> Any:
    return family_of(checkpoint.config, checkpoint.path).read(checkpoint.config, checkpoint.path)


# ---- The same model -------------------------------------------------------------------------------------------------


def test_every_tensor_comes_back(case: tuple[Path, Path]) -> None:
    before, after = (open_checkpoint(path) for path in case)
    try:
        assert {name: info.shape for name, info in after.tensors.items()} == {
            name: info.shape for name, info in before.tensors.items()
        }
        for name in before.tensors:
            assert np.array_equal(before.read(name), after.read(name)), name
    finally:
        before.close()
        after.close()


def _without_biases(config: Any) -> list[Any]:
    plain = {"qkv_bias": False, "output_bias": False, "window": 0}
    return [replace(layer, attention=replace(layer.attention, **plain)) for layer in config.layers]


def test_the_config_comes_back(case: tuple[Path, Path]) -> None:
    before, after = (open_checkpoint(path) for path in case)
    try:
        ours, theirs = read_config(before), read_config(after)
        seen = tuple(window if window < ours.context_length else 0 for window in ours.windows)
        for field in type(ours).__slots__:
            # The reader takes the biases of all attention tensors from the first, and words rope in another way.
            # A Mistral without a window, or with one as long as its context, is a Llama.
            if field == "windows":
                assert theirs.windows == seen
            elif field == "model_type" and not any(seen):
                assert theirs.model_type == ours.model_type.replace("mistral", "llama")
            elif field == "layers":
                assert _without_biases(ours) == _without_biases(theirs)
            elif field not in ("rope", "ropes", "attention_bias", "output_bias"):
                assert getattr(ours, field) == getattr(theirs, field), field
        a, b = (make_rope(c.rope, c.head_dim, c.context_length, c.context_length, case[0]) for c in (ours, theirs))
        assert np.allclose(a.inv_freq, b.inv_freq, rtol=3e-7)
        assert abs(a.scale - b.scale) < 1e-6
        assert list(differences(ours, theirs, case[0])) == []
    finally:
        before.close()
        after.close()


def test_the_tokenizer_comes_back(case: tuple[Path, Path]) -> None:
    before = Tokenizer.from_folder(case[0])
    with GgufFile(case[1]) as file:
        after = Tokenizer.from_gguf(file.metadata, case[1])
    for text in ("the lion sat on the wall 12", "é 😀 <s> x", ""):
        assert before.encode(text) == after.encode(text)
        assert before.encode(text, special=True) == after.encode(text, special=True)
    assert (before.bos_id, before.eos_ids, before.add_bos) == (after.bos_id, after.eos_ids, after.add_bos)
    assert before.special_tokens == after.special_tokens
    assert before.chat_template == after.chat_template


def test_the_logits_come_back(case: tuple[Path, Path]) -> None:
    ids = np.random.default_rng(3).integers(0, tiny.VOCAB, 90).tolist()
    before, after = logits(case[0], ids), logits(case[1], ids)
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()


def test_through_a_file_or_at_once_is_the_same(wide: Path, tmp_path: Path) -> None:
    quantize_model(wide, tmp_path / "f32.gguf", "f32")
    for kind in ("q8_0", "q4_k_m"):
        quantize_model(wide, tmp_path / "once.gguf", kind, overwrite=True, threads=1)
        quantize_model(tmp_path / "f32.gguf", tmp_path / "twice.gguf", kind, overwrite=True, threads=3)
        assert (tmp_path / "once.gguf").read_bytes() == (tmp_path / "twice.gguf").read_bytes()


def test_pieces_do_not_matter(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_model(wide, tmp_path / "whole.gguf", "q4_k")
    monkeypatch.setattr(export, "_PIECE", 700)  # two rows, or one
    steps: list[tuple[int, int]] = []
    pieces = quantize_model(wide, tmp_path / "pieces.gguf", "q4_k", progress=lambda *step: steps.append(step))
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()
    assert abs(whole.error - pieces.error) < 1e-9
    assert steps[-1] == (whole.bytes_before, whole.bytes_before)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_quantised_matrices_of_the_same_type_are_copied(wide: Path, tmp_path: Path) -> None:
    quantize_model(wide, tmp_path / "a.gguf", "q4_k")
    report = quantize_model(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_k")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert report.error == 0 and not report.requantized
    assert quantize_model(tmp_path / "a.gguf", tmp_path / "c.gguf", "q8_0").requantized


# ---- Which format ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_error_and_size_of_each_type(wide: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out.gguf"
    report = quantize_model(wide, target, kind)
    assert report.file_bytes == target.stat().st_size
    assert report.bits_per_weight == 8 * report.bytes_after / report.n_parameters
    most = {
        "f32": 0.0, "f16": 3e-4, "bf16": 2.2e-3, "q8_0": 0.007, "q6_k": 0.02, "q5_k_m": 0.04, "q5_k": 0.04,
        "q5_1": 0.045, "q5_0": 0.05, "q4_k_m": 0.08, "q4_k": 0.08, "q4_1": 0.09, "q4_0": 0.1, "iq4_nl": 0.085,
        "mxfp4": 0.12, "q3_k": 0.17, "q2_k": 0.3,
    }  # fmt: skip
    assert report.error <= most[kind]
    with GgufFile(target) as file:
        assert file.metadata["general.file_type"] == KINDS[kind].file_type
        for tensor in file.tensors.values():
            assert len(tensor.shape) > 1 or tensor.dtype is DType.F32
            assert tensor.dtype is dtype_for(KINDS[kind], tensor.name, tensor.shape, Shape(9, 4, False))
        written = sum(tensor.n_bytes for tensor in file.tensors.values())
    assert written == report.bytes_after
    with Model.load(target) as model:
        assert np.isfinite(model.logits([5, 6, 7])).all()


def test_rows_that_do_not_fit_fall_back() -> None:
    model = Shape(30, 3, True)
    expected = {
        "q4_k": {576: DType.Q5_0, 256: DType.Q4_K, 40: DType.F16},
        "q5_k": {576: DType.Q5_1, 256: DType.Q5_K, 40: DType.F16},
        "q6_k": {576: DType.Q8_0, 256: DType.Q6_K, 40: DType.F16},
        "q3_k": {576: DType.Q4_0, 256: DType.Q3_K, 40: DType.F16},
        "q2_k": {576: DType.Q4_0, 256: DType.Q2_K, 40: DType.F16},
        "q8_0": {576: DType.Q8_0, 256: DType.Q8_0, 40: DType.F16},
        "bf16": {576: DType.BF16, 40: DType.BF16},
    }
    for kind, by_width in expected.items():
        for width, dtype in by_width.items():
            assert dtype_for(KINDS[kind], "blk.9.ffn_up.weight", (64, width), model) is dtype, (kind, width)
    assert dtype_for(KINDS["q4_k"], "token_embd.weight", (64, 576), model) is DType.Q8_0
    assert dtype_for(KINDS["q4_0"], "token_embd.weight", (64, 512), model) is DType.Q6_K
    assert dtype_for(KINDS["q4_0"], "token_embd.weight", (64, 512), Shape(30, 3, False)) is DType.Q4_0
    assert dtype_for(KINDS["q4_0"], "blk.0.attn_norm.weight", (512,), model) is DType.F32
    assert dtype_for(KINDS["q4_k"], "per_layer_token_embd.weight", (64, 512), model) is DType.Q4_K
    for name in (
        "altup_proj.weight",
        "blk.0.altup_router.weight",
        "blk.0.laurel_l.weight",
        "per_layer_model_proj.weight",
    ):
        assert dtype_for(KINDS["q4_k"], name, (64, 512), model) is DType.F16
    assert role_of("blk.3.attn_q_norm.weight") == role_of("blk.3.attn_q.bias") == "norms and biases"


# ---- llama.cpp ------------------------------------------------------------------------------------------------------


def test_llama_cpp_computes_the_same(llama_cpp: LlamaCpp, case: tuple[Path, Path]) -> None:
    """Beyond the window of those that have one, and in texts longer than the old context of those that are scaled."""
    ids = np.random.default_rng(4).integers(4, tiny.VOCAB, 200).tolist()
    ours, theirs = logits(case[1], ids), llama_cpp.logits(case[1], ids)
    assert theirs is not None
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(ours).max()  # its exponentials are coarser


@pytest.mark.parametrize("name", sorted(NOTED))
def test_llama_cpp_does_what_the_notes_say(llama_cpp: LlamaCpp, tmp_path: Path, name: str) -> None:
    settings, word = NOTED[name]
    report = quantize_model(make_folder(tmp_path / "m", settings), tmp_path / "out.gguf", "f32")
    assert word in " ".join(report.notes)
    ids = np.random.default_rng(4).integers(4, tiny.VOCAB, 200).tolist()
    ours, theirs = logits(tmp_path / "out.gguf", ids), llama_cpp.logits(tmp_path / "out.gguf", ids)
    if "refuses" in word:
        assert theirs is None
    else:
        assert theirs is not None and np.abs(ours - theirs).max() > 1e-3 * np.abs(ours).max()


@pytest.mark.parametrize(
    "kind", ["q8_0", "q4_k_m", "q5_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q3_k", "q2_k"]
)
def test_llama_cpp_makes_the_same_choices(llama_cpp: LlamaCpp, wide: Path, tmp_path: Path, kind: str) -> None:
    """Format by format, and the two engines read each other's files alike."""
    quantize_model(wide, tmp_path / "f32.gguf", "f32")
    quantize_model(tmp_path / "f32.gguf", tmp_path / "ours.gguf", kind)
    target = (str(tmp_path / "theirs.gguf"), KINDS[kind].file_type)
    assert llama_cpp.ask(tmp_path / "f32.gguf", quantize=target) == {"code": 0}
    with GgufFile(tmp_path / "ours.gguf") as ours, GgufFile(tmp_path / "theirs.gguf") as theirs:
        assert {t.name: t.dtype for t in ours.tensors.values()} == {t.name: t.dtype for t in theirs.tensors.values()}
        assert set(ours.metadata) == set(theirs.metadata)
    ids = np.random.default_rng(4).integers(4, tiny.VOCAB, 30).tolist()
    for name in ("ours.gguf", "theirs.gguf"):
        a, b = logits(tmp_path / name, ids), llama_cpp.logits(tmp_path / name, ids)
        assert b is not None
        # It rounds activations to 8 bits before every product, which a random network makes 0.1 to 0.2 of; anything
        # read in a wrong way makes 1 of it.
        assert np.linalg.norm(a - b) <= 0.35 * np.linalg.norm(a), name


def test_llama_cpp_reads_the_vocabulary_alike(llama_cpp: LlamaCpp, smollm2_gguf: Path, tmp_path: Path) -> None:
    quantize_model(smollm2_gguf, tmp_path / "out.gguf", "q8_0")
    text = "Once upon a time, in 1984, there wasn't a café — only   spaces."
    with Model.load(tmp_path / "out.gguf", weights="f32", kv="f32") as ours:
        ids = ours.tokenizer.encode(text)
        ours_logits = ours.logits(ids)
    assert llama_cpp.ask(tmp_path / "out.gguf", text=text)["ids"] == ids
    theirs = llama_cpp.logits(tmp_path / "out.gguf", ids)
    assert theirs is not None
    assert (ours_logits.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.9  # its activations have 8 bits


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_llama_cpp_reads_made_vocabularies_alike(llama_cpp: LlamaCpp, tmp_path: Path, name: str) -> None:
    quantize_model(make_folder(tmp_path / "m", CASES[name]), tmp_path / "out.gguf", "f32")
    tokenizer = Tokenizer.from_folder(tmp_path / "m")
    for text in ("the lion sat on the wall 12", "é 😀 <s> x", "a  b\n\nc it's  "):
        answer = llama_cpp.ask(tmp_path / "out.gguf", text=text)
        assert answer["ids"] == tokenizer.encode(text, add_bos=False)
        assert answer["with_bos"] == tokenizer.encode(text)
        special = llama_cpp.ask(tmp_path / "out.gguf", text=text, special=True)
        assert special["ids"] == tokenizer.encode(text, add_bos=False, special=True)


# ---- SentencePiece --------------------------------------------------------------------------------------------------


def test_a_sentencepiece_model(story_folder: Path, tmp_path: Path) -> None:
    quantize_model(story_folder, tmp_path / "out.gguf", "f32")
    before = Tokenizer.from_folder(story_folder)
    with GgufFile(tmp_path / "out.gguf") as file:
        assert file.metadata["tokenizer.ggml.model"] == "llama"
        after = Tokenizer.from_gguf(file.metadata, tmp_path / "out.gguf")
    text = 'Once upon a time, there was a little girl named Lily. She said: "Hello!"\n  Then what?'
    ids = before.encode(text)
    assert after.encode(text) == ids
    assert np.array_equal(logits(story_folder, ids), logits(tmp_path / "out.gguf", ids))


# ---- Refusals -------------------------------------------------------------------------------------------------------


def refused(folder: Path, kind: type[Exception], words: str, target: str = "q8_0") -> None:
    """Nothing of a file may be left."""
    with pytest.raises(kind, match=words):
        quantize_model(folder, folder.parent / "out.gguf", target)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    tensors = tiny.random_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][7, 9] = np.nan
    refused(
        tiny.write_model(tmp_path / "a" / "m", tensors=tensors), NonFinite, "'blk.1.ffn_up.weight': row 7, column 9"
    )
    tensors["model.layers.1.mlp.up_proj.weight"][7, 9] = 7e4
    refused(tiny.write_model(tmp_path / "b" / "m", tensors=tensors), NonFinite, "infinite in F16", "f16")


def test_tensors_that_are_missing_or_unknown(tmp_path: Path) -> None:
    tensors = tiny.random_tensors()
    taken = tensors.pop("model.layers.1.mlp.up_proj.weight")
    refused(tiny.write_model(tmp_path / "a" / "m", tensors=tensors), ModelFileError, "blk.1.ffn_up.weight is missing")
    tensors["model.layers.1.mlp.up_proj.weight"] = taken
    more = {**tensors, "model.layers.1.mlp.router.weight": taken}
    refused(tiny.write_model(tmp_path / "b" / "m", tensors=more), Unsupported, "router")
    more = {**tensors, "model.layers.2.mlp.up_proj.weight": taken}
    refused(tiny.write_model(tmp_path / "c" / "m", tensors=more), Unsupported, "not part of this model")
    for i, name in enumerate(("0.mlp.down_proj.bias", "1.self_attn.q_proj.bias", "1.input_layernorm.bias")):
        more = {**tensors, f"model.layers.{name}": np.ones(24, np.float32)}
        folder = tiny.write_model(tmp_path / f"bias{i}" / "m", tensors=more)
        refused(folder, Unsupported, rf"model\.layers\.{name}.*not part of this model's config")
    more = {**tensors, "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    quantize_model(tiny.write_model(tmp_path / "d" / "m", tensors=more), tmp_path / "out.gguf", "f32")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "no key for 'dynamic'"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 3}},
            "'longrope'",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}, "max_position_embeddings": 64},
            "'truncate' false",
        ),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, "window in"),
    ],
)
def test_settings_without_words_in_gguf(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    refused(make_folder(tmp_path / "m", config), Unsupported, words)


def test_a_window_that_hides_nothing_is_left_out(tmp_path: Path) -> None:
    report = quantize_model(
        make_folder(tmp_path / "m", {"model_type": "mistral", "sliding_window": 600}), tmp_path / "out.gguf", "f32"
    )
    with GgufFile(tmp_path / "out.gguf") as file:
        assert file.metadata["general.architecture"] == "llama" and not report.notes
    ids = list(range(4, 100))
    assert np.array_equal(logits(tmp_path / "m", ids), logits(tmp_path / "out.gguf", ids))


def test_a_window_is_written_where_llama_cpp_has_it(fabula: Any, tmp_path: Path) -> None:
    folder, target = make_folder(tmp_path / "m", CASES["mistral"]), tmp_path / "out.gguf"
    code, out, err = fabula(folder, target, "--type", "q8_0", "--json")
    assert code == 0 and "window of 40 tokens" in json.loads(out)["notes"][0]
    with GgufFile(target) as file:
        assert file.metadata["general.architecture"] == "granite_swa"
        assert file.metadata["granite_swa.attention.sliding_window"] == 40
        assert file.metadata["granite_swa.attention.sliding_window_pattern"].tolist() == [True, True]
    code, out, err = fabula(target, tmp_path / "again.gguf", "--type", "q4_0")
    assert code == 0 and "note: it is written as granite_swa" in err
    assert np.isfinite(logits(tmp_path / "again.gguf", [5, 6, 7])).all()


def test_a_window_in_a_gguf_file_of_llama_is_noted(tmp_path: Path) -> None:
    quantize_model(make_folder(tmp_path / "m", {}), tmp_path / "llama.gguf", "f32")
    with GgufFile(tmp_path / "llama.gguf") as file:
        new = [NewTensor(t.name, t.dtype, t.shape) for t in file.tensors.values()]
        metadata: dict[str, Any] = {**file.metadata, "llama.attention.sliding_window": 40}
        with GgufWriter(tmp_path / "old.gguf", metadata, new) as writer:
            for tensor in new:
                writer.write(tensor.name, file.read(tensor.name))
    report = quantize_model(tmp_path / "old.gguf", tmp_path / "out.gguf", "f32")
    assert len(report.notes) == 1 and "no window in architecture llama: it ignores that of 40" in report.notes[0]
    assert not quantize_model(tmp_path / "llama.gguf", tmp_path / "new.gguf", "f32").notes


def test_end_tokens_of_any_name_come_back(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"eos_token_id": [1, 20, 21]})
    report = quantize_model(folder, tmp_path / "out.gguf", "f32")
    before = Tokenizer.from_folder(folder)
    with GgufFile(tmp_path / "out.gguf") as file:
        after = Tokenizer.from_gguf(file.metadata, tmp_path / "out.gguf")
    assert set(before.eos_ids) == set(after.eos_ids) >= {1, 20, 21} and not report.notes
    folder = make_folder(tmp_path / "more", {"eos_token_id": [1, 20, 21, 22]})
    report = quantize_model(folder, tmp_path / "out.gguf", "f32", overwrite=True)
    lost = Tokenizer.from_folder(folder).token_text(22)
    assert len(report.notes) == 1 and report.notes[0].endswith(f"these are left out: {lost!r}")


def test_vocabularies_without_words_in_gguf(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "m")
    description = json.loads((folder / "tokenizer.json").read_text())
    splitting = {"type": "Split", "pattern": {"String": "h"}, "behavior": "Isolated", "invert": False}
    changed = {"type": "Sequence", "pretokenizers": [splitting, description["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(description | {"pre_tokenizer": changed}))
    refused(folder, Unsupported, "no name for")
    description["model"]["vocab"]["too many"] = tiny.VOCAB
    (folder / "tokenizer.json").write_text(json.dumps(description))
    refused(folder, TokenizerError, "the embedding has")


def test_ids_without_a_token_get_one(tmp_path: Path) -> None:
    config = {**tiny.CONFIG, "vocab_size": tiny.VOCAB + 3}
    folder = tiny.write_model(
        tmp_path / "m", config={"vocab_size": tiny.VOCAB + 3}, tensors=tiny.random_tensors(config)
    )
    quantize_model(folder, tmp_path / "out.gguf", "f32")
    with GgufFile(tmp_path / "out.gguf") as file:
        assert file.metadata["tokenizer.ggml.tokens"][-3:] == [f"[PAD{tiny.VOCAB + i}]" for i in range(3)]
        assert file.metadata["tokenizer.ggml.token_type"][-3:].tolist() == [5, 5, 5]
    assert np.array_equal(logits(folder, [5, 6]), logits(tmp_path / "out.gguf", [5, 6]))


# ---- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fabula(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            run(["quantize", *map(str, words)])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


def test_the_command_lists_every_type(fabula: Any) -> None:
    assert tuple(KINDS) == FILE_TYPES
    code, out, _ = fabula("--help")
    assert code == 0 and "Examples:" in out and "q4_k_m" in out
    assert fabula("a", "b")[0] == 2  # no --type
    assert fabula("a", "b", "--type", "q9")[0] == 2


def test_the_command_tells_what_it_wrote(fabula: Any, wide: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    code, out, err = fabula(wide, target, "--type", "Q4_K_M", "--json", "--threads", "2")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["file_bytes"] == target.stat().st_size and facts["type"] == "q4_k_m"
    assert {role["name"] for role in facts["roles"]} >= {"embedding", "head", "ffn_down", "attn_q", "norms and biases"}
    assert sum(role["bytes_after"] for role in facts["roles"]) == facts["bytes_after"]
    assert 4.5 < facts["bits_per_weight"] < 6 and 0.03 < facts["error"] < 0.1

    before = target.read_bytes()
    code, out, err = fabula(wide, target, "--type", "q8_0")
    assert code == 1 and "exists already" in err and "--force" in err
    assert target.read_bytes() == before
    code, out, err = fabula(wide, target, "--type", "q2_k", "--force")
    assert code == 0 and "bits per weight" in out and "ffn_down" in out and "Q3_K" in out
    assert target.read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    code, out, err = fabula(target, tmp_path / "again.gguf", "--type", "q8_0")
    assert code == 0 and "quantized already" in err


def test_the_command_refuses_what_is_no_model(fabula: Any, tmp_path: Path) -> None:
    code, _, err = fabula(tmp_path / "nothing", tmp_path / "out.gguf", "--type", "q8_0")
    assert code == 1 and "no such file or folder" in err
    with pytest.raises(InvalidArgument, match="must be one of"):
        quantize_model(tmp_path, tmp_path / "out.gguf", "q9")


def test_block_sizes_are_known_for_every_type() -> None:
    assert {kind.dtype for kind in KINDS.values()} == set(BLOCKS)
