"""Every operator against the same loop in plain serial C: compares results, then times.

Speeds of memory-bound operators count the bytes that must move once (inputs read, results written); those of the others
count multiplications and additions. For the roofline both are counted for all; an exponential or a division is one
operation. Shares are of the machine's measured limit, streaming reads or multiply-adds; data that fits a cache
(SwiGLU's here) can exceed the limit of memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fabula import _native, _operators, ops
from fabula.bench import library
from fabula.bench.machine import Machine
from fabula.bench.row import Row
from fabula.bench.status import Status, silent
from fabula.bench.timing import Times, interleaved, measure
from fabula.errors import EngineError
from fabula.formats.checkpoint import DType

F32 = npt.NDArray[np.float32]

QUICK = 20  # quick sizes are about this many times smaller
_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Case:
    """One operator with its data.

    Attributes:
        name, size: what is measured, for the reader.
        tolerance: see `difference`.
        operations: of one call. moved: bytes to move in one call, by precision of the weights.
        bound: what the operator waits for.
        serial: the plain loop; fast: the operators by precision of the weights. Each returns its result, in memory that
            was taken beforehand.
    """

    name: str
    size: str
    tolerance: float
    operations: float
    moved: dict[str, float]
    bound: Literal["memory", "compute"]
    serial: Callable[[], F32]
    fast: dict[str, Callable[[], F32]]


@dataclass(frozen=True, slots=True)
class OpRow:
    """A row of results; times in seconds, speeds in `unit`.

    Attributes:
        serial_spread, spread: seconds of the fastest and the slowest call.
        ratio: serial median / optimized median.
        difference, tolerance: largest difference found and allowed; see `difference`.
        share: speed / limit.
    """

    op: str
    weights: str
    size: str
    threads: int
    serial_mean: float
    serial_median: float
    serial_spread: tuple[float, float]
    mean: float
    median: float
    spread: tuple[float, float]
    n: int
    ratio: float
    unit: str
    speed: float
    limit: float
    share: float
    difference: float
    tolerance: float
    operations_per_byte: float
    gop_per_s: float

    def to_json(self) -> dict[str, Any]:
        """The keys of `Row`, with our and the serial loop's speed, and further ones."""
        own = {name: value for name, value in asdict(self).items() if name not in ("ratio", "limit", "share")}
        work = self.speed * self.median  # of one call
        row = Row(
            case=f"{self.op} {self.size}",
            weights=self.weights,
            threads=self.threads,
            unit=self.unit,
            ours=self.speed,
            peer=self.speed / self.ratio,
            peer_name="serial C",
            peer_settings="1 thread, compiled with the library",
            limit=self.limit,
            more={
                **own,
                "ours_spread": [work / each for each in reversed(self.spread)],
                "peer_spread": [work / each for each in reversed(self.serial_spread)],
            },
        )
        return row.to_json()


def bench_ops(
    machine: Machine, *, quick: bool = False, min_seconds: float = 1.0, status: Status = silent
) -> list[OpRow]:
    """Measures every operator with the machine's threads.

    Args:
        machine: its measured limits and the threads to use.
        quick: sizes about 20 times smaller, for a test that everything works.
        min_seconds: each case repeats until the serial loop took about this long, and five times at least.
        status: callback for progress.

    Raises:
        EngineError: an operator's result differs from the serial loop's.
    """
    rows: list[OpRow] = []
    for make in CASES:
        case = make(QUICK if quick else 1, machine.threads)
        status(f"{case.name} {case.size}")
        rows += _rows(case, machine, min_seconds)
    return rows


def difference(result: F32, expected: F32) -> float:
    """Largest difference of two arrays, relative to the largest expected number in each row (last axis)."""
    largest = np.maximum(np.abs(expected).max(axis=-1), np.finfo(np.float32).tiny)
    return float((np.abs(result - expected).max(axis=-1) / largest).max())


