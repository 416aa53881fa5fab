"""Requests whose KV is read from a disk that stands still: the others go on, and every end leaves no page."""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from desks import LONG, SHORT, Desk, alone, talk
from fabula import InvalidArgument, Session
from fabula._native import PAGE_POSITIONS, kv_layers, page_bytes
from fabula.engine.request import Request, State
from fabula.errors import StoreError
from fabula.formats.checkpoint import DType
from fabula.kv import prefix_read as prefix_read_module
from fabula.kv.prefix import EVERYTHING, KeyChain
from fabula.kv.spill import SpillFolder
from fabula.sessions.reply import Reply
from scheduling import Clock, settled
from threaded import in_threads
from waiting import run_program, wait_until

PAGE = page_bytes(DType.F16, kv_layers(2, 2, 6))
PAST = "a b c d e f g " * 12


class Disk:
    """Every page that is read stops here until `open`, except the first `n_quick`.

    Attributes:
        read: how often each page was read.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: Counter[bytes] = Counter()
        self.n_quick = 0
        self.reached, self._open, really = threading.Event(), threading.Event(), SpillFolder._read

        def read(folder: SpillFolder, path: Path, key: bytes, out: Any) -> bool:
            self.read[key] += 1
            if self.read.total() > self.n_quick:
                self.reached.set()
                self._open.wait()
            return really(folder, path, key, out)

        monkeypatch.setattr(SpillFolder, "_read", read)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def disk(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:  # noqa: ARG001  `desk` is closed after it
    made = Disk(monkeypatch)
    yield made
    made.open()


def spilled(desk: Desk, id: str = "a") -> Session:
    """A session of two turns whose KV is on disk only; the head is the first turn."""
    session = desk.session(id)
    talk(session, f"{id} {PAST}", "more")
    session.rollback(1)
    desk.workspace.models["tiny"].clear_cache()
    assert desk.pool.n_free == desk.pool.n_pages
    return session


def loading(desk: Desk) -> list[Request]:
    return [r for r in desk.workspace._scheduler._waiting if r.state is State.LOADING]


def asked(session: Session, disk: Disk) -> Reply:
    """Asks for the second turn again, which waits for the disk when this returns."""
    reply = session.say("more", SHORT)
    disk.reached.wait()
    return reply


def test_others_go_on_while_a_page_is_read(desk: Desk, disk: Disk) -> None:
    session = spilled(desk)
    running = desk.session("b", tenant="other").say("long", LONG)
    next(running)
    reply = asked(session, disk)
    assert len(list(running)) == LONG.max_tokens - 1, "one that decodes"
    for id in ("c", "d"):
        assert talk(desk.session(id, tenant="other"), f"{id} new")[-1].token_ids, "one that comes later"
    assert len(loading(desk)) == 1 and not reply.generation.is_ready
    disk.open()
    reply.text()
    turn, model = reply.turn, desk.workspace.models["tiny"]
    assert turn is not None and turn.reused >= (turn.kept - 1) // PAGE_POSITIONS * PAGE_POSITIONS > 0
    assert list(turn.token_ids) == alone(model, turn)
    assert max(disk.read.values()) == 1 and settled(model)


@pytest.mark.parametrize("n_quick", [0, 2])
def test_cancel_while_loading(desk: Desk, disk: Disk, n_quick: int) -> None:
    """It waits for no disk; what was read before is free at once, what comes later is not kept."""
    session, pool = spilled(desk), desk.pool
    disk.n_quick = n_quick
    reply = asked(session, disk)
    assert pool.n_pages - pool.n_free == n_quick
    reply.cancel()
    assert reply.turn is None and not session.is_busy and session.head.number == 1
    assert pool.n_free == pool.n_pages and not loading(desk)
    disk.open()
    assert list(talk(session, "more")[-1].token_ids) == alone(desk.workspace.models["tiny"], session.head)
    assert settled(desk.workspace.models["tiny"])


def test_a_deadline_while_loading(desk: Desk, disk: Disk, clock: Clock) -> None:
    session = spilled(desk)
    reply = session.say("more", SHORT, timeout=1.0)
    disk.reached.wait()
    clock.now += 2.0
    assert reply.text() == "" and reply.generation.finish_reason == "timeout" and desk.pool.n_free == desk.pool.n_pages


def test_unload_while_loading(desk: Desk, disk: Disk) -> None:
    """The model's memory is freed while a page is being read, which is then written nowhere."""
    session = spilled(desk)
    disk.n_quick = 1
    reply = asked(session, disk)
    desk.workspace.unload("tiny")
    with pytest.raises(InvalidArgument, match="closed"):
        reply.text()
    with pytest.raises(InvalidArgument, match="closed"):
        reply.generation.engine.runner.pool.read(0)
    disk.open()
    desk.load()
    assert list(talk(session, "more")[-1].token_ids) == alone(desk.workspace.models["tiny"], session.head)


