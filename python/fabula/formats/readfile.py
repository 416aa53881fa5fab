"""Files that strangers wrote: opened as regular files only, read by position, and their JSON taken strictly.

A model folder is untrusted input. So nothing here maps a file into memory (a file that another process
shortens gives an error, not a signal), a pipe or device in place of a file is refused instead of waited for,
and JSON is taken as the standard has it: no NaN or Infinity, no number beyond 64 bits, no key twice, UTF-8
only. Every failure is a ModelFileError that names the file.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from fabula.errors import ModelFileError, OutOfMemory

_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1


def shown(name: object, limit: int = 80) -> str:
    """A foreign name as a message may repeat it: quoted, control characters escaped, cut at `limit`."""
    text = str(name)
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"


def open_regular(path: Path) -> io.FileIO:
    """Opens a regular file for reading by position.

    Raises:
        ModelFileError: no such file, not a regular file, or not readable.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer for ever.
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
    while done < n_bytes:  # one turn, except that Linux moves at most 2 GiB a call
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
        path: file it came from, for messages.
        what: part of the file that is meant ("header"), "" for all of it.
        wide_integers: whether numbers of up to 40 digits pass; transformers writes 10^30 where it means "no limit".

    Raises:
        ModelFileError: not UTF-8, not JSON, not an object, a key twice, half a UTF-16 pair, NaN or Infinity,
            a number beyond 64 bits, or nested too deep.
    """
    where = f"{path}: {what}" if what else str(path)

    def fail(reason: str) -> NoReturn:
        raise ModelFileError(f"{where}: {reason}", path=path, field=what)

    def parse_constant(text: str) -> NoReturn:
        fail(f"{text} is not JSON")

    def parse_int(text: str) -> int:
        # The length comes first: turning very many digits into an int takes quadratic time.
        if wide_integers and len(text) <= 40:
            return int(text)
        if len(text) > 20 or not _INT_MIN <= (value := int(text)) <= _INT_MAX:
            fail(f"the number {shown(text)} does not fit 64 bits")
        return value

    def parse_float(text: str) -> float:
        if not math.isfinite(value := float(text)):
            fail(f"the number {shown(text)} is too large")
        return value

    def parse_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    fail(f"the key {shown(key)} appears twice")
                seen.add(key)
        return result

    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=parse_constant,
            parse_int=parse_int,
            parse_float=parse_float,
            object_pairs_hook=parse_pairs,
        )
    except UnicodeDecodeError as error:
        fail(f"is not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        fail(f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}")
    except RecursionError:
        fail("is nested too deep")
    except MemoryError:
        raise OutOfMemory(f"{where}: no memory to parse {len(data)} bytes of JSON") from None
    if not isinstance(value, dict):
        fail(f"is a JSON {type(value).__name__}, not an object")
    if b"\\ud" in data or b"\\uD" in data:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            fail("holds half a UTF-16 pair, which UTF-8 cannot carry")
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
