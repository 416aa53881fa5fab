"""Workspaces whose pages run out, and whose disk is damaged, full or read-only."""

from __future__ import annotations

import errno
import gc
import os
import random
import shutil
import sqlite3
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from desks import LONG, PAST, SHORT, Desk, alone, talk, told
from fabula import OutOfMemory, StoreCorrupt, StoreFull, Workspace
from fabula._native import kv_layers, page_bytes
from fabula.formats.checkpoint import DType
from waiting import run_program, wait_until

PAGE = page_bytes(DType.F16, kv_layers(2, 2, 6))


# ---- Pages run out --------------------------------------------------------------------------------------------------


def test_a_prompt_for_which_there_are_no_pages(tiny_folder: Path, tmp_path: Path) -> None:
    with Workspace(tmp_path) as workspace:
        model = workspace.load(tiny_folder, name="tiny", threads=1, kv_memory=4 * PAGE)
        session = workspace.session("a")
        (first,) = talk(session, "one")
        before = told(session)
        for _ in range(2):
            with pytest.raises(OutOfMemory, match="pages"):
                session.say("word " * 60, SHORT).text()
            assert told(session) == before and not session.is_busy
        assert list(talk(session, "two")[-1].token_ids) == alone(model, session.head)
        assert session.path[0] is first


def test_pages_from_the_disk_are_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    """Ten conversations in a pool for two: each is read from disk repeatedly."""
    with Workspace(tmp_path) as workspace:
        model = workspace.load(tiny_folder, name="tiny", threads=1, kv_memory=14 * PAGE)
        sessions = [workspace.session(f"s{i}") for i in range(10)]
        for n in range(3):
            for i, session in enumerate(sessions):
                turn = talk(session, f"{i} {n} " + "words " * 5)[-1]
                assert list(turn.token_ids) == alone(model, turn)
                if n:
                    assert turn.reused >= (turn.parent.n_ids - 1) // 32 * 32 if turn.parent else False
        assert model.kv_usage.n_spilled > 14


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "foreign", "gone", "unreadable", "all but first"])
def test_damaged_pages_on_disk_are_computed_anew(desk: Desk, harm: str) -> None:
    session = desk.session()
    first, second = talk(session, PAST * 2, PAST)
    desk.workspace.close()
    files = sorted(path for path in (desk.folder / "pages").rglob("*") if len(path.name) == 32 and path.is_file())
    assert len(files) >= second.n_ids // 32
    rng = random.Random(harm)
    for path in files if harm != "all but first" else files[1:]:
        data = bytearray(path.read_bytes())
        if harm == "cut":
            path.write_bytes(data[: rng.randrange(len(data))])
        elif harm == "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        elif harm == "empty":
            path.write_bytes(b"")
        elif harm == "foreign":
            path.write_bytes(rng.choice(files).read_bytes() if rng.random() < 0.5 else os.urandom(len(data)))
        elif harm == "unreadable":
            path.unlink()
            path.mkdir()
        else:
            path.unlink()
    desk.workspace = Workspace(desk.folder)
    model = desk.load()
    back = desk.session()
    back.rollback(1)
    again = talk(back, PAST)[-1]
    assert again.token_ids == second.token_ids == tuple(alone(model, again))
    assert again.recomputed > 0 and again.why_recomputed
    assert first.n_ids == back.path[0].n_ids


def test_a_damaged_row_harms_one_session(desk: Desk) -> None:
    for name in ("a", "b"):
        talk(desk.session(name), "one", "two")
    talk(desk.session("a").fork(1, id="fork"), "x")
    before = {name: told(desk.session(name)) for name in ("b", "fork")}
    gc.collect()
    turn = desk.session("a").path[1].id
    desk.workspace.close()
    connection = sqlite3.connect(desk.folder / "sessions.sqlite3")
    connection.execute("UPDATE turns SET text = ? WHERE id = ?", (b"something else", turn))
    connection.commit()
    connection.close()
    gc.collect()
    desk.workspace = Workspace(desk.folder)
    desk.load()
    with pytest.raises(StoreCorrupt, match=turn):
        desk.workspace.open("a")
    assert {name: told(desk.workspace.open(name)) for name in ("b", "fork")} == before
    talk(desk.workspace.open("b"), "three")
    assert any(turn in problem for problem in desk.store.check())


# ---- The disk fails -------------------------------------------------------------------------------------------------


