"""Reads untrusted files: regular files only, by position, with strict JSON.

Nothing here maps a file into memory, so a file that another process truncates gives an error, not a signal. A pipe or
device in place of a file is refused, not waited for. Every failure is a ModelFileError that names the file.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fabula import strict_json
from fabula.errors import ModelFileError, OutOfMemory, shown


def open_regular(path: Path) -> io.FileIO:
    """Opens a regular file for reading by position.

    Raises:
        ModelFileError: no such file, not a regular file, or not readable.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would block until there is a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file", path=path) from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be opened: {error}", path=path) from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ModelFileError(f"{path}: is not a regular file", path=path)
        return io.FileIO(fd, "rb", closefd=True)
    except BaseException:
        os.close(fd)
        raise


def file_size(file: io.FileIO) -> int:
    """Size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


def read_at(file: io.FileIO, offset: int, n_bytes: int, *, path: Path, field: str = "") -> npt.NDArray[np.uint8]:
    """Reads `n_bytes` bytes at `offset` into a new array, uint8 [n_bytes].

    Raises:
        ModelFileError: the file ends early, is closed, or the disk fails.
        OutOfMemory: no room for the bytes.
    """
    where = f"{path}: {shown(field)}" if field else str(path)
    try:
        buffer = np.empty(n_bytes, dtype=np.uint8)
    except MemoryError:
        raise OutOfMemory(f"{where}: no memory for {n_bytes} bytes") from None
    view = buffer.data
    done = 0
    while done < n_bytes:  # Linux reads at most 2 GiB a call
        try:
            n = os.preadv(file.fileno(), [view[done:]], offset + done)
        except (OSError, ValueError, OverflowError) as error:
            raise ModelFileError(f"{where}: cannot be read: {error}", path=path, field=field) from None
        if n == 0:
            raise ModelFileError(
                f"{where}: the file ends at byte {offset + done}, {n_bytes - done} bytes too early;"
                " it was cut, or changed while in use",
                path=path,
                field=field,
            )
        done += n
    return buffer


def parse_json_object(data: bytes, *, path: Path, what: str = "", wide_integers: bool = False) -> dict[str, Any]:
    """Parses a JSON object strictly.

    Args:
        data: the whole text.
        path: of the file, for messages.
        what: the part of the file ("header"); "" for all of it.
        wide_integers: accept integers of up to 40 digits; see `strict_json.parse`.

    Raises:
        ModelFileError: not an object, or not strict JSON; see `strict_json.parse`.
        OutOfMemory: no room for the values.
    """
    where = f"{path}: {what}" if what else str(path)

    def error(reason: str) -> ModelFileError:
        return ModelFileError(f"{where}: {reason}", path=path, field=what)

    try:
        value = strict_json.parse(data, error, wide_integers=wide_integers)
    except MemoryError:
        raise OutOfMemory(f"{where}: no memory to parse {len(data)} bytes of JSON") from None
    if not isinstance(value, dict):
        raise error(f"is a JSON {type(value).__name__}, not an object")
    return value


def read_json_object(path: Path, *, max_bytes: int, wide_integers: bool = False) -> dict[str, Any]:
    """Reads and parses a JSON file of at most `max_bytes` bytes.

    Raises:
        ModelFileError: missing, too large, or not a strict JSON object; see `parse_json_object`.
    """
    with open_regular(path) as file:
        size = file_size(file)
        if size > max_bytes:
            raise ModelFileError(f"{path}: has {size} bytes, more than the {max_bytes} allowed", path=path)
        data = read_at(file, 0, size, path=path)
    return parse_json_object(data.tobytes(), path=path, wide_integers=wide_integers)
