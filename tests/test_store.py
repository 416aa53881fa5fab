"""The store: what is acknowledged is there, what is damaged is said, and nothing hangs."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabula.errors import (
    InvalidArgument,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreLocked,
    StoreReadOnly,
    StoreTooNew,
)
from fabula.store.failures import translate
from fabula.store.migrate import migrate
from fabula.store.place import connect, find_place, make_engine
from fabula.store.records import SessionRecord, TurnRecord, session_row, turn_row
from fabula.store.schema import VERSION_TABLE, metadata, sessions, tags, turns
from fabula.store.store import Store

WAIT_S = 30  # only tells a hang from an answer


def a_session(id: str = "s", **fields: Any) -> SessionRecord:
    values: dict[str, Any] = {"tenant": "t", "model": "tiny", "fingerprint": "f00d", "settings": {"system": "be kind"}}
    values |= {"base_id": None, "head_id": None, "undone": (), "created_at": 1.0, "updated_at": 2.0}
    return SessionRecord(id=id, **(values | fields))


def a_turn(parent: TurnRecord | None = None, **fields: Any) -> TurnRecord:
    values: dict[str, Any] = {"id": uuid.uuid4().hex, "session_id": "s", "parent_id": parent and parent.id}
    values |= {"number": parent.number + 1 if parent else 1, "chat": True, "prompt": "hello", "text": "good day"}
    values |= {"kept": 0, "prompt_ids": (1, 2), "token_ids": (3,), "params": {"seed": 7}, "finish_reason": "stop"}
    values |= {"timings": {"prompt_tokens": 2}, "cut": None, "created_at": 1.5, "tags": ()}
    return TurnRecord(**(values | fields))


def chain(n: int, **fields: Any) -> list[TurnRecord]:
    """Turns that follow each other."""
    found: list[TurnRecord] = []
    for i in range(n):
        found.append(a_turn(found[-1] if found else None, created_at=float(i), prompt=f"say {i}", **fields))
    return found


def put_all(store: Store, found: list[TurnRecord], **fields: Any) -> list[Future[None]]:
    return [store.put_turn(turn, a_session(str(turn.session_id), head_id=turn.id, **fields)) for turn in found]


def done(*futures: Future[None]) -> None:
    for future in futures:
        future.result(WAIT_S)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as store:
        yield store
        assert store.check() == []


@pytest.fixture(params=["sqlite", "postgresql"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store of each kind; FABULA_TEST_POSTGRES is the URL of an empty database that may be filled."""
    place = str(tmp_path)
    if request.param == "postgresql":
        place = os.environ.get("FABULA_TEST_POSTGRES", "")
        if not place:
            pytest.skip("FABULA_TEST_POSTGRES is not set")
    with Store.open(place) as store:
        with connect(store._engine, write=True) as connection, connection.begin():
            for table in (tags, turns, sessions):
                connection.execute(sa.delete(table))
        yield store
        assert store.check() == []


def run_python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a program in an interpreter of its own; it sees this file's helpers."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
        capture_output=True,
        text=True,
        timeout=WAIT_S * 2,
    )


# ---- What is put is there --------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
name = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=10)
number = st.integers(0, 2**31 - 1)
ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5).map(tuple)
value = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
json_object = st.dictionaries(text, value | st.lists(value, max_size=3), max_size=3)
when = st.floats(allow_nan=False, allow_infinity=False)
turn_records = st.builds(
    TurnRecord,
    id=st.uuids().map(lambda id: id.hex),
    session_id=st.just("s"),
    parent_id=st.none(),
    number=number,
    chat=st.booleans(),
    prompt=text,
    text=text,
    kept=number,
    prompt_ids=ids,
    token_ids=ids,
    params=json_object,
    finish_reason=st.none() | name,
    timings=st.none() | json_object,
    cut=st.none() | json_object,
    created_at=when,
    tags=st.sets(name, max_size=3).map(lambda found: tuple(sorted(found))),
)
session_records = st.builds(
    SessionRecord,
    id=st.just("s"),
    tenant=name,
    model=name,
    fingerprint=name,
    settings=json_object,
    base_id=st.none(),
    head_id=st.none(),
    undone=st.lists(name, max_size=3).map(tuple),
    created_at=when,
    updated_at=when,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turn=turn_records, session=session_records)
