"""The GGUF reader on good files: every value type, every layout of tensors, and a real model.

The `gguf` package writes and reads the same files as a second opinion.
"""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabula.errors import ModelFileError
from fabula.formats.checkpoint import DType
from fabula.formats.gguf import GgufFile
from gguf_builder import (
    ARRAY,
    BOOL,
    F16,
    F32,
    FLOAT32,
    FLOAT64,
    INT8,
    INT32,
    INT64,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    Key,
    Tensor,
    array,
    build,
    key,
    small_keys,
    small_tensors,
    writer,
)  # fmt: skip


@pytest.fixture
def write(tmp_path: Path):
    return writer(tmp_path)


# ---- Good files ---------------------------------------------------------------------------------------


def test_every_value_type(write) -> None:
    values = [
        ("u8", UINT8, 200), ("i8", INT8, -100), ("u16", UINT16, 60000), ("u32", UINT32, 4_000_000_000),
        ("i32", INT32, -5), ("f32", FLOAT32, 0.5), ("yes", BOOL, 1), ("no", BOOL, 0),
        ("u64", UINT64, 2**64 - 1), ("i64", INT64, -(2**63)), ("f64", FLOAT64, 1e300),
        ("text", STRING, "žluťoučký 🐎"), ("empty", STRING, ""),
    ]  # fmt: skip
    arrays = [
        Key("numbers", ARRAY, array(INT32, [-1, 2, 3])),
        Key("flags", ARRAY, array(BOOL, [1, 0])),
        Key("words", ARRAY, array(STRING, ["a", "", "ü"])),
        Key("nothing", ARRAY, array(FLOAT32, [])),
    ]
    with GgufFile(write(build([key(*value) for value in values] + arrays))) as file:
        assert file.version == 3
        for name, kind, value in values:
            found = file.metadata[name]
            assert found == value
            assert type(found) is {FLOAT32: float, FLOAT64: float, BOOL: bool, STRING: str}.get(kind, int)
        numbers = file.metadata["numbers"]
        assert isinstance(numbers, np.ndarray) and numbers.dtype == np.int32 and numbers.tolist() == [-1, 2, 3]
        assert not numbers.flags.writeable
        assert file.metadata["flags"].tolist() == [True, False]
        assert file.metadata["words"] == ["a", "", "ü"]
        assert file.metadata["nothing"].shape == (0,)


def test_version_2_reads_alike(write) -> None:
    with GgufFile(write(build(small_keys(), small_tensors(), version=2))) as file:
        assert file.version == 2
        assert len(file.tensors) == len(small_tensors())


@pytest.mark.parametrize("alignment", [1, 8, 32, 4096, 1 << 20])
def test_alignment(write, alignment: int) -> None:
    tensors = [Tensor("a", [3], F32, b"abcdefghijkl"), Tensor("b", [1], F16, b"yz")]
    raw = build([key("general.alignment", UINT32, alignment)], tensors, alignment=alignment)
    with GgufFile(write(raw)) as file:
        assert file.read("a").tobytes() == b"abcdefghijkl"
        assert file.read("b").tobytes() == b"yz"
        assert file.tensors["b"].offset % alignment == 0


def test_tensors_in_any_order_and_without_last_padding(write) -> None:
    tensors = [
        Tensor("second", [2], F32, b"BBBBBBBB", offset=32),
        Tensor("first", [8], F32, b"A" * 32, offset=0),
    ]
    raw = build(tensors=tensors, data_bytes=0) + b"A" * 32 + b"B" * 8
    with GgufFile(write(raw)) as file:
        assert file.read("first").tobytes() == b"A" * 32
        assert file.read("second").tobytes() == b"B" * 8


