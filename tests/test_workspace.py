"""Workspaces: sessions that survive the process, the model, the disk and each other."""

from __future__ import annotations

import errno
import gc
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from fabula import (
    InvalidArgument,
    Model,
    OutOfMemory,
    SamplingParams,
    Session,
    SessionBusy,
    StoreCorrupt,
    StoreFull,
    StoreLocked,
    Turn,
    Workspace,
)
from fabula._native import page_bytes
from fabula.engine.generation import Generation
from fabula.formats.checkpoint import DType
from threaded import WAIT_S, in_threads

FAULTS = Path(__file__).parent / "faults"
SHORT = SamplingParams(temperature=1.0, max_tokens=9, seed=11)
LONG = SamplingParams(temperature=1.0, max_tokens=300, seed=12, ignore_eos=True)
PAGE = page_bytes(DType.F16, 2, 2, 6)
PAST = "a b c d e f g " * 6


class Desk:
    """A workspace that can be closed and opened again."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model_folder = folder, model
        self.options: dict[str, Any] = {"threads": 1}
        self.workspace = Workspace(folder)
        self.load()

    def load(self, **options: Any) -> Model:
        return self.workspace.load(self.model_folder, name="tiny", **self.options | options)

    def session(self, id: str = "a", **settings: Any) -> Session:
        return self.workspace.session(id, model="tiny", **settings)

    def again(self, **options: Any) -> None:
        """As if the process had ended in order and begun again."""
        self.workspace.close()
        gc.collect()
        self.workspace = Workspace(self.folder)
        self.load(**options)

    @property
    def pool(self) -> Any:
        return self.workspace.models["tiny"]._runner.pool

    @property
    def store(self) -> Any:
        return self.workspace._keeper.store


@pytest.fixture
def desk(tmp_path: Path, tiny_folder: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path / "data", tiny_folder)
    yield desk
    desk.workspace.close()


def talk(session: Session, *words: str) -> list[Turn]:
    for text in words:
        session.say(text, SHORT).text()
    return session.path


def alone(model: Model, turn: Turn) -> list[int]:
    """The answer of a turn from scratch, under a salt that nobody uses."""
    assert turn.params is not None
    prompt = turn.ids()[: turn.n_ids - len(turn.token_ids)]
    generation = Generation(
        model._engine,
        prompt,
        turn.params,
        continues=not turn.chat,
        begun=turn.token_ids[: turn.n_begun],
        salt=os.urandom(8).hex(),
    )
    generation.text()
    return generation.token_ids


def told(session: Session) -> dict[str, Any]:
    """Everything about a session that must survive."""
    return {
        "turns": {
            turn.id: (
                turn.parent.id if turn.parent else None, turn.number, turn.chat, turn.prompt, turn.text, turn.kept,
                turn.prompt_ids, turn.token_ids, turn.n_begun, turn.params, turn.finish_reason, turn.timings, turn.cut,
                turn.why_recomputed, turn.created_at, turn.tags,
            )
            for turn in session.turns
        },
        "head": session.head.id,
        "undone": [turn.id for turn in session._undone],
        "settings": (session.system, session.params, session.policy, session.created_at, session.vocabulary),
    }  # fmt: skip


# ---- Coming back ----------------------------------------------------------------------------------------------------


def test_everything_survives_a_restart(desk: Desk) -> None:
    session = desk.session(system="be kind", sampling=replace(SHORT, logit_bias={5: float("-inf"), 6: 2.0}))
    _, second, third = talk(session, "one", "two", "three <|im_end|> 日本")
    session.tag(2, "good")
    session.tag(2, "日本")
    session.tag(third, "gone")
    session.untag(third, "gone")
    session.edit(2, "other").text()
    session.fork_at(second, 3, 40).text()
    for reply in session.branch(3, "which", SHORT):
        reply.text()
    fork = session.fork(second, id="fork")
    talk(fork, "aside")
    with session.say("cut", LONG) as reply:
        next(reply)
    session.rollback(third)
    session.rollback(1)
    session.rollback(0)
    before = [told(session), told(fork)]
    assert len(before[0]["undone"]) == 3 and len(before[0]["turns"]) == 9
    del session, fork, second, third, reply
    desk.again()
    back, fork_back = desk.workspace.open("a"), desk.workspace.open("fork")
    assert [told(back), told(fork_back)] == before
    assert desk.store.check() == []
    assert [back.redo().number, back.redo().number] == [1, 3]
    assert back.path[1] is fork_back.path[1], "they share their past as they did"
    assert {summary.record.id: summary.n_turns for summary in desk.workspace.sessions()} == {"a": 9, "fork": 1}


@pytest.mark.parametrize("policy", ["error", "slide", "drop_oldest_turns"])
def test_a_restart_is_warm_and_says_the_same(desk: Desk, policy: str) -> None:
    """The K and V of full pages come back from the disk; a turn computes what its parent's last page held."""
    session = desk.session(context_policy=policy)
    first, second = talk(session, PAST, PAST)
    expected = alone(desk.workspace.models["tiny"], second)
    desk.again()
    assert desk.workspace.models["tiny"].kv_usage.n_spilled >= second.n_ids // 32
    back = desk.session()
    back.rollback(1)
    again = talk(back, PAST)[-1]
    assert list(again.token_ids) == expected == list(second.token_ids)
    assert again.reused >= (first.n_ids - 1) // 32 * 32 and again.recomputed < 32


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("kv", "KV is f32 here, f16 there"),
        ("weights", "the weights differ"),
        ("gone", "given up for others, or not kept"),
        ("no spill", "given up for others, or not kept"),
    ],
)
def test_a_cold_start_says_why(desk: Desk, tmp_path: Path, change: str, why: str) -> None:
    session = desk.session()
    (first,) = talk(session, PAST)
    desk.workspace.close()
    if change == "gone":
        shutil.rmtree(desk.folder / "pages")
    if change == "weights":
        desk.model_folder = tiny.write_model(tmp_path / "other", tensors=tiny.random_tensors(seed=3))
    desk.workspace = Workspace(desk.folder, spill_bytes=0 if change == "no spill" else 1 << 20)
    desk.load(kv="f32" if change == "kv" else "f16")
    turn = talk(desk.session(), "more")[-1]
    assert turn.kept == first.n_ids and turn.reused == 0 and turn.recomputed == first.n_ids - 1
    assert why in turn.why_recomputed
    assert list(turn.token_ids) == alone(desk.workspace.models["tiny"], turn)
    assert talk(desk.session(), "and")[-1].why_recomputed == ""