def test_records_come_back_as_they_were(any_store: Store, turn: TurnRecord, session: SessionRecord) -> None:
    done(any_store.put_turn(turn, session))
    assert any_store.load(session.tenant, "s") == (session, [turn])
    again = replace(turn, text=turn.prompt, tags=("one",))
    done(any_store.put_turn(again, session))
    assert any_store.load(session.tenant, "s") == (session, [again])
    done(any_store.delete_session(session.tenant, "s", [turn.id]))


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("prompt", "half \ud800"),
        ("id", "nul \0"),
        ("params", {"a": {1, 2}}),
        ("params", {"a": float("nan")}),
        ("cut", {"a": "\udfff"}),
        ("token_ids", (2**31,)),
        ("number", -1),
        ("kept", 2**40),
        ("created_at", float("inf")),
        ("session_id", "other"),
    ],
)
def test_what_cannot_be_kept_is_refused_at_once(store: Store, field: str, bad: Any) -> None:
    with pytest.raises(InvalidArgument, match=field if field != "session_id" else "not of 's'"):
        store.put_turn(a_turn(**{field: bad}), a_session())
    with pytest.raises(InvalidArgument, match="tag"):
        store.put_tags("x", ["\0"])


def test_tenants_do_not_see_each_other(any_store: Store) -> None:
    mine, theirs = a_turn(), a_turn(text="theirs")
    done(any_store.put_turn(mine, a_session()), any_store.put_turn(theirs, a_session(tenant="u", updated_at=3.0)))
    assert any_store.load("t", "s")[1] == [mine] and any_store.load("u", "s")[1] == [theirs]
    assert [(found.record.tenant, found.n_turns) for found in any_store.sessions()] == [("u", 1), ("t", 1)]
    assert [found.record.tenant for found in any_store.sessions("t")] == ["t"]
    with pytest.raises(StoreError, match="does not fit"):
        any_store.put_turn(replace(theirs, text="stolen"), a_session()).result(WAIT_S)
    done(any_store.delete_session("t", "s", [mine.id, theirs.id]))
    assert any_store.load("u", "s")[1] == [theirs]


def test_a_fork_loads_its_past_and_outlives_it(any_store: Store) -> None:
    first, second, third = chain(3)
    other = a_turn(second, session_id="fork", created_at=9.0)
    done(*put_all(any_store, [first, second, third]), *put_all(any_store, [other], base_id=second.id))
    assert any_store.load("t", "fork")[1] == [first, second, other]
    with pytest.raises(InvalidArgument, match="'fork' begins at it"):
        any_store.delete_session("t", "s", [first.id, second.id, third.id]).result(WAIT_S)
    with pytest.raises(StoreError, match="does not fit"):
        any_store.delete_session("t", "s", [third.id], [second.id]).result(WAIT_S)
    assert any_store.load("t", "s")[1] == [first, second, third], "a refused change leaves nothing half done"

    done(any_store.delete_session("t", "s", [third.id], [first.id, second.id]))
    past = [replace(turn, session_id=None) for turn in (first, second)]
    assert any_store.load("t", "fork")[1] == [*past, other]
    with pytest.raises(InvalidArgument, match="there is no session 's'"):
        any_store.load("t", "s")
    done(any_store.delete_session("t", "fork", [other.id, first.id, second.id]), any_store.delete_session("t", "s", []))
    assert any_store.sessions() == []


def test_tags_heads_and_pruning(any_store: Store) -> None:
    first, second, third = chain(3)
    done(*put_all(any_store, [first, second, third]))
    done(any_store.put_tags(first.id, ["b", "a", "b"]), any_store.set_head("t", "s", first.id, [third.id]))
    session, (tagged, *_) = any_store.load("t", "s")
    assert tagged.tags == ("a", "b") and (session.head_id, session.undone) == (first.id, (third.id,))
    assert session.updated_at > 2.0
    with pytest.raises(InvalidArgument, match="no turn 'x'"):
        any_store.put_tags("x", ["a"]).result(WAIT_S)
    with pytest.raises(InvalidArgument, match="no session 'x'"):
        any_store.set_head("t", "x", None).result(WAIT_S)
    with pytest.raises(InvalidArgument, match="still refers"):
        any_store.delete_turns(session, [third.id])
    with pytest.raises(StoreError, match="does not fit"):
        any_store.delete_turns(replace(session, undone=()), [second.id]).result(WAIT_S)
    done(any_store.delete_turns(replace(session, undone=()), [second.id, third.id]))
    assert any_store.load("t", "s") == (replace(session, undone=()), [tagged])