def _rows(case: Case, machine: Machine, min_seconds: float) -> Iterator[OpRow]:
    expected = case.serial().copy()
    differences = {name: difference(fast(), expected) for name, fast in case.fast.items()}
    for name, found in differences.items():
        if not found <= case.tolerance:  # NaN must fail as well
            raise EngineError(
                f"{case.name} ({name}): differs from the serial loop by {found:.1e}, allowed are {case.tolerance:.1e}"
            )
    estimate = measure(case.serial, warmup=0, repeats=1).median
    rounds = min(max(5, math.ceil(min_seconds / max(estimate, 1e-6))), 500)
    times = interleaved({"serial": case.serial, **case.fast}, rounds, warmup=2)
    for name in case.fast:
        yield _row(case, name, times["serial"], times[name], machine, differences[name])


def _row(case: Case, weights: str, serial: Times, fast: Times, machine: Machine, found: float) -> OpRow:
    memory = case.bound == "memory"
    limit = (machine.read_bytes_per_s if memory else machine.peak(weights)) / 1e9
    moved = case.moved[weights]
    speed = (moved if memory else case.operations) / fast.median / 1e9
    return OpRow(
        op=case.name,
        weights=weights,
        size=case.size,
        threads=machine.threads,
        serial_mean=serial.mean,
        serial_median=serial.median,
        serial_spread=(serial.low, serial.high),
        mean=fast.mean,
        median=fast.median,
        spread=(fast.low, fast.high),
        n=fast.n,
        ratio=serial.median / fast.median,
        unit="GB/s" if memory else "GFLOP/s",
        speed=speed,
        limit=limit,
        share=speed / limit,
        difference=found,
        tolerance=case.tolerance,
        operations_per_byte=case.operations / moved,
        gop_per_s=case.operations / fast.median / 1e9,
    )


# ---- Cases ---------------------------------------------------------------------------------------------------------
# `less`: factor by which to shrink a case. Tolerances allow for the serial loops' long chains of additions, more so
# with many terms of one sign.


