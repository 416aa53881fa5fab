"""Families with recurrent layers: what their configs say beside sizes, and what is left out or refused by name.

Logits are compared in test_decoder_families.py, fields in test_family_flips.py, files in test_gguf_families.py.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoder_families import CASES, ODD, PLAIN, make_model
from fabula.errors import ModelFileError, Unsupported
from fabula.models.description import ModelConfig
from fabula.models.families import FAMILIES, family_of
from fabula.models.opening import check_tensors, open_model
from hybrid_families import FULL, LINEAR, hybrid_settings

HYBRIDS = {name: CASES[name] for name in hybrid_settings(ODD, PLAIN)}


def read(settings: dict[str, Any]) -> ModelConfig:
    return family_of(settings, Path("m")).read(settings, Path("m"))


@pytest.mark.parametrize("name", HYBRIDS)
def test_every_tensor_has_its_place(name: str, tmp_path: Path) -> None:
    """Without a warning, and with a state for each recurrent operator."""
    make_model(HYBRIDS[name], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint, config = open_model(tmp_path)
        check_tensors(checkpoint, config)
        checkpoint.close()
    mixers = [layer.mixer for layer in config.layers if layer.mixer]
    assert len(config.state_layers) == sum(len(mixer.state_layers) for mixer in mixers) > 0
    assert len(config.kv_layers) == sum(layer.attends for layer in config.layers)
    assert [a.kv for a in config.attentions] == list(range(len(config.attentions)))


def test_heads_for_drafts_are_left_out(tmp_path: Path) -> None:
    make_model(CASES["qwen3_5"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {f"mtp.{name}": torch.zeros(2, 2) for name in ("fc.weight", "layers.0.self_attn.q_proj.weight")}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mtp_num_hidden_layers": 1}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint, found = open_model(tmp_path)
        check_tensors(checkpoint, found)
        checkpoint.close()
    assert found.left_out == ("heads for drafts (MTP)",)


# Sizes of states by hand: convolutions remember taps - 1 inputs of each column, heads k * v numbers.
QWEN_08B = {
    **{"model_type": "qwen3_5_text", "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 248320, "linear_num_value_heads": 16},
}
LFM2_700M = {
    **{"model_type": "lfm2", "hidden_size": 1536, "block_ff_dim": 10240, "num_hidden_layers": 16, "vocab_size": 65536},
    **{"num_attention_heads": 24, "num_key_value_heads": 8, "full_attn_idxs": [2, 5, 8, 10, 12, 14]},
}


def test_released_shapes() -> None:
    qwen, lfm2 = read(QWEN_08B), read(LFM2_700M)
    assert len(qwen.attentions) == 6 and len(qwen.state_layers) == 36
    assert 4 * sum(qwen.state_layers) == 18 * 4 * (3 * 6144 + 16 * 128 * 128)
    assert lfm2.layers[0].mlp.size == 6912 and 4 * sum(lfm2.state_layers) == 10 * 4 * 2 * 1536


@pytest.mark.parametrize("family", ["jamba", "mamba", "falcon_mamba", "zamba2", "rwkv7"])
def test_other_recurrences_are_refused_by_name(family: str) -> None:
    with pytest.raises(Unsupported, match=f"{family!r} is not supported"):
        family_of({"model_type": family}, Path("m"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layer_types": [LINEAR] * 24}, "without any layer with attention"),
        ({"layer_types": ["conv", FULL] * 12}, "layer_types"),
        ({"linear_num_key_heads": 3}, "linear_num_value_heads.*multiple"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim"),
        ({"linear_key_head_dim": 2000}, "linear_key_head_dim"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises((ModelFileError, Unsupported), match=problem):
        read(QWEN_08B | changes)


def test_all_hybrids_have_a_case() -> None:
    kinds = {case.model_type for case in HYBRIDS.values()}
    assert kinds == {name for name, family in FAMILIES.items() if family.traits.mixers or name == "falcon_h1"}
