"""The GGUF reader on hostile files: each way a file can be wrong gives an error that names file and field.

Each file comes from gguf_builder with one wrong field. M1 to M20 are the inputs of the project's list of
hostile model files. Random tests print their seed.
"""

from __future__ import annotations

import os
import random
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fabula.errors import EngineError, ModelFileError, Unsupported
from fabula.formats import gguf as reader
from fabula.formats.checkpoint import DType
from fabula.formats.gguf import GgufFile
from fabula.formats.gguf_names import open_gguf
from gguf_builder import (
    ARRAY,
    BLOCKS,
    BOOL,
    F16,
    F32,
    FLOAT32,
    INT32,
    Q4_0,
    Q4_1,
    Q4_K,
    Q8_0,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    Key,
    Tensor,
    array,
    build,
    build_parts,
    key,
    small_keys,
    small_tensors,
    string,
    writer,
)  # fmt: skip


@pytest.fixture
def write(tmp_path: Path):
    return writer(tmp_path)


@pytest.fixture
def refuse(write):
    """A function that expects a file to be refused and returns the message, which must name the file."""

    def refuse(raw: bytes, *words: str, error: type[EngineError] = ModelFileError) -> str:
        path = write(raw)
        with pytest.raises(error) as caught:
            GgufFile(path).close()
        message = str(caught.value)
        assert str(path) in message
        for word in words:
            assert word in message, message
        if isinstance(caught.value, ModelFileError):
            assert caught.value.path == str(path)
        return message

    return refuse


# ---- M1: magic and version ----------------------------------------------------------------------------


@pytest.mark.parametrize("magic", [b"GGUG", b"\0\0\0\0", b"FUGG", b"ggml", b"PK\3\4"])
def test_m1_magic(refuse, magic: bytes) -> None:
    refuse(build(magic=magic), "magic", repr(magic), "GGUF")


@pytest.mark.parametrize(
    ("version", "error", "word"),
    [
        (0, ModelFileError, "0"),
        (1, Unsupported, "1"),
        (4, Unsupported, "4"),
        (2**32 - 1, Unsupported, "4294967295"),
    ],
)
def test_m1_version(refuse, version: int, error: type[EngineError], word: str) -> None:
    refuse(build(version=version), "version", word, error=error)


def test_m1_big_endian(refuse) -> None:
    refuse(build(version=3 << 24), "big-endian", error=Unsupported)


# ---- M2: counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2**63, 2**64 - 1, 65_537])
@pytest.mark.parametrize("field", ["n_tensors", "n_keys"])
def test_m2_counts(refuse, field: str, count: int) -> None:
    refuse(build(**{field: count}), field, str(count), "65536")


@pytest.mark.parametrize("field", ["n_tensors", "n_keys"])
def test_m2_more_counted_than_there(refuse, field: str) -> None:
    for count in (len(small_keys()) + 1, 65_536):
        refuse(build(small_keys(), **{field: count}), "tensor 0" if field == "n_tensors" else "key 13")


@pytest.mark.parametrize("kind", [UINT8, STRING, UINT64])
def test_m2_tiny_file_with_an_array_of_2_to_63_is_refused_at_once(write, kind: int) -> None:
    raw = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + string("abc") + struct.pack("<IIQ", ARRAY, kind, 2**63)
    path = write(raw)
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(ModelFileError, match=str(2**63)):
        GgufFile(path)
    seconds = time.process_time() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1.0, "2^63 entries were looked at"
    assert peak < 1_000_000


# ---- M3: key-values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 1 << 21, 1000])
def test_m3_string_length(refuse, length: int) -> None:
    refuse(build([Key("text", STRING, string("abc", length))]), "'text'", str(length))
    refuse(build()[:16] + struct.pack("<Q", 1) + string("abc", length), "key 0", str(length))
    refuse(
        build([Key("list", ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + string("b", length))]),
        "item 1",
    )


