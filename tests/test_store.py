"""The store: acknowledged writes are there, damage is reported, and nothing hangs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabula.errors import InvalidArgument, StoreError
from fabula.store.location import connect
from fabula.store.records import SessionRecord, TurnRecord
from fabula.store.schema import sessions, tags, turns
from fabula.store.store import Store
from storing import Draft, Gate, a_session, a_turn, chain, done, put_all


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
        any_store.put_turn(replace(theirs, text="stolen"), a_session()).result()
    done(any_store.delete_session("t", "s", [mine.id, theirs.id]))
    assert any_store.load("u", "s")[1] == [theirs]


def test_a_fork_loads_its_past_and_outlives_it(any_store: Store) -> None:
    first, second, third = chain(3)
    other = a_turn(second, session_id="fork", created_at=9.0)
    done(*put_all(any_store, [first, second, third]), *put_all(any_store, [other], base_id=second.id))
    assert any_store.load("t", "fork")[1] == [first, second, other]
    with pytest.raises(InvalidArgument, match="'fork' begins at it"):
        any_store.delete_session("t", "s", [first.id, second.id, third.id]).result()
    with pytest.raises(StoreError, match="does not fit"):
        any_store.delete_session("t", "s", [third.id], [second.id]).result()
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
        any_store.put_tags("x", ["a"]).result()
    with pytest.raises(InvalidArgument, match="no session 'x'"):
        any_store.set_head("t", "x", None).result()
    with pytest.raises(InvalidArgument, match="still refers"):
        any_store.delete_turns(session, [third.id])
    with pytest.raises(StoreError, match="does not fit"):
        any_store.delete_turns(replace(session, undone=()), [second.id]).result()
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
        futures.pop(3).result()
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
        thread.join()
    assert [found.n_turns for found in store.sessions()] == [10] * 8


def test_flush_waits_for_what_is_queued(store: Store) -> None:
    gate = Gate(store)
    future = store.put_session(a_session())
    with pytest.raises(StoreError, match="not written in 0 s"):
        store.flush(0)
    gate.open()
    store.flush()
    assert future.done()


# ---- Turns that are being made ---------------------------------------------------------------------------------------


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
        other.wait_until_stored()  # the writer ran twice, and would have written the first
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
            go_on.wait()

        monkeypatch.setattr("fabula.store.changes.put_turn", slow)
        watch = store.watch(Draft())
        writing.wait()
        closing = threading.Thread(target=lambda: (watch.close(), closed.set()))
        closing.start()
        assert not closed.wait(0.05), "the draft is being written"
        go_on.set()
        closing.join()
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
            looks.acquire()
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
            looks.acquire()
        assert isinstance(store.last_error, StoreError) and "no snapshot today" in store.last_error.message
        watch.close()
        lost = store.watch(lambda: (looks.release(), (a_turn(parent_id="missing"), a_session()))[1])
        for _ in range(4):
            looks.acquire()
        assert "does not fit" in store.last_error.message
        lost.close()
        done(store.put_session(a_session()))
