"""A commit, a save or a load that stands still holds up only those who need it: no lock is held over any of them."""

from __future__ import annotations

import gc
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from desks import LONG, PAST, SHORT, Desk, alone, talk, told
from fabula import InvalidArgument, Model, SessionNotFound
from fabula.errors import SessionExists, StoreError
from fabula.keyed_lock import KeyedLocks
from fabula.kv.spill import SpillFolder
from fabula.server.failures import ApiError
from fabula.sessions import archive
from storing import Gate
from test_openai_inside import Inside, inside
from threaded import in_threads
from waiting import wait_until


@contextmanager
def meanwhile(*work: Callable[[], Any], release: Callable[[], Any]) -> Iterator[list[Any]]:
    """Runs functions in threads; they must not end before the block does. Their results are in the list then."""
    results: list[Any] = []
    with ThreadPoolExecutor(len(work)) as pool:
        futures = [pool.submit(one) for one in work]
        try:
            yield results
            assert not any(future.done() for future in futures), "they did not wait"
        finally:
            release()
        results += [future.result() for future in futures]


FIVE = replace(SHORT, max_tokens=5, ignore_eos=True)


class Stop:
    """Calls of a function stop here until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.reached, self._open, function = threading.Event(), threading.Event(), getattr(owner, name)

        def stopped(*args: Any, **options: Any) -> Any:
            self.reached.set()
            self._open.wait()
            return function(*args, **options)

        monkeypatch.setattr(owner, name, stopped)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def cold(desk: Desk) -> list[dict[str, Any]]:
    """Sessions "cold0" and "cold1" are in the store and not in memory, "live" is in both."""
    for name in ("cold0", "cold1", "live"):
        talk(desk.session(name), f"{name} one", "two")
    desk.again()
    before = [told(desk.workspace.open(name)) for name in ("cold0", "cold1")]
    gc.collect()
    desk.live = desk.workspace.open("live")  # type: ignore[attr-defined]
    return before


def everybody_else_goes_on(desk: Desk, cold: list[dict[str, Any]], other_folder: Path) -> None:
    """Opens, reads, answers and loads, as far as none of it must be committed."""
    workspace = desk.workspace
    assert [told(workspace.open(name)) for name in ("cold0", "cold1")] == cold
    assert workspace.open("live") is workspace.session("live", model="tiny")
    with pytest.raises(SessionNotFound):
        workspace.open("nobody")
    other = workspace.load(other_folder, name="other", threads=1)
    assert workspace.models["other"] is other and workspace.load(other_folder, name="other") is other
    in_memory = other.session()
    assert talk(in_memory, "hi")[-1].token_ids and workspace.has("live") and len(workspace.sessions()) >= 3
    workspace.unload("other")


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("other") / "m", tensors=tiny.random_tensors(seed=3))


# ---- Commits that stand still ---------------------------------------------------------------------------------------


def test_sessions_that_are_created(desk: Desk, cold: list[dict[str, Any]], other_folder: Path) -> None:
    workspace, gate = desk.workspace, Gate(desk.store)
    create = [lambda i=i: workspace.session(f"new{i}", model="tiny") for i in range(3)]
    with meanwhile(*create, release=gate.open) as created:
        wait_until(lambda: all(("", f"new{i}") in workspace._keeper.sessions for i in range(3)))
        everybody_else_goes_on(desk, cold, other_folder)
        reply = workspace.open("live").say("three", FIVE)
        for _ in range(4):  # the last one waits for the commit
            next(reply)
    reply.text()
    assert [session.id for session in created] == ["new0", "new1", "new2"]
    assert list(reply.generation.token_ids) == alone(workspace.models["tiny"], workspace.open("live").head)


def test_a_session_that_is_imported(desk: Desk, cold: list[dict[str, Any]], other_folder: Path, tmp_path: Path) -> None:
    workspace = desk.workspace
    data = workspace.open("live").export(kv=tmp_path / "kv")
    gate = Gate(desk.store)
    work = [lambda i=i: workspace.import_(data, id=f"in{i}", kv=tmp_path / "kv" if i else None) for i in range(2)]
    with meanwhile(*work, release=gate.open) as imported:
        wait_until(lambda: all(("", f"in{i}") in workspace._keeper.sessions for i in range(2)))
        with pytest.raises(SessionExists):
            workspace.import_(data, id="in0")
        everybody_else_goes_on(desk, cold, other_folder)
    assert [session.id for session in imported] == ["in0", "in1"]
    assert [turn.text for turn in imported[0].turns] == [turn.text for turn in workspace.open("live").turns]


def test_an_unload_and_its_replies(desk: Desk, cold: list[dict[str, Any]], other_folder: Path) -> None:
    """Replies of a model that is unloaded while commits stand still end with an error; another model goes on."""
    workspace, gate = desk.workspace, Gate(desk.store)
    reply = workspace.open("live").say("three", LONG)
    next(reply)
    with meanwhile(lambda: talk(workspace.session("new", model="tiny"), "one"), release=gate.open) as said:
        wait_until(lambda: ("", "new") in workspace._keeper.sessions)
        workspace.unload("tiny")
        with pytest.raises(InvalidArgument, match="closed"):
            list(reply)
        everybody_else_goes_on(desk, cold, other_folder)
    assert len(said[0]) == 1, "the new session loads the model again"


def test_a_cold_session_with_a_queued_write(desk: Desk, cold: list[dict[str, Any]], other_folder: Path) -> None:
    """Opening it must wait for the store. Opening others need not."""
    workspace = desk.workspace
    session = workspace.session("moved", model="tiny")
    talk(session, "one")
    gate = Gate(desk.store)
    session.rollback(0)
    del session
    gc.collect()
    with meanwhile(*[lambda: workspace.open("moved")] * 3, release=gate.open) as opened:
        everybody_else_goes_on(desk, cold, other_folder)
    assert opened[0] is opened[1] is opened[2] and opened[0].head.number == 0


def test_a_fork(desk: Desk) -> None:
    """Its commit does not lock the session it comes from, whose turns it keeps."""
    session = desk.session("a")
    talk(session, "one", "two")
    gate, turn = Gate(desk.store), session.head
    with meanwhile(lambda: session.fork(id="fork"), release=gate.open) as forks:
        wait_until(lambda: ("", "fork") in desk.workspace._keeper.sessions)
        assert session.rollback(0).number == 0 and session.redo() is turn and not session.is_busy
        assert [node.number for node in session.path] == [1, 2]
        reply = session.say("three", SHORT)
        assert next(reply).text is not None
        threading.Thread(target=reply.cancel).start()  # waits for its commit
    assert forks[0].head is turn and not session.is_busy
    gate = Gate(desk.store)
    with meanwhile(
        lambda: session.fork(turn, id="again"), lambda: session.rollback(0, prune=True), release=gate.open
    ) as results:
        wait_until(lambda: ("", "again") in desk.workspace._keeper.sessions)
    assert results[0].head is turn and session.turns == [] and desk.store.check() == []
    del results, forks
    gc.collect()
    assert [node.number for node in desk.workspace.open("again").path] == [1, 2]


def test_a_fork_that_cannot_be_stored_keeps_no_turn(desk: Desk) -> None:
    session = desk.session("a")
    talk(session, "one")
    desk.session("taken")
    with pytest.raises(SessionExists):
        session.fork(id="taken")
    assert not session.head.forks


def test_a_store_that_reads_slowly(desk: Desk, cold: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One session's rows; sessions in memory and new ones go on."""
    workspace = desk.workspace
    stop = Stop(monkeypatch, desk.store, "load")
    with meanwhile(lambda: workspace.open("cold0"), release=stop.open) as opened:
        stop.reached.wait()
        talk(workspace.open("live"), "three")
        talk(workspace.session("new", model="tiny"), "one")
        workspace.session(model="tiny").fork()
    assert told(opened[0]) == cold[0]


