"""Multimodal checkpoints: their text part gives the logits that the whole model gives for a text."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from decoder_families import CASES as CASES_OF_TEXT
from decoder_families import GEMMA4, LLAMA4, ODD, PLAIN, YARN, make_model
from fabula.formats.checkpoint import DType, TensorInfo
from fabula.formats.tensor_names import canonical_names
from fabula.formats.text_part import text_part
from fabula.models.families import family_of
from fabula.models.opening import check_tensors
from hybrid_families import use_recurrent_form
from test_decoder_families import assert_close, expected, load, text

TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER: dict[str, Any] = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24}
MROPE = {"type": "mrope", "mrope_section": [4, 4, 4], "rope_theta": 10000.0}
PART = {"mrope_section": [3, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
THREE_WAYS = {"rope_type": "default", "mrope_section": [8, 6, 6], "mrope_interleaved": True, "rope_theta": 10000.0}
# Name of the classes, the text part's config, the tower's.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "Gemma3",
        {**ODD, "sliding_window": 19, "model_type": "gemma3_text"},
        TOWER | {"model_type": "siglip_vision_model"},
    ),
    "gemma4": ("Gemma4", {**GEMMA4, "model_type": "gemma4_text"}, TOWER | {"num_key_value_heads": 2}),
    "mistral3": (
        "Mistral3",
        {**ODD, "model_type": "ministral3", "rope_parameters": YARN | {"llama_4_scaling_beta": 0.3}},
        TOWER | {"model_type": "pixtral", "head_dim": 8},
    ),
    "mistral3-mistral": (
        "Mistral3",
        {**ODD, "model_type": "mistral", "sliding_window": None},
        TOWER | {"model_type": "pixtral", "head_dim": 8},
    ),
    "qwen2_vl": (
        "Qwen2VL",
        PLAIN | {"rope_parameters": MROPE},
        {"depth": 1, "embed_dim": 16, "hidden_size": 144, "num_heads": 2},
    ),
    "qwen2_5_vl": ("Qwen2_5_VL", PLAIN | {"rope_parameters": MROPE}, QWEN_TOWER | {"out_hidden_size": 144}),
    "qwen3_vl": (
        "Qwen3VL",
        {**ODD, "rope_parameters": THREE_WAYS},
        QWEN_TOWER | {"out_hidden_size": 72, "deepstack_visual_indexes": [0]},
    ),
    "qwen3_5": (
        "Qwen3_5",
        {**CASES_OF_TEXT["qwen3_5"].settings, "rope_parameters": {"rope_type": "default", **PART}},
        QWEN_TOWER | {"out_hidden_size": 72},
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {**CASES_OF_TEXT["qwen3_5_moe"].settings, "rope_parameters": {"rope_type": "default", **PART}},
        QWEN_TOWER | {"out_hidden_size": 72},
    ),
    "llama4": (
        "Llama4",
        dict(LLAMA4),
        TOWER | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    ),
    "muse_glimmer": (
        "MuseGlimmer",
        {**ODD, "num_hidden_layers": 6, "sliding_window": 19},
        {key: TOWER[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
        | {"pos_emb_height": 4, "pos_emb_width": 4},
    ),
}


def make(name: str, folder: Path) -> Any:
    family, inner, tower = CASES[name]
    torch.manual_seed(0)
    more: dict[str, Any] = {"audio_config": None} if family == "Gemma4" else {}
    config = getattr(transformers, f"{family}Config")(text_config=inner, vision_config=tower, **more)
    config._attn_implementation = config.text_config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() < 2 else 0.15))
    use_recurrent_form(model)
    model.save_pretrained(folder)
    # Without an image Llama 4's own class fails in transformers 5.24; the language model inside it has logits, too.
    return model.language_model if family == "Llama4" else model


@pytest.mark.parametrize("name", CASES)
def test_text_part(name: str, tmp_path: Path) -> None:
    model = make(name, tmp_path)
    ids = text(1, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # tensors of the tower are known, and no reason for a warning
        runner = load(tmp_path)
    try:
        (ours,) = runner.all_logits(ids)
        assert_close(ours, expected(model, ids))
        assert runner.config.left_out == ("vision",)
        with runner.sequence() as sequence:
            runner.prefill(sequence, ids[:90])
            (one,) = runner.step([(sequence, ids[90:91])], [0])
            assert np.array_equal(one, ours[90])
    finally:
        runner.close()


def test_gemma3n(tmp_path: Path) -> None:
    """transformers builds the whole model with the towers' library only, so the text part is wrapped by hand."""
    model = make_model(CASES_OF_TEXT["gemma3n"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    wrapped = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    others = ("vision_tower.x.weight", "audio_tower.x.weight", "embed_vision.embedding.weight", "embed_audio.y.weight")
    save_file(wrapped | {f"model.{name}": torch.zeros(2, 2) for name in others}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    towers = {"vision_config": {"model_type": "gemma3n_vision"}, "audio_config": {"model_type": "gemma3n_audio"}}
    names = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps({**names, **towers, "text_config": config}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner = load(tmp_path)
    try:
        ids = text(1, 50)
        assert_close(next(runner.all_logits(ids)), expected(model, ids))
        assert runner.config.left_out == ("vision", "audio")
    finally:
        runner.close()


@pytest.mark.parametrize(("n_layers", "inner", "n_shared"), [(30, 8192, 10), (35, 16384, 15)], ids=["e2b", "e4b"])
def test_released_shapes_of_gemma3n(n_layers: int, inner: int, n_shared: int, tmp_path: Path) -> None:
    """Every tensor of the released sizes has the shape that the program asks for; nothing is left over."""
    settings = {
        "num_hidden_layers": n_layers,
        "intermediate_size": [inner] * n_layers,
        "num_kv_shared_layers": n_shared,
    }
    whole = transformers.Gemma3nTextConfig(**settings)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in transformers.Gemma3nForCausalLM(whole).state_dict().items()}
    infos = {
        name: TensorInfo(name, DType.BF16, tuple(shapes[old]), 2 * shapes[old].numel())
        for old, name in canonical_names(shapes, tmp_path, "gemma3n_text").items()
    }
    about = whole.to_dict()
    made: Any = SimpleNamespace(path=tmp_path, format="safetensors", config=about, metadata={}, tensors=infos)
    config = family_of(about, tmp_path).read(about, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_tensors(made, config)
    assert len(config.kv_layers) == n_layers - n_shared
    assert [layer.mlp.cutoff is not None for layer in config.layers] == [i < 10 for i in range(n_layers)]


def test_older_layout_of_qwen2_vl(tmp_path: Path) -> None:
    """Fields of the text part beside `vision_config`, as the released files have them."""
    model = make("qwen2_vl", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    inner = config.pop("text_config")
    del inner["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(inner | config))
    runner = load(tmp_path)
    try:
        ids = text(2, 50)
        assert_close(next(runner.all_logits(ids)), expected(model, ids))
    finally:
        runner.close()


def test_configs() -> None:
    plain = {"model_type": "llama", "hidden_size": 8}
    assert text_part(plain) == plain
    wrapped = {"model_type": "gemma3", "text_config": {"hidden_size": 8}, "vision_config": {}, "eos_token_id": [1, 106]}
    flat = text_part(wrapped)
    assert flat["model_type"] == "gemma3_text"
    assert flat["tie_word_embeddings"] is True
    assert flat["eos_token_id"] == [1, 106]
    assert flat["left_out"] == ["vision"]
    assert text_part(wrapped | {"tie_word_embeddings": False})["tie_word_embeddings"] is False
    unknown = {"model_type": "other_vl", "text_config": {"model_type": "llama"}}
    assert text_part(unknown) == unknown  # refused by its name
