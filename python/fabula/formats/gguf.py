"""Reads GGUF files, versions 2 and 3, little-endian, trusting nothing in them.

    "GGUF"  version u32  n_tensors u64  n_keys u64
    n_keys    x  { key string, value type u32, value }          string = length u64, then UTF-8
    n_tensors x  { name string, n_dims u32, dims u64 [n_dims], type u32, offset u64 }
    padding to the alignment, then the tensors' bytes, each padded to the alignment

Every count, length and range is checked against the limits below and against the file's size before use, and the file
is read by position, never by memory map, so a damaged, hostile or shrinking file gives a typed error. Tensors must
follow each other without gaps, and the file must end with the last one or its zero padding, so that no second file can
hide in it. gguf_names.py and gguf_config.py interpret names and keys.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from fabula._native import join_strings
from fabula.errors import ModelFileError, OutOfMemory, Unsupported, shown
from fabula.formats.checkpoint import DType, Span
from fabula.formats.readfile import file_size, open_regular, read_at
from fabula.lean_dataclasses import dataclass, replace

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 65_536
MAX_KEYS = 65_536
MAX_STRING_BYTES = 1 << 20
MAX_ARRAY_ITEMS = 2_000_000  # per array; all arrays of strings together, since strings take six times the memory
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
# Value type -> numpy dtype. Types 8 (string) and 9 (array) have no fixed size.
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip

# (elements, bytes) of one block of each format; native/src/quant/blocks.h draws the layouts.
BLOCKS: dict[DType, tuple[int, int]] = {
    DType.F32: (1, 4),
    DType.F16: (1, 2),
    DType.BF16: (1, 2),
    DType.Q4_0: (32, 18),
    DType.Q4_1: (32, 20),
    DType.Q5_0: (32, 22),
    DType.Q5_1: (32, 24),
    DType.Q8_0: (32, 34),
    DType.Q4_K: (256, 144),
    DType.Q5_K: (256, 176),
    DType.Q6_K: (256, 210),
    DType.Q2_K: (256, 84),
    DType.Q3_K: (256, 110),
    DType.IQ4_NL: (32, 18),
    DType.MXFP4: (32, 17),
}

# Numbers of enum ggml_type.
_DTYPES = {
    0: DType.F32, 1: DType.F16, 2: DType.Q4_0, 3: DType.Q4_1, 6: DType.Q5_0, 7: DType.Q5_1, 8: DType.Q8_0,
    10: DType.Q2_K, 11: DType.Q3_K, 12: DType.Q4_K, 13: DType.Q5_K, 14: DType.Q6_K, 20: DType.IQ4_NL, 30: DType.BF16,
    39: DType.MXFP4,
}  # fmt: skip
TENSOR_TYPES = {dtype: number for number, dtype in _DTYPES.items()}
_OTHER_TYPES = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: GGUF's name, e.g. "blk.0.attn_q.weight".
        dtype: format of its bytes.
        shape: row-major, slowest dimension first: GGUF's dimensions reversed.
        offset: position of its first byte in the file.
        n_bytes: bytes it takes there.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class GgufFile:
    """An opened GGUF file whose header was read and checked.

    Values of `metadata` are int, float, bool, str, list[str] or, for arrays of numbers and booleans, read-only numpy
    arrays of the file's width. A FLOAT32 becomes the float that equals it exactly.

    Args:
        path: the file.
        check_kind: callback with path and metadata, before the tensors are parsed; its exceptions propagate.

    Raises:
        ModelFileError: the file cannot be opened or something in it is damaged; the message names what.
        Unsupported: another version or byte order of GGUF, or an unsupported tensor type.
        OutOfMemory: no room for the header.

    Attributes:
        path: the file.
        version: 2 or 3.
        metadata: key-values in the file's order.
        tensors: by GGUF name, in the file's order.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        check_kind: Callable[[Path, Mapping[str, object]], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self._file = open_regular(self.path)
        try:
            header = _Header(self.path, self._file, check_kind)
        except MemoryError as error:
            self._file.close()
            if isinstance(error, OutOfMemory):
                raise
            raise OutOfMemory(f"{self.path}: no memory for the header") from error
        except BaseException:
            self._file.close()
            raise
        self.version = header.version
        self.metadata: dict[str, object] = header.metadata
        self.tensors: dict[str, GgufTensor] = header.tensors

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """Reads a tensor's bytes as stored, uint8 [n_bytes]. Thread-safe.

        Raises:
            ModelFileError: no tensor has that name, or the file is closed or shorter than when it was opened.
            OutOfMemory: no room for the bytes.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"{self.path}: has no tensor {shown(name)}", path=self.path, field=name)
        return read_at(self._file, tensor.offset, tensor.n_bytes, path=self.path, field=name)

    def span(self, name: str) -> Span:
        """Where the file has a tensor's bytes; errors as `read`."""
        tensor = self.tensors.get(name)
        if tensor is None or self._file.closed:
            problem = f"has no tensor {shown(name)}" if tensor is None else "is closed"
            raise ModelFileError(f"{self.path}: {problem}", path=self.path, field=name)
        return Span(self._file.fileno(), tensor.offset, self.path)

    def close(self) -> None:
        """Closes the file; may be called twice."""
        self._file.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Header:
    """Parses the header from a buffer that is filled from the file as needed."""

    def __init__(
        self, path: Path, file: io.FileIO, check_kind: Callable[[Path, Mapping[str, object]], None] | None
    ) -> None:
        self._path = path
        self._file = file
        self._size = file_size(file)
        self._data = bytearray()
        self._joined = bytearray()  # output buffer of join_strings, as long as _data
        self._pos = 0
        self._n_strings = 0
        self.metadata: dict[str, object] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self._alignment = DEFAULT_ALIGNMENT

        self.version = self._read_version()
        n_tensors = self._count("n_tensors", MAX_TENSORS)
        n_keys = self._count("n_keys", MAX_KEYS)
        for i in range(n_keys):
            self._read_key(i)
        if check_kind is not None:
            check_kind(path, self.metadata)
        self._not_offered: dict[int, list[str]] = {}  # names of unsupported tensors by type number
        infos = [self._read_tensor_info(i) for i in range(n_tensors)]
        if self._not_offered:
            raise self._types_error()
        self._place([info for info in infos if info is not None])

    # ---- Bytes ----------------------------------------------------------------------------------------

    def _error(self, field: str, problem: str) -> ModelFileError:
        where = f"{field}: " if field else ""
        return ModelFileError(f"{self._path}: {where}{problem}", path=self._path, field=field)

    def _need(self, n_bytes: int, field: str) -> None:
        """Fills the buffer up to the next n_bytes."""
        end = self._pos + n_bytes
        if end <= len(self._data):
            return
        if end > self._size:
            raise self._error(
                field,
                f"{n_bytes} bytes wanted at byte {self._pos}, but the file ends at {self._size}: it is cut",
            )
        if end > MAX_HEADER_BYTES:
            raise self._error(field, f"the header goes beyond {MAX_HEADER_BYTES} bytes, the most allowed")
        have = len(self._data)
        wanted = min(self._size, MAX_HEADER_BYTES, max(end, 2 * have, 1 << 16))
        self._data.extend(read_at(self._file, have, wanted - have, path=self._path, field=field).data)

    def _u32(self, field: str) -> int:
        self._need(4, field)
        self._pos += 4
        return int(_U32.unpack_from(self._data, self._pos - 4)[0])

    def _u64(self, field: str) -> int:
        self._need(8, field)
        self._pos += 8
        return int(_U64.unpack_from(self._data, self._pos - 8)[0])

    def _count(self, field: str, most: int) -> int:
        count = self._u64(field)
        if count > most:
            raise self._error(field, f"is {count}, at most {most} allowed")
        return count

    def _strings(self, count: int, field: Callable[[int], str]) -> list[str]:
        """Reads `count` strings; `field(i)` names the i-th in messages.

        The native library decodes all strings in the buffer at once, because vocabularies are long. The others are read
        one by one: those beyond the buffer, those with a NUL, and invalid ones.
        """
        out: list[str] = []
        while len(out) < count:
            out += self._joined_strings(count - len(out), len(out), field)
            if len(out) < count:
                out.append(self._string(field(len(out))))
        return out

    def _joined_strings(self, most: int, first: int, field: Callable[[int], str]) -> list[str]:
        if len(self._joined) < len(self._data):
            self._joined = bytearray(len(self._data))
        count, n_read, n_written = join_strings(self._data, self._pos, most, MAX_STRING_BYTES, self._joined)
        if count == 0:
            return []
        with memoryview(self._joined) as joined:
            data = bytes(joined[: n_written - 1])
        try:
            texts = data.decode().split("\0")
        except UnicodeDecodeError as error:
            begin = data.rfind(b"\0", 0, error.start) + 1
            raise self._not_utf8(field(first + data.count(b"\0", 0, begin)), error, error.start - begin) from error
        self._pos += n_read
        return texts

    def _string(self, field: str) -> str:
        length = self._u64(field)
        if length > MAX_STRING_BYTES:
            raise self._error(field, f"string of {length} bytes, at most {MAX_STRING_BYTES} allowed")
        self._need(length, field)
        self._pos += length
        try:
            return self._data[self._pos - length : self._pos].decode()
        except UnicodeDecodeError as error:
            raise self._not_utf8(field, error, error.start) from error

    def _not_utf8(self, field: str, error: UnicodeDecodeError, at: int) -> ModelFileError:
        return self._error(field, f"string is not UTF-8: {error.reason} at its byte {at}")

    # ---- Parts ----------------------------------------------------------------------------------------

    def _read_version(self) -> int:
        self._need(4, "magic")
        magic = bytes(self._data[:4])
        if magic != b"GGUF":
            raise self._error("magic", f"file begins with {magic!r}, not with b'GGUF': this is not a GGUF file")
        self._pos = 4
        version = self._u32("version")
        if version in (2, 3):
            return version
        if version == 0:
            raise self._error("version", "is 0, must be 2 or 3")
        if version & 0xFFFF == 0:
            raise Unsupported(
                f"{self._path}: version: is 0x{version:08x}: a big-endian file; convert it to little-endian"
            )
        raise Unsupported(f"{self._path}: version: is {version}, 2 and 3 are read; convert the model again")

    def _read_key(self, index: int) -> None:
        key = self._string(f"key {index}")
        if not key:
            raise self._error(f"key {index}", "has an empty name")
        field = f"key {shown(key)}"
        if key in self.metadata:
            raise self._error(field, "stands twice")
        kind = self._u32(field)
        if key == "general.alignment":
            self._read_alignment(field, kind)
            value: object = self._alignment
        elif kind == _STRING:
            value = self._string(field)
        elif kind == _ARRAY:
            value = self._read_array(field)
        else:
            value = self._read_numbers(kind, 1, field)[0].item()
        self.metadata[key] = value

    def _read_alignment(self, field: str, kind: int) -> None:
        if kind != _UINT32:
            raise self._error(field, f"has value type {kind}, must be {_UINT32} (UINT32)")
        alignment = self._u32(field)
        if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._error(field, f"is {alignment}, must be a power of two up to {MAX_ALIGNMENT}")
        self._alignment = alignment

    def _read_array(self, field: str) -> object:
        kind = self._u32(field)
        if kind == _ARRAY:
            raise self._error(field, "is an array of arrays, which no model needs")
        if kind != _STRING and kind not in _SCALARS:
            raise self._error(field, f"is an array of unknown value type {kind}")
        count = self._u64(field)
        if count > MAX_ARRAY_ITEMS:
            raise self._error(field, f"has {count} items, at most {MAX_ARRAY_ITEMS} allowed")
        if kind != _STRING:
            return self._read_numbers(kind, count, field)
        self._n_strings += count
        if self._n_strings > MAX_ARRAY_ITEMS:
            raise self._error(
                field, f"brings the strings in arrays to {self._n_strings}, at most {MAX_ARRAY_ITEMS} allowed"
            )
        if 8 * count > self._size - self._pos:  # the lengths alone would not fit
            raise self._error(field, f"{count} strings do not fit into the {self._size - self._pos} bytes left")
        return self._strings(count, lambda i: f"{field} item {i}")

    def _read_numbers(self, kind: int, count: int, field: str) -> npt.NDArray[np.generic]:
        """Reads numbers or booleans into a read-only array [count]."""
        if kind not in _SCALARS:
            raise self._error(field, f"has unknown value type {kind}")
        n_bytes = count * np.dtype(_SCALARS[kind]).itemsize
        self._need(n_bytes, field)
        values = np.frombuffer(bytes(self._data[self._pos : self._pos + n_bytes]), _SCALARS[kind])
        self._pos += n_bytes
        if kind != _BOOL:
            return values
        if count and values.max() > 1:
            raise self._error(field, f"is a boolean of value {values.max()}, must be 0 or 1")
        return values.view(np.bool_)

    def _read_tensor_info(self, index: int) -> GgufTensor | None:
        """Reads one tensor's entry; None for an unsupported type. The offset counts from the start of the data."""
        name = self._string(f"tensor {index}")
        if not name:
            raise self._error(f"tensor {index}", "has an empty name")
        field = f"tensor {shown(name)}"
        if name in self.tensors:
            raise self._error(field, "stands twice")
        n_dims = self._u32(field)
        if not 1 <= n_dims <= MAX_DIMS:
            raise self._error(field, f"has {n_dims} dimensions, must have 1 to {MAX_DIMS}")
        dims = [self._u64(field) for _ in range(n_dims)]
        kind = self._u32(field)
        offset = self._u64(field)
        if kind not in _DTYPES:
            self._not_offered.setdefault(kind, []).append(name)
            return None
        dtype = _DTYPES[kind]
        block_size, block_bytes = BLOCKS[dtype]
        n_elements = 1
        for dim in dims:  # Python's integers do not overflow; the size check below catches huge products
            if dim == 0:
                raise self._error(field, f"has a dimension of 0 in {dims}")
            n_elements *= dim
        if dims[0] % block_size:
            raise self._error(field, f"rows of {dims[0]} elements, {dtype.name} needs a multiple of {block_size}")
        n_bytes = n_elements // block_size * block_bytes
        if n_bytes > self._size:
            raise self._error(
                field, f"dimensions {dims} of {dtype.name} take {n_bytes} bytes, the file has {self._size}"
            )
        tensor = GgufTensor(name, dtype, tuple(reversed(dims)), offset, n_bytes)
        self.tensors[name] = tensor
        return tensor

    def _types_error(self) -> Unsupported:
        """An error that lists the unsupported types and the tensors that have them."""
        parts = []
        for kind, names in self._not_offered.items():
            first = ", ".join(map(shown, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            of = "tensor" if len(names) == 1 else "tensors"
            parts.append(f"{of} {first}: type {kind} ({_OTHER_TYPES.get(kind, 'unknown')}) is not offered")
        known = ", ".join(dtype.name for dtype in _DTYPES.values())
        return Unsupported(f"{self._path}: {'; '.join(parts[:8])}; quantize the model again, to one of {known}")

    def _place(self, infos: list[GgufTensor]) -> None:
        """Checks that the tensors cover the data without overlap or gap, and makes their offsets absolute."""
        start = self._padded(self._pos)
        end = 0
        for info in sorted(infos, key=lambda info: info.offset):
            field = f"tensor {shown(info.name)}"
            if info.offset % self._alignment:
                raise self._error(field, f"offset {info.offset} is not a multiple of the alignment, {self._alignment}")
            last = start + info.offset + info.n_bytes
            if last > self._size:
                raise self._error(field, f"ends at byte {last}, but the file at {self._size}: it is cut")
            if info.offset != self._padded(end):
                problem = "overlaps the tensor before it" if info.offset < end else "leaves a hole"
                raise self._error(field, f"offset {info.offset} {problem}, must be {self._padded(end)}")
            end = info.offset + info.n_bytes
        self.tensors = {i.name: replace(i, offset=start + i.offset) for i in infos}
        self._check_tail(start + end if infos else self._pos)

    def _check_tail(self, end: int) -> None:
        """Checks that only zero padding follows the last tensor: no second file of another format."""
        if self._size > self._padded(end):
            raise self._error("", f"{self._size - end} bytes follow the last tensor, which ends at byte {end}")
        if self._size > end and read_at(self._file, end, self._size - end, path=self._path).any():
            raise self._error("", f"the padding after the last tensor, at byte {end}, is not zero")

    def _padded(self, n_bytes: int) -> int:
        return (n_bytes + self._alignment - 1) & -self._alignment
