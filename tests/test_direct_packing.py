"""Packing by one native call that reads files itself: the same weights as by way of the checkpoint's `read`."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fabula import Model, _native
from fabula._native import FilePacking, FileRows, Weight
from fabula.errors import InvalidArgument, ModelFileError, TokenizerError
from fabula.formats.checkpoint import DType, Span, TensorInfo
from fabula.formats.fingerprint import Fingerprinting
from fabula.models.packing import Packer, Packing, Part, Place, Placing
from fabula.text.tokenizer import Tokenizer

COLUMNS = 256
SHAPES = [(DType.F32, 300), (DType.F16, 64), (DType.BF16, 47), (DType.Q8_0, 100), (DType.Q4_K, 33), (DType.Q4_1, 16)]


class OneFile:
    """Matrices in a file, which can be read or packed from where they are."""

    format = "safetensors"
    config: Mapping[str, Any] = {}
    metadata: Mapping[str, Any] = {}

    def __init__(self, path: Path, *, offers: bool = True, cut: int = 0) -> None:
        rng = np.random.default_rng(3)
        self.path, self.offers, self.reads = path, offers, 0
        self.tensors: dict[str, TensorInfo] = {}
        self.offsets: dict[str, int] = {}
        data = bytearray(b"header.")
        for i, (dtype, n_rows) in enumerate(SHAPES):
            raw = _native.quantize(dtype, rng.standard_normal((n_rows, COLUMNS)).astype(np.float32))
            self.offsets[f"t{i}"] = len(data)
            self.tensors[f"t{i}"] = TensorInfo(f"t{i}", dtype, (n_rows, COLUMNS), raw.nbytes)
            data += raw.tobytes()
        path.write_bytes(data[: len(data) - cut])
        self._file = os.open(path, os.O_RDONLY)

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        self.reads += 1
        return np.frombuffer(os.pread(self._file, self.tensors[name].n_bytes, self.offsets[name]), np.uint8)

    def span(self, name: str) -> Span | None:
        return Span(self._file, self.offsets[name], self.path) if self.offers else None

    def close(self) -> None:
        os.close(self._file)


def packings_of(file: OneFile, held: DType | None) -> list[Packing]:
    """Each tensor a weight; then all stacked, two of them interleaved by panels, and one at half a panel."""
    every = range(COLUMNS)
    infos = list(file.tensors.values())

    def weight(n_rows: int, info: TensorInfo) -> Weight:
        return Weight(info.dtype if held is None else held, n_rows, COLUMNS)

    found = [Packing([weight(i.shape[0], i)], [Part(i, [Place(0, range(i.shape[0]), every)])]) for i in infos]
    first, second = infos[3], infos[5]
    stacked = Packing([weight(128, first)], [Part(first, [Place(0, range(100), every)])])
    half = Packing([weight(128, second)], [Part(second, [Place(8, range(16), every)])])
    parts = [Part(info, [Place(16 * i, range(info.shape[0]), every, 16, 2)]) for i, info in enumerate((first, second))]
    return [*found, stacked, half, Packing([weight(2 * 112, first)], parts)]


def rows_of(packings: list[Packing]) -> list[npt.NDArray[np.float32]]:
    return [np.stack([w.row(i) for i in range(w.n_rows)]) for packing in packings for w in packing.weights]


@pytest.mark.parametrize("held", [None, DType.F16, DType.F32, DType.BF16, DType.Q8_0])
@pytest.mark.parametrize("n_threads", [1, 3, 64])
def test_the_same_bits(tmp_path: Path, held: DType | None, n_threads: int) -> None:
    results, digests = [], []
    for offers in (False, True):
        file = OneFile(tmp_path / "f", offers=offers)
        checkpoint, read, called = Fingerprinting(file), list[int](), list[int]()
        packings = packings_of(file, held)
        assert Packer(checkpoint, n_threads, read.append).pack(packings, lambda called=called: called.append(1)) == []
        assert called == [1]
        assert sum(read) == sum(part.info.n_bytes for packing in packings for part in packing.parts)
        assert file.reads == (1 if offers else 10), "only the one that begins within a panel"
        results.append(rows_of(packings))
        digests.append(checkpoint.digest)
        file.close()
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
    assert digests[0] == digests[1]


def test_a_file_that_is_cut(tmp_path: Path) -> None:
    file = OneFile(tmp_path / "f", cut=5000)
    with pytest.raises(ModelFileError, match=r"t5.*ends too early") as caught:
        Packer(Fingerprinting(file), 3, lambda _: None).pack(packings_of(file, None)[5:6])
    assert caught.value.path == str(file.path)
    file.close()


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    file = OneFile(tmp_path / "f")
    file.close()
    file._file = os.open(file.path, os.O_WRONLY)
    with pytest.raises(ModelFileError, match="cannot be read"):
        Packer(file, 2, lambda _: None).pack(packings_of(file, None)[:2])
    file.close()


def test_what_is_not_finite(tmp_path: Path) -> None:
    file = OneFile(tmp_path / "f")
    with file.path.open("r+b") as out:
        out.seek(file.offsets["t0"] + 4 * 10)
        out.write(np.float32(np.inf).tobytes())
    packings = packings_of(file, None)
    damaged = Packer(file, 3, lambda _: None).pack(packings)
    assert damaged == [("t0", packings[0].weights[0])] and packings[0].weights[0].n_non_finite == 1
    file.close()


def test_meanwhile_that_raises_stops_the_others(tmp_path: Path) -> None:
    file = OneFile(tmp_path / "f")

    def fail() -> None:
        raise TokenizerError("damaged", path=file.path)

    with pytest.raises(TokenizerError):
        Packer(file, 2, lambda _: None).pack(packings_of(file, None), fail)
    assert not [thread for thread in threading.enumerate() if thread.name == "fabula-pack"]
    file.close()


def test_the_tokenizer_is_read_while_weights_are_packed(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the thread that loads, and not before the native call is running."""
    found: list[bool] = []
    before = Tokenizer.from_folder

    def from_folder(folder: Path) -> Tokenizer:
        found.append(any(thread.name == "fabula-pack" for thread in threading.enumerate()))
        return before(folder)

    run = FilePacking.run
    done = threading.Event()

    def slow(self: FilePacking) -> None:
        assert done.wait(60)
        run(self)

    monkeypatch.setattr(FilePacking, "run", slow)
    monkeypatch.setattr(Tokenizer, "from_folder", staticmethod(lambda folder: (from_folder(folder), done.set())[0]))
    Model.load(tiny_folder, threads=2).close()
    assert found == [True]


