"""Tensor views: each form of a stored tensor, in plain and quantized formats, and sources that are read once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fabula import _native
from fabula.errors import ModelFileError, Unsupported
from fabula.formats.checkpoint import DType, TensorInfo
from fabula.formats.family_names import NAMES, renamed
from fabula.formats.tensor_names import canonical_names, is_leftover
from fabula.models.views import View, ViewedCheckpoint

MATRIX = np.random.default_rng(0).standard_normal((12, 64)).astype(np.float32)


class Stored:
    """A checkpoint in memory that counts its reads."""

    path, format = Path("model"), "safetensors"
    config: Mapping[str, Any] = {}
    metadata: Mapping[str, Any] = {}

    def __init__(self, dtype: DType = DType.F32, **arrays: npt.NDArray[np.float32]) -> None:
        self._raw = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.reads: list[str] = []
        for name, array in arrays.items():
            raw = _native.quantize(dtype, array.reshape(-1, array.shape[-1]))
            self._raw[name] = raw
            self.tensors[name] = TensorInfo(name, dtype, array.shape, raw.nbytes)

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        self.reads.append(name)
        return self._raw[name]

    def span(self, name: str) -> None:
        """In no file."""

    def close(self) -> None:
        """Nothing to close."""


def numbers(checkpoint: Any, name: str) -> npt.NDArray[np.float32]:
    info = checkpoint.tensors[name]
    raw = checkpoint.read(name)
    assert raw.nbytes == info.n_bytes
    return _native.dequantize(info.dtype, raw, int(np.prod(info.shape))).reshape(info.shape)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.Q8_0, DType.Q4_0])
def test_rows(dtype: DType) -> None:
    """Rows keep every bit of their blocks, in any order."""
    stored = Stored(dtype, fused=MATRIX)
    rows = {"a": np.arange(4), "b": np.array([11, 4, 7]), "c": np.array([5, 6])}
    viewed = ViewedCheckpoint(stored, {name: View(("fused",), taken, n_rows=12) for name, taken in rows.items()})
    whole = numbers(Stored(dtype, m=MATRIX), "m")
    for name, taken in rows.items():
        assert np.array_equal(numbers(viewed, name), whole[taken])
    assert stored.reads == ["fused"], "a source of several views is read once"
    assert "fused" not in viewed.tensors
    assert np.array_equal(numbers(viewed, "b"), whole[rows["b"]])  # again, from the file


def test_other_forms() -> None:
    stored = Stored(matrix=MATRIX, one=MATRIX[0], two=MATRIX[1], heads=MATRIX[:3], rest=MATRIX[2])
    views = {
        "transposed": View(("matrix",), np.arange(10, 20), transposed=True),
        "joined": View(("one", "two")),
        "flat": View(("heads",), np.arange(192)[::-1].copy(), flat=True),
        "shifted": View(("rest",), offset=1.0),
    }
    viewed = ViewedCheckpoint(stored, views)
    assert np.array_equal(numbers(viewed, "transposed"), MATRIX.T[10:20])
    assert np.array_equal(numbers(viewed, "joined"), MATRIX[:2].ravel())
    assert np.array_equal(numbers(viewed, "flat"), MATRIX[:3].ravel()[::-1])
    assert np.array_equal(numbers(viewed, "shifted"), MATRIX[2] + np.float32(1))
    unit = ViewedCheckpoint(stored, {"head": View(("matrix",), normalized=True)})
    assert np.allclose(np.linalg.norm(numbers(unit, "head"), axis=1), 1, atol=1e-6)


def test_what_does_not_fit() -> None:
    with pytest.raises(ModelFileError, match="asks for 13 rows"):
        ViewedCheckpoint(Stored(fused=MATRIX), {"a": View(("fused",), np.arange(4), n_rows=13)})
    with pytest.raises(Unsupported, match="Q8_0"):
        ViewedCheckpoint(Stored(DType.Q8_0, m=MATRIX), {"a": View(("m",), transposed=True)})
    with pytest.raises(ModelFileError, match="belong together"):
        ViewedCheckpoint(Stored(a=MATRIX, b=MATRIX[:, :32]), {"c": View(("a", "b"))})


@pytest.mark.parametrize(
    ("family", "found", "canonical"),
    [
        ("gpt2", "transformer.h.3.attn.c_attn.weight", "model.layers.3.self_attn.qkv_proj.weight"),
        ("gpt2", "h.3.mlp.c_proj.bias", "model.layers.3.mlp.down_proj.bias"),
        ("gpt_neox", "gpt_neox.layers.1.attention.dense.weight", "model.layers.1.self_attn.o_proj.weight"),
        ("gpt_neox", "embed_out.weight", "lm_head.weight"),
        ("falcon", "transformer.h.0.ln_mlp.bias", "model.layers.0.post_attention_layernorm.bias"),
        ("gemma3_text", "model.language_model.layers.2.post_attention_layernorm.weight",
         "model.layers.2.post_self_attn_layernorm.weight"),
        ("gemma3_text", "language_model.model.layers.2.pre_feedforward_layernorm.weight",
         "model.layers.2.post_attention_layernorm.weight"),
        ("internlm2", "model.layers.0.feed_forward.w2.weight", "model.layers.0.mlp.down_proj.weight"),
        ("phi", "_orig_mod.model.layers.5.mlp.fc1.bias", "model.layers.5.mlp.up_proj.bias"),
        ("llama", "module.model.layers.5.mlp.up_proj.weight", "model.layers.5.mlp.up_proj.weight"),
    ],
)  # fmt: skip
def test_names(family: str, found: str, canonical: str) -> None:
    embedding = {"gpt2": "wte", "falcon": "word_embeddings", "gpt_neox": "embed_in", "internlm2": "tok_embeddings"}
    prefix = (
        found.split("h." if family in ("gpt2", "falcon") else "layers.")[0] if "embed_out" not in found else "gpt_neox."
    )
    first = f"{prefix}{embedding.get(family, 'embed_tokens')}.weight"
    layer = f"{prefix}{'h' if family in ('gpt2', 'falcon') else 'layers'}.9.mlp.up_proj.weight"
    assert canonical_names([first, layer, found], Path("x"), family)[found] == canonical


def test_rules_do_not_meet() -> None:
    """No rule of a family takes up what an earlier one made, so each tensor has one name."""
    for family, rules in NAMES.items():
        parts = [old for old in rules if not any(old.startswith(f"{other}.") for other in rules)]  # or parts of those
        found = [renamed(f"model.layers.0.{old}.weight", family) for old in parts]
        assert len(set(found)) == len(found), family


def test_saved_buffers() -> None:
    """Masks and angles that older files hold, and no bias of a projection."""
    for name in ("h.0.attn.bias", "model.layers.0.self_attn.masked_bias", "layers.0.attention.rotary_emb.inv_freq"):
        assert is_leftover(name)
    for name in ("h.0.attn.c_attn.bias", "model.layers.0.self_attn.q_proj.bias"):
        assert not is_leftover(name)
