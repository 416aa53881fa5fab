"""Calls of single operators.

Shapes are checked and documented in fabula.ops; here arrays are float32, C-contiguous and of matching sizes. `out`,
where given, takes the result.
"""

from __future__ import annotations

import numpy as np

from fabula._ffi import lib
from fabula._native import F32, I32, Isa, KvDTypes, Weight, check, floats, ints, isa_number, of_k_and_v


def rms_norm(x: F32, weight: F32, eps: float, n_threads: int, isa: Isa, out: F32 | None = None) -> F32:
    out = np.empty_like(x) if out is None else out
    rows, cols = x.shape
    check(lib.fb_rms_norm(floats(x), floats(weight), rows, cols, eps, n_threads, isa_number(isa), floats(out)))
    return out


def gather(table: F32, ids: I32, n_threads: int, isa: Isa, out: F32 | None = None) -> F32:
    rows, cols = table.shape
    out = np.empty((ids.size, cols), np.float32) if out is None else out
    check(lib.fb_gather(floats(table), rows, cols, ints(ids), ids.size, n_threads, isa_number(isa), floats(out)))
    return out


def masked_softmax(x: F32, causal: bool, first_visible: int, n_threads: int, isa: Isa, out: F32 | None = None) -> F32:
    out = np.empty_like(x) if out is None else out
    rows, cols = x.shape
    check(lib.fb_masked_softmax(floats(x), rows, cols, causal, first_visible, n_threads, isa_number(isa), floats(out)))
    return out


def swiglu(gate: F32, up: F32, n_threads: int, isa: Isa, out: F32 | None = None) -> F32:
    out = np.empty_like(gate) if out is None else out
    check(lib.fb_swiglu(floats(gate), floats(up), gate.size, n_threads, isa_number(isa), floats(out)))
    return out


def linear(
    weight: Weight, x: F32, bias: F32 | None, residual: F32 | None, n_threads: int, isa: Isa, out: F32 | None = None
) -> F32:
    out = np.empty((x.shape[0], weight.n_rows), np.float32) if out is None else out
    check(
        lib.fb_linear(
            weight.handle,
            floats(x),
            x.shape[0],
            floats(bias),
            floats(residual),
            n_threads,
            isa_number(isa),
            floats(out),
        )
    )
    return out


def rope(
    x: F32, positions: I32, inv_freq: F32, rope_scale: float, n_threads: int, isa: Isa, out: F32 | None = None
) -> F32:
    """`out` may be `x`: in place."""
    if out is None:
        out = x.copy()
    elif out is not x:
        np.copyto(out, x)
    rows, heads, dim = x.shape
    check(
        lib.fb_rope(
            floats(out), ints(positions), rows, heads, dim, 2 * inv_freq.size, floats(inv_freq), rope_scale,
            n_threads, isa_number(isa),
        )
    )  # fmt: skip
    return out


def self_attention(
    q: F32,
    k: F32,
    v: F32,
    window: int,
    scale: float,
    kv_dtypes: KvDTypes,
    n_threads: int,
    isa: Isa,
    out: F32 | None = None,
) -> F32:
    out = np.empty_like(q) if out is None else out
    tokens, heads, dim = q.shape
    check(
        lib.fb_self_attention(
            floats(q), floats(k), floats(v), tokens, heads, k.shape[1], dim, window, scale,
            *of_k_and_v(kv_dtypes), n_threads, isa_number(isa), floats(out),
        )
    )  # fmt: skip
    return out
