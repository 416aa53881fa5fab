"""Calls of libfabula_bench.so: the machine's limits, and operators as plain serial loops to compare with.

Only benchmarks load it. Arrays are float32, C-contiguous and of matching sizes; `out` takes the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fabula._native import ABI_VERSION, F32, I32, Device, Isa, check, floats, ints, isa_number


def _open() -> tuple[Any, Any]:
    try:
        from fabula import _cdef_bench
    except ImportError as error:
        raise ImportError("what `fabula bench` measures with is not built; build Fabula again") from error
    ffi: Any = _cdef_bench.ffi
    path = Path(_cdef_bench.__file__).with_name("libfabula_bench.so")
    try:
        lib: Any = ffi.dlopen(str(path))
    except OSError as error:
        raise ImportError(f"cannot load {path.name}: {error}; build Fabula again") from error
    if lib.fb_bench_abi_version() != ABI_VERSION:
        raise ImportError(
            f"{path.name} has ABI {lib.fb_bench_abi_version()}, libfabula.so has {ABI_VERSION}; build Fabula again"
        )
    return ffi, lib


_ffi, _lib = _open()


def measure_read(n_bytes: int, n_repeats: int, n_threads: int) -> float:
    """Bytes per second of streaming reads; see fb_measure_read."""
    out = _ffi.new("double *")
    check(_lib.fb_measure_read(n_bytes, n_repeats, n_threads, out))
    return float(out[0])


def measure_copy(device: Device, n_bytes: int, n_repeats: int) -> float:
    """Bytes per second that a GPU's memory moves, those read and those written; see fb_measure_copy."""
    out = _ffi.new("double *")
    check(_lib.fb_measure_copy(device.handle, n_bytes, n_repeats, out))
    return float(out[0])


def measure_fma(n_repeats: int, n_threads: int, isa: Isa = "auto") -> float:
    """f32 operations per second of multiply-adds in registers; see fb_measure_fma."""
    out = _ffi.new("double *")
    check(_lib.fb_measure_fma(n_repeats, n_threads, isa_number(isa), out))
    return float(out[0])


def measure_pairs(n_repeats: int, n_threads: int, isa: Isa = "auto") -> float:
    """Operations per second of products of bf16; see fb_measure_pairs."""
    out = _ffi.new("double *")
    check(_lib.fb_measure_pairs(n_repeats, n_threads, isa_number(isa), out))
    return float(out[0])


def measure_dot(n_repeats: int, n_threads: int, isa: Isa = "auto") -> float:
    """Operations per second of products of bytes; see fb_measure_dot."""
    out = _ffi.new("double *")
    check(_lib.fb_measure_dot(n_repeats, n_threads, isa_number(isa), out))
    return float(out[0])


def serial_rms_norm(x: F32, weight: F32, eps: float, out: F32) -> None:
    check(_lib.fb_serial_rms_norm(floats(x), floats(weight), *x.shape, eps, floats(out)))


def serial_gather(table: F32, ids: I32, out: F32) -> None:
    check(_lib.fb_serial_gather(floats(table), table.shape[1], ints(ids), ids.size, floats(out)))


def serial_masked_softmax(x: F32, causal: bool, first_visible: int, out: F32) -> None:
    check(_lib.fb_serial_masked_softmax(floats(x), *x.shape, causal, first_visible, floats(out)))


def serial_swiglu(gate: F32, up: F32, out: F32) -> None:
    check(_lib.fb_serial_swiglu(floats(gate), floats(up), gate.size, floats(out)))


def serial_matmul_transb(a: F32, b: F32, out: F32) -> None:
    check(_lib.fb_serial_matmul_transb(floats(a), floats(b), *out.shape, a.shape[1], floats(out)))


def serial_rope(x: F32, positions: I32, inv_freq: F32, rope_scale: float) -> None:
    rows, heads, dim = x.shape
    check(
        _lib.fb_serial_rope(
            floats(x), ints(positions), rows, heads, dim, 2 * inv_freq.size, floats(inv_freq), rope_scale
        )
    )


def serial_self_attention(q: F32, k: F32, v: F32, window: int, scale: float, out: F32) -> None:
    tokens, heads, dim = q.shape
    check(
        _lib.fb_serial_self_attention(
            floats(q), floats(k), floats(v), tokens, heads, k.shape[1], dim, window, scale, floats(out)
        )
    )