def test_a_session_outlives_its_model(desk: Desk) -> None:
    session = desk.session()
    first, second = talk(session, PAST, "two")
    desk.workspace.unload("tiny")
    with pytest.raises(InvalidArgument, match="not loaded"):
        desk.workspace.unload("tiny")
    assert desk.workspace.models == {} and session.path == [first, second]
    session.rollback(1)
    assert talk(session, "two")[-1].token_ids == second.token_ids, "it is loaded when it is needed"
    assert session.head.reused >= first.n_ids // 32 * 32 and session.head.recomputed < 32
    desk.workspace.unload("tiny")
    assert session.delete() == 0 and desk.workspace.sessions() == []


@pytest.mark.parametrize("n_read", [0, 3])
@pytest.mark.parametrize("params", [LONG, SHORT], ids=["in the making", "made"])
def test_the_model_goes_while_a_reply_is_read(desk: Desk, n_read: int, params: SamplingParams) -> None:
    """An error, or the rest of what was made already; never a model that is loaded again behind the reader's back."""
    session = desk.session()
    (first,) = talk(session, "one")
    reply = session.say("two", params)
    pieces = [next(reply) for _ in range(n_read)]
    while params is SHORT and not reply.generation._request.done.is_set():
        time.sleep(0.001)
    desk.workspace.unload("tiny")
    try:
        pieces += list(reply)
    except InvalidArgument as error:
        assert "closed" in str(error)
        assert reply.turn is None and session.path == [first]
    else:
        assert reply.turn is not None and session.path == [first, reply.turn]
        assert reply.turn.text == "".join(piece.text for piece in pieces)
    assert desk.workspace.models == {} and not session.is_busy
    assert len(talk(session, "three")) == len(session.path)
    assert list(session.head.token_ids) == alone(desk.workspace.models["tiny"], session.head)
    desk.again()
    assert desk.store.check() == []