def test_parents_come_first_though_the_clock_was_set_back(any_store: Store) -> None:
    first, second, third = chain(3)
    found = [replace(turn, created_at=-turn.created_at) for turn in (first, second, third)]
    done(*put_all(any_store, found))
    assert any_store.load("t", "s")[1] == found


def test_a_long_session(store: Store) -> None:
    found = chain(1200)
    other = a_turn(found[-1], session_id="fork", created_at=9e9)
    done(*put_all(store, found), *put_all(store, [other], base_id=found[-1].id))
    assert store.load("t", "fork")[1] == [*found, other]
    done(store.delete_session("t", "fork", [other.id]), store.delete_session("t", "s", [turn.id for turn in found]))


# ---- The thread that writes ------------------------------------------------------------------------------------------


class Gate:
    """Holds the store's thread in a transaction until it is opened."""

    def __init__(self, store: Store) -> None:
        self._entered, self._open = threading.Event(), threading.Event()
        self.future = store._writer.submit(self._wait)
        assert self._entered.wait(WAIT_S)

    def _wait(self, _: sa.Connection) -> None:
        self._entered.set()
        assert self._open.wait(WAIT_S)

    def open(self) -> None:
        self._open.set()
        self.future.result(WAIT_S)


def test_what_waits_is_committed_together(store: Store) -> None:
    commits: list[sa.Connection] = []
    sa.event.listen(store._engine, "commit", commits.append)
    gate = Gate(store)
    futures = put_all(store, chain(20))
    assert not any(future.done() for future in futures)
    gate.open()
    done(*futures)
    assert len(commits) == 2, "the gate's transaction, and one for all turns"


def test_one_that_fails_leaves_its_neighbours_alone(store: Store) -> None:
    gate = Gate(store)
    found = chain(6)
    futures = put_all(store, [*found[:3], a_turn(parent_id="missing"), *found[3:]])
    cancelled = store.put_tags(found[0].id, ["never"])
    assert cancelled.cancel()
    gate.open()
    with pytest.raises(StoreError, match="does not fit"):
        futures.pop(3).result(WAIT_S)
    done(*futures)
    assert store.load("t", "s")[1] == found


def test_order_is_kept(store: Store) -> None:
    gate = Gate(store)
    (turn,) = chain(1)
    futures = [store.put_turn(replace(turn, text=str(i)), a_session()) for i in range(10)]
    gate.open()
    done(*futures)
    assert store.load("t", "s")[1][0].text == "9"


