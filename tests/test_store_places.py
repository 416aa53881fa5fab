"""The file of a store: its version, its place, damage, and the end of the process that has it."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from fabula.errors import InvalidArgument, StoreCorrupt, StoreError, StoreFull, StoreLocked, StoreReadOnly, StoreTooNew
from fabula.store.failures import translate
from fabula.store.location import connect, find_location, make_engine
from fabula.store.migrate import migrate
from fabula.store.records import TurnRecord, session_row, turn_row
from fabula.store.schema import VERSION_TABLE, metadata, sessions, turns
from fabula.store.store import Store
from storing import Draft, Gate, a_session, chain, done, put_all
from waiting import run_program


def run_python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a program in an interpreter of its own; it sees the helpers of tests."""
    return run_program(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
    )


# ---- Versions --------------------------------------------------------------------------------------------------------


def test_a_store_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    place = find_location(tmp_path / "old file %s.db")
    engine = make_engine(place)
    found = chain(3)
    with connect(engine, write=True) as connection:
        migrate(connection, place.name, revision="0001")
        with connection.begin():
            row = session_row(a_session(head_id=found[-1].id))
            connection.execute(sa.insert(sessions), row)
            for turn in found:
                row = turn_row(turn, "t")
                del row["cut"], row["said"]
                connection.execute(sa.insert(turns), row)
        columns = {column["name"] for column in sa.inspect(connection).get_columns("turns")}
    engine.dispose()
    assert "cut" not in columns, "it really is the first version"
    with Store.open(place.name) as store:
        assert store.load("t", "s") == (a_session(head_id=found[-1].id), found)
        cut = replace(found[1], cut={"left_out": 7})
        done(*put_all(store, [cut]))
        assert store.load("t", "s")[1][1] == cut and store.check() == []


def test_migrations_make_the_tables_that_are_used(store: Store) -> None:
    with connect(store._engine, write=False) as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, metadata) == []


