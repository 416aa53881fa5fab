"""Workspaces with several concurrent callers: waiting in order, stopping others' replies, and locks."""

from __future__ import annotations

import gc
import random
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from desks import LONG, SHORT, Desk, alone, talk, told
from fabula import InvalidArgument, SessionBusy, SessionNotFound, StoreFull
from threaded import in_threads
from waiting import wait_until

# ---- Several callers ------------------------------------------------------------------------------------------------


def test_those_who_wait_get_their_turn_in_order(desk: Desk) -> None:
    session = desk.session()
    first = session.say("first", LONG)
    next(first)
    with pytest.raises(SessionBusy):
        session.say("no", wait=False)
    with pytest.raises(SessionBusy):
        session.say("no", wait=0.05)
    threads = []
    for i in range(4):
        thread = threading.Thread(target=lambda i=i: session.say(f"{i}", SHORT, wait=True).text())
        thread.start()
        threads.append(thread)
        wait_until(lambda i=i: len(session._queue.waiting) > i)
    with pytest.raises(SessionBusy):
        session.say("no", wait=0.05)
    first.cancel()
    for thread in threads:
        thread.join()
    assert [turn.prompt for turn in session.path] == ["first", "0", "1", "2", "3"]


def test_a_forgotten_reply_holds_up_nobody_who_waits(desk: Desk) -> None:
    session = desk.session()
    reply = session.say("first", LONG)
    next(reply)
    thread = threading.Thread(target=lambda: session.say("second", SHORT, wait=True).text())
    thread.start()
    wait_until(lambda: session._queue.waiting)
    del reply
    gc.collect()
    thread.join()
    assert [turn.prompt for turn in session.path] == ["first", "second"]


def test_a_new_session_holds_up_nobody_while_it_is_committed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, open_one = desk.workspace, desk.session()
    commit: Future[None] = Future()

    def create() -> None:
        with pytest.raises(StoreFull):
            workspace.session("new")

    with monkeypatch.context() as patched:
        patched.setattr(workspace._keeper.store, "put_session", lambda _: commit)
        creating = threading.Thread(target=create)
        creating.start()
        wait_until(lambda: workspace.has("new"))
        assert workspace.open(open_one.id) is open_one
        opened_early = workspace.open("new")
        commit.set_exception(StoreFull("no room", path="here"))
        creating.join()
    with pytest.raises(SessionNotFound):
        opened_early.tag(0, "x")
    assert not workspace.has("new")
    assert workspace.session("new").id == "new"


def test_opening_a_stored_session_writes_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk(desk.session(), "one", "two")
    desk.again()
    writer = desk.workspace._keeper.store._writer
    monkeypatch.setattr(writer, "submit", lambda _: pytest.fail("reading a session queued a write"))
    session = desk.session()
    assert [turn.prompt for turn in session.path] == ["one", "two"] and session.tree_json()["turns"]
    assert desk.workspace.open(session.id) is session
    monkeypatch.undo()


@pytest.mark.parametrize("verb", ["rollback", "redo", "delete", "prune", "close", "unload", "at"])
def test_in_the_middle_of_a_reply(desk: Desk, verb: str) -> None:
    """Another thread reads; each verb ends the reply, and the session can be continued."""
    session = desk.session()
    first, second = talk(session, "one", "two")
    session.rollback(1)
    reply = session.say("more", LONG)
    result: list[Any] = []

    def read() -> None:
        try:
            result.extend(reply)
        except InvalidArgument as error:
            assert verb == "unload" and "closed" in str(error)

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: len(reply.generation.token_ids) >= 2)
    if verb == "redo":  # the partial turn is new, so there is nothing to redo
        with pytest.raises(InvalidArgument, match="nothing to redo"):
            session.redo()
    elif verb == "at":
        with session.at(1) as there:
            assert there.head is first
        assert session.head is first
    else:
        {
            "rollback": lambda: session.rollback(0),
            "delete": session.delete,
            "prune": lambda: session.rollback(1, prune=True),
            "close": desk.workspace.close,
            "unload": lambda: desk.workspace.unload("tiny"),
        }[verb]()
    reader.join()
    assert reply.is_done and not session.is_busy
    if reply.turn is not None:
        assert reply.turn.finish_reason in ("cancelled", "length")
        assert list(reply.turn.token_ids) == [piece.token_id for piece in result]
        assert reply.turn.text == "".join(piece.text for piece in result)
    if verb == "delete":
        assert session.turns == [] and desk.workspace.sessions() == []
        return
    if verb in ("close", "unload"):
        desk.again()
        session = desk.workspace.open("a")
    expected = {"rollback": 3, "redo": 3, "at": 3, "prune": 1, "close": 3, "unload": 2}[verb]
    assert len(session.turns) in (expected, 3 if verb == "unload" else expected)
    assert list(talk(session, "on")[-1].token_ids) == alone(desk.workspace.models["tiny"], session.head)
    assert second.number == 2 and desk.store.check() == []