# ---- Files that stand still -----------------------------------------------------------------------------------------


def test_pages_that_are_saved_by_unload(
    desk: Desk, cold: list[dict[str, Any]], other_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = desk.workspace
    session = workspace.session("a", model="tiny")
    (turn,) = talk(session, PAST)
    stop = Stop(monkeypatch, SpillFolder, "_header")
    with meanwhile(
        lambda: workspace.unload("tiny"), lambda: [stop.reached.wait(), talk(session, "more")], release=stop.open
    ):
        stop.reached.wait()
        everybody_else_goes_on(desk, cold, other_folder)
        assert "tiny" not in workspace.models and session.path[0] is turn
    assert session.head.number == 2 and session.head.reused > 0, "loaded again, with its pages on disk"


def test_a_model_that_is_loaded(desk: Desk, cold: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading one takes minutes; others load, and one name is loaded once."""
    workspace, folder, load, slow = desk.workspace, desk.model_folder, Model.load, threading.Event()
    reached = threading.Event()

    def loaded(name: Any, **options: Any) -> Model:
        if options.pop("context", None) == 64:
            reached.set()
            slow.wait()
        return load(name, **options)

    monkeypatch.setattr(Model, "load", loaded)
    names = ["slow"] * 3
    with meanwhile(
        *(lambda name=name: workspace.load(folder, name=name, context=64, threads=1) for name in names),
        release=slow.set,
    ) as found:
        reached.wait()
        everybody_else_goes_on(desk, cold, folder)
        talk(workspace.open("live"), "three")
    assert found[0] is found[1] is found[2] is workspace.models["slow"]


def test_a_workspace_that_is_closed_while_a_model_is_loaded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Stop(monkeypatch, Model, "load")

    def load() -> str:
        try:
            desk.workspace.load(desk.model_folder, name="late", threads=1)
        except InvalidArgument as error:
            return str(error)
        return ""

    with meanwhile(load, release=stop.open) as results:
        stop.reached.wait()
        desk.workspace.close()
    assert "closed" in results[0] and desk.workspace.models == {}


def test_kv_that_is_exported(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = desk.session("a")
    talk(session, PAST)
    stop = Stop(monkeypatch, archive, "_write_kv")
    with meanwhile(lambda: session.export(kv=tmp_path / "kv"), release=stop.open) as exported:
        stop.reached.wait()
        talk(session, "more")
    assert len(exported[0]["turns"]) == 1 and (tmp_path / "kv").stat().st_size > 0
    assert len(desk.workspace.import_(exported[0], id="b", kv=tmp_path / "kv").turns) == 1


# ---- Names ----------------------------------------------------------------------------------------------------------


def test_many_open_one_cold_session(desk: Desk, cold: list[dict[str, Any]]) -> None:
    workspace = desk.workspace
    found = in_threads(*[lambda: workspace.open("cold0")] * 8, *[lambda: workspace.session("cold0", model="tiny")] * 8)
    assert all(one is found[0] for one in found) and told(found[0]) == cold[0]


def test_many_create_one_session(desk: Desk) -> None:
    found = in_threads(*[lambda: desk.session("one")] * 8)
    assert all(one is found[0] for one in found)
    data = found[0].export()
    results = in_threads(*[lambda: desk.workspace.import_(data, id="two")] * 8)
    assert sum(isinstance(one, SessionExists) for one in results) == 7
    assert not desk.workspace._keeper._names._entries


def test_a_session_that_cannot_be_committed_frees_its_name(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise sqlite3.OperationalError("the disk is gone")

    monkeypatch.setattr("fabula.store.changes.put_session", fail)
    with pytest.raises(StoreError):
        desk.session("a")
    monkeypatch.undo()
    assert talk(desk.session("a"), "one")[-1].number == 1


def test_keyed_locks() -> None:
    locks, inside, leave = KeyedLocks(), threading.Event(), threading.Event()
    order: list[str] = []

    def first() -> None:
        with locks.of("a"), locks.of("a"):
            inside.set()
            leave.wait()
            order.append("first")

    def second() -> None:
        inside.wait()
        with locks.of("a"):
            order.append("second")

    def other() -> None:
        inside.wait()
        with locks.of("b"):
            order.append("other")
        wait_until(lambda: locks._entries["a"].n_users == 3)
        leave.set()

    in_threads(first, second, other)
    assert order == ["other", "first", "second"] and not locks._entries


# ---- The server -----------------------------------------------------------------------------------------------------


def test_sessions_of_a_server_are_created_side_by_side(tiny_folder: Path, tmp_path: Path) -> None:
    """They share a commit. Where a key has a last place, one of two gets it."""

    async def work(client: Inside) -> None:
        state = client.app.extensions["fabula"]
        await client.ask("POST", "/write", session_id="a", text="once")
        most = state.limits._settings.max_sessions
        first, second = state.opening("", "b"), state.opening("", "c")
        with first, second:
            assert len(state._places[""]) == 2
        assert not state._places and most > 3
        object.__setattr__(state.limits._settings, "max_sessions", 2)
        inside, leave = threading.Event(), threading.Event()
        results: list[str] = []

        def take() -> None:
            with state.opening("", "b"):
                inside.set()
                leave.wait()
                state.workspace.session("b", model="tiny")

        def wait() -> None:
            inside.wait()
            try:
                with state.opening("", "c"):
                    results.append("both")
            except ApiError as error:
                results.append(str(error.status))

        def watch() -> None:
            inside.wait()
            wait_until(lambda: len(state._places[""]) == 2)
            assert not results
            leave.set()

        found = await state.call(lambda: in_threads(take, wait, watch))
        assert found == [None] * 3 and results == ["429"] and not state._places

    inside(tmp_path, tiny_folder, work)
