"""Workspaces: sessions that survive the process, the model and each other."""

from __future__ import annotations

import gc
import os
import random
import shutil
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from desks import LONG, PAST, SHORT, Desk, alone, talk, told
from fabula import InvalidArgument, Model, SamplingParams, Session, StoreLocked, Workspace
from waiting import run_program, wait_until

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
    """The KV of full pages is read from disk; a turn computes the rest of its parent's last page."""
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
        ("gone", "evicted, or never kept"),
        ("no spill", "evicted, or never kept"),
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
    """An error, or the pieces that were generated already; never a model that is silently loaded again."""
    session = desk.session()
    (first,) = talk(session, "one")
    reply = session.say("two", params)
    pieces = [next(reply) for _ in range(n_read)]
    wait_until(lambda: params is not SHORT or reply.generation._request.done.is_set())
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
    reply.generation._request.done.wait()
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
    assert run_program(command, env=environment).returncode == 0
    desk.workspace.close()
    desk.workspace.close()
    for call in (lambda: desk.session(), lambda: desk.workspace.open("a"), lambda: desk.workspace.load(tiny_folder)):
        with pytest.raises(InvalidArgument, match="closed"):
            call()
    assert run_program(command, env=environment).returncode == 3
    desk.workspace = Workspace(desk.folder)
    assert len(desk.workspace.open("a").path) == 1


def test_what_was_done_last_is_there_at_once(desk: Desk) -> None:
    """A session that lost its last reference is the same when it is opened again."""
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
    with pytest.raises(InvalidArgument, match="uses the model tiny"):
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
    """Many forks, some of which continue, and their end: every page is freed once."""
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
    wait_until(lambda: not desk.store._writer._watches, "the store looks at it for ever")
    assert [turn.prompt for turn in desk.workspace.open("a").path][:1] == ["one"]