def test_a_closed_model_leaves_a_session_that_is_whole(tiny_folder: Path) -> None:
    model = Model.load(tiny_folder, threads=1)
    session = model.session()
    reply = session.say("x", SHORT)
    next(reply)
    while not reply.generation._request.done.is_set():
        time.sleep(0.001)
    model.close()
    try:
        reply.text()
    except InvalidArgument:
        assert session.turns == []
    assert session.turns == session.path == ([] if reply.turn is None else [reply.turn])
    assert not session.is_busy


def test_one_process_at_a_time(desk: Desk, tiny_folder: Path) -> None:
    with pytest.raises(StoreLocked):
        Workspace(desk.folder)
    talk(desk.session(), "one")
    script = (
        "import sys\nfrom fabula import Workspace, StoreLocked\ntry: Workspace(sys.argv[1])\nexcept StoreLocked: pass"
    )
    command = [sys.executable, "-W", "error", "-c", script + "\nelse: sys.exit(3)", str(desk.folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run(command, env=environment, timeout=60).returncode == 0
    desk.workspace.close()
    desk.workspace.close()
    for call in (lambda: desk.session(), lambda: desk.workspace.open("a"), lambda: desk.workspace.load(tiny_folder)):
        with pytest.raises(InvalidArgument, match="closed"):
            call()
    assert subprocess.run(command, env=environment, timeout=60).returncode == 3
    desk.workspace = Workspace(desk.folder)
    assert len(desk.workspace.open("a").path) == 1


def test_what_was_done_last_is_there_at_once(desk: Desk) -> None:
    """Whoever forgets a session and opens it again finds it as he left it."""
    talk(desk.session(), "one", "two", "three")
    for _ in range(6):
        gc.collect()
        desk.workspace.open("a").rollback(1)
        gc.collect()
        assert desk.workspace.open("a").head.number == 1
        desk.workspace.open("a").redo()
        gc.collect()
        assert desk.workspace.open("a").head.number == 3


def test_a_prune_that_takes_nothing_away_ends_redo_for_good(desk: Desk) -> None:
    session = desk.session()
    first, _ = talk(session, "one", "two")
    leaf = session.edit(1, "other", SHORT)
    leaf.text()
    session.rollback(session.children(first)[0])
    session.rollback(leaf.turn or 0, prune=True)
    del session, leaf, first
    desk.again()
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="nothing to redo"):
            desk.workspace.open("a").redo()


def test_settings_of_a_session_that_exists(desk: Desk, tiny_folder: Path) -> None:
    session = desk.session(system="s", sampling=SHORT, tenant="x")
    assert desk.session(tenant="x") is session and desk.session(tenant="y") is not session
    assert desk.session(tenant="x", system="t", sampling=LONG).system == "t"
    talk(session, "one")
    desk.workspace.load(tiny_folder, name="two", threads=1)
    wrong: list[dict[str, Any]] = [{"system": "u"}, {"context_policy": "slide"}]
    for change in wrong:
        with pytest.raises(InvalidArgument, match="session a has"):
            desk.session(tenant="x", **change)
    with pytest.raises(InvalidArgument, match="talks to tiny"):
        desk.workspace.session("a", model="two", tenant="x")
    with pytest.raises(InvalidArgument, match="no session"):
        desk.workspace.open("a", tenant="z")
    del session
    desk.again()
    back = desk.session(tenant="x")
    assert (back.system, back.params, len(back.path)) == ("t", LONG, 1)


def test_a_session_of_another_tokenizer_is_refused(desk: Desk, tmp_path: Path) -> None:
    talk(desk.session(), "one")
    before = told(desk.session())
    desk.workspace.close()
    vocab = tiny.VOCAB + 3
    config = dict(tiny.CONFIG) | {"vocab_size": vocab}
    tensors = tiny.random_tensors(config)
    desk.model_folder = tiny.write_model(tmp_path / "m", config=config, tensors=tensors, n_more_tokens=3)
    desk.workspace = Workspace(desk.folder)
    desk.load()
    back = desk.session()
    for call in (lambda: back.say("two"), back.regenerate, lambda: back.continue_(3)):
        with pytest.raises(InvalidArgument, match="another tokenizer"):
            call()
    assert told(back) == before and not back.is_busy


# ---- Several callers ------------------------------------------------------------------------------------------------


def test_those_who_wait_get_their_turn_in_order(desk: Desk) -> None:
    session = desk.session()
    first = session.say("first", LONG)
    next(first)
    with pytest.raises(SessionBusy):
        session.say("no", wait=False)
    began = time.monotonic()
    with pytest.raises(SessionBusy):
        session.say("no", wait=0.05)
    assert time.monotonic() - began < 5
    threads = []
    for i in range(4):
        thread = threading.Thread(target=lambda i=i: session.say(f"{i}", SHORT, wait=True).text())
        thread.start()
        threads.append(thread)
        while len(session._line) <= i:
            time.sleep(0.001)
    with pytest.raises(SessionBusy):
        session.say("no", wait=0.05)
    first.cancel()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert [turn.prompt for turn in session.path] == ["first", "0", "1", "2", "3"]


def test_a_forgotten_reply_holds_up_nobody_who_waits(desk: Desk) -> None:
    session = desk.session()
    reply = session.say("first", LONG)
    next(reply)
    thread = threading.Thread(target=lambda: session.say("second", SHORT, wait=True).text())
    thread.start()
    time.sleep(0.02)
    del reply
    gc.collect()
    thread.join(WAIT_S)
    assert not thread.is_alive() and [turn.prompt for turn in session.path] == ["first", "second"]


@pytest.mark.parametrize("verb", ["rollback", "redo", "delete", "prune", "close", "unload", "at"])
def test_in_the_middle_of_a_reply(desk: Desk, verb: str) -> None:
    """Another thread reads; each verb ends the reply, and leaves a session that goes on."""
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
    while len(reply.generation.token_ids) < 2:
        time.sleep(0.0005)
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
    reader.join(WAIT_S)
    assert not reader.is_alive() and reply.is_done and not session.is_busy
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
    for number in (-1, 3, 10**9):
        with pytest.raises(InvalidArgument, match="no turn"):
            session.rollback(number)
    assert told(session) == before
    assert session.rollback(0).number == 0 and session.rollback(0).number == 0
    assert len(session._undone) == 1 and session.redo().number == 2
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
        going.wait(WAIT_S)
        load(name)

    session._host._load = lambda: slow("tiny")

    def other() -> None:
        assert inside.wait(WAIT_S)
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
                    with session.say("half", LONG, wait=1.0) as reply:
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


# ---- Forks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["oldest first", "newest first", "any"])
def test_three_hundred_forks_of_forks(tiny_folder: Path, order: str) -> None:
    with Model.load(tiny_folder, threads=1) as model:
        grow_and_fell(model, model.session(), 300, order)


def test_forks_of_forks_in_a_store(desk: Desk) -> None:
    n = int(os.environ.get("FABULA_TEST_FORKS", "60"))
    grow_and_fell(desk.workspace.models["tiny"], desk.session(), n, "any")
    assert desk.workspace.sessions() == [] and desk.store.check() == []
    assert n_rows(desk) == 0


def grow_and_fell(model: Model, session: Session, n: int, order: str) -> None:
    """A bush of forks, some of which go on, and its end: every page is freed, once."""
    pool, rng = model._runner.pool, random.Random(4)
    talk(session, PAST)
    forks = [session]
    for i in range(n):
        fork = rng.choice(forks[-10:]).fork(id=f"f{i}")
        if i % 10 == 0:
            fork.say("x", replace(SHORT, max_tokens=2)).text()
        forks.append(fork)
    turns = {turn for each in forks for turn in each.turns}
    assert len(turns) == 1 + -(-n // 10)
    pool.check([turn.kv.pages for turn in turns if turn.kv is not None])
    if order == "newest first":
        forks.reverse()
    elif order == "any":
        rng.shuffle(forks)
    del fork, session, turns
    while forks:
        forks.pop().delete()
    gc.collect()
    pool.check([])
    assert pool.n_free == pool.n_pages


def n_rows(desk: Desk) -> int:
    connection = sqlite3.connect(desk.folder / "sessions.sqlite3")
    (n,) = connection.execute("SELECT count(*) FROM turns").fetchone()
    connection.close()
    return int(n)


@pytest.mark.parametrize("verb", ["delete", "prune"])
def test_a_fork_that_nobody_has_opened_keeps_its_past(desk: Desk, verb: str) -> None:
    session = desk.session()
    talk(session, PAST, "two", "three")
    talk(session.fork(2, id="fork"), "four")
    before = told(desk.session("fork"))
    del session
    desk.again()
    session = desk.session()
    session.delete() if verb == "delete" else session.rollback(0, prune=True)
    assert session.turns == [] and desk.store.check() == []
    del session
    fork = desk.workspace.open("fork")
    assert told(fork) == before
    assert list(talk(fork, "five")[-1].token_ids) == alone(desk.workspace.models["tiny"], fork.head)
    fork.delete()
    assert desk.store.check() == []
    assert n_rows(desk) == 0


def test_a_tag_on_a_shared_turn_is_everybodys(desk: Desk) -> None:
    session = desk.session()
    talk(session, "one")
    fork = session.fork(id="fork")
    fork.tag(1, "mine")
    assert session.path[0].tags == {"mine"}
    session.untag(1, "mine")
    with pytest.raises(InvalidArgument, match="empty start"):
        session.untag(0, "mine")
    for wrong in ("", "a\0b", "\ud800"):
        with pytest.raises(InvalidArgument):
            session.tag(1, wrong)
    assert session.path[0].tags == set(), "a tag that cannot be kept is not there"
    session.tag(1, "last")
    del session, fork
    desk.again()
    assert desk.workspace.open("fork").path[0].tags == {"last"}


def test_the_watch_of_a_forgotten_reply_ends(desk: Desk) -> None:
    session = desk.session()
    talk(session, "one")
    reply = session.say("two", LONG)
    next(reply)
    del session, reply
    gc.collect()
    end = time.monotonic() + WAIT_S
    while desk.store._writer._watches:
        assert time.monotonic() < end, "the store looks at it for ever"
        time.sleep(0.01)
    assert [turn.prompt for turn in desk.workspace.open("a").path][:1] == ["one"]


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
    """Ten conversations in a pool for two: each comes back from the disk again and again."""
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
    while drafted and watch._stored is None:
        time.sleep(0.001)
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
# The database alone being read-only is not what a disk does; the folder beside it tells a full one from a broken one.
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
def told():
    return [(t.id, t.text, t.token_ids) for t in s.turns], s.head.id
refused = 0
for n in range(30):
    before = told()
    shim.fault_arm(part.encode(), ctypes.c_long(1 + rng.randrange(3)), error, 1)
    try:
        s.say(words, short).text()
    except kind as failure:
        refused += 1
        assert shim.fault_hits() and told() == before and not s.is_busy, failure
        shim.fault_clear()
    shim.fault_clear()
    s.say(words, short).text()
    assert len(s.turns) >= len(before[0]) + 1
    s.rollback(rng.randrange(s.head.number + 1) if s.head.number < 4 else 0)
w._keeper.store.flush()
assert w._keeper.store.check() == [], w._keeper.store.check()
before = sorted(told()[0]), told()[1]
w.close()
del s
with Workspace(folder) as w:
    w.load(model, name="m", threads=1)
    s = w.open("a")
    assert (sorted(told()[0]), told()[1]) == before
    s.say("again", short).text()
    s.delete()
    assert w._keeper.store.check() == []
print(refused)
"""


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("part", ["sessions.sqlite3", "pages", ""])
def test_the_disk_is_full_or_read_only(shim: Path, tiny_folder: Path, tmp_path: Path, error: int, part: str) -> None:
    """A reply fails as a whole, session and store stay as before, and all is well once there is room. Where only pages
    of K and V cannot be written, nothing fails."""
    folder = tmp_path / "data"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", FULL_DISK, folder, tiny_folder, str(error), f"{folder}/{part}", "1"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        timeout=60,
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
