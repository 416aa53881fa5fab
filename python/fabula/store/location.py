"""The location of a store: parsing of paths and URLs, file lock, and connections."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError

from fabula.errors import InvalidArgument, StoreError
from fabula.files import FileLock, fsync_folder

_FILE = "sessions.sqlite3"  # in a folder
_FILE_SUFFIXES = {".sqlite3", ".sqlite", ".db"}
_PRAGMAS = """
    PRAGMA busy_timeout = 5000;
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = FULL;
    PRAGMA foreign_keys = ON;
    PRAGMA trusted_schema = OFF;
    PRAGMA cell_size_check = ON;
    PRAGMA journal_size_limit = 16777216;
    PRAGMA temp_store = MEMORY;
"""  # temp_store: no conversation goes to temporary files


@dataclass(frozen=True, slots=True)
class Location:
    """The location of a store.

    Attributes:
        url: for SQLAlchemy.
        name: the path, or the URL without secrets, for messages.
        file: of SQLite; None for a database server.
    """

    url: sa.URL
    name: str
    file: Path | None

    def without_secrets(self, message: str) -> str:
        """Removes the URL's secrets from a message."""
        secrets = [self.url.password, *(v for k, v in self.url.query.items() if "pass" in k)]
        for secret in secrets:
            if secret:
                message = message.replace(str(secret), "***")
        return message


def find_location(place: str | os.PathLike[str]) -> Location:
    """Parses a path or URL.

    Args:
        place: path of a file (it exists, or ends with .sqlite3, .sqlite or .db); path of a folder, for sessions.sqlite3
            in it; or URL (sqlite:///path, postgresql+psycopg://user:password@host/database).

    Raises:
        InvalidArgument: an invalid or unsupported URL.
    """
    text = os.fspath(place)
    if "://" not in text:
        return _file_location(Path(text))
    try:
        url = sa.make_url(text)
        driver = url.drivername
    except (ArgumentError, ValueError):
        raise InvalidArgument(
            "the store's URL cannot be read; it is not repeated here, as it may hold a password"
        ) from None
    if driver in ("sqlite", "sqlite+pysqlite"):
        if url.query or url.database in (None, "", ":memory:"):
            raise InvalidArgument("a store in SQLite is a file: sqlite:///path, without a query")
        return _file_location(Path(str(url.database)))
    if driver in ("postgresql", "postgresql+psycopg"):
        shown = url.set(query={}).render_as_string(hide_password=True)
        return Location(url.set(drivername="postgresql+psycopg"), shown, None)
    raise InvalidArgument(f"{driver} is not supported for a store; give a path, sqlite:/// or postgresql+psycopg://")


def _file_location(path: Path) -> Location:
    path = path.absolute()
    if path.is_dir() or (path.suffix not in _FILE_SUFFIXES and not path.exists()):
        path /= _FILE
    return Location(sa.URL.create("sqlite", database=str(path)), str(path), path)


def prepare_file(file: Path) -> FileLock:
    """Creates a database's folder and file, accessible to this user only, and locks it.

    Raises:
        StoreLocked: another process, or another store in this one, uses it.
        OSError: a system call failed.
    """
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(file.with_name(file.name + ".lock"), file)
    try:
        # Only after locking, because closing a file releases all locks that SQLite has on it in this process. SQLite
        # gives its other files the same mode.
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        fsync_folder(file.parent)
    except BaseException:
        lock.close()
        raise
    return lock


def make_engine(place: Location) -> sa.Engine:
    """Creates a SQLAlchemy engine, without connecting. Its messages never contain values.

    Raises:
        StoreError: the database's driver is not installed.
    """
    try:
        engine = sa.create_engine(place.url, hide_parameters=True, pool_pre_ping=place.file is None)
    except ModuleNotFoundError as error:
        raise StoreError(
            f'{place.name}: {error.name} is not installed; `pip install "psycopg[binary]"`', path=place.name
        ) from None
    if place.file is not None:
        sa.event.listen(engine, "connect", _set_up_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def connect(engine: sa.Engine, *, write: bool) -> sa.Connection:
    """A connection whose transactions write, or read one snapshot of the database."""
    if engine.dialect.name == "sqlite":
        return engine.connect().execution_options(sqlite_begin="BEGIN IMMEDIATE" if write else "BEGIN")
    return engine.connect().execution_options(isolation_level="READ COMMITTED" if write else "REPEATABLE READ")


def checkpoint(connection: sa.Connection) -> None:
    """Moves the content of SQLite's write-ahead log into the database file; does nothing in other databases."""
    if connection.dialect.name == "sqlite":
        driver: Any = connection.connection.driver_connection
        driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _set_up_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # SQLAlchemy begins all transactions, also for schema changes
    # Invalid UTF-8 must reach the checksum, which names the row, instead of failing the query.
    connection.text_factory = lambda data: data.decode(errors="surrogateescape")
    for pragma in _PRAGMAS.split(";")[:-1]:
        connection.execute(pragma).fetchall()


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))