WEIGHT = Weight(DType.F16, 64, COLUMNS)
GOOD = FileRows(WEIGHT, 0, DType.F16, 0, 64)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (GOOD._replace(file=-1), "file -1"),
        (GOOD._replace(offset=-1), "offset -1"),
        (GOOD._replace(dtype=99), "src_dtype 99"),
        (GOOD._replace(n_rows=0), "n_rows 0"),
        (GOOD._replace(n_rows=65), "the last row would be 64"),
        (GOOD._replace(first_row=8, n_rows=2), "first_row 8"),
        (GOOD._replace(row_step=2, n_rows=2), "row_step 2"),
    ],
)
def test_wrong_parts(part: FileRows, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        FilePacking([GOOD, part], 2).run()


def test_no_parts() -> None:
    empty = FilePacking([], 2)
    empty.run()
    assert empty.results() == [] and empty.n_read == 0


def test_a_stopped_call_ends(tmp_path: Path) -> None:
    file = OneFile(tmp_path / "f")
    rows = [FileRows(Weight(DType.F32, 300, COLUMNS), file._file, DType.F32, file.offsets["t0"], 300)]
    call = FilePacking(rows, 2)
    call.stop()
    call.run()
    assert call.n_read == 0
    file.close()


def test_threads_are_bound_to_the_cpus_that_are_given(tiny_folder: Path, tmp_path: Path) -> None:
    """In threads of the test's own, which are bound from then on."""
    cpus = sorted(os.sched_getaffinity(0))
    found: list[set[int]] = []
    with Model.load(tiny_folder, threads=2) as free, Model.load(tiny_folder, threads=2, pin_threads=True) as pinned:
        ids, logits = list(range(3, 40)), list[npt.NDArray[np.float32]]()
        worker = threading.Thread(
            target=lambda: (logits.append(pinned.logits(ids)), found.append(os.sched_getaffinity(0)))
        )
        worker.start()
        worker.join()
        np.testing.assert_array_equal(logits[0], free.logits(ids))
    file = OneFile(tmp_path / "f")
    rows = [FileRows(Weight(DType.F32, 300, COLUMNS), file._file, DType.F32, file.offsets["t0"], 300)]
    worker = threading.Thread(
        target=lambda: (FilePacking(rows, 2, [cpus[-1]] * 2).run(), found.append(os.sched_getaffinity(0)))
    )
    worker.start()
    worker.join()
    file.close()
    assert found == [{cpus[0]}, {cpus[-1]}]
    with pytest.raises(InvalidArgument, match=r"cpus\[0\] is 1024"):
        FilePacking([GOOD], 1, [1024]).run()


def test_memory_over_all_nodes(tmp_path: Path) -> None:
    """Where the system lets a process choose; the packed bits are the same."""
    results = []
    for interleaves in (False, True):
        file = OneFile(tmp_path / "f")
        packings = packings_of(file, None)
        Packer(file, 2, lambda _: None, placing=Placing(interleaves=interleaves)).pack(packings)
        results.append(rows_of(packings))
        file.close()
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
