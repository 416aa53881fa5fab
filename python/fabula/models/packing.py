"""Reads and packs the matrices of a model in parallel.

One thread reads and packs a small matrix: a barrier after each of some hundred matrices took longer than packing on a
busy machine. All threads pack a large matrix together, each touching its own share of the memory first (NUMA).

With several devices, a tensor is read once and each device's rows and columns are packed from it.

The tensors held at a time take no more than the largest one, so peak memory is the packed size plus one tensor.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fabula._native import Device, Weight, dtype_block
from fabula.formats.checkpoint import Checkpoint, TensorInfo

LARGE = 16 << 20  # bytes from which all threads pack a tensor together


@dataclass(frozen=True, slots=True)
class Place:
    """Rows and columns of a tensor, and their destination rows in a device's weight; see fb_weight_pack_rows."""

    first_row: int
    rows: range
    columns: range
    row_block: int = 1
    row_step: int = 1
    expert: int = 0

    def cut(self, raw: npt.NDArray[np.uint8], info: TensorInfo) -> npt.NDArray[np.uint8]:
        """Copies the bytes of these rows and columns; the columns must be whole blocks. Rows of a tensor with three
        dimensions are counted through all its matrices."""
        size, n_bytes = dtype_block(info.dtype)
        rows = raw.reshape(math.prod(info.shape[:-1]), -1)
        first, last = self.columns.start // size * n_bytes, self.columns.stop // size * n_bytes
        return np.ascontiguousarray(rows[self.rows.start : self.rows.stop, first:last]).reshape(-1)


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor and its destination on each device, or in the matrices of the experts of a single weight."""

    info: TensorInfo
    places: Sequence[Place]


@dataclass(frozen=True, slots=True)
class Packing:
    """One weight per device and the tensors they are packed from, in order, since tensors may share a panel."""

    weights: Sequence[Weight]
    parts: Sequence[Part]

    @property
    def largest(self) -> int:
        """Bytes of its largest tensor."""
        return max(part.info.n_bytes for part in self.parts)


class Packer:
    """Packs weights.

    Args:
        checkpoint: source of the tensors; several threads read from it.
        n_threads: threads that pack.
        read: callback with the number of bytes read, in the thread that called `pack`.
        devices: GPUs to move packed weights to, so that host memory never holds all of them; none for the CPU.
    """

    def __init__(
        self, checkpoint: Checkpoint, n_threads: int, read: Callable[[int], None], devices: Sequence[Device] = ()
    ) -> None:
        self._checkpoint, self._n_threads, self._read, self._devices = checkpoint, n_threads, read, devices
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, Packing]] = []  # small packings, first at the end
        self._n_read = 0  # bytes not yet reported to `read`
        self._damaged: list[tuple[int, str, Weight]] = []
        self._failures: list[tuple[int, BaseException]] = []

    def pack(self, packings: Sequence[Packing]) -> list[tuple[str, Weight]]:
        """Packs everything. Returns (name, weight) of tensors that are not finite in the weight's format.

        Raises:
            ModelFileError, OutOfMemory: a tensor cannot be read; of several errors the first tensor's.
        """
        small = [(i, packing) for i, packing in enumerate(packings) if packing.largest < LARGE]
        for i, packing in enumerate(packings):
            if packing.largest >= LARGE:
                self._pack(i, packing, self._n_threads)
                self._report()
        self._waiting = small[::-1]
        helpers = [threading.Thread(target=self._work, name="fabula-pack") for _ in range(self._n_helpers(packings))]
        for helper in helpers:
            helper.start()
        try:
            self._work(report=True)
        finally:
            self._stop()
            for helper in helpers:
                helper.join()
        if self._failures:
            raise min(self._failures, key=lambda failure: failure[0])[1]
        self._report()
        return [(name, weight) for _, name, weight in sorted(self._damaged, key=lambda entry: entry[0])]

    def _n_helpers(self, packings: Sequence[Packing]) -> int:
        """Threads besides the caller's, limited so that the tensors they hold take no more than the largest tensor."""
        sizes = [packing.largest for _, packing in self._waiting]
        if not sizes:
            return 0
        most = max(packing.largest for packing in packings)
        return min(self._n_threads, len(sizes), max(1, most // max(sizes))) - 1

    def _work(self, *, report: bool = False) -> None:
        """Packs waiting matrices until none is left."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
                i, packing = self._waiting.pop()
            try:
                self._pack(i, packing, 1)
            except BaseException as error:
                self._stop()
                with self._lock:
                    self._failures.append((i, error))
                return
            if report:
                self._report()

    def _stop(self) -> None:
        with self._lock:
            self._waiting.clear()

    def _pack(self, i: int, packing: Packing, n_threads: int) -> None:
        for part in packing.parts:
            info = part.info
            raw = self._checkpoint.read(info.name)
            before = sum(weight.n_non_finite for weight in packing.weights)
            weights = packing.weights if len(packing.weights) > 1 else [*packing.weights] * len(part.places)
            for weight, place in zip(weights, part.places, strict=True):
                weight.pack_rows(
                    place.cut(raw, info),
                    info.dtype,
                    len(place.rows),
                    first_row=place.first_row,
                    row_block=place.row_block,
                    row_step=place.row_step,
                    n_threads=n_threads,
                    expert=place.expert,
                )
            del raw  # free it before reading the next
            with self._lock:
                self._n_read += info.n_bytes
                if sum(weight.n_non_finite for weight in packing.weights) > before:
                    self._damaged.append((i, info.name, packing.weights[0]))
        for weight, device in zip(packing.weights, self._devices, strict=False):
            weight.move(device)

    def _report(self) -> None:
        with self._lock:
            n_read, self._n_read = self._n_read, 0
        self._read(n_read)
