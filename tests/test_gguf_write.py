"""The GGUF writer: our reader and the gguf package's read what it wrote; a failure leaves no partial file."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabula import files
from fabula.errors import EngineError, InvalidArgument, StoreError, StoreFull, StoreReadOnly
from fabula.formats.checkpoint import DType
from fabula.formats.gguf import BLOCKS, GgufFile
from fabula.formats.gguf_write import GgufWriter, NewTensor

EVERY_VALUE: dict[str, Any] = {
    "general.architecture": "llama",
    "a.text": "Grüße, 世界 \u0001",
    "a.empty": "",
    "a.yes": True,
    "a.no": False,
    "a.small": 7,
    "a.negative": -7,
    "a.large": 2**63,
    "a.very_negative": -(2**40),
    "a.float": 0.5,
    "a.double": 0.1,
    "a.infinity": math.inf,
    **{f"n.{kind}": np.dtype(kind).type(5) for kind in ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "u8", "i8", "f8")},
    **{
        f"l.{kind}": np.arange(6).astype(kind)
        for kind in ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "u8", "i8", "f8", "b1")
    },
    "l.none": np.zeros(0, np.int32),
    "l.texts": ["", "a", "é", "日本"],
    "l.no_texts": [],
}
# Number of ggml's value type that a Python scalar takes.
TYPES = {"a.yes": 7, "a.small": 4, "a.negative": 5, "a.large": 10, "a.very_negative": 11, "a.float": 6, "a.double": 12}


def raw_of(dtype: DType, shape: tuple[int, ...], seed: int) -> np.ndarray:
    size, n_bytes = BLOCKS[dtype]
    return np.random.default_rng(seed).integers(0, 256, math.prod(shape) // size * n_bytes, dtype=np.uint8)


def one_of_each() -> list[NewTensor]:
    tensors = [NewTensor(f"t.{dtype.name}", dtype, (3, 2 * BLOCKS[dtype][0])) for dtype in DType]
    return [*tensors, NewTensor("vector", DType.F32, (5,)), NewTensor("cube", DType.F16, (2, 3, 4, 5))]


def write(path: Path, tensors: list[NewTensor], **options: Any) -> None:
    with GgufWriter(path, EVERY_VALUE, tensors, **options) as writer:
        for i, tensor in enumerate(tensors):
            writer.write(tensor.name, raw_of(tensor.dtype, tensor.shape, i))
    assert path.stat().st_size == writer.n_bytes


@pytest.mark.parametrize("alignment", [32, 1, 64, 4096])
def test_our_reader_finds_all_of_it(tmp_path: Path, alignment: int) -> None:
    path, tensors = tmp_path / "out.gguf", one_of_each()
    write(path, tensors, alignment=alignment)
    with GgufFile(path) as file:
        assert file.version == 3
        metadata = dict(file.metadata)
        assert metadata.pop("general.alignment", 32) == alignment
        assert list(metadata) == list(EVERY_VALUE)
        for key, value in EVERY_VALUE.items():
            if isinstance(value, np.ndarray):
                found = metadata[key]
                assert isinstance(found, np.ndarray) and found.dtype == value.dtype and np.array_equal(found, value)
            else:
                assert metadata[key] == value, key
        assert [(t.name, t.dtype, t.shape) for t in file.tensors.values()] == [
            (t.name, t.dtype, t.shape) for t in tensors
        ]
        for i, tensor in enumerate(tensors):
            assert file.tensors[tensor.name].offset % alignment == 0
            assert np.array_equal(file.read(tensor.name), raw_of(tensor.dtype, tensor.shape, i)), tensor.name


def test_the_package_finds_all_of_it(tmp_path: Path) -> None:
    path, tensors = tmp_path / "out.gguf", one_of_each()
    write(path, tensors)
    reader = gguf.GGUFReader(path)
    for key, value in EVERY_VALUE.items():
        if isinstance(value, list | np.ndarray) and len(value) == 0:
            continue  # the package cannot show an empty array
        found = reader.fields[key].contents()
        assert np.array_equal(found, value) if isinstance(value, np.ndarray) else found == value, key
    for key, kind in TYPES.items():
        assert reader.fields[key].types == [gguf.GGUFValueType(kind)], key
    for i, (tensor, found) in enumerate(zip(tensors, reader.tensors, strict=True)):
        assert (found.name, found.tensor_type.name) == (tensor.name, tensor.dtype.name)
        assert tuple(reversed(found.shape.tolist())) == tensor.shape
        assert np.array_equal(found.data.view(np.uint8).reshape(-1), raw_of(tensor.dtype, tensor.shape, i))


@settings(max_examples=50, deadline=None)
@given(
    metadata=st.dictionaries(
        st.text(min_size=1, max_size=9).filter(lambda key: key != "general.alignment" and key.isprintable()),
        st.one_of(
            st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text(max_size=20),
            st.lists(st.text(max_size=5), max_size=4),
        ),
        max_size=8,
    ),
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), max_size=5),
    data=st.data(),
)  # fmt: skip
def test_whatever_is_written_comes_back(
    tmp_path_factory: Any, metadata: dict[str, Any], shapes: Any, data: Any
) -> None:
    path = tmp_path_factory.mktemp("any") / "out.gguf"
    tensors = [NewTensor(f"t{i}", DType.F16, tuple(shape)) for i, shape in enumerate(shapes)]
    with GgufWriter(path, metadata, tensors) as writer:
        for i, tensor in enumerate(tensors):
            raw = raw_of(DType.F16, tensor.shape, i)
            cut = data.draw(st.integers(0, raw.size))
            writer.write(tensor.name, raw[:cut])  # in two pieces; the first may be empty or all of it
            if cut < raw.size:
                writer.write(tensor.name, raw[cut:])
    with GgufFile(path) as file:
        assert file.metadata == metadata
        for i, tensor in enumerate(tensors):
            assert np.array_equal(file.read(tensor.name), raw_of(DType.F16, tensor.shape, i))


# ---- Refusals -------------------------------------------------------------------------------------------------------

A = NewTensor("a", DType.F32, (2, 2))


@pytest.mark.parametrize(
    ("metadata", "tensors", "words"),
    [
        ({"": 1}, [], "empty name"),
        ({"k": 2**64}, [], "64 bits"),
        ({"k": np.zeros((2, 2), np.int32)}, [], "2 dimensions"),
        ({"k": np.float16(1)}, [], "no type in GGUF"),
        ({"k": ["a", 3]}, [], "list of strings"),
        ({"k": "\ud800"}, [], "lone surrogate"),
        ({"k": "x" * (2**20 + 1)}, [], "at most 1048576"),
        ({}, [A, A], "given twice"),
        ({}, [NewTensor("", DType.F32, (2,))], "empty name"),
        ({}, [NewTensor("a", DType.F32, ())], "1 to 4"),
        ({}, [NewTensor("a", DType.F32, (1, 2, 3, 4, 5))], "1 to 4"),
        ({}, [NewTensor("a", DType.F32, (3, 0))], "above 0"),
        ({}, [NewTensor("a", DType.Q4_K, (2, 128))], "multiple of 256"),
    ],
)
def test_what_no_reader_takes(tmp_path: Path, metadata: Any, tensors: Any, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        GgufWriter(tmp_path / "out.gguf", metadata, tensors)
    assert not list(tmp_path.iterdir())


def test_alignment_must_be_a_power_of_two(tmp_path: Path) -> None:
    for alignment in (0, 3, -32, 2**21):
        with pytest.raises(InvalidArgument, match="alignment"):
            GgufWriter(tmp_path / "out.gguf", {}, [], alignment=alignment)


def test_order_and_size_are_kept(tmp_path: Path) -> None:
    path, b = tmp_path / "out.gguf", NewTensor("b", DType.F32, (1,))
    with pytest.raises(InvalidArgument, match="turn of 'a'"), GgufWriter(path, {}, [A, b]) as writer:
        writer.write("b", np.zeros(1, np.float32))
    with (
        pytest.raises(InvalidArgument, match="16 bytes, 0 are written and 20 more"),
        GgufWriter(path, {}, [A]) as writer,
    ):
        writer.write("a", np.zeros(5, np.float32))
    with pytest.raises(InvalidArgument, match="all are written"), GgufWriter(path, {}, [b]) as writer:
        writer.write("b", np.zeros(1, np.float32))
        writer.write("b", np.zeros(1, np.float32))
    with pytest.raises(InvalidArgument, match="'b' is not complete"), GgufWriter(path, {}, [A, b]) as writer:
        writer.write("a", np.zeros(4, np.float32))
    with pytest.raises(InvalidArgument, match="use `with`"):
        GgufWriter(path, {}, [A]).write("a", np.zeros(4, np.float32))
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(InvalidArgument, match="exists already"), GgufWriter(path, {}, []):
        pass
    assert path.read_bytes() == b"mine"
    with pytest.raises(KeyError), GgufWriter(path, {}, [A], overwrite=True):
        raise KeyError
    assert path.read_bytes() == b"mine"
    with GgufWriter(path, {"k": 1}, [], overwrite=True):
        assert path.read_bytes() == b"mine"  # until the new one is whole
    GgufFile(path).close()
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    # One that appears while the file is written is not replaced either.
    path.unlink()
    with pytest.raises(InvalidArgument, match="exists already"), GgufWriter(path, {}, []):
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    assert len(list(tmp_path.iterdir())) == 1


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="is a folder"), GgufWriter(tmp_path, {}, []):
        pass
    with pytest.raises(InvalidArgument, match="no folder"), GgufWriter(tmp_path / "no" / "out.gguf", {}, []):
        pass


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, StoreFull), (errno.EROFS, StoreReadOnly), (errno.EIO, StoreError)]
)
@pytest.mark.parametrize("function", ["fsync", "open"])
def test_a_system_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int, kind: type[EngineError]
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(files.os, function, refuse)
        with pytest.raises(kind, match="cannot be written") as caught, GgufWriter(tmp_path / "out.gguf", {}, []):
            pass
    assert type(caught.value) is kind
    assert not list(tmp_path.iterdir())


def test_permissions_follow_the_mask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with GgufWriter(tmp_path / "out.gguf", {}, []):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "out.gguf").stat().st_mode & 0o777 == 0o640