def test_m3_names_of_keys(refuse) -> None:
    refuse(build([key("", UINT32, 1)]), "key 0", "empty")
    refuse(build([key("a", UINT32, 1), key("a", UINT32, 1)]), "'a'", "twice")


@pytest.mark.parametrize("kind", [13, 255, 2**32 - 1])
def test_m3_unknown_value_types(refuse, kind: int) -> None:
    refuse(build([Key("a", kind, bytes(8))]), "'a'", str(kind))
    refuse(build([Key("a", ARRAY, struct.pack("<IQ", kind, 0))]), "'a'", str(kind))


def test_m3_nested_arrays(refuse) -> None:
    bomb = struct.pack("<IQ", ARRAY, 1) * 10_000 + struct.pack("<IQ", UINT8, 0)
    refuse(build([Key("a", ARRAY, bomb)]), "'a'", "array of arrays")


def test_m3_text_that_is_not_utf8(refuse) -> None:
    refuse(build([Key("a", STRING, string(b"ok\xff"))]), "'a'", "UTF-8", "byte 2")
    refuse(
        build([Key("a", ARRAY, struct.pack("<IQ", STRING, 2) + string("x") + string(b"\xc3"))]),
        "item 1",
        "UTF-8",
    )
    refuse(build([Key("a", ARRAY, array(STRING, ["é", b"", b"xyz\xc3", "é"]))]), "item 2", "UTF-8", "byte 3")
    refuse(build([key("a", UINT32, 1), Key(b"\xed\xa0\x80", UINT32, bytes(4))]), "key 1", "UTF-8")
    refuse(build(tensors=[Tensor(b"\xff", [1])]), "tensor 0", "UTF-8")


def test_m3_booleans_other_than_0_and_1(refuse) -> None:
    refuse(build([key("a", BOOL, 2)]), "'a'", "2")
    refuse(build([Key("a", ARRAY, array(BOOL, [0, 1, 255]))]), "'a'", "255")


def test_m3_hostile_names_are_escaped_and_cut(refuse) -> None:
    name = "\x1b[31m\r\n" + "x" * 5000
    message = refuse(build([key(name, UINT32, 1), key(name, UINT32, 1)]), "twice")
    assert "\x1b" not in message and "\n" not in message and len(message) < 400


# ---- M4: alignment ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [0, 3, 33, 1 << 21, 2**31, 2**32 - 1])
def test_m4_alignment_values(refuse, alignment: int) -> None:
    refuse(build([key("general.alignment", UINT32, alignment)]), "'general.alignment'", str(alignment))


@pytest.mark.parametrize("kind", [INT32, UINT64, UINT8, FLOAT32])
def test_m4_alignment_type(refuse, kind: int) -> None:
    refuse(build([key("general.alignment", kind, 32)]), "'general.alignment'", "UINT32")
    refuse(build([Key("general.alignment", ARRAY, array(UINT32, [32]))]), "'general.alignment'", "UINT32")


# ---- M5, M6: dimensions and sizes ---------------------------------------------------------------------


@pytest.mark.parametrize("n_dims", [0, 5, 2**31, 2**32 - 1])
def test_m5_number_of_dimensions(refuse, n_dims: int) -> None:
    refuse(build(tensors=[Tensor("t", [1, 1, 1, 1, 1], n_dims=n_dims)]), "'t'", f"{n_dims} dimensions")


@pytest.mark.parametrize(
    "dims",
    [[0], [4, 0], [-1], [2**63], [2**42 + 1], [2**32, 2**32], [2**16, 2**16, 2**16, 2**16], [2**62, 4],
     [2**61, 8], [2**64 - 32, 2]],
)  # fmt: skip
def test_m5_dimensions(refuse, dims: list[int]) -> None:
    for kind in (F32, Q4_0 if dims[0] % 32 == 0 else F16):
        refuse(build(tensors=[Tensor("t", dims, kind)], data_bytes=4096), "'t'")