def test_opening_says_nothing_and_leaves_logging_alone(tmp_path: Path) -> None:
    program = """
import logging, sys
from fabula.store.store import Store
before = {name: logging.getLogger(name).level for name in ("", "alembic", "sqlalchemy", "sqlalchemy.engine")}
Store.open(sys.argv[1]).close()
assert before == {name: logging.getLogger(name).level for name in before} and not logging.root.handlers
"""
    result = run_python(program, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_newer_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    Store.open(tmp_path).close()
    file = tmp_path / "sessions.sqlite3"
    with sqlite3.connect(file) as connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    connection.close()
    with pytest.raises(StoreTooNew, match="9999"):
        Store.open(tmp_path)


# ---- Places ----------------------------------------------------------------------------------------------------------


def test_folder_file_and_url_are_the_same_place(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "er"
    with Store.open(folder) as store:
        done(store.put_session(a_session()))
        assert store.name == str(folder / "sessions.sqlite3")
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "sessions.sqlite3").stat().st_mode & 0o777 == 0o600
    for place in (folder / "sessions.sqlite3", f"sqlite:///{folder}/sessions.sqlite3", str(folder)):
        with Store.open(place) as store:
            assert len(store.sessions()) == 1


def test_a_store_is_locked_within_a_process(tmp_path: Path) -> None:
    with Store.open(tmp_path), pytest.raises(StoreLocked, match=r"sessions\.sqlite3"):
        Store.open(tmp_path)
    Store.open(tmp_path).close()


def test_a_store_is_locked_across_processes_until_its_holder_dies(tmp_path: Path) -> None:
    program = (
        "import sys, time; from fabula.store.store import Store as S; s = S.open(sys.argv[1]); print(1, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{program}; time.sleep(1e6)", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        with pytest.raises(StoreLocked):
            Store.open(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    Store.open(tmp_path).close()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_bytes(b"these are no pages of a database\n" * 400)
    with pytest.raises(StoreCorrupt, match=r"text\.db: file is not a database"):
        Store.open(tmp_path / "text.db")
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    with pytest.raises(StoreError, match="some other program"):
        Store.open(tmp_path / "other.db")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    Store.open(tmp_path / "file").close()
    (tmp_path / "file" / "sessions.sqlite3").chmod(0o400)
    program = """
import ctypes, sys
from fabula.errors import StoreReadOnly
from fabula.store.store import Store
# The right to pass over file modes, which root has, goes: capset() with version 3 of its header, and no capability.
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(header, none) == 0
for place in sys.argv[1:]:
    try:
        Store.open(place)
    except StoreReadOnly as error:
        assert place in error.path and place in error.message, error
    else:
        raise AssertionError(place)
"""
    result = run_python(program, tmp_path / "closed", tmp_path / "closed" / "deeper", tmp_path / "file")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("postgresql+psycopg2://u:hush@h/d", "is not supported for a store"),
        ("mysql://u:hush@h/d", "is not supported for a store"),
        ("://u:hush@h", "cannot be read"),
        ("postgresql://u:hush@h:port/d", "cannot be read"),
        ("sqlite://", "is a file"),
        ("sqlite:///:memory:", "is a file"),
        ("sqlite:///x.db?mode=ro", "is a file"),
    ],
)
def test_urls_that_mean_nothing(place: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        Store.open(place)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("url", ["postgresql://u:hush@127.0.0.1:1/d", "postgresql://127.0.0.1:1/d?password=hush"])
def test_a_password_is_never_shown(url: str) -> None:
    with pytest.raises(StoreError, match=r"127\.0\.0\.1") as caught:  # no driver, or no server
        Store.open(url)
    error: BaseException | None = caught.value
    while error is not None:
        assert "hush" not in f"{error} {error!r} {getattr(error, 'path', '')}"
        error = error.__cause__


def test_errors_by_their_codes(tmp_path: Path) -> None:
    place = find_location("postgresql+psycopg://u:hush@h/d")

    class Answer(Exception):
        def __init__(self, sqlstate: str) -> None:
            super().__init__("server says hush")
            self.sqlstate = sqlstate

    def wrapped(sqlstate: str) -> StoreError:
        error = translate(sa.exc.DBAPIError("INSERT", {}, Answer(sqlstate)), place)
        assert isinstance(error, StoreError) and error.message.endswith("server says ***")
        return error

    assert type(wrapped("53100")) is StoreFull and type(wrapped("25006")) is StoreReadOnly
    assert type(wrapped("XX001")) is StoreCorrupt and type(wrapped("08006")) is StoreError
    file = find_location(tmp_path)
    assert type(translate(OSError(errno.EDQUOT, "Quota"), file)) is StoreFull
    assert type(translate(OSError(errno.EROFS, "Read-only"), file)) is StoreReadOnly
    assert type(translate(OSError(errno.EIO, "Bad disk"), file)) is StoreError


# ---- Damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[tuple[Store, sqlite3.Connection, list[TurnRecord]]]:
    """A store with sessions "s" and "fine", and another program's connection to its file."""
    found = chain(3, prompt_ids=(5, 6))
    with Store.open(tmp_path) as store:
        done(*put_all(store, found), *put_all(store, chain(1, session_id="fine")))
        connection = sqlite3.connect(tmp_path / "sessions.sqlite3", isolation_level=None)
        yield store, connection, found
        connection.close()
        assert len(store.load("t", "fine")[1]) == 1, "the damage is one session's"


@pytest.mark.parametrize(
    "change",
    [
        "text = CAST('other' AS BLOB)",
        "text = 'good day'",
        "text = 5000000000000",
        "prompt_ids = zeroblob(8)",
        "prompt_ids = x'0500'",
        "number = 7",
        "number = 'two'",
        "params = '{}'",
        "params = CAST(x'80' AS TEXT)",
        "finish_reason = NULL",
        "finish_reason = CAST(x'ff' AS TEXT)",
        "created_at = 'now'",
        "checksum = zeroblob(16)",
        "tenant = tenant, parent_id = NULL",
    ],
)
def test_a_damaged_turn_is_named(damaged: tuple[Store, sqlite3.Connection, list[TurnRecord]], change: str) -> None:
    store, connection, found = damaged
    connection.execute(f"UPDATE turns SET {change} WHERE id = ?", (found[1].id,))
    with pytest.raises(StoreCorrupt, match=rf"session 's': turn '{found[1].id}' is damaged"):
        store.load("t", "s")
    assert any(found[1].id in problem for problem in store.check())
    assert len(store.sessions()) == 2


def test_a_missing_turn_is_named(damaged: tuple[Store, sqlite3.Connection, list[TurnRecord]]) -> None:
    store, connection, found = damaged
    connection.execute("DELETE FROM turns WHERE id = ?", (found[2].id,))
    with pytest.raises(StoreCorrupt, match=rf"turn '{found[2].id}', its head, is missing"):
        store.load("t", "s")
    connection.execute("DELETE FROM turns WHERE id = ?", (found[0].id,))
    connection.execute("UPDATE sessions SET id = 'z' WHERE id = 's'")
    problems = "\n".join(store.check())
    assert f"turn '{found[0].id}' before it is missing" in problems and "'s' of tenant 't' has turns" in problems


def test_turns_in_a_circle(damaged: tuple[Store, sqlite3.Connection, list[TurnRecord]]) -> None:
    store, connection, found = damaged
    circle = replace(found[0], parent_id=found[2].id)
    row = turn_row(circle, "t")
    connection.execute(
        "UPDATE turns SET parent_id = ?, checksum = ? WHERE id = ?", (found[2].id, row["checksum"], circle.id)
    )
    with pytest.raises(StoreCorrupt, match="is missing"):
        store.load("t", "s")


def test_a_damaged_session_is_named(damaged: tuple[Store, sqlite3.Connection, list[TurnRecord]]) -> None:
    store, connection, _ = damaged
    connection.execute("UPDATE sessions SET settings = '[1' WHERE id = 's'")
    with pytest.raises(StoreCorrupt, match="session 's' of tenant 't' is damaged"):
        store.load("t", "s")
    with pytest.raises(StoreCorrupt, match="session 's'"):
        store.set_head("t", "s", None).result()
    assert [found.record.id for found in store.sessions()] == ["fine"]
    assert isinstance(store.last_error, StoreCorrupt) and "session 's'" in store.last_error.message
    assert any("session 's'" in problem for problem in store.check())
    done(store.put_session(a_session()))
    assert len(store.sessions()) == 2


def test_damaged_pages_are_corrupt_not_a_crash(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        done(*put_all(store, chain(200)))
    file = tmp_path / "sessions.sqlite3"
    data = bytearray(file.read_bytes())
    data[4096 * 4 :] = bytes(b ^ 0x5A for b in data[4096 * 4 :])
    file.write_bytes(data)
    try:
        store = Store.open(tmp_path)
    except StoreCorrupt:
        return
    with store:
        with pytest.raises(StoreCorrupt):
            store.load("t", "s")
        assert store.check() != []


# ---- Ending ----------------------------------------------------------------------------------------------------------


def test_closing(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    gate = Gate(store)
    future = store.put_session(a_session())
    watch = store.watch(Draft())
    gate._open.set()
    store.close()
    store.close()
    assert future.done() and future.exception() is None
    assert not (tmp_path / "sessions.sqlite3-wal").exists(), "all is in the file"
    watch.close()
    for use in (store.sessions, store.flush, lambda: store.put_session(a_session()), lambda: store.load("t", "s")):
        with pytest.raises(StoreError, match="closed"):
            use()


def test_a_forgotten_store_closes_itself(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    store.put_session(a_session())
    del store
    with Store.open(tmp_path) as again:
        assert len(again.sessions()) == 1


def test_the_end_of_the_interpreter_writes_what_is_queued(tmp_path: Path) -> None:
    program = """
import sys
from storing import *
from fabula.store.store import Store
store = Store.open(sys.argv[1])
put_all(store, chain(30))
store.watch(Draft())
"""
    result = run_python(program, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    with Store.open(tmp_path) as store:
        assert len(store.load("t", "s")[1]) == 30


def test_a_forked_child_is_told_so(tmp_path: Path) -> None:
    program = """
import os, sys
from storing import *
from fabula.errors import StoreError, StoreLocked
from fabula.store.store import Store
store = Store.open(sys.argv[1])
done(*put_all(store, chain(3)))
watch = store.watch(lambda: None)
child = os.fork()
if not child:
    for use in (store.sessions, store.flush, lambda: store.put_session(a_session())):
        try:
            use()
        except StoreError as error:
            assert "forked" in error.message
        else:
            os._exit(1)
    watch.close()
    store.close()
    try:
        Store.open(sys.argv[1])
    except StoreLocked:
        sys.exit(7)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
store.put_session(a_session()).result()
idle = os.fork()
if not idle:
    import time
    time.sleep(1e6)
store.close()
Store.open(sys.argv[1]).close()  # the child that lives on does not hold the lock
os.kill(idle, 9)
os.waitpid(idle, 0)
print("fine")
"""
    result = run_python(program, tmp_path)
    assert result.stdout == "fine\n", result.stderr