def test_rollback_to_places_that_are_not_there(desk: Desk) -> None:
    session = desk.session()
    talk(session, "one", "two")
    before = told(session)
    for number in (-3, 3, 10**9):
        with pytest.raises(InvalidArgument, match="no turn"):
            session.rollback(number)
    assert told(session) == before
    assert session.rollback(0).number == 0 and session.rollback(0).number == 0
    assert len(session._tree.redo_stack) == 1 and session.redo().number == 2
    desk.again()
    assert desk.session().head.number == 2


def test_a_piece_that_comes_with_the_end(desk: Desk) -> None:
    """Another thread cancels between a token and its text: the turn has both, or neither."""
    session = desk.session()
    reply = session.say("one", LONG)
    generation, n = reply.generation, 0

    class Interrupted(type(generation)):  # type: ignore[misc]
        def __next__(self) -> Any:
            nonlocal n
            piece, n = super().__next__(), n + 1
            if n == 4:
                in_threads(reply.cancel)
            return piece

    generation.__class__ = Interrupted
    for _ in reply:
        pass
    assert reply.turn is not None
    assert reply.turn.text == desk.workspace.models["tiny"].tokenizer.decode(list(reply.turn.token_ids))


def test_a_checkpoint_against_the_end_of_a_reply(desk: Desk) -> None:
    """The store's thread reads the draft while its last piece is taken in."""
    desk.store._writer._checkpoint_s = 0.001
    session = desk.session()
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for seed in range(30):
            reply = session.say("one", replace(SHORT, seed=seed))
            text = "".join(piece.text for piece in reply)
            assert reply.turn is not None and reply.turn.text == text
            session.rollback(0)
    finally:
        sys.setswitchinterval(switch)
    before = told(session)
    del session, reply
    desk.again()
    assert told(desk.session()) == before


def test_nobody_holds_two_locks_in_two_orders(desk: Desk) -> None:
    """A session that loads its model, while the workspace is closed, or lists the session's turns."""
    session = desk.session()
    talk(session, "one")
    desk.workspace.unload("tiny")
    inside, going = threading.Event(), threading.Event()
    load = desk.workspace._load_again

    def slow(name: str) -> None:
        inside.set()
        going.wait()
        load(name)

    session._handle._load = lambda: slow("tiny")

    def other() -> None:
        inside.wait()
        with desk.workspace._lock:
            going.set()
            time.sleep(0.1)
            desk.session(sampling=LONG)
            session.turns  # noqa: B018
            desk.workspace.close()

    results = in_threads(lambda: session.say("two", SHORT).text(), other)
    assert results[1] is None and isinstance(results[0], str | InvalidArgument)


def test_many_callers_at_once(desk: Desk) -> None:
    """Threads that say, go back, fork, tag, delete and open; at the end everything is in order."""

    def work(seed: int) -> int:
        rng, n = random.Random(seed), 0
        for i in range(25):
            session = desk.session(f"s{rng.randrange(3)}", system="s")
            try:
                what = rng.randrange(8)
                if what < 3:
                    session.say(f"{seed} {i}", replace(SHORT, seed=i), wait=True).text()
                elif what == 3:
                    with session.say("half", LONG, wait=1e6) as reply:
                        next(reply, None)  # another may have stopped it already
                elif what == 4:
                    session.rollback(rng.randrange(session.head.number + 1), prune=rng.random() < 0.3)
                elif what == 5:
                    talk(session.fork(id=f"f{seed}-{i}"), "x")
                elif what == 6 and session.turns:
                    session.tag(rng.choice(session.turns), "t")
                elif what == 7:
                    desk.workspace.open(f"f{seed}-{i - 1}").delete()
                n += 1
            except (InvalidArgument, SessionBusy):  # it is gone, or another was quicker
                pass
        return n

    results = in_threads(*[lambda seed=seed: work(seed) for seed in range(4)])
    assert all(isinstance(n, int) and n > 5 for n in results), results
    assert desk.store.check() == []
    before = {summary.record.id: told(desk.workspace.open(summary.record.id)) for summary in desk.workspace.sessions()}
    gc.collect()
    desk.again()
    assert {name: told(desk.workspace.open(name)) for name in before} == before
    for name in before:
        desk.workspace.delete(name)
    gc.collect()
    desk.workspace.models["tiny"].clear_cache()
    assert desk.pool.n_free == desk.pool.n_pages and desk.store.check() == []