def test_same_as_the_gguf_package(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    path = tmp_path / "good.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.number", 7)
    writer.add_string("a.text", "héllo")
    writer.add_array("a.words", [f"word {i}" for i in range(1000)])
    writer.add_array("a.floats", [0.5, -1.0])
    wanted: dict[str, tuple[tuple[int, ...], bytes]] = {}
    for name, dtype, shape in [
        ("f32", np.float32, (3, 5)),
        ("f16", np.float16, (2, 3, 4)),
        ("one", np.float32, (1,)),
    ]:
        tensor = rng.standard_normal(shape).astype(dtype)
        writer.add_tensor(name, tensor)
        wanted[name] = (shape, tensor.tobytes())
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        raw = gguf.quants.quantize(rng.standard_normal((4, 64)).astype(np.float32), gguf.GGMLQuantizationType[kind])
        writer.add_tensor(kind, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
        wanted[kind] = ((4, 64), raw.tobytes())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(path) as file:
        assert file.metadata["general.architecture"] == "llama"
        assert file.metadata["a.number"] == 7
        assert file.metadata["a.text"] == "héllo"
        assert file.metadata["a.words"] == [f"word {i}" for i in range(1000)]
        assert file.metadata["a.floats"].tolist() == [0.5, -1.0]
        assert list(file.tensors) == list(wanted)
        for name, (shape, raw) in wanted.items():
            assert file.tensors[name].shape == shape
            assert file.tensors[name].n_bytes == len(raw)
            assert file.read(name).tobytes() == raw


def test_reading_after_close_and_unknown_names(write) -> None:
    file = GgufFile(write(build(tensors=[Tensor("a", [2])])))
    with pytest.raises(ModelFileError, match="no tensor 'b'"):
        file.read("b")
    file.close()
    file.close()
    with pytest.raises(ModelFileError, match="closed"):
        file.read("a")


def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for name in ("missing.gguf", "", "pipe.gguf", "a\0b.gguf"):
        with pytest.raises(ModelFileError):
            GgufFile(tmp_path / name)


# ---- A real model -------------------------------------------------------------------------------------


def test_smollm2_header(smollm2_gguf: Path) -> None:
    file = GgufFile(smollm2_gguf)
    file.close()
    assert len(file.tensors) == 272
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert len(file.metadata["tokenizer.ggml.merges"]) == 48900
    assert file.metadata["tokenizer.ggml.token_type"].dtype == np.int32
    embedding = file.tensors["token_embd.weight"]
    assert (embedding.dtype, embedding.shape) == (DType.Q8_0, (49152, 576))
    down = file.tensors["blk.29.ffn_down.weight"]
    assert (down.dtype, down.shape, down.n_bytes) == (DType.Q4_1, (576, 1536), 576 * 1536 // 32 * 20)


def test_smollm2_bytes_as_the_gguf_package_reads_them(smollm2_gguf: Path) -> None:
    theirs = gguf.GGUFReader(smollm2_gguf)
    with GgufFile(smollm2_gguf) as file:
        assert [t.name for t in theirs.tensors] == list(file.tensors)
        for tensor in theirs.tensors[1:60]:
            assert np.array_equal(file.read(tensor.name), tensor.data.reshape(-1).view(np.uint8)), tensor.name


@given(
    texts=st.lists(st.text(max_size=12) | st.sampled_from(["", "\0", "a\0b", "\u0100", "\U0001f40b"]), max_size=60),
    lengths=st.lists(st.sampled_from([65_500, 65_536, 200_000]), max_size=3),
    seed=st.randoms(use_true_random=False),
)
def test_lists_of_texts_of_every_length(tmp_path_factory, texts: list[str], lengths: list[int], seed) -> None:
    """NULs, which the library leaves, and texts that the buffer does not hold yet."""
    texts = texts + ["x" * length for length in lengths]
    seed.shuffle(texts)
    path = tmp_path_factory.mktemp("texts") / "a.gguf"
    path.write_bytes(build([Key("a", ARRAY, array(STRING, texts)), key("b", UINT32, 7)]))
    with GgufFile(path) as file:
        assert file.metadata == {"a": texts, "b": 7}
