"""Writes GGUF files, version 3: the counterpart of gguf.py, which draws the format.

The header comes first, since shapes and formats give each tensor's offset. The tensors' bytes follow in order, in
pieces of any size, so only one piece is in memory. The file has a temporary name until it is complete. What the reader
would refuse (a duplicate name, a row of partial blocks, a string that is too long) is refused here.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from fabula.errors import InvalidArgument, shown
from fabula.files import writing_whole
from fabula.formats.checkpoint import DType
from fabula.formats.gguf import (
    BLOCKS,
    DEFAULT_ALIGNMENT,
    MAX_ALIGNMENT,
    MAX_ARRAY_ITEMS,
    MAX_DIMS,
    MAX_HEADER_BYTES,
    MAX_KEYS,
    MAX_STRING_BYTES,
    MAX_TENSORS,
    TENSOR_TYPES,
)

__all__ = ["GgufWriter", "NewTensor", "Value"]

# A Python int becomes UINT32, or the first of INT32, UINT64 and INT64 that holds it; a float FLOAT32, or FLOAT64 if
# that would round. Numpy scalars and arrays keep their width.
Value = bool | int | float | str | list[str] | np.generic | npt.NDArray[np.generic]

_STRING, _ARRAY = 8, 9
_NUMBERS = {
    "u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write.

    Attributes:
        name: GGUF's name, e.g. "blk.0.attn_q.weight".
        dtype: format of its bytes.
        shape: row-major, slowest dimension first, as in `GgufTensor`.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        size, n_bytes = BLOCKS[self.dtype]
        return math.prod(self.shape) // size * n_bytes


class GgufWriter:
    """Writes a GGUF file. A context manager: a normal exit puts the file in place, if every tensor is complete.

    Example:
        >>> with GgufWriter(path, {"general.architecture": "llama"}, [NewTensor("t", DType.F32, (2, 3))]) as writer:
        ...     writer.write("t", np.zeros((2, 3), np.float32))

    Args:
        path: of the file.
        metadata: key-values in file order; `general.alignment` is written from `alignment`.
        tensors: in the order in which they are written.
        alignment: of the tensors' bytes, a power of two.
        overwrite: whether to replace an existing file.

    Raises:
        InvalidArgument: a key, value or tensor that readers would refuse, or the file exists. Leaves no file.
        StoreFull, StoreReadOnly, StoreError: the file cannot be written. Leaves no file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Value],
        tensors: Sequence[NewTensor],
        *,
        alignment: int = DEFAULT_ALIGNMENT,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise InvalidArgument(f"alignment is {alignment}, must be a power of two up to {MAX_ALIGNMENT}")
        self._alignment = alignment
        self._tensors = list(tensors)
        self._header = self._pack_header(metadata)
        self._overwrite = overwrite
        self._stack = contextlib.ExitStack()
        self._file: BinaryIO | None = None
        self._index = 0  # of the current tensor
        self._written = 0  # bytes of the current tensor

    @property
    def n_bytes(self) -> int:
        """Size of the whole file in bytes."""
        return len(self._header) + sum(self._padded(tensor.n_bytes) for tensor in self._tensors)

    def __enter__(self) -> GgufWriter:
        self._file = self._stack.enter_context(writing_whole(self.path, overwrite=self._overwrite))
        self._put(self._header)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file = None
        if error is None and self._index < len(self._tensors):
            name = shown(self._tensors[self._index].name)
            error = InvalidArgument(f"{self.path}: tensor {name} is not complete; every tensor must be written")
            with contextlib.suppress(InvalidArgument):
                self._stack.__exit__(InvalidArgument, error, None)
            raise error
        self._stack.__exit__(kind, error, trace)

    def write(self, name: str, piece: npt.NDArray[np.generic]) -> None:
        """Appends bytes to a tensor: all of it, or the next piece.

        Args:
            name: of the current tensor, or of the next one once that is complete.
            piece: an array; its bytes are written in row-major order.

        Raises:
            InvalidArgument: not the current tensor, or more bytes than it has left.
            StoreFull, StoreError: the write failed; the file cannot be completed.
        """
        expected = self._tensors[self._index] if self._index < len(self._tensors) else None
        if expected is None or expected.name != name:
            turn = "all are written" if expected is None else f"it is the turn of {shown(expected.name)}"
            raise InvalidArgument(f"{self.path}: tensor {shown(name)}: {turn}")
        if self._written + piece.nbytes > expected.n_bytes:
            raise InvalidArgument(
                f"{self.path}: tensor {shown(name)}: has {expected.n_bytes} bytes, "
                f"{self._written} are written and {piece.nbytes} more given"
            )
        self._put(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        self._written += piece.nbytes
        if self._written == expected.n_bytes:
            self._put(bytes(self._padded(self._written) - self._written))
            self._index += 1
            self._written = 0

    # ---- The header -------------------------------------------------------------------------------------------------

    def _pack_header(self, metadata: Mapping[str, Value]) -> bytes:
        keys = {key: value for key, value in metadata.items() if key != "general.alignment"}
        if self._alignment != DEFAULT_ALIGNMENT:
            keys = {"general.alignment": np.uint32(self._alignment), **keys}
        if len(keys) > MAX_KEYS or len(self._tensors) > MAX_TENSORS:
            raise InvalidArgument(
                f"{self.path}: {len(keys)} keys and {len(self._tensors)} tensors, "
                f"at most {MAX_KEYS} and {MAX_TENSORS} allowed"
            )
        parts = [b"GGUF", struct.pack("<IQQ", 3, len(self._tensors), len(keys))]
        n_strings = 0
        for key, value in keys.items():
            if isinstance(value, list):
                n_strings += len(value)
            parts += [self._string(key, f"key {shown(key)}"), self._value(key, value)]
        if n_strings > MAX_ARRAY_ITEMS:
            raise InvalidArgument(f"{self.path}: {n_strings} strings in arrays, at most {MAX_ARRAY_ITEMS} allowed")
        offset = 0
        seen: set[str] = set()
        for tensor in self._tensors:
            self._check_tensor(tensor, seen)
            dims = tuple(reversed(tensor.shape))
            parts.append(self._string(tensor.name, f"tensor {shown(tensor.name)}"))
            parts.append(struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
            parts.append(struct.pack("<IQ", TENSOR_TYPES[tensor.dtype], offset))
            offset += self._padded(tensor.n_bytes)
        header = b"".join(parts)
        if len(header) > MAX_HEADER_BYTES:
            raise InvalidArgument(f"{self.path}: a header of {len(header)} bytes, at most {MAX_HEADER_BYTES} allowed")
        return header + bytes(self._padded(len(header)) - len(header)) if self._tensors else header

    def _check_tensor(self, tensor: NewTensor, seen: set[str]) -> None:
        where = f"{self.path}: tensor {shown(tensor.name)}"
        if not tensor.name:
            raise InvalidArgument(f"{self.path}: a tensor has an empty name")
        if tensor.name in seen:
            raise InvalidArgument(f"{where}: given twice")
        seen.add(tensor.name)
        if not 1 <= len(tensor.shape) <= MAX_DIMS or min(tensor.shape) < 1:
            raise InvalidArgument(f"{where}: shape is {list(tensor.shape)}, must be 1 to {MAX_DIMS} numbers above 0")
        size = BLOCKS[tensor.dtype][0]
        if tensor.shape[-1] % size:
            raise InvalidArgument(
                f"{where}: rows of {tensor.shape[-1]} elements, {tensor.dtype.name} needs a multiple of {size}"
            )

    def _string(self, text: str, where: str) -> bytes:
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"{self.path}: {where}: a lone surrogate at position {error.start}") from None
        if not raw and where.startswith("key"):
            raise InvalidArgument(f"{self.path}: a key has an empty name")
        if len(raw) > MAX_STRING_BYTES:
            raise InvalidArgument(f"{self.path}: {where}: {len(raw)} bytes, at most {MAX_STRING_BYTES} allowed")
        return struct.pack("<Q", len(raw)) + raw

    def _value(self, key: str, value: Value) -> bytes:
        """Type and payload of a value."""
        where = f"value of {shown(key)}"
        if isinstance(value, str):
            return struct.pack("<I", _STRING) + self._string(value, where)
        if isinstance(value, list):
            if not all(isinstance(item, str) for item in value):
                raise InvalidArgument(f"{self.path}: {where}: must be a list of strings; give numbers as numpy arrays")
            head = struct.pack("<IIQ", _ARRAY, _STRING, len(value))
            return head + b"".join(self._string(item, f"item {i} of {shown(key)}") for i, item in enumerate(value))
        if isinstance(value, bool | int | float):
            value = self._scalar(value, where)
        array = np.asarray(value)
        kind = _NUMBERS.get(array.dtype.str[1:])
        if kind is None or array.ndim > 1:
            raise InvalidArgument(f"{self.path}: {where}: {array.dtype} of {array.ndim} dimensions has no type in GGUF")
        payload = array.astype(array.dtype.newbyteorder("<")).tobytes()
        if array.ndim == 0:
            return struct.pack("<I", kind) + payload
        if array.size > MAX_ARRAY_ITEMS:
            raise InvalidArgument(f"{self.path}: {where}: {array.size} items, at most {MAX_ARRAY_ITEMS} allowed")
        return struct.pack("<IIQ", _ARRAY, kind, array.size) + payload

    def _scalar(self, value: bool | int | float, where: str) -> np.generic:
        if isinstance(value, bool):
            return np.bool_(value)
        if isinstance(value, int):
            for kind in (np.uint32, np.int32, np.uint64, np.int64):
                if np.iinfo(kind).min <= value <= np.iinfo(kind).max:
                    return kind(value)
            raise InvalidArgument(f"{self.path}: {where}: {value} needs more than 64 bits")
        with np.errstate(over="ignore"):
            single = np.float32(value)
        return single if float(single) == value or math.isnan(value) else np.float64(value)

    def _padded(self, n_bytes: int) -> int:
        return (n_bytes + self._alignment - 1) & -self._alignment

    def _put(self, raw: bytes | memoryview) -> None:
        if self._file is None:
            raise InvalidArgument(f"{self.path}: is not being written; use `with`")
        self._file.write(raw)