@pytest.mark.parametrize("kind", [k for k, (size, _) in BLOCKS.items() if size > 1])
def test_m5_rows_that_are_no_whole_blocks(refuse, kind: int) -> None:
    size = BLOCKS[kind][0]
    for columns in (1, size - 1, size + 16):
        refuse(build(tensors=[Tensor("t", [columns, size], kind)], data_bytes=1 << 20), "'t'", str(size))


def test_m6_sum_of_sizes_wraps(refuse) -> None:
    half = 2**61 - 16  # times 4 bytes: 2^63 - 64
    tensors = [
        Tensor("a", [half], offset=0),
        Tensor("b", [half], offset=2**63 - 64),
        Tensor("c", [32], offset=2**64 - 128),
    ]
    refuse(build(tensors=tensors, data_bytes=256), "'a'", str(2**63 - 64))


# ---- M7: places ---------------------------------------------------------------------------------------


def test_m7_offsets(refuse) -> None:
    def pair(offset: int, first: int | None = None) -> bytes:
        tensors = [Tensor("a", [8], offset=first), Tensor("b", [8], offset=offset)]
        return build(tensors=tensors, data_bytes=64)

    refuse(pair(64), "'b'", "cut")
    refuse(pair(2**64 - 32), "'b'")
    refuse(pair(2**63), "'b'")
    refuse(pair(33), "'b'", "33", "alignment")
    refuse(pair(16), "'b'", "16", "alignment")
    refuse(pair(0), "'b'", "overlaps")
    refuse(build(tensors=[Tensor("a", [9]), Tensor("b", [8], offset=32)], data_bytes=96), "'b'", "overlaps")
    refuse(build(tensors=[Tensor("a", [8]), Tensor("b", [8], offset=64)], data_bytes=96), "'b'", "hole")
    refuse(build(tensors=[Tensor("a", [8], offset=32)], data_bytes=64), "'a'", "hole")


def test_m7_names(refuse) -> None:
    refuse(build(tensors=[Tensor("a", [8]), Tensor("a", [8])]), "'a'", "twice")
    refuse(build(tensors=[Tensor("", [8])]), "tensor 0", "empty")


@pytest.mark.parametrize("kind", [4, 5, 9, 15, 16, 23, 26, 28, 31, 40, 41, 2**31, 2**32 - 1])
def test_unknown_tensor_types_are_named(refuse, kind: int) -> None:
    refuse(build(tensors=[Tensor("blk.0.t", [256], kind)]), "'blk.0.t'", f"type {kind} ", error=Unsupported)


# ---- M8, M9: cut files --------------------------------------------------------------------------------


def test_m8_cut_anywhere(tmp_path: Path) -> None:
    parts = build_parts(small_keys(), small_tensors(kind=Q4_0))
    path = tmp_path / "model.gguf"
    path.write_bytes(parts.file)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    # The padding after the last tensor may be missing, so the last byte that counts is that tensor's.
    with GgufFile(path) as file:
        last = max(t.offset + t.n_bytes for t in file.tensors.values())
    places = [random.Random(seed).randrange(len(parts.header), last) for _ in range(100)]
    started = time.process_time()
    for size in [last - 1, *places, *reversed(range(len(parts.header)))]:
        if path.stat().st_size < size:
            path.write_bytes(parts.file)
        os.truncate(path, size)
        with pytest.raises(ModelFileError):
            GgufFile(path)
    assert time.process_time() - started < 10


def test_m9_file_shortened_while_in_use(write) -> None:
    path = write(build(small_keys(), small_tensors()))
    with GgufFile(path) as file:
        name, tensor = list(file.tensors.items())[-1]
        assert file.read(name).size == tensor.n_bytes
        os.truncate(path, tensor.offset + 10)
        with pytest.raises(ModelFileError, match="ends at byte") as caught:
            file.read(name)
        assert caught.value.field == name
        assert file.read(next(iter(file.tensors))).size > 0
        os.truncate(path, 0)
        with pytest.raises(ModelFileError):
            file.read(next(iter(file.tensors)))


# ---- M13: tails ---------------------------------------------------------------------------------------


