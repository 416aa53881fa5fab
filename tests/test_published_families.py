"""Families whose modeling code is published beside their weights and not part of transformers.

Each is Llama or Granite with other names, fused matrices or factors. So a tiny model of those is written under the
family's names, as its own code would read them, and must give the logits of the original.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoder_families import PLAIN, Case, make_model
from test_decoder_families import assert_close, expected, load, text

N_KV, DIM = PLAIN["num_key_value_heads"], 24
Tensors = dict[str, torch.Tensor]


def internlm2(tensors: Tensors) -> Tensors:
    """Rows of `wqkv`: for each KV head its query heads, then k, then v. Source: InternLM2's modeling_internlm2.py."""
    names = {
        "embed_tokens": "tok_embeddings",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "lm_head": "output",
    }
    found: Tensors = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            groups = [part.reshape(N_KV, -1, DIM, *part.shape[1:]) for part in parts]
            fused = torch.cat(groups, dim=1).reshape(-1, *tensor.shape[1:])
            found[name.replace("self_attn.q_proj", "attention.wqkv")] = fused
        elif ".k_proj." not in name and ".v_proj." not in name:
            for old, new in names.items():
                name = name.replace(old, new)
            found[name] = tensor
    return found


def baichuan(tensors: Tensors) -> Tensors:
    found = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            found[name.replace("q_proj", "W_pack")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            found[name] = tensor
    return found


def rewrite(folder: Path, tensors: Tensors, changes: dict[str, Any]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def check(folder: Path, model: Any) -> None:
    runner = load(folder)
    try:
        ids = text(1, 90)
        assert_close(next(runner.all_logits(ids)), expected(model, ids))
    finally:
        runner.close()


@pytest.mark.parametrize("bias", [False, True])
def test_internlm2(bias: bool, tmp_path: Path) -> None:
    model = make_model(Case("Llama", PLAIN | {"attention_bias": bias}), tmp_path)
    tensors = internlm2(load_file(tmp_path / "model.safetensors"))
    rewrite(tmp_path, tensors, {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": bias})
    check(tmp_path, model)


@pytest.mark.parametrize("second", [False, True])
def test_baichuan(second: bool, tmp_path: Path) -> None:
    """Baichuan 2's head divides each row by its length."""
    model = make_model(Case("Llama", PLAIN | {"num_key_value_heads": 6}), tmp_path)
    tensors = baichuan(load_file(tmp_path / "model.safetensors"))
    changes = {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "num_key_value_heads": None}
    rewrite(tmp_path, tensors, changes | ({"z_loss_weight": 0} if second else {}))
    if second:
        with torch.no_grad():
            model.lm_head.weight.copy_(torch.nn.functional.normalize(model.lm_head.weight))
    check(tmp_path, model)


def test_baichuan_13b(tmp_path: Path) -> None:
    """40 layers: ALiBi in place of rotation. The reference is Llama without rotation, with biases in its mask."""
    model = make_model(Case("Llama", PLAIN | {"num_key_value_heads": 6, "num_hidden_layers": 40}), tmp_path)
    tensors = baichuan(load_file(tmp_path / "model.safetensors"))
    changes = {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "num_key_value_heads": None}
    rewrite(tmp_path, tensors, changes)
    slopes = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])  # of 4 heads, then of every other one of 8
    model.model.rotary_emb.forward = lambda x, position_ids: (  # noqa: ARG005
        torch.ones(1, x.shape[1], DIM),
        torch.zeros(1, x.shape[1], DIM),
    )
    ids, runner = text(1, 90), load(tmp_path)
    distance = (torch.arange(90)[None, :] - torch.arange(90)[:, None]).float()
    mask = torch.where(distance > 0, -torch.inf, slopes[:, None, None] * distance)[None]
    with torch.no_grad():
        theirs = model(torch.tensor(ids[None].astype("int64")), attention_mask=mask, use_cache=False).logits[0].numpy()
    try:
        assert_close(next(runner.all_logits(ids)), theirs)
    finally:
        runner.close()


def test_minicpm(tmp_path: Path) -> None:
    """Factors: embeddings by `scale_emb`, residuals by scale_depth / sqrt(layers), the head's input divided."""
    factors = {"embedding_multiplier": 12.0, "residual_multiplier": 1.4 / 3**0.5, "logits_scaling": 144 / 36}
    model = make_model(Case("Granite", PLAIN | factors | {"attention_multiplier": DIM**-0.5}), tmp_path)
    changes = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 36} | dict.fromkeys(factors)
    tensors = load_file(tmp_path / "model.safetensors")
    names = {"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], "attention_multiplier": None}
    rewrite(tmp_path, tensors, names | changes)
    check(tmp_path, model)
