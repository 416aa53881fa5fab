"""Converts errors of SQLite, PostgreSQL and the system to Fabula's errors, by their codes."""

from __future__ import annotations

import sqlite3
import tempfile
from pathlib import Path

from sqlalchemy.exc import IntegrityError

from fabula.errors import EngineError, StoreCorrupt, StoreError, StoreFull, StoreReadOnly
from fabula.files import ERRORS_OF_WRITING
from fabula.store.location import Location
from fabula.store.records import Damaged

_BY_SQLITE_CODE = {
    sqlite3.SQLITE_FULL: StoreFull,
    sqlite3.SQLITE_READONLY: StoreReadOnly,
    sqlite3.SQLITE_PERM: StoreReadOnly,
    sqlite3.SQLITE_CORRUPT: StoreCorrupt,
    sqlite3.SQLITE_NOTADB: StoreCorrupt,
}
_BY_SQLSTATE = {
    "53100": StoreFull,
    "25006": StoreReadOnly,
    "42501": StoreReadOnly,
    "XX001": StoreCorrupt,
    "XX002": StoreCorrupt,
}


def translate(error: Exception, place: Location) -> EngineError:
    """The error to raise instead of `error`, which becomes its cause. Fabula's own errors stay as they are."""
    if isinstance(error, EngineError):
        return error
    reason = getattr(error, "orig", None) or error
    kind = _kind(reason, place)
    message = " ".join(str(reason).split())  # PostgreSQL's messages have several lines
    if isinstance(error, IntegrityError):
        message = f"does not fit what is stored: what it refers to is missing, or others refer to it ({message})"
    elif isinstance(reason, OSError):
        message = reason.strerror or message
    translated = kind(place.without_secrets(f"{place.name}: {message}"), path=place.name)
    translated.__cause__ = error
    return translated


def _kind(reason: BaseException, place: Location) -> type[StoreError]:
    if isinstance(reason, Damaged):
        return StoreCorrupt
    if isinstance(reason, OSError):
        return ERRORS_OF_WRITING.get(reason.errno or 0, StoreError)
    if isinstance(reason, sqlite3.Error):
        code = getattr(reason, "sqlite_errorcode", 0) & 0xFF  # the primary code
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and place.file is not None:
            return ERRORS_OF_WRITING.get(_errno_of_writing(place.file.parent), StoreError)
        return _BY_SQLITE_CODE.get(code, StoreError)
    return _BY_SQLSTATE.get(getattr(reason, "sqlstate", None) or "", StoreError)


def _errno_of_writing(folder: Path) -> int:
    """The errno of a small write to a folder; 0 if it succeeds. SQLite hides the errno, so that an exceeded quota or a
    lack of inodes looks like a broken disk."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(4096))
    except OSError as error:
        return error.errno or 0
    return 0
