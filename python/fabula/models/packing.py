"""Reading and packing the matrices of a model, several at a time.

A small matrix is one thread's, from the file to its panels: nobody waits for the others after each of some hundred
matrices, which on a busy machine took longer than packing. A large one is packed by all threads together, each of which
touches its own share of the memory first.

Each tensor is read, packed and dropped, and no more are held at a time than are as large as the largest, so the peak of
memory is the packed size plus one tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fabula._native import Device, Weight
from fabula.formats.checkpoint import Checkpoint, TensorInfo

LARGE = 16 << 20  # bytes of a tensor that all threads pack together


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor and the rows of a weight it goes to; see fb_weight_pack_rows."""

    info: TensorInfo
    first_row: int
    row_block: int = 1
    row_step: int = 1


@dataclass(frozen=True, slots=True)
class Packing:
    """A weight and the tensors it is packed from, one after the other: they may share a panel."""

    weight: Weight
    parts: Sequence[Part]

    @property
    def largest(self) -> int:
        """Bytes of its largest tensor."""
        return max(part.info.n_bytes for part in self.parts)


class Packer:
    """Packs weights.

    Args:
        checkpoint: where tensors come from; several threads read from it.
        n_threads: threads that pack.
        read: told the bytes of tensors that were read, from the thread that called `pack`.
        device: GPU that each weight moves to when it is packed, so that this process never holds all of them.
    """

    def __init__(
        self, checkpoint: Checkpoint, n_threads: int, read: Callable[[int], None], device: Device | None = None
    ) -> None:
        self._checkpoint, self._n_threads, self._read, self._device = checkpoint, n_threads, read, device
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, Packing]] = []  # small ones, the first at the end
        self._n_read = 0  # bytes that nobody was told of
        self._damaged: list[tuple[int, str, Weight]] = []
        self._failures: list[tuple[int, BaseException]] = []

    def pack(self, packings: Sequence[Packing]) -> list[tuple[str, Weight]]:
        """Packs everything. Returns the tensors that hold what is not finite in their weight's format, with the weight.

        Raises:
            ModelFileError, OutOfMemory: a tensor cannot be read; the first one's error, if several.
        """
        small = [(i, packing) for i, packing in enumerate(packings) if packing.largest < LARGE]
        for i, packing in enumerate(packings):
            if packing.largest >= LARGE:
                self._pack(i, packing, self._n_threads)
                self._tell()
        self._waiting = small[::-1]
        helpers = [threading.Thread(target=self._work, name="fabula-pack") for _ in range(self._n_helpers(packings))]
        for helper in helpers:
            helper.start()
        try:
            self._work(tell=True)
        finally:
            self._stop()
            for helper in helpers:
                helper.join()
        if self._failures:
            raise min(self._failures, key=lambda failure: failure[0])[1]
        self._tell()
        return [(name, weight) for _, name, weight in sorted(self._damaged, key=lambda entry: entry[0])]

    def _n_helpers(self, packings: Sequence[Packing]) -> int:
        """Threads beside the caller's: so many that what they hold together is no more than the largest tensor."""
        sizes = [packing.largest for _, packing in self._waiting]
        if not sizes:
            return 0
        most = max(packing.largest for packing in packings)
        return min(self._n_threads, len(sizes), max(1, most // max(sizes))) - 1

    def _work(self, *, tell: bool = False) -> None:
        """Packs what waits until nothing does."""
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
            if tell:
                self._tell()

    def _stop(self) -> None:
        with self._lock:
            self._waiting.clear()

    def _pack(self, i: int, packing: Packing, n_threads: int) -> None:
        weight = packing.weight
        for part in packing.parts:
            info = part.info
            raw = self._checkpoint.read(info.name)
            before = weight.n_non_finite
            weight.pack_rows(
                raw,
                info.dtype,
                info.shape[0],
                first_row=part.first_row,
                row_block=part.row_block,
                row_step=part.row_step,
                n_threads=n_threads,
            )
            del raw  # before the next one is read
            with self._lock:
                self._n_read += info.n_bytes
                if weight.n_non_finite > before:
                    self._damaged.append((i, info.name, weight))
        if self._device is not None:
            weight.move(self._device)

    def _tell(self) -> None:
        with self._lock:
            n_read, self._n_read = self._n_read, 0
        self._read(n_read)