def test_m13_tails(refuse, write) -> None:
    unpadded = build(tensors=[Tensor("a", [9])])[:-28]
    GgufFile(write(unpadded)).close()
    GgufFile(write(unpadded + bytes(28))).close()
    GgufFile(write(unpadded + bytes(5))).close()
    refuse(unpadded + bytes(29), "29 bytes follow")
    end_of_zip = b"PK\5\6" + bytes(18)
    refuse(unpadded + end_of_zip, "not zero")
    refuse(unpadded + bytes(28) + end_of_zip, "follow the last tensor")
    refuse(unpadded + bytes(28) + b"%PDF-1.7\n" * 100, "follow the last tensor")
    refuse(build(small_keys()) + end_of_zip * 100, "follow")


# ---- M19: dtype and shape against the file ------------------------------------------------------------


def test_m19_wrong_type_or_shape(refuse) -> None:
    good = Tensor("a", [64, 4], Q4_1)
    behind = Tensor("b", [64])
    refuse(build(tensors=[Tensor("a", [64, 4], Q8_0, good.bytes()), behind]), "'b'", "overlaps", "must be 288")
    refuse(build(tensors=[Tensor("a", [32, 4], Q4_1, good.bytes()), behind]), "'b'", "hole", "must be 96")
    refuse(build(tensors=[Tensor("a", [64, 4], F32, good.bytes())]), "'a'")
    refuse(build(tensors=[Tensor("a", [64, 3], Q4_1, good.bytes())]), "follow the last tensor")
    refuse(build(tensors=[Tensor("a", [4, 64], Q4_1, good.bytes())]), "'a'", "rows of 4", "Q4_1")


# ---- Limits, at the limit and one beyond --------------------------------------------------------------


def test_limit_of_keys_and_tensors(write) -> None:
    keys = [Key(f"{i:x}", UINT8, b"\1") for i in range(reader.MAX_KEYS)]
    tensors = [Tensor(f"{i:x}", [1], F32) for i in range(reader.MAX_TENSORS)]
    tables = b"".join(k.pack() for k in keys) + b"".join(t.pack(32 * i) for i, t in enumerate(tensors))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + tables
    with GgufFile(write(head + bytes(-len(head) % 32) + bytes(32 * len(tensors)))) as file:
        assert len(file.metadata) == reader.MAX_KEYS
        assert len(file.tensors) == reader.MAX_TENSORS
        assert file.tensors["ffff"].shape == (1,)


def test_limit_of_strings(write, refuse) -> None:
    text = "x" * reader.MAX_STRING_BYTES
    with GgufFile(write(build([key("a", STRING, text), Key("b", ARRAY, array(STRING, [text]))]))) as file:
        assert file.metadata["a"] == text and file.metadata["b"] == [text]
    refuse(build([key("a", STRING, text + "x")]), "'a'", str(reader.MAX_STRING_BYTES))
    refuse(build([Key("a", ARRAY, array(STRING, ["ok", text + "x"]))]), "item 1", str(reader.MAX_STRING_BYTES))


def test_limit_of_arrays(write, refuse) -> None:
    n = reader.MAX_ARRAY_ITEMS
    with GgufFile(write(build([Key("a", ARRAY, struct.pack("<IQ", UINT8, n) + bytes(n))]))) as file:
        assert file.metadata["a"].shape == (n,)
    refuse(build([Key("a", ARRAY, struct.pack("<IQ", UINT8, n + 1) + bytes(n + 1))]), "'a'", str(n + 1), str(n))


