"""Multi-head latent attention as operators, and its matrices in the form that they need.

    q         = q_b norm(q_a x), or q_proj x        a head is [rotated, plain]
    k         = [rotated, norm(latent)] of kv_a x   one for all heads; its latent is v, too
    q'_h      = [rotated, k_b_h plain]              so that q'_h . k = q_h . k_h
    o_h       = attention(q'_h, k, latent)
    result_h  = v_b_h o_h

This "absorbed" form reads one latent a position and step, where the other makes k and v of all heads for all positions
again. It is used for prompts as well: there it takes more multiply-adds than the other (1,088 for 320 a head and
position in DeepSeek V3), but a token's bits must not depend on the chunk in which it was computed.

Files have k_b and v_b in one matrix, kv_b, or as GGUF's newer ones apart, k_b transposed; `SplitLatents` makes the
second form of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fabula import _native
from fabula.errors import ModelFileError
from fabula.formats.checkpoint import Checkpoint, DType, Span, TensorInfo, TensorTable
from fabula.models.builder import ProgramBuilder
from fabula.models.description import Attention, Latent, ModelConfig, Norm
from fabula.models.shares import whole

Rows = npt.NDArray[np.int64]
_NORM = Norm("rms", 1e-6)  # of latents, whatever the config has for other norms; as in transformers
_KV_B, _K_B, _V_B = "kv_b_proj.weight", "k_b_proj.weight", "v_b_proj.weight"


# ---- Operators ------------------------------------------------------------------------------------------------------


def emit_latent_attention(
    b: ProgramBuilder, scratch: Callable[..., int], prefix: str, a: Attention, heads: int, x: int
) -> int:
    """Attention over `x`; returns the buffer of the heads' results, [n_heads value].

    Args:
        b: collects operators and tensors.
        scratch: gives buffers.
        prefix: of the tensors' names.
        heads: index of the geometry.
    """
    latent = a.latent
    assert latent is not None
    n, hidden = a.n_heads, b.shares.hidden
    q_width, kv = whole(n * (latent.rotated + latent.plain), 1), whole(latent.width, 1)
    q, rows = scratch("q", q_width), scratch("latent_heads", whole(n * latent.width, 1), kv)
    attended, values = scratch("latents", whole(n * latent.rank, 1)), scratch("attended", whole(n * latent.value, 1))

    def bias(name: str, length: int) -> npt.NDArray[np.float32] | None:
        return b.vector(f"{prefix}{name}.bias", length) if a.qkv_bias else None

    # Products that read one buffer share a stage. That of k comes before those of q in its buffer.
    if latent.q_rank:
        axis = whole(latent.q_rank, 1)
        low, normed = scratch("q_latent", axis), scratch("q_normed", axis)
        weights = b.matrix(prefix + "q_a_proj.weight", axis, hidden)
        b.linear_into(x, low, weights, bias=bias("q_a_proj", latent.q_rank))
    weights = b.matrix(prefix + "kv_a_proj_with_mqa.weight", kv, hidden)
    b.linear_into(x, rows, weights, column=n * latent.width, bias=bias("kv_a_proj_with_mqa", latent.width))
    if latent.q_rank:
        b.norm(low, normed, _NORM, b.vector(prefix + "q_a_layernorm.weight", latent.q_rank))
        b.linear_into(normed, q, b.matrix(prefix + "q_b_proj.weight", q_width, axis))
    else:
        b.linear_into(x, q, b.matrix(prefix + "q_proj.weight", q_width, hidden))

    b.head_linear(q, rows, b.experts(prefix, ("k_b_proj",), n, latent.rank, latent.plain))
    b.latent_norm(rows, heads, _NORM, b.vector(prefix + "kv_a_layernorm.weight", latent.rank))
    if a.rope >= 0:
        b.rope(rows, heads)
    b.kv_write(rows, heads, a.kv)
    b.attention(rows, attended, heads, a)
    b.head_linear(attended, values, b.experts(prefix, ("v_b_proj",), n, latent.value, latent.rank))
    return values


# ---- Tensors --------------------------------------------------------------------------------------------------------


def _rotated_first(before: int, rotated: int, interleaved: bool) -> Rows:
    """Rows of [others, rotated] as [rotated, others], with the two halves of rotated pairs apart."""
    pairs = np.arange(rotated)
    if interleaved:
        pairs = np.concatenate([pairs[::2], pairs[1::2]])
    return np.concatenate([before + pairs, np.arange(before)])


def orders(a: Attention, latent: Latent, interleaved: bool) -> Mapping[str, Rows]:
    """The rows of the stored projections of q and kv, in the order in which they are computed here."""
    head = _rotated_first(latent.plain, latent.rotated, interleaved)
    q: Rows = (np.arange(a.n_heads)[:, None] * len(head) + head).reshape(-1)
    projection = "q_b_proj" if latent.q_rank else "q_proj"
    return {projection: q, "kv_a_proj_with_mqa": _rotated_first(latent.rank, latent.rotated, interleaved)}


class SplitLatents:
    """A checkpoint with `k_b_proj` [n, rank, plain] and `v_b_proj` [n, value, rank] in place of `kv_b_proj`
    [n (plain + value), rank]; all else is as it was.

    k_b is a transposed matrix, so one in blocks becomes f32, which holds its numbers exactly.

    Args:
        checkpoint: source of the tensors.
        config: of the model.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self._checkpoint = checkpoint
        self.path: Path = checkpoint.path
        self.format: str = checkpoint.format
        self.config: Mapping[str, Any] = checkpoint.config
        self.metadata: Mapping[str, Any] = checkpoint.metadata
        tensors = dict(checkpoint.tensors)
        self._parts: dict[str, tuple[str, Attention, Latent]] = {}
        for prefix, a, latent in _latent_layers(config):
            source = prefix + _KV_B
            if source not in tensors:
                continue
            info = tensors.pop(source)
            wanted = (a.n_heads * (latent.plain + latent.value), latent.rank)
            if info.shape != wanted:
                raise ModelFileError(
                    f"{self.path}: tensor {source!r} has shape {list(info.shape)}, the config needs {list(wanted)}",
                    path=self.path,
                    field=source,
                )
            k_shape, v_shape = (a.n_heads, latent.rank, latent.plain), (a.n_heads, latent.value, latent.rank)
            k_dtype = info.dtype if _native.dtype_block(info.dtype)[0] == 1 else DType.F32
            for name, dtype, shape in ((_K_B, k_dtype, k_shape), (_V_B, info.dtype, v_shape)):
                size, n_bytes = _native.dtype_block(dtype)
                tensors[prefix + name] = TensorInfo(prefix + name, dtype, shape, int(np.prod(shape)) // size * n_bytes)
                self._parts[prefix + name] = source, a, latent
        others = checkpoint.tensors.others if isinstance(checkpoint.tensors, TensorTable) else {}
        self.tensors: Mapping[str, TensorInfo] = TensorTable(self.path, tensors, dict(others))

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """Reads one tensor; see `Checkpoint.read`."""
        if name not in self._parts:
            return self._checkpoint.read(name)
        source, a, latent = self._parts[name]
        info = self._checkpoint.tensors[source]
        size, n_bytes = _native.dtype_block(info.dtype)
        rows = self._checkpoint.read(source).reshape(a.n_heads, latent.plain + latent.value, -1)
        if name.endswith(_V_B):
            return np.ascontiguousarray(rows[:, latent.plain :]).reshape(-1)
        k = np.ascontiguousarray(rows[:, : latent.plain])
        if size > 1:
            numbers = _native.dequantize(info.dtype, k.reshape(-1), a.n_heads * latent.plain * latent.rank)
            k, n_bytes = numbers.view(np.uint8), 4
        elements = k.reshape(a.n_heads, latent.plain, latent.rank, n_bytes)
        return np.ascontiguousarray(elements.transpose(0, 2, 1, 3)).reshape(-1)

    def span(self, name: str) -> Span | None:
        """Where a file has these bytes; see `Checkpoint.span`."""
        return None if name in self._parts else self._checkpoint.span(name)

    def close(self) -> None:
        """Closes the checkpoint."""
        self._checkpoint.close()


def _latent_layers(config: ModelConfig) -> Iterator[tuple[str, Attention, Latent]]:
    for i, layer in enumerate(config.layers):
        if layer.attention.latent:
            yield f"model.layers.{i}.self_attn.", layer.attention, layer.attention.latent


def has_joined_latents(checkpoint: Checkpoint, config: ModelConfig) -> bool:
    """Whether any layer has k_b and v_b in one matrix."""
    return any(prefix + _KV_B in checkpoint.tensors for prefix, _, _ in _latent_layers(config))
