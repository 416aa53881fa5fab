"""Limits of this machine: bytes read from memory, and multiply-adds in registers, per second."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fabula import _native
from fabula.bench import library

_READ_BYTES = 512 << 20  # larger than any cache
_REPEATS = 7
_TRIES = 3  # the best counts, so that a busy moment does not lower a limit


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine and its measured limits.

    Attributes:
        cpu: the processor's name.
        isa: the best supported instruction set.
        cores: cores this process may run on.
        threads: threads the limits were measured with.
        read_bytes_per_s: streaming reads of memory.
        flops_per_s: f32 operations of the matrix kernel on data in L1; a multiply-add counts as two.
        pairs_per_s: the same for the bf16 kernel.
        dots_per_s: the same for the int8 kernel of quantized weights.
    """

    cpu: str
    isa: str
    cores: int
    threads: int
    read_bytes_per_s: float
    flops_per_s: float
    pairs_per_s: float
    dots_per_s: float

    @classmethod
    def measure(cls, threads: int, *, read_bytes: int = _READ_BYTES, repeats: int = _REPEATS) -> Machine:
        """Measures the limits with `threads` threads, each the best of three medians; takes a few seconds."""
        return cls(
            cpu=cpu_name(),
            isa=_native.isa_best(),
            cores=_cores(),
            threads=threads,
            read_bytes_per_s=max(library.measure_read(read_bytes, repeats, threads) for _ in range(_TRIES)),
            flops_per_s=max(library.measure_fma(repeats, threads) for _ in range(_TRIES)),
            pairs_per_s=max(library.measure_pairs(repeats, threads) for _ in range(_TRIES)),
            dots_per_s=max(library.measure_dot(repeats, threads) for _ in range(_TRIES)),
        )

    def peak(self, weights: str) -> float:
        """Operations per second of products with weights in this precision."""
        if weights == "bf16":  # with inputs in f32, where the CPU has no instruction for pairs of bf16
            return max(self.pairs_per_s, self.flops_per_s)
        return self.flops_per_s if weights in ("f32", "f16") else self.dots_per_s

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.isa}, {self.threads} of {self.cores} cores: "
            f"reads {self.read_bytes_per_s / 1e9:.1f} GB/s, multiply-adds {self.flops_per_s / 1e9:.0f} GFLOP/s, "
            f"of bf16 {self.pairs_per_s / 1e9:.0f} GFLOP/s, of bytes {self.dots_per_s / 1e9:.0f} GOP/s"
        )


def about(threads: int) -> dict[str, Any]:
    """Describes the machine, for rows of measurements without limits."""
    return {"cpu": cpu_name(), "isa": _native.isa_best(), "cores": _cores(), "threads": threads}


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, from the system."""
    try:
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1