@pytest.fixture
def failing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a kind of write of the store fail, or all work again with ""."""
    store, real = desk.store, {name: getattr(desk.store, name) for name in ("put_turn", "put_tags", "delete_turns")}

    def refuse(*_: Any) -> Future[None]:
        future: Future[None] = Future()
        future.set_exception(StoreFull("no room is left", path="disk"))
        return future

    def set_up(what: str) -> None:
        for name, function in real.items():
            monkeypatch.setattr(store, name, refuse if name == what else function)

    return set_up


@pytest.mark.parametrize("drafted", [False, True])
def test_a_turn_that_cannot_be_kept(desk: Desk, failing: Callable[[str], None], drafted: bool) -> None:
    """The session is as it was, also if a part of the turn was on disk already, and can be pruned and deleted."""
    desk.store._writer._checkpoint_s = 0.001 if drafted else 100
    session = desk.session()
    (first,) = talk(session, "one")
    before = told(session)
    reply = session.say("two", LONG)
    for _ in range(5):
        next(reply)
    watch = desk.workspace._keeper._watches[reply]
    wait_until(lambda: not drafted or watch._stored is not None, "the store does not look at it")
    failing("put_turn")
    with pytest.raises(StoreFull):
        reply.text()
    assert told(session) == before and reply.turn is None and not session.is_busy
    failing("")
    desk.store.flush()
    assert [turn.id for turn in desk.store.load("", "a")[1]] == [first.id], "nothing of it is left"
    talk(session, "two")
    session.rollback(1, prune=True)
    session.rollback(0, prune=True)
    assert session.delete() == 0 and desk.store.check() == []


def test_a_tag_that_cannot_be_kept(desk: Desk, failing: Callable[[str], None]) -> None:
    session = desk.session()
    talk(session, "one")
    session.tag(1, "good")
    failing("put_tags")
    for change, name in ((session.tag, "new"), (session.untag, "good")):
        with pytest.raises(StoreFull):
            change(1, name)
        assert session.path[0].tags == {"good"}
    failing("")
    del change
    del session
    desk.again()
    assert desk.session().path[0].tags == {"good"}


FULL_DISK = """
import ctypes, random, sys
from fabula import *
folder, model, error, part, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
shim, rng = ctypes.CDLL(None), random.Random(seed)
# A disk does not make only the database read-only; the folder shows whether it is full or broken.
kind = StoreError if part.endswith("sessions.sqlite3") else {28: StoreFull, 30: StoreReadOnly}[error]
short = SamplingParams(temperature=1.0, max_tokens=9, seed=3)
w = Workspace(folder)
w._keeper.store._writer._checkpoint_s = 0.001
w.load(model, name="m", threads=1, kv_memory=1 << 17)
s = w.session("a")
words = "so many words that pages run out " * 3
for n in range(6):
    s.say(words, short).text()
    if n % 2:
        s.rollback(0)
def state():
    return [(t.id, t.text, t.token_ids) for t in s.turns], s.head.id
refused = 0
for n in range(30):
    before = state()
    shim.fault_arm(part.encode(), ctypes.c_long(1 + rng.randrange(3)), error, 1)
    try:
        s.say(words, short).text()
    except kind as failure:
        refused += 1
        assert shim.fault_hits() and state() == before and not s.is_busy, failure
        shim.fault_clear()
    shim.fault_clear()
    s.say(words, short).text()
    assert len(s.turns) >= len(before[0]) + 1
    s.rollback(rng.randrange(s.head.number + 1) if s.head.number < 4 else 0)
w._keeper.store.flush()
assert w._keeper.store.check() == [], w._keeper.store.check()
before = sorted(state()[0]), state()[1]
w.close()
del s
with Workspace(folder) as w:
    w.load(model, name="m", threads=1)
    s = w.open("a")
    assert (sorted(state()[0]), state()[1]) == before
    s.say("again", short).text()
    s.delete()
    assert w._keeper.store.check() == []
print(refused)
"""


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("part", ["sessions.sqlite3", "pages", ""])
def test_the_disk_is_full_or_read_only(shim: Path, tiny_folder: Path, tmp_path: Path, error: int, part: str) -> None:
    """A reply fails as a whole, session and store stay as before, and the next one works once there is room. If only KV
    pages cannot be written, nothing fails."""
    folder = tmp_path / "data"
    result = run_program(
        [sys.executable, "-W", "error", "-c", FULL_DISK, folder, tiny_folder, error, f"{folder}/{part}", 1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "LD_PRELOAD": str(shim)},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert (int(result.stdout) > 0) == (part != "pages")


def test_no_place_for_pages_is_no_reason_to_fail(desk: Desk) -> None:
    talk(desk.session(), PAST)
    desk.workspace.close()
    shutil.rmtree(desk.folder / "pages")
    (desk.folder / "pages").write_bytes(b"a file")
    desk.workspace = Workspace(desk.folder)
    desk.load()
    assert "not kept on disk" in talk(desk.session(), "two")[-1].why_recomputed
