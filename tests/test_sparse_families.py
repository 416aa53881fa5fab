"""Mixtures of every family where routing is skewed: an expert that nobody chooses, and one that everybody does.

And Phi-MoE in llama.cpp, which computes another model: what differs is named, and nothing else does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from decoder_families import CASES, Case, make_model
from fabula.export.quantize import quantize_model
from fabula.models.families import FAMILIES
from llama_peer import LlamaCpp
from test_decoder_families import assert_close, expected, load, text

UNUSED, COMMON = 2, 5  # experts
N_EXPERTS = 7
# One case of each family whose layers have 7 experts.
SPARSE = {
    case.model_type: name
    for name, case in reversed(CASES.items())
    if FAMILIES[case.model_type].traits.experts and "7" in {str(value) for value in case.settings.values()}
}


def skew(model: Any) -> None:
    """Makes the first channel of every token positive, and lets routers look at little else."""
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] += 40
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if "correction" in name:
                parameter.fill_(0)
            elif parameter.shape[:1] == (N_EXPERTS,) and parameter.dim() == 2 and "experts" not in name:
                parameter[:, 0] = 0
                parameter[COMMON, 0], parameter[UNUSED, 0] = 0.6, -0.6


def change_expert(source: Path, target: Path, expert: int, value: float) -> None:
    """A copy of a checkpoint with one expert's matrices filled with a number."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    n_changed = 0
    for name, tensor in tensors.items():
        if f".experts.{expert}." in name:
            tensor.fill_(value)
        elif tensor.dim() == 3 and tensor.shape[0] == N_EXPERTS:
            tensor[expert] = value
        else:
            continue
        n_changed += 1
    assert n_changed
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_bytes((source / "config.json").read_bytes())


@pytest.mark.filterwarnings("ignore::fabula.models.builder.DamagedWeightWarning")
@pytest.mark.parametrize("name", SPARSE.values())
def test_an_expert_that_nobody_chooses_and_one_that_all_do(name: str, tmp_path: Path) -> None:
    folder, ids = tmp_path / "m", text(1, 60)
    model = make_model(CASES[name], folder)
    skew(model)
    model.save_pretrained(folder)
    runner = load(folder)
    (ours,) = runner.all_logits(ids)
    assert_close(ours, expected(model, ids))
    firsts = [next(runner.all_logits(ids[i : i + 1]))[0] for i in range(12)]
    runner.close()

    change_expert(folder, tmp_path / "unused", UNUSED, float("nan"))
    runner = load(tmp_path / "unused")
    (again,) = runner.all_logits(ids)
    np.testing.assert_array_equal(again, ours)
    for i, wanted in enumerate(firsts):
        np.testing.assert_array_equal(next(runner.all_logits(ids[i : i + 1]))[0], wanted)
    runner.close()

    change_expert(folder, tmp_path / "common", COMMON, 0.0)
    runner = load(tmp_path / "common")
    for i, before in enumerate(firsts):
        assert (next(runner.all_logits(ids[i : i + 1]))[0] != before).any()
    runner.close()


# ---- Phi-MoE in llama.cpp -------------------------------------------------------------------------------------------


class RmsNorm(nn.Module):
    """What llama.cpp has in place of Phi-MoE's layer norms; the bias is kept."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.norm.eps)
        return scaled * self.norm.weight + self.norm.bias


def softmax_routes(scores: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What llama.cpp has in place of SparseMixer."""
    weights, chosen = torch.softmax(scores, dim=-1).topk(2, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), chosen


def test_llama_cpp_has_another_phimoe(llama_cpp: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its RMS norms and its plain softmax, put into transformers' model, give its logits. So files are as it reads
    them, and our logits, which are those of transformers' model as it is, differ in these two points alone."""
    folder, ids = tmp_path / "m", text(1, 60)
    case = Case("Phimoe", {**CASES["phimoe"].settings, "sliding_window": None, "router_jitter_noise": 0.01})
    model = make_model(case, folder)
    (folder / "tokenizer.json").write_text(tiny.tokenizer_json())
    quantize_model(folder, tmp_path / "out.gguf", "f32", threads=1)
    theirs = llama_cpp.logits(tmp_path / "out.gguf", ids.tolist(), context=256)
    assert theirs is not None
    runner = load(tmp_path / "out.gguf")
    assert_close(next(runner.all_logits(ids)), expected(model, ids))
    runner.close()
    assert np.abs(theirs - expected(model, ids)).max() > 1e-2 * np.abs(theirs).max()

    monkeypatch.setattr("transformers.models.phimoe.modeling_phimoe.sparsemixer", softmax_routes)
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = (
            RmsNorm(layer.input_layernorm),
            RmsNorm(layer.post_attention_layernorm),
        )
    model.model.norm = RmsNorm(model.model.norm)
    assert_close(theirs, expected(model, ids))
