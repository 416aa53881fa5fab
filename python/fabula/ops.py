"""The engine's operators as functions on numpy arrays, with the same kernels as in models.

Every function takes `threads` (None for as many as the process may use) and `isa` ("auto", "reference", "avx2",
"avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "avx512_amx", "neon", "neon_dotprod", "neon_i8mm"); results are
bitwise independent of both. Inputs are converted to contiguous float32 if needed.

Example:
    >>> import numpy as np
    >>> from fabula import ops
    >>> ops.rms_norm(np.array([[3.0, 4.0]]), np.ones(2), eps=0.0)
    array([[0.84852815, 1.1313709 ]], dtype=float32)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from fabula import _native, _operators
from fabula._native import Isa
from fabula.engine.threads import default_threads
from fabula.errors import InvalidArgument
from fabula.formats.checkpoint import DType
from fabula.kv.format import kv_dtypes

__all__ = [
    "Weight",
    "gather",
    "linear",
    "masked_softmax",
    "matmul_transb",
    "pack",
    "rms_norm",
    "rope",
    "self_attention",
    "swiglu",
]

F32 = npt.NDArray[np.float32]
Weight = _native.Weight
Precision = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "mxfp4", "q3_k",
    "q2_k",
]  # fmt: skip

_DTYPES = {dtype.name.lower(): dtype for dtype in DType}


def _array(value: npt.ArrayLike, name: str, n_dims: int) -> F32:
    array = np.ascontiguousarray(value, dtype=np.float32)
    if array.ndim != n_dims or array.size == 0:
        raise InvalidArgument(f"{name} has shape {list(array.shape)}, must have {n_dims} dimensions, none of them 0")
    return array


def _shape(array: npt.NDArray[np.generic] | F32, name: str, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise InvalidArgument(f"{name} has shape {list(array.shape)}, must be {list(expected)}")


def _threads(threads: int | None) -> int:
    return default_threads() if threads is None else threads


def _indices(value: npt.ArrayLike, name: str) -> npt.NDArray[np.int32]:
    array = np.asarray(value)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidArgument(f"{name} must be a list of integers")
    if array.size and (array.min() < 0 or array.max() > 2**31 - 1):
        raise InvalidArgument(f"{name} must be in 0 .. 2^31 - 1")
    return np.ascontiguousarray(array, dtype=np.int32)


def _precision(name: str, value: str, among: Mapping[str, DType]) -> DType:
    if value not in among:
        raise InvalidArgument(f"{name} is {value!r}, must be one of {', '.join(among)}")
    return among[value]


def rms_norm(
    x: npt.ArrayLike, weight: npt.ArrayLike, *, eps: float = 1e-6, threads: int | None = None, isa: Isa = "auto"
) -> F32:
    """out = x / sqrt(mean(x^2) + eps) * weight, row by row.

    Args:
        x: float32 [n_rows, n_cols].
        weight: float32 [n_cols].
        eps: added to the mean square.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    rows, scale = _array(x, "x", 2), _array(weight, "weight", 1)
    _shape(scale, "weight", (rows.shape[1],))
    return _operators.rms_norm(rows, scale, eps, _threads(threads), isa)


def gather(table: npt.ArrayLike, ids: npt.ArrayLike, *, threads: int | None = None, isa: Isa = "auto") -> F32:
    """out[i] = table[ids[i]]: an embedding lookup.

    Args:
        table: float32 [n_rows, n_cols].
        ids: int32 [n_ids], each in 0 .. n_rows-1.
    """
    wanted = _indices(ids, "ids")
    if wanted.size == 0:
        return np.empty((0, _array(table, "table", 2).shape[1]), np.float32)
    return _operators.gather(_array(table, "table", 2), wanted, _threads(threads), isa)


def masked_softmax(
    x: npt.ArrayLike,
    *,
    causal: bool = True,
    first_visible: int = 1,
    threads: int | None = None,
    isa: Isa = "auto",
) -> F32:
    """Softmax over the columns that are visible to a row; the others become 0.

    Args:
        x: float32 [n_rows, n_cols].
        causal: whether only the first `first_visible + r` columns are visible to row r.
        first_visible: columns visible to row 0, at least 1.
    """
    return _operators.masked_softmax(_array(x, "x", 2), causal, first_visible, _threads(threads), isa)


def swiglu(gate: npt.ArrayLike, up: npt.ArrayLike, *, threads: int | None = None, isa: Isa = "auto") -> F32:
    """out = gate / (1 + exp(-gate)) * up, any shape.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """
    left = np.ascontiguousarray(gate, dtype=np.float32)
    right = np.ascontiguousarray(up, dtype=np.float32)
    _shape(right, "up", left.shape)
    return _operators.swiglu(left, right, _threads(threads), isa)


