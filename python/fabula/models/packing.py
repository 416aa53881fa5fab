"""Reads and packs the matrices of a model in parallel.

Matrices that a file holds as they are go through one native call, which reads and packs piece by piece: it holds no
tensor, each thread touches its own share of every weight first (NUMA), and Python's lock is left to the thread that
called `pack`, which reads the tokenizer meanwhile.

The others (rows in another order, several devices) are read here. One thread packs a small matrix: a barrier after each
of some hundred matrices took longer than packing on a busy machine. All threads pack a large matrix together.

With several devices, a tensor is read once and each device's rows and columns are packed from it.

The tensors held at a time take no more than the largest one, so peak memory is the packed size plus one tensor.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from fabula._native import Device, FilePacking, FileRows, Weight, dtype_block, interleave_memory
from fabula.errors import ModelFileError
from fabula.formats.checkpoint import Checkpoint, Span, TensorInfo
from fabula.lean_dataclasses import dataclass

PANEL = 16  # rows
REPORT_S = 0.05  # between two reports of the bytes read
_ENDS_EARLY = "the file ends too early; it was cut, or changed while in use"
LARGE = 16 << 20  # bytes from which all threads pack a tensor together


@dataclass(frozen=True, slots=True)
class Placing:
    """Where threads run, and where the memory of weights comes from, on machines with several nodes of memory.

    Attributes:
        cpus: the CPU of each thread; () leaves that to the system.
        interleaves: whether weights are spread over all nodes. Where threads are bound to CPUs they are not: then each
            thread's share of every weight is on its own node.
    """

    cpus: tuple[int, ...] = ()
    interleaves: bool = False


ANYWHERE = Placing()


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
        placing: where threads run, and where memory comes from.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        n_threads: int,
        read: Callable[[int], None],
        devices: Sequence[Device] = (),
        placing: Placing = ANYWHERE,
    ) -> None:
        self._placing = placing
        self._checkpoint, self._n_threads, self._read, self._devices = checkpoint, n_threads, read, devices
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, Packing]] = []  # small packings, first at the end
        self._n_read = 0  # bytes not yet reported to `read`
        self._damaged: list[tuple[int, str, Weight]] = []
        self._n_direct = 0  # bytes of the native call that were reported
        self._failures: list[tuple[int, BaseException]] = []

    def pack(
        self, packings: Sequence[Packing], meanwhile: Callable[[], None] | None = None
    ) -> list[tuple[str, Weight]]:
        """Packs everything. Returns (name, weight) of tensors that are not finite in the weight's format.

        Args:
            packings: weights and their tensors.
            meanwhile: called once, by this thread, while others pack.

        Raises:
            ModelFileError, OutOfMemory: a tensor cannot be read; of several errors the first tensor's.
        """
        spans = [self._spans(packing) for packing in packings]
        with _Direct(packings, spans, self._n_threads, self._placing) as running:
            if meanwhile is not None:
                meanwhile()
            for span in itertools.chain.from_iterable(spans):
                if span.after is not None:
                    span.after()
            self._pack_here([(i, packing) for i, packing in enumerate(packings) if not spans[i]])
            running.wait(self._report_direct)
        self._damaged += running.damaged
        self._failures += running.failures
        if self._failures:
            raise min(self._failures, key=lambda failure: failure[0])[1]
        return [(name, weight) for _, name, weight in sorted(self._damaged, key=lambda entry: entry[0])]

    def _spans(self, packing: Packing) -> list[Span]:
        """Where a file has the tensors; none if they cannot be packed by a native call."""
        if self._devices or len(packing.weights) != 1 or packing.weights[0].n_experts > 1:
            return []
        found = []
        for part in packing.parts:
            place, n_cols = part.places[0], packing.weights[0].n_cols
            whole = place.rows == range(part.info.shape[0]) and place.columns == range(n_cols)
            aligned = place.first_row % PANEL == 0 and (place.row_step == 1 or place.row_block % PANEL == 0)
            span = self._checkpoint.span(part.info.name) if whole and aligned else None
            if span is None:
                return []
            found.append(span)
        return found

    def _report_direct(self, n_read: int) -> None:
        self._read(n_read - self._n_direct)
        self._n_direct = n_read

    def _pack_here(self, packings: Sequence[tuple[int, Packing]]) -> None:
        """Packs from what the checkpoint reads."""
        small = [(i, packing) for i, packing in packings if packing.largest < LARGE]
        for i, packing in packings:
            if packing.largest >= LARGE:
                self._pack(i, packing, self._n_threads)
                self._report()
        self._waiting = small[::-1]
        n_helpers = self._n_helpers([packing for _, packing in packings])
        helpers = [threading.Thread(target=self._work, name="fabula-pack") for _ in range(n_helpers)]
        for helper in helpers:
            helper.start()
        try:
            self._work(report=True)
        finally:
            self._stop()
            for helper in helpers:
                helper.join()
        if not self._failures:
            self._report()

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


class _Direct:
    """The native call that reads and packs, in a thread of its own; stopped if the block is left early.

    Args:
        packings: those to pack, and others.
        spans: of each packing, where a file has its tensors; none if it is one of the others.
        n_threads: threads of the call.
        placing: where they run.

    Attributes:
        damaged: (number of the packing, name, weight) of tensors that are not finite in the weight's format.
        failures: (number of the packing, error).
    """

    def __init__(
        self, packings: Sequence[Packing], spans: Sequence[Sequence[Span]], n_threads: int, placing: Placing
    ) -> None:
        self._interleaves = placing.interleaves
        self._of = [
            (i, part, packing.weights[0], span)
            for i, (packing, found) in enumerate(zip(packings, spans, strict=True))
            if found
            for part, span in zip(packing.parts, found, strict=True)
        ]
        self._call = FilePacking(
            [_rows_of(weight, part, span) for _, part, weight, span in self._of], n_threads, placing.cpus
        )
        self._thread = threading.Thread(target=self._run, name="fabula-pack")
        self.damaged: list[tuple[int, str, Weight]] = []
        self.failures: list[tuple[int, BaseException]] = []

    def __enter__(self) -> _Direct:
        if self._of:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._call.stop()
        if self._of:
            self._thread.join()
        self._of, self._call = [], FilePacking([], 1)  # an exception may keep this alive: hold no weights

    def _run(self) -> None:
        try:
            if self._interleaves:  # this thread's, which ends with the call, and those of its team
                interleave_memory()
            self._call.run()
        except BaseException as error:
            self.failures.append((self._of[0][0], error))

    def wait(self, report: Callable[[int], None]) -> None:
        """Waits for the end; `report` gets the bytes read so far."""
        while self._of and self._thread.is_alive():
            self._thread.join(REPORT_S)
            report(self._call.n_read)
        if self.failures:
            return
        report(self._call.n_read)
        for (i, part, weight, span), (error, n_non_finite) in zip(self._of, self._call.results(), strict=True):
            name = part.info.name
            if error:
                reason = f"cannot be read: {os.strerror(error)}" if error > 0 else _ENDS_EARLY
                self.failures.append((i, ModelFileError(f"{span.path}: {name}: {reason}", path=span.path, field=name)))
            elif n_non_finite:
                self.damaged.append((i, name, weight))


def _rows_of(weight: Weight, part: Part, span: Span) -> FileRows:
    place = part.places[0]
    return FileRows(
        weight=weight,
        file=span.file,
        dtype=part.info.dtype,
        offset=span.offset,
        n_rows=len(place.rows),
        first_row=place.first_row,
        row_block=place.row_block,
        row_step=place.row_step,
    )
