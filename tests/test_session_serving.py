"""What a server asks of sessions: counts, titles, trees as JSON, turns by id, and verbs in the middle of a reply."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabula import (
    ContextOverflow,
    ContextPolicy,
    InvalidArgument,
    Model,
    Piece,
    Reply,
    SamplingParams,
    Session,
    SessionNotFound,
    StoreFull,
    Turn,
    Workspace,
)
from waiting import wait_until

SHORT = SamplingParams(temperature=1.0, max_tokens=9, seed=11, ignore_eos=True)
LONG = replace(SHORT, max_tokens=400)
CONTEXT = 160
RESULT = {"role": "tool", "content": "12:00"}


@pytest.fixture
def model(tiny_model: Model) -> Model:
    return tiny_model


@pytest.fixture(scope="module")
def narrow(tiny_folder: Path) -> Iterator[Model]:
    with Model.load(tiny_folder, threads=1, context=CONTEXT) as model:
        yield model


@pytest.fixture
def workspace(tmp_path: Path, tiny_folder: Path) -> Iterator[Workspace]:
    with Workspace(tmp_path / "data") as workspace:
        workspace.load(tiny_folder, name="tiny", threads=1)
        yield workspace


def talk(session: Session, *words: Any) -> list[Turn]:
    for text in words:
        session.say(text, SHORT).text()
    return session.path


# ---- Counting -------------------------------------------------------------------------------------------------------


def test_a_count_is_what_the_turn_then_costs(model: Model) -> None:
    session = model.session(system="s")
    for said, options in (("one", None), ([RESULT], {"x": 1}), ("two " * 30, None)):
        before = (session.head, session.turns, model.kv_usage)
        count = session.count(said, template_options=options)
        assert (session.head, session.turns, model.kv_usage) == before and not session.is_busy
        turn = session.say(said, SHORT, template_options=options)
        turn.text()
        head = session.head
        assert count.prompt_tokens == head.kept + len(head.prompt_ids) and count.new_tokens == len(head.prompt_ids)
        assert count.reused_tokens == head.reused and count.cut is None
        assert count.fits and count.max_answer == count.context - count.prompt_tokens == 600 - count.prompt_tokens
    nothing = session.count()
    assert (nothing.prompt_tokens, nothing.new_tokens) == (session.head.n_ids, 0)
    model.clear_cache()
    assert session.count("three").reused_tokens == 0


def test_a_count_of_a_story_and_of_nothing(model: Model) -> None:
    session = model.session()
    assert session.count() == session.count(chat=False)
    assert (session.count().prompt_tokens, session.count().fits, session.count().max_answer) == (0, True, 600)
    with pytest.raises(InvalidArgument, match="no text to continue"):
        session.count("", chat=False)
    assert session.count("the cat", chat=False).prompt_tokens == len(model.tokenizer.encode("the cat"))
    session.tell(5, prompt="the cat", params=SHORT).text()
    count = session.count(" sat", chat=False)
    session.tell(5, prompt=" sat", params=SHORT).text()
    assert count.prompt_tokens == session.head.n_ids - 5 and count.reused_tokens == session.head.reused
    with pytest.raises(InvalidArgument, match="this session is a story"):
        session.count("x")


@pytest.mark.parametrize("policy", ["error", "drop_oldest_turns", "slide"])
def test_a_count_where_the_context_ends(narrow: Model, policy: Any) -> None:
    """For every length around the context: it says what then happens, with the same numbers."""
    session = narrow.session(context_policy=ContextPolicy(policy, window=50 if policy == "slide" else None))
    talk(session, "word0", "word1 " * 4)
    parent, seen = session.head, set()
    for n in range(60, 170, 3):
        session.rollback(parent)
        text = "x" * n
        params = replace(SHORT, max_tokens=None if policy != "slide" else 20)
        count = session.count(text, params)
        seen.add((count.fits, count.cut is not None))
        try:
            session.say(text, params).text()
        except ContextOverflow as error:
            assert not count.fits and count.prompt_tokens == error.n_tokens and count.max_answer == 0
            assert error.context == count.context == CONTEXT
            continue
        head = session.head
        assert count.fits and count.prompt_tokens == head.n_ids - len(head.token_ids)
        if policy == "slide":
            assert count.cut is not None and head.cut is not None
            assert head.cut.n_tokens == count.cut.n_tokens + 20 and count.max_answer > CONTEXT
        else:
            assert count.cut == head.cut and count.max_answer == len(head.token_ids)
    expected: dict[str, set[tuple[bool, bool]]] = {
        "error": {(True, False), (False, False)},
        "drop_oldest_turns": {(True, False), (True, True), (False, True)},
        "slide": {(True, True)},
    }
    assert seen == expected[policy]


def test_a_prompt_as_long_as_the_context_gets_one_token(narrow: Model) -> None:
    session = narrow.session()
    n_more = CONTEXT - session.count("").prompt_tokens
    text = "".join("xz"[i % 2] for i in range(n_more))
    count = session.count(text)
    assert (count.prompt_tokens, count.fits, count.max_answer) == (CONTEXT, True, 1)
    session.say(text, SHORT).text()
    assert len(session.head.token_ids) == 1 and not session.count(text + "x").fits
    assert not session.count().fits, "nothing can follow an answer behind the end"


def test_a_count_waits_for_nobody(model: Model) -> None:
    session = model.session()
    talk(session, "one")
    expected = session.count("two")
    reply = session.say("more", LONG)
    next(reply)
    with session._lock:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(session.count("two")))
        thread.start()
        thread.join()
    assert found == [expected]
    reply.cancel()


# ---- Titles and settings --------------------------------------------------------------------------------------------


def test_settings_can_be_changed(workspace: Workspace) -> None:
    session = workspace.session("a", title="First")
    assert session.title == "First" and workspace.session("b").title == ""
    session.configure(title="日本 🙂", system="s", sampling=SHORT)
    talk(session, "one")
    session.configure(system="s")
    with pytest.raises(InvalidArgument, match="another system message"):
        session.configure(title="no", system="t")
    assert session.title == "日本 🙂"
    with pytest.raises(InvalidArgument, match="title must be text of at most 200"):
        workspace.session("a", title="x" * 201)
    fork = session.fork(0, id="f")
    with pytest.raises(InvalidArgument, match="another system message"):
        session.fork(1).configure(system="t")
    fork.configure(title="", system="other")
    assert workspace.session("a", title="x" * 200) is session and len(session.title) == 200
    settings = {summary.record.id: (summary.title, summary.n_turns) for summary in workspace.sessions()}
    assert settings["a"] == ("x" * 200, 1) and settings["f"] == ("", 0)
    del session, fork
    gc.collect()
    back = workspace.open("a")
    assert (back.title, back.system, back.params, back.n_turns) == ("x" * 200, "s", SHORT, 1)
    assert workspace.open("f").system == "other"


@pytest.mark.parametrize("title", ["x" * 201, "a\nb", "\0", "\x1b[31m", "a\u2028b", "\x85", "\ud800", None, 5, b"x"])
def test_titles_that_cannot_be(workspace: Workspace, model: Model, title: Any) -> None:
    with pytest.raises(InvalidArgument, match="title"):
        Session(model._handle, title=title)
    if title is not None:
        with pytest.raises(InvalidArgument, match="title"):
            workspace.session("a", title=title)
        assert workspace.sessions() == []
    data = model.session().export()
    data["settings"]["title"] = title
    with pytest.raises(InvalidArgument, match="title"):
        workspace.import_(data)


def test_settings_that_cannot_be_kept_do_not_change(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    session = workspace.session("a", title="before")

    def full(_: Any) -> Future[None]:
        failed: Future[None] = Future()
        failed.set_exception(StoreFull("no room", path="here"))
        return failed

    with monkeypatch.context() as patched:
        patched.setattr(workspace._keeper.store, "put_session", full)
        with pytest.raises(StoreFull):
            session.configure(title="after", sampling=LONG)
    assert session.title == "before" and session.params == SamplingParams()


def test_the_system_message_of_a_first_reply_stays(model: Model) -> None:
    session = model.session(system="s")
    reply = session.say("one", LONG)
    next(reply)
    with pytest.raises(InvalidArgument, match="another system message"):
        session.configure(system="t")
    session.configure(title="while it talks")
    reply.cancel()
    assert session.system == "s" and session.title == "while it talks"


def test_lists_say_when(workspace: Workspace) -> None:
    began = time.time()
    for name in ("a", "b"):
        talk(workspace.session(name), "one")
    workspace.open("a").configure(title="last")
    first, second = workspace.sessions()
    assert (first.id, first.model, first.title, first.n_turns, second.title) == ("a", "tiny", "last", 1, "")
    assert began <= second.created_at <= second.updated_at <= first.updated_at <= time.time()


# ---- Trees and turns by their ids -----------------------------------------------------------------------------------


def test_a_tree_as_json(model: Model) -> None:
    session = model.session(id="mine")
    assert session.tree_json() == {
        "id": "mine", "title": "", "head": 0, "head_id": "", "can_redo": False, "turns": [],
    }  # fmt: skip
    session.configure(title="T")
    first, second = talk(session, "one", [RESULT])
    session.edit(2, "other", SHORT).text()
    third = session.head
    session.tag(second, "good")
    fork = session.fork(second)
    fourth = talk(fork, "four")[-1]
    session.rollback(1)
    tree = json.loads(json.dumps(session.tree_json()))
    assert (tree["head"], tree["head_id"], tree["title"], tree["can_redo"]) == (1, first.id, "T", True)
    nodes = {node["id"]: node for node in tree["turns"]}
    assert list(nodes) == [first.id, second.id, third.id]
    shape = {id: (node["number"], node["parent"], node["parent_id"], node["n_children"]) for id, node in nodes.items()}
    assert shape == {first.id: (1, 0, "", 2), second.id: (2, 1, first.id, 0), third.id: (2, 1, first.id, 0)}
    assert [(n["is_head"], n["on_path"], n["is_own"]) for n in nodes.values()] == [
        (True, True, True), (False, False, True), (False, False, True),
    ]  # fmt: skip
    node = nodes[second.id]
    assert node["messages"] == [RESULT] and node["tags"] == ["good"] and node["finish_reason"] == "length"
    assert node["prompt"] == "12:00" and node["text"] == second.text and node["created_at"] == second.created_at
    assert node["generated"] == len(second.token_ids) and node["prompt_tokens"] > 0
    theirs = fork.tree_json()
    assert [(n["id"], n["is_own"], n["on_path"]) for n in theirs["turns"]] == [
        (first.id, False, True), (second.id, False, True), (fourth.id, True, True),
    ]  # fmt: skip
    assert fork.n_turns == 1 and session.n_turns == 3


def test_a_turn_by_its_id(model: Model) -> None:
    session, other = model.session(), model.session()
    first, second = talk(session, "one", "two")
    session.rollback(1)
    aside = talk(session, "aside")[-1]
    assert session.rollback(second.id) is second and session.rollback("").number == 0
    session.rollback(aside.id)
    session.tag(second.id, "x")
    assert second.tags == {"x"}
    session.untag(second.id, "x")
    assert session.children(first.id) == [second, aside] and session.children(0) == [first]
    assert session.diff(second.id, aside.id) == ([second], [aside])
    assert session.alternatives(second.id, 0, 20) == session.alternatives(second, 0, 20)
    assert session.turn(second.id) is session.turn(second) is second and session.turn(1) is first
    with session.at(second.id) as there:
        assert there.head is second
    assert session.head is aside
    session.replay(second.id).text()
    assert session.head.token_ids == second.token_ids
    session.edit(second.id, "instead", SHORT).text()
    assert session.head.parent is first
    session.fork_at(second.id, 1, 40, SHORT).text()
    assert session.head.token_ids[:2] == (second.token_ids[0], 40)
    assert session.fork(second.id).head is second
    foreign = talk(other, "x")[0]
    calls: list[Callable[[Any], Any]] = [
        session.rollback, session.prune, session.fork, session.children, session.replay, session.turn,
        lambda turn: session.tag(turn, "x"), lambda turn: session.untag(turn, "x"),
        lambda turn: session.edit(turn, "x"), lambda turn: session.fork_at(turn, 0, 5),
        lambda turn: session.alternatives(turn, 0), lambda turn: session.diff(turn, 0),
    ]  # fmt: skip
    before = (session.head, session.turns, session._tree.redo_stack)
    for wrong in (foreign, foreign.id, "1", "x" * 500, 99, -99, 1.0, True, [], b"x", first.id + " "):
        for call in calls:
            with pytest.raises(InvalidArgument, match="turn"):
                call(wrong)
    assert (session.head, session.turns, session._tree.redo_stack) == before


# ---- Going back, twice, and after the end ---------------------------------------------------------------------------


def test_going_back_again_changes_nothing(model: Model) -> None:
    session = model.session()
    first, second = talk(session, "one", "two")
    for target, head in ((1, first), (0, first.parent), (second.id, second)):
        for _ in range(2):
            assert session.rollback(target) is head and session.head is head
    assert session.turns == [first, second]
    for _ in range(2):
        session.rollback(1)
    assert session.redo() is second, "a step that was none is not taken back"


@pytest.mark.parametrize("kept", [True, False])
def test_a_deleted_session_is_not_found(workspace: Workspace, model: Model, kept: bool) -> None:
    session = workspace.session("a") if kept else model.session()
    (first,) = talk(session, "one")
    assert session.delete() > 0 and session.delete() == 0
    calls: list[Callable[[], Any]] = [
        lambda: session.rollback(0), lambda: session.rollback(1), lambda: session.rollback(first), session.redo,
        lambda: session.prune(0), session.fork, lambda: session.say("x"), lambda: session.tell(1, prompt="x"),
        session.regenerate, lambda: session.edit(1, "x"), lambda: session.replay(first.id), session.continue_,
        lambda: session.branch(2, "x"), lambda: session.fork_at(1, 0, 5), lambda: session.alternatives(1, 0),
        lambda: session.tag(1, "x"), session.export, session.count, lambda: session.configure(title="x"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(SessionNotFound, match="was deleted"):
            call()
    assert session.turns == session.path == [] and session.tree_json()["turns"] == [] and not session.is_busy
    with pytest.raises(SessionNotFound):
        workspace.delete("a")


def test_prune_says_what_it_freed(workspace: Workspace) -> None:
    session = workspace.session("a")
    first, second, third = talk(session, "a long beginning " * 8, "two " * 30, "three " * 20)
    pool = workspace.models["tiny"]._runner.pool
    n_free = pool.n_free
    n_bytes = session.prune(second.id)
    assert n_bytes == (pool.n_free - n_free) * pool.page_bytes > 0
    assert (
        session.head is second and session.turns == [first, second] and third.kv is not None and not third.kv.n_tokens
    )
    assert session.prune(2) == 0
    session.rollback(0)
    assert session.prune(first.id) > 0 and session.head.number == 0, "a head that stands elsewhere stays"
    assert session.turns == [first]
    with pytest.raises(InvalidArgument, match="nothing to redo"):
        session.redo()
    fork = session.fork(first)
    session.prune(0)
    assert session.turns == [] and fork.path == [first] and talk(fork, "on")[-1].recomputed == 0
    assert workspace._keeper.store.check() == []


@pytest.mark.parametrize("select", [True, False])
def test_a_prune_that_the_store_refuses_changes_nothing(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, select: bool
) -> None:
    session = workspace.session("a")
    talk(session, "one", "two", "three")
    session.rollback(2)
    before = (session.head, session.turns, session._tree.redo_stack)

    def full(*_: Any) -> Future[None]:
        failed: Future[None] = Future()
        failed.set_exception(StoreFull("no room", path="here"))
        return failed

    with monkeypatch.context() as patched:
        patched.setattr(workspace._keeper.store, "delete_turns", full)
        with pytest.raises(StoreFull):
            session.prune(1, select=select)
    assert (session.head, session.turns, session._tree.redo_stack) == before
    assert session.rollback(1, prune=True).number == 1 and session.n_turns == 1


# ---- In the middle of a reply ---------------------------------------------------------------------------------------

VERBS: dict[str, Callable[[Session], Any]] = {
    "rollback": lambda session: session.rollback(1),
    "rollback to the start": lambda session: session.rollback(0),
    "rollback where it is": lambda session: session.rollback(session.head),
    "prune": lambda session: session.rollback(1, prune=True),
    "delete": lambda session: session.delete(),
    "stop": lambda session: session.stop(),
}


def judge(session: Session, reply: Reply, read: list[Piece], verb: str, past: list[Turn]) -> None:
    """The reply ended where its reader was, and the session is where the verb put it."""
    assert reply.is_done and reply.generation.finish_reason == "cancelled" and len(read) < LONG.max_tokens  # type: ignore[operator]
    turn = reply.turn
    assert turn is not None and turn.finish_reason == "cancelled" and not session.is_busy
    assert list(turn.token_ids) == [piece.token_id for piece in read]
    assert turn.text == "".join(piece.text for piece in read)
    first, second = past
    expected = {
        "rollback": (first, [first, second, turn]),
        "rollback to the start": (first.parent, [first, second, turn]),
        "rollback where it is": (second, [first, second, turn]),
        "prune": (first, [first]),
        "stop": (turn, [first, second, turn]),
    }
    if verb == "delete":
        assert session.turns == [] and session.head.number == 0
        with pytest.raises(SessionNotFound):
            session.say("more")
    else:
        assert (session.head, session.turns) == expected[verb]
        assert talk(session, "on")[-1].finish_reason == "length"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kept", [True, False])
def test_a_verb_while_a_thread_reads(workspace: Workspace, model: Model, verb: str, kept: bool) -> None:
    session = workspace.session("a") if kept else model.session()
    past = talk(session, "one", "two")
    reply, read, done = session.say("more", LONG), [], threading.Event()

    def reader() -> None:
        for piece in reply:
            read.append(piece)
            if len(read) == 100:
                done.wait()  # or it might come to the end before the verb does
            time.sleep(0.001)  # a reader slow enough to be caught in the middle

    thread = threading.Thread(target=reader)
    thread.start()
    wait_until(lambda: len(read) >= 2)
    VERBS[verb](session)
    n_read = len(reply.generation.token_ids)
    done.set()
    thread.join()
    assert len(read) == n_read, "nothing is read behind the verb"
    judge(session, reply, read, verb, past)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("how", ["in the loop", "in a thread"])
def test_a_verb_while_a_task_reads(workspace: Workspace, verb: str, how: str) -> None:
    session = workspace.session("a")
    past = talk(session, "one", "two")

    async def main() -> tuple[Reply, list[Piece]]:
        reply = session.say("more", LONG)
        read: list[Piece] = []
        begun, done = asyncio.Event(), asyncio.Event()

        async def reader() -> None:
            async for piece in reply:
                read.append(piece)
                if len(read) == 2:
                    begun.set()
                if len(read) == 100:
                    await done.wait()
                await asyncio.sleep(0.001)

        task = asyncio.create_task(reader())
        await begun.wait()
        if how == "in the loop":
            VERBS[verb](session)
        else:
            await asyncio.to_thread(VERBS[verb], session)
        done.set()
        await task
        return reply, read

    reply, read = asyncio.run(main())
    judge(session, reply, read, verb, past)


def test_a_task_that_waits_for_the_first_token(model: Model) -> None:
    """It is woken, although there is no new turn; the session is as it was."""
    session = model.session()
    talk(session, "one")

    async def main() -> list[Piece]:
        reply = session.say("word " * 80, LONG)
        read: list[Piece] = []

        async def reader() -> None:
            read.extend([piece async for piece in reply])

        task = asyncio.create_task(reader())
        await asyncio.sleep(0)
        session.rollback(0)
        await task
        assert reply.generation.finish_reason == "cancelled" and len(read) == len(reply.generation.token_ids)
        return read

    read = asyncio.run(main())
    assert session.head.number == 0 and session.n_turns == (2 if read else 1)


def test_wrong_turns_stop_no_reply(model: Model) -> None:
    session = model.session()
    (first,) = talk(session, "one")
    reply = session.say("two", SHORT)
    pieces = [next(reply)]
    for wrong in (2, -2, "x"):  # its own turn is not there yet
        for verb in (session.rollback, session.prune):
            with pytest.raises(InvalidArgument, match="turn"):
                verb(wrong)  # type: ignore[operator]
    pieces += list(reply)
    assert session.path == [first, reply.turn] and len(pieces) == 9


def test_many_callers_go_back_at_once(workspace: Workspace) -> None:
    """Whatever the order, each verb is done whole, and what is left is a tree."""
    session = workspace.session("a")
    talk(session, "one", "two")
    failures: list[BaseException] = []

    def work(session: Session, k: int) -> None:
        try:
            for i in range(8):
                if k % 2:
                    session.say(f"{k} {i}", SHORT, wait=True).text()
                else:
                    session.rollback(session.turns[i % 2].id)
                    session.count("x")
                    session.tree_json()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(session, k)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and not session.is_busy
    tree = session.tree_json()
    del threads, thread
    numbers = {"": 0} | {node["id"]: node["number"] for node in tree["turns"]}
    assert all(node["number"] == numbers[node["parent_id"]] + 1 for node in tree["turns"])
    before = (tree["head_id"], [node["id"] for node in tree["turns"]])
    del session
    gc.collect()
    back = workspace.open("a").tree_json()
    assert (back["head_id"], [node["id"] for node in back["turns"]]) == before
    assert workspace._keeper.store.check() == []