def test_many_threads(store: Store) -> None:
    def talk(id: str) -> None:
        for turn in chain(10, session_id=id):
            done(*put_all(store, [turn]))
            assert store.load("t", id)[1][-1] == turn

    threads = [threading.Thread(target=talk, args=(f"s{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert [found.n_turns for found in store.sessions()] == [10] * 8


def test_flush_waits_for_what_is_queued(store: Store) -> None:
    gate = Gate(store)
    future = store.put_session(a_session())
    with pytest.raises(StoreError, match="not written in 0 s"):
        store.flush(0)
    gate.open()
    store.flush(WAIT_S)
    assert future.done()


# ---- Turns that are being made ---------------------------------------------------------------------------------------


class Draft:
    """A turn that grows each time somebody looks."""

    def __init__(self) -> None:
        self.turn, self.looks = a_turn(text="", token_ids=()), threading.Semaphore(0)

    def __call__(self) -> tuple[TurnRecord, SessionRecord]:
        self.looks.release()
        self.turn = replace(self.turn, text=self.turn.text + "la")
        return self.turn, a_session(head_id=self.turn.id)

    def wait_until_stored(self) -> None:
        for _ in range(2):  # whoever looks again has stored what was seen before
            assert self.looks.acquire(timeout=WAIT_S)


def test_a_draft_is_stored_until_its_watch_closes(tmp_path: Path) -> None:
    with Store.open(tmp_path, checkpoint_s=0.01) as store:
        draft = Draft()
        watch = store.watch(draft)
        draft.wait_until_stored()
        (kept,) = store.load("t", "s")[1]
        assert kept.finish_reason is None and kept.text.startswith("la") and kept.id == draft.turn.id
        done(watch.close(), watch.close())
        final = replace(draft.turn, text="the end", finish_reason="length")
        done(store.put_turn(final, a_session(head_id=final.id)))
        other = Draft()
        second = store.watch(other)
        other.wait_until_stored()  # the writer went round twice, and would have looked at the first
        second.close()
        assert final in store.load("t", "s")[1]


def test_a_draft_that_came_to_nothing_is_deleted(tmp_path: Path) -> None:
    with Store.open(tmp_path, checkpoint_s=0.01) as store:
        done(store.watch(Draft()).close(discard=True))
        draft = Draft()
        watch = store.watch(draft)
        draft.wait_until_stored()
        done(watch.close(discard=True), watch.close(discard=True))
        session, left = store.load("t", "s")
        assert left == [] and session.head_id is None


def test_a_closing_watch_waits_for_the_checkpoint_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    with Store.open(tmp_path, checkpoint_s=0.01) as store:

        def slow(*_: Any, **__: Any) -> None:
            writing.set()
            assert go_on.wait(WAIT_S)

        monkeypatch.setattr("fabula.store.changes.put_turn", slow)
        watch = store.watch(Draft())
        assert writing.wait(WAIT_S)
        closing = threading.Thread(target=lambda: (watch.close(), closed.set()))
        closing.start()
        assert not closed.wait(0.05), "the draft is being written"
        go_on.set()
        closing.join(WAIT_S)
        assert closed.is_set()


def test_a_draft_is_not_written_again_unless_it_changed(tmp_path: Path) -> None:
    commits: list[sa.Connection] = []
    looks = threading.Semaphore(0)
    turn = a_turn()

    def still() -> tuple[TurnRecord, SessionRecord]:
        looks.release()
        return turn, a_session()

    with Store.open(tmp_path, checkpoint_s=0.01) as store:
        sa.event.listen(store._engine, "commit", commits.append)
        watch = store.watch(still)
        for _ in range(5):
            assert looks.acquire(timeout=WAIT_S)
        watch.close()
        assert len(commits) == 1


def test_a_checkpoint_that_fails_is_remembered(tmp_path: Path) -> None:
    looks = threading.Semaphore(0)

    def broken() -> None:
        looks.release()
        raise ValueError("no snapshot today")

    with Store.open(tmp_path, checkpoint_s=0.01) as store:
        assert store.last_error is None
        watch = store.watch(broken)
        for _ in range(2):
            assert looks.acquire(timeout=WAIT_S)
        assert isinstance(store.last_error, StoreError) and "no snapshot today" in store.last_error.message
        watch.close()
        lost = store.watch(lambda: (looks.release(), (a_turn(parent_id="missing"), a_session()))[1])
        for _ in range(4):
            assert looks.acquire(timeout=WAIT_S)
        assert "does not fit" in store.last_error.message
        lost.close()
        done(store.put_session(a_session()))


# ---- Versions --------------------------------------------------------------------------------------------------------


def test_a_store_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    place = find_place(tmp_path / "old file %s.db")
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
        "import sys, time; from fabula.store.store import Store; s = Store.open(sys.argv[1]); print(1, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{program}; time.sleep(600)", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        with pytest.raises(StoreLocked):
            Store.open(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait(WAIT_S)
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
        ("postgresql+psycopg2://u:hush@h/d", "cannot lie in"),
        ("mysql://u:hush@h/d", "cannot lie in"),
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
    place = find_place("postgresql+psycopg://u:hush@h/d")

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
    file = find_place(tmp_path)
    assert type(translate(OSError(errno.EDQUOT, "Quota"), file)) is StoreFull
    assert type(translate(OSError(errno.EROFS, "Read-only"), file)) is StoreReadOnly
    assert type(translate(OSError(errno.EIO, "Bad disk"), file)) is StoreError


# ---- Damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[tuple[Store, sqlite3.Connection, list[TurnRecord]]]:
    """A store with sessions "s" and "fine", and a connection of somebody else's to its file."""
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
        store.set_head("t", "s", None).result(WAIT_S)
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
from test_store import *
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
from test_store import *
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
store.put_session(a_session()).result(30)
idle = os.fork()
if not idle:
    import time
    time.sleep(600)
store.close()
Store.open(sys.argv[1]).close()  # the child that lives on does not hold the lock
os.kill(idle, 9)
os.waitpid(idle, 0)
print("fine")
"""
    result = run_python(program, tmp_path)
    assert result.stdout == "fine\n", result.stderr