def test_limit_of_strings_in_all_arrays(write, refuse) -> None:
    half = struct.pack("<IQ", STRING, reader.MAX_ARRAY_ITEMS // 2) + bytes(8 * (reader.MAX_ARRAY_ITEMS // 2))
    GgufFile(write(build([Key("a", ARRAY, half), Key("b", ARRAY, half)]))).close()
    one = Key("c", ARRAY, array(STRING, [""]))
    refuse(build([Key("a", ARRAY, half), Key("b", ARRAY, half), one]), "'c'", str(reader.MAX_ARRAY_ITEMS + 1))


def test_limit_of_the_header(tmp_path: Path) -> None:
    block = struct.pack("<IQ", UINT64, reader.MAX_ARRAY_ITEMS)  # 16 MB each, as holes in a sparse file
    path = tmp_path / "model.gguf"
    for n_arrays, fits in ((6, True), (7, False)):
        with path.open("wb") as out:
            out.write(b"GGUF" + struct.pack("<IQQ", 3, 0, n_arrays))
            for i in range(n_arrays):
                out.write(string(f"key {i}") + struct.pack("<I", ARRAY) + block)
                out.seek(8 * reader.MAX_ARRAY_ITEMS, os.SEEK_CUR)
            out.truncate(out.tell())
        if fits:
            GgufFile(path).close()
        else:
            with pytest.raises(ModelFileError, match=f"key 6.*{reader.MAX_HEADER_BYTES}"):
                GgufFile(path)


# ---- M20: random damage -------------------------------------------------------------------------------


def _mutated(rng: random.Random, good: bytes, header: int) -> bytes:
    """A good file with one to four random wounds, nine in ten of them in the header."""
    raw = bytearray(good)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place = rng.randrange(header if rng.random() < 0.9 else len(raw))
        wound = rng.randrange(6)
        if wound == 0:
            raw[place] ^= 1 << rng.randrange(8)
        elif wound == 1:
            raw[place] = rng.choice((0, 1, 2, 4, 8, 9, 0x7F, 0x80, 0xFF))
        elif wound == 2:
            raw[place : place + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**32, 2**63, 2**64 - 1)))
        elif wound == 3:
            del raw[place : place + rng.randrange(1, 40)]
        elif wound == 4:
            raw[place:place] = rng.randbytes(rng.randrange(1, 40))
        else:
            other, n_bytes = rng.randrange(header), rng.randrange(1, 40)
            raw[place : place + n_bytes] = raw[other : other + n_bytes]
        if not raw:
            return b""
        header = min(header, len(raw))
    return bytes(raw)


def _use(path: Path) -> None:
    """Reads everything of a file that was accepted, and checks that it is what it says."""
    with GgufFile(path) as file:
        size = path.stat().st_size
        assert len(file.metadata) <= reader.MAX_KEYS
        for name, tensor in file.tensors.items():
            assert isinstance(tensor.dtype, DType)
            assert tensor.offset >= 24 and tensor.offset + tensor.n_bytes <= size
            size_of_block, bytes_of_block = reader.BLOCKS[tensor.dtype]
            assert np.prod(tensor.shape) // size_of_block * bytes_of_block == tensor.n_bytes
            assert file.read(name).size == tensor.n_bytes
    model = open_gguf(path)
    try:
        for name, info in model.tensors.items():
            assert model.read(name).size == info.n_bytes
    finally:
        model.close()


def test_m20_random_damage(tmp_path: Path) -> None:
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    goods = [
        build_parts(small_keys(), small_tensors(kind=Q4_0)),
        build_parts(small_keys("qwen2"), small_tensors("qwen2", F16)[:3]),
        build_parts([key("general.alignment", UINT32, 8)], [Tensor("a", [256, 2], Q4_K)], alignment=8),
    ]
    path = tmp_path / "model.gguf"
    accepted, slowest = 0, 0.0
    with path.open("w+b", buffering=0) as out:
        for _ in range(20_000):
            parts = rng.choice(goods)
            raw = _mutated(rng, parts.file, len(parts.header))
            out.seek(0)
            out.write(raw)
            out.truncate(len(raw))
            started = time.process_time()
            try:
                _use(path)
                accepted += 1
            except EngineError as error:
                assert str(path) in str(error)
            slowest = max(slowest, time.process_time() - started)
    print(f"{accepted} accepted, slowest {slowest * 1000:.1f} ms")
    assert 0 < accepted < 20_000
    assert slowest < 5.0, "something hangs"