def _random(*shape: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def _filled(shape: tuple[int, ...]) -> F32:
    """Memory for a result, touched to avoid page faults in the measurement."""
    return np.full(shape, np.nan, np.float32)


def _rms_norm(less: int, threads: int) -> Case:
    x, weight = _random(8192 // less, 4096), _random(4096, seed=1)
    plain, out = _filled(x.shape), _filled(x.shape)

    def serial() -> F32:
        library.serial_rms_norm(x, weight, _EPS, plain)
        return plain

    def fast() -> F32:
        return _operators.rms_norm(x, weight, _EPS, threads, "auto", out)

    size = f"{x.shape[0]} x {x.shape[1]}"
    # A square, a sum, and two factors.
    return Case("rms_norm", size, 2e-5, 4.0 * x.size, {"f32": 2.0 * x.nbytes}, "memory", serial, {"f32": fast})


def _gather(less: int, threads: int) -> Case:
    table = _random(49152 // less, 576)
    ids = np.random.default_rng(1).integers(0, table.shape[0], 40960 // less).astype(np.int32)
    plain, out = _filled((ids.size, 576)), _filled((ids.size, 576))

    def serial() -> F32:
        library.serial_gather(table, ids, plain)
        return plain

    def fast() -> F32:
        return _operators.gather(table, ids, threads, "auto", out)

    size = f"{ids.size} of {table.shape[0]} x {table.shape[1]}"
    return Case("gather", size, 0.0, 0.0, {"f32": 2.0 * plain.nbytes}, "memory", serial, {"f32": fast})


def _masked_softmax(less: int, threads: int) -> Case:
    rows, cols = 4096 // less, 16384 // min(less, 2)
    x = _random(rows, cols) * np.float32(3)
    first = cols - rows + 1  # a chunk of a prompt at the end of its context
    plain, out = _filled(x.shape), _filled(x.shape)
    visible = float(np.minimum(first + np.arange(rows), cols).sum())

    def serial() -> F32:
        library.serial_masked_softmax(x, True, first, plain)
        return plain

    def fast() -> F32:
        return _operators.masked_softmax(x, True, first, threads, "auto", out)

    moved = {"f32": 4 * visible + out.nbytes}
    # The largest, a difference, its exponential, a sum, and a factor.
    size, work = f"{rows} x {cols}, causal", 5 * visible
    return Case("masked_softmax", size, 2e-4, work, moved, "memory", serial, {"f32": fast})


def _swiglu(less: int, threads: int) -> Case:
    gate, up = _random(256 // less, 1536) * np.float32(3), _random(256 // less, 1536, seed=1)
    plain, out = _filled(gate.shape), _filled(gate.shape)

    def serial() -> F32:
        library.serial_swiglu(gate, up, plain)
        return plain

    def fast() -> F32:
        return _operators.swiglu(gate, up, threads, "auto", out)

    size = f"{gate.shape[0]} x {gate.shape[1]}"
    # An exponential, a sum, a division, a product; and the sign.
    return Case("swiglu", size, 1e-5, 5.0 * gate.size, {"f32": 3.0 * gate.nbytes}, "memory", serial, {"f32": fast})


def _matmul_transb(less: int, threads: int) -> Case:
    m, n, k = 512 // min(less, 4), 2048 // max(1, less // 4), 1536
    a = _random(m, k)
    a = (a.view(np.uint32) & 0xFFFF0000).view(np.float32)  # bf16, as in products with bf16 weights
    # Multiples of 1/64 below 2: exact in f32, f16 and bf16, so that one serial result serves all three.
    b = np.random.default_rng(1).integers(-127, 128, (n, k)).astype(np.float32) / np.float32(64)
    plain = _filled((m, n))

    def serial() -> F32:
        library.serial_matmul_transb(a, b, plain)
        return plain

    def fast(precision: Literal["f32", "f16", "bf16"]) -> Callable[[], F32]:
        inputs = _native.inputs_of_bf16("auto")
        weight, out = ops.pack(b, precision=precision, threads=threads, bf16_inputs=inputs), _filled((m, n))
        return lambda: _operators.linear(weight, a, None, None, threads, "auto", out)

    variants = {"f32": fast("f32"), "f16": fast("f16"), "bf16": fast("bf16")}
    moved = {name: a.nbytes + plain.nbytes + float(b.size) * (4 if name == "f32" else 2) for name in variants}
    return Case("matmul_transb", f"{m} x {n} x {k}", 1e-5, 2.0 * m * n * k, moved, "compute", serial, variants)


def _rope(less: int, threads: int) -> Case:
    rows, heads, dim = 10240 // less, 9, 64
    x = _random(rows, heads, dim)
    positions = np.arange(rows, dtype=np.int32)
    inv_freq = (1e5 ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)
    plain, out = x.copy(), x.copy()

    def serial() -> F32:
        library.serial_rope(plain, positions, inv_freq, 1.0)
        return plain

    def fast() -> F32:
        return _operators.rope(out, positions, inv_freq, 1.0, threads, "auto", out)

    # A pair takes four products and two sums; cosines and sines are shared by all heads.
    size, work = f"{rows} x {heads} x {dim}", 3.0 * x.size + 2.0 * rows * dim
    return Case("rope", size, 1e-5, work, {"f32": 2.0 * x.nbytes}, "memory", serial, {"f32": fast})


def _self_attention(less: int, threads: int) -> Case:
    tokens, heads, kv_heads, dim = 256 // math.isqrt(less), 9, 3, 64
    q, k, v = (
        _random(tokens, heads, dim),
        _random(tokens, kv_heads, dim, seed=1),
        _random(tokens, kv_heads, dim, seed=2),
    )
    plain, out = _filled(q.shape), _filled(q.shape)
    scale = dim**-0.5

    def serial() -> F32:
        library.serial_self_attention(q, k, v, 0, scale, plain)
        return plain

    def fast() -> F32:
        return _operators.self_attention(q, k, v, 0, scale, DType.F32, threads, "auto", out)

    work = 4.0 * dim * heads * (tokens * (tokens + 1) / 2)
    size = f"{tokens} x {heads} ({kv_heads}) x {dim}"
    moved = {"f32": float(q.nbytes + k.nbytes + v.nbytes + out.nbytes)}
    return Case("self_attention", size, 2e-5, work, moved, "compute", serial, {"f32": fast})


CASES: tuple[Callable[[int, int], Case], ...] = (
    _rms_norm, _gather, _masked_softmax, _swiglu, _matmul_transb, _rope, _self_attention,
)  # fmt: skip