def pack(
    matrix: npt.ArrayLike,
    *,
    precision: Precision = "f32",
    threads: int | None = None,
    bf16_inputs: Literal["bf16", "f32"] = "bf16",
) -> Weight:
    """Packs a matrix [n_rows, n_cols], one output per row, for `linear`.

    Args:
        matrix: float32 [n_rows, n_cols].
        precision: format in memory.
        bf16_inputs: what products with a matrix in bf16 take: inputs rounded to "bf16", which CPUs with AVX-512 BF16
            multiply faster, or "f32", which others do. The results differ.
    """
    rows = _array(matrix, "matrix", 2)
    dtype = _precision("precision", precision, _DTYPES)
    if bf16_inputs not in ("bf16", "f32"):
        raise InvalidArgument(f"bf16_inputs is {bf16_inputs!r}, must be bf16 or f32")
    weight = Weight(dtype, *rows.shape, f32_inputs=dtype == DType.BF16 and bf16_inputs == "f32")
    weight.pack_rows(rows.view(np.uint8).reshape(-1), DType.F32, rows.shape[0], n_threads=_threads(threads))
    return weight


def linear(
    x: npt.ArrayLike,
    weight: Weight,
    *,
    bias: npt.ArrayLike | None = None,
    residual: npt.ArrayLike | None = None,
    threads: int | None = None,
    isa: Isa = "auto",
) -> F32:
    """out = x weight^T (+ bias) (+ residual).

    Args:
        x: float32 [n_rows, weight.n_cols].
        weight: packed by `pack`.
        bias: float32 [weight.n_rows].
        residual: float32 [n_rows, weight.n_rows].
    """
    rows = _array(x, "x", 2)
    _shape(rows, "x", (rows.shape[0], weight.n_cols))
    added = None if bias is None else _array(bias, "bias", 1)
    if added is not None:
        _shape(added, "bias", (weight.n_rows,))
    base = None if residual is None else _array(residual, "residual", 2)
    if base is not None:
        _shape(base, "residual", (rows.shape[0], weight.n_rows))
    return _operators.linear(weight, rows, added, base, _threads(threads), isa)


def matmul_transb(a: npt.ArrayLike, b: npt.ArrayLike, *, threads: int | None = None, isa: Isa = "auto") -> F32:
    """out = a b^T: packs b, then multiplies. For a matrix used more than once, `pack` it and call `linear`.

    Args:
        a: float32 [m, k].
        b: float32 [n, k].
    """
    return linear(a, pack(b, threads=threads), threads=threads, isa=isa)


def rope(
    x: npt.ArrayLike,
    positions: npt.ArrayLike,
    inv_freq: npt.ArrayLike,
    *,
    scale: float = 1.0,
    threads: int | None = None,
    isa: Isa = "auto",
) -> F32:
    """Rotates pairs (i, i + n) of every head by position * inv_freq[i], n = len(inv_freq).

    Args:
        x: float32 [n_rows, n_heads, head_dim].
        positions: int32 [n_rows].
        inv_freq: float32 [n], radians per position; 2 n <= head_dim.
        scale: factor on cos and sin.

    Source: Su et al. 2021, "RoFormer"; pairing as in transformers (first with second half).
    """
    heads, frequencies = _array(x, "x", 3), _array(inv_freq, "inv_freq", 1)
    where = _indices(positions, "positions")
    _shape(where, "positions", (heads.shape[0],))
    return _operators.rope(heads, where, frequencies, scale, _threads(threads), isa)


def self_attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    scale: float | None = None,
    window: int = 0,
    kv: str = "f32",
    threads: int | None = None,
    isa: Isa = "auto",
) -> F32:
    """Causal grouped-query self-attention over paged keys and values.

    Args:
        q: float32 [n_tokens, n_heads, head_dim].
        k, v: float32 [n_tokens, n_kv_heads, head_dim]; n_kv_heads divides n_heads.
        scale: factor on q.k; None for 1 / sqrt(head_dim).
        window: a token attends to itself and window - 1 tokens before it; 0 for all.
        kv: format of the KV cache: "f32", "f16", "bf16" or "q8", or two of them as "K:V".
    """
    queries, keys, values = _array(q, "q", 3), _array(k, "k", 3), _array(v, "v", 3)
    n_tokens, _, head_dim = queries.shape
    _shape(keys, "k", (n_tokens, keys.shape[1], head_dim))
    _shape(values, "v", keys.shape)
    factor = head_dim**-0.5 if scale is None else scale
    return _operators.self_attention(queries, keys, values, window, factor, kv_dtypes(kv), _threads(threads), isa)