def test_the_scheduler_stops_while_loading(desk: Desk, disk: Disk) -> None:
    session = spilled(desk)
    reply = asked(session, disk)
    desk.workspace._scheduler.stop()
    assert reply.text() == "" and reply.generation.finish_reason == "cancelled"
    assert desk.pool.n_free == desk.pool.n_pages


def test_a_process_ends_while_loading(tiny_folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "ends.py"
    program.write_text(f"""
import threading
from fabula import SamplingParams, Workspace
from fabula.kv.spill import SpillFolder
with_disk, stands = threading.Event(), threading.Event()
def read(*_):
    with_disk.set()
    stands.wait()
workspace = Workspace({str(tmp_path / "data")!r})
model = workspace.load({str(tiny_folder)!r}, name="tiny", threads=1)
session = workspace.session("a")
session.say({PAST!r}, SamplingParams(max_tokens=3)).text()
model.clear_cache()
SpillFolder._read = read
reply = session.say("more")
with_disk.wait()
print("ends")
""")
    ended = run_program([sys.executable, program])
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ends\n", "")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARMS: dict[str, Callable[[Path], None]] = {
    "flip": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("n_quick", [0, 2])
def test_pages_damaged_while_loading_are_recomputed(desk: Desk, disk: Disk, harm: str, n_quick: int) -> None:
    session = spilled(desk)
    disk.n_quick = n_quick
    reply = asked(session, disk)
    for path in (desk.folder / "pages").rglob("*"):
        if len(path.name) == 32 and path.is_file():
            HARMS[harm](path)
    disk.open()
    reply.text()
    turn, model = reply.turn, desk.workspace.models["tiny"]
    assert turn is not None and turn.reused == n_quick * PAGE_POSITIONS
    assert list(turn.token_ids) == alone(model, turn)
    assert disk.read.total() == n_quick + 1, "what comes after a damaged page is of no use"
    assert settled(model)


@pytest.mark.parametrize("error", [OSError(5, "I/O error"), StoreError("the disk is gone"), RuntimeError("a bug")])
def test_a_failing_read_is_recomputed(desk: Desk, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    session, n_calls = spilled(desk), Counter[str]()

    def fail(*_: Any) -> bool:
        n_calls["get"] += 1
        raise error

    monkeypatch.setattr(SpillFolder, "get", fail)
    turn, model = talk(session, "more")[-1], desk.workspace.models["tiny"]
    assert turn.reused == 0 and n_calls["get"] == 1
    monkeypatch.undo()
    assert list(turn.token_ids) == alone(model, turn) and settled(model)


def test_without_threads_the_prefix_is_recomputed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    session = spilled(desk)

    class NoThread:
        def __init__(self, **_: Any) -> None: ...

        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(prefix_read_module, "threading", SimpleNamespace(Thread=NoThread))
    turn = talk(session, "more")[-1]
    assert turn.reused == 0
    monkeypatch.undo()
    assert list(turn.token_ids) == alone(desk.workspace.models["tiny"], turn)


def test_each_page_is_read_once_for_several_requests(desk: Desk, disk: Disk) -> None:
    session = spilled(desk)
    replies = session.branch(5, "more", SHORT)
    disk.reached.wait()
    wait_until(lambda: desk.workspace._scheduler.load.n_waiting == 5)
    assert len(loading(desk)) == 1
    disk.open()
    for reply in replies:
        reply.text()
        assert reply.turn is not None and reply.turn.reused > 0
        assert list(reply.turn.token_ids) == alone(desk.workspace.models["tiny"], reply.turn)
    assert max(disk.read.values()) == 1


def test_another_takes_over_when_the_one_that_reads_is_canceled(desk: Desk, disk: Disk) -> None:
    session = spilled(desk)
    first, second = session.branch(2, "more", SHORT)
    disk.reached.wait()
    (reading,) = loading(desk)
    left = second if reading is first.generation._request else first
    (first if left is second else second).cancel()
    wait_until(lambda: loading(desk) == [left.generation._request])
    disk.open()
    left.text()
    assert left.turn is not None and left.turn.reused > 0


def test_pages_of_a_slow_read_go_to_those_that_run(desk: Desk, disk: Disk) -> None:
    desk.workspace.unload("tiny")
    desk.load(kv_memory=12 * PAGE)
    session = spilled(desk)
    disk.n_quick = 3
    reply = asked(session, disk)
    assert desk.pool.n_pages - desk.pool.n_free == 3
    other = desk.session("b", tenant="other").say("long", LONG)
    assert len(list(other)) == LONG.max_tokens, "11 pages, which only the slow read can give back"
    disk.open()
    reply.text()
    turn, model = reply.turn, desk.workspace.models["tiny"]
    assert turn is not None and list(turn.token_ids) == alone(model, turn) and settled(model)


@pytest.mark.parametrize("seed", range(3))
def test_many_at_once_from_a_slow_disk_say_the_same(desk: Desk, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A pool for two of eight conversations; reads take their time, fail and find damage."""
    desk.workspace.unload("tiny")
    model = desk.load(kv_memory=14 * PAGE)
    rng, really = random.Random(seed), SpillFolder._read

    def read(folder: SpillFolder, path: Path, key: bytes, out: Any) -> bool:
        threading.Event().wait(rng.random() * 0.004)
        if rng.random() < 0.05:
            raise OSError(5, "I/O error")
        return really(folder, path, key, out) and rng.random() > 0.05

    monkeypatch.setattr(SpillFolder, "_read", read)
    sessions = [desk.session(f"s{i}") for i in range(8)]
    for n in range(3):
        for found in in_threads(*(lambda s=s, n=n: talk(s, f"{n} {s.id} " + "words " * 5) for s in sessions)):
            assert not isinstance(found, BaseException), found
    for session in sessions:
        for turn in session.path:
            assert list(turn.token_ids) == alone(model, turn)
    assert settled(model)


def test_a_canceled_read_allocates_nothing(desk: Desk, disk: Disk) -> None:
    """Also one that was canceled before it began, or between two pages."""
    session = spilled(desk)
    cache, pool, turn = desk.workspace.models["tiny"]._engine.cache, desk.pool, session.head
    keys = KeyChain("").keys(np.asarray(turn.ids(), np.int32))
    assert cache.n_findable(keys, EVERYTHING) == len(keys) * PAGE_POSITIONS > 0
    assert cache.find_in_memory(keys, EVERYTHING) is None
    done = threading.Event()
    read = cache.read(keys, EVERYTHING, done.set)
    read.cancel()
    read.cancel()
    disk.open()
    done.wait()
    assert read.is_done and read.take() is None and pool.n_free == pool.n_pages
    forgotten = [cache.read(keys, EVERYTHING, (again := threading.Event()).set)]
    again.wait()
    assert forgotten[0].n_pages == len(keys)
    forgotten.clear()  # nobody takes it
    wait_until(lambda: pool.n_free == pool.n_pages)


def test_usage_counts_pages_that_are_read(desk: Desk, disk: Disk) -> None:
    session, model = spilled(desk), desk.workspace.models["tiny"]
    disk.n_quick = 2
    reply = asked(session, disk)
    assert (model.kv_usage.n_used, model.kv_usage.n_cached) == (2, 0)
    pages = [page for request in loading(desk) if request.read for page in request.read._pages]
    desk.pool.check([pages])
    disk.open()
    reply.text()
    assert settled(model)
