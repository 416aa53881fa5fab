"""Sessions: trees that can be walked, and the laws that walking keeps."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

import tiny
from fabula import (
    ContextOverflow,
    DamagedWeightWarning,
    InvalidArgument,
    Model,
    NonFinite,
    SamplingParams,
    SessionBusy,
    TemplateError,
)
from fabula.engine.generation import Generation
from fabula.sessions.session import Session
from fabula.sessions.turn import Turn
from waiting import wait_until

SHORT = SamplingParams(temperature=1.0, max_tokens=9, seed=11)


@pytest.fixture
def model(tiny_model: Model) -> Model:
    return tiny_model


def alone(model: Model, turn: Turn) -> list[int]:
    """The answer of a turn from scratch: no session, no pages from before."""
    assert turn.params is not None
    prompt = turn.ids()[: turn.n_ids - len(turn.token_ids)]
    model.clear_cache()
    generation = Generation(model._engine, prompt, turn.params, continues=not turn.chat)
    generation.text()
    return generation.token_ids


def talk(session: Session, *words: str) -> list[Turn]:
    for text in words:
        session.say(text, SHORT).text()
    return session.path


# ---- Going on and going back ----------------------------------------------------------------------------------


def test_a_turn_reuses_everything_before_it(model: Model) -> None:
    session = model.session(system="be kind")
    first, second = talk(session, "hello there", "and then")
    assert (first.number, first.reused, first.recomputed) == (1, 0, 0)
    assert second.reused == first.n_ids - 1 and second.recomputed == 0
    assert second.kept == first.n_ids, "what was drawn is kept as it was drawn"
    assert first.token_ids == tuple(alone(model, first)) and second.token_ids == tuple(alone(model, second))
    assert [m["role"] for m in session.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_rollback_and_the_same_again(model: Model) -> None:
    session = model.session()
    first, second, third = talk(session, "one", "two", "three")
    assert session.rollback(1) is first and session.head is first
    again, further = talk(session, "two", "three")[1:]
    assert again is not second and (again.token_ids, further.token_ids) == (second.token_ids, third.token_ids)
    assert again.recomputed == 0
    assert session.turns == [first, second, third, again, further]
    assert session.children(first) == [second, again]


def test_redo_goes_forward_again(model: Model) -> None:
    session = model.session()
    _, second, third = talk(session, "one", "two", "three")
    session.rollback(2)
    session.rollback(0)
    assert session.redo() is second and session.redo() is third
    with pytest.raises(InvalidArgument, match="nothing to redo"):
        session.redo()
    session.rollback(1)
    talk(session, "else")
    with pytest.raises(InvalidArgument, match="nothing to redo"):
        session.redo()


def test_prune_gives_pages_back(model: Model) -> None:
    session = model.session()
    first, *_ = talk(session, "a long beginning " * 8, "two " * 30, "three " * 20)
    pool = model._runner.pool
    used = pool.usage().n_used
    session.rollback(1, prune=True)
    assert session.turns == [first] and pool.usage().n_used < used
    assert talk(session, "two")[1].recomputed == 0


def test_regenerate_edit_and_replay(model: Model) -> None:
    session = model.session()
    first, second = talk(session, "one", "two")
    session.regenerate().text()
    third = session.head
    assert third.parent is first and third.prompt == "two" and third.params != second.params
    session.edit(1, "other", SHORT).text()
    assert session.head.number == 1 and session.head.prompt == "other" and session.head.params == SHORT
    session.replay(second).text()
    assert session.head.parent is first and session.head.token_ids == second.token_ids
    hot = replace(SHORT, temperature=5.0)
    session.replay(second, hot).text()
    assert session.head.params == hot and session.head.token_ids == tuple(alone(model, session.head))
    session.rollback(0)
    with pytest.raises(InvalidArgument, match="empty start"):
        session.regenerate()


def test_a_fork_goes_on_alone(model: Model) -> None:
    session = model.session(id="mine")
    first, second = talk(session, "one", "two")
    fork = session.fork(1)
    assert fork.path == [first] and fork.id != session.id
    mine, theirs = talk(session, "three"), talk(fork, "two", "four")
    assert theirs[1].token_ids == second.token_ids and theirs[1].recomputed == 0
    assert session.path == mine and second in mine and theirs[1] not in session.turns
    assert session.diff(second, 3) == ([], [session.head])
    assert session.delete() > 0
    last = talk(fork, "five")[-1]
    assert last.recomputed == 0 and last.token_ids == tuple(alone(model, last)), "the past it shares is still there"


def test_a_fork_keeps_its_past_alive(model: Model) -> None:
    session = model.session()
    first, second, _ = talk(session, "one", "two", "three")
    fork = session.fork(2)
    session.rollback(1, prune=True)
    session.delete()
    last = talk(fork, "four")[-1]
    assert fork.path[:2] == [first, second] and last.reused >= second.n_ids - 1 and last.recomputed == 0


def test_delete_frees_what_is_held(model: Model) -> None:
    session = model.session()
    turns = talk(session, "one", "two " * 20)
    n_bytes = session.delete()
    pool = model._runner.pool
    assert n_bytes % pool.page_bytes == 0 and n_bytes > 0 and pool.n_free == pool.n_pages
    assert session.turns == [] and session.delete() == 0
    assert turns[0].ids(), "a turn that somebody still holds keeps its words"


def test_at_comes_back(model: Model) -> None:
    session = model.session()
    first, second = talk(session, "one", "two")
    with session.at(1) as there:
        assert there.head is first
        talk(there, "aside")
    assert session.head is second and len(session.turns) == 3


def test_tags_and_numbers(model: Model) -> None:
    session, other = model.session(), model.session()
    (first,), (foreign,) = talk(session, "one"), talk(other, "one")
    session.tag(1, "good")
    assert first.tags == {"good"} and first.to_json()["tags"] == ["good"]
    for turn in (2, -2, foreign):
        with pytest.raises(InvalidArgument, match="no turn"):
            session.rollback(turn)
    with pytest.raises(InvalidArgument, match="tag is empty"):
        session.tag(1, "")


# ---- Running replies ------------------------------------------------------------------------------------------


def test_one_reply_at_a_time(model: Model) -> None:
    session = model.session()
    reply = session.say("one", SHORT)
    next(reply)
    with pytest.raises(SessionBusy, match="another reply"):
        session.say("two")
    reply.text()
    assert len(talk(session, "two")) == 2


def test_rollback_stops_the_reply_and_keeps_it(model: Model) -> None:
    session = model.session()
    (first,) = talk(session, "one")
    reply = session.say("two", replace(SHORT, max_tokens=200, ignore_eos=True))
    pieces = [next(reply) for _ in range(5)]
    session.rollback(1)
    partial = session.turns[-1]
    assert partial.finish_reason == "cancelled" and list(partial.token_ids) == [piece.token_id for piece in pieces]
    assert session.head is first and reply.turn is partial
    session.rollback(partial)
    assert talk(session, "and")[-1].kept == partial.n_ids


@pytest.mark.parametrize("n_pieces", [0, 3])
def test_a_forgotten_reply_frees_the_session(model: Model, n_pieces: int) -> None:
    session = model.session()
    reply = session.say("one", replace(SHORT, max_tokens=200, ignore_eos=True))
    for _ in range(n_pieces):
        next(reply)
    del reply
    gc.collect()
    assert len(session.turns) == (1 if n_pieces else 0)
    assert len(talk(session, "two")) == (2 if n_pieces else 1)


def test_errors_change_nothing(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, threads=1, context=120) as model:
        session = model.session()
        (first,) = talk(session, "one")
        with pytest.raises(ContextOverflow) as caught:
            session.say("word " * 100)
        assert caught.value.context == 120 and caught.value.n_tokens > 120
        assert session.head is first and session.turns == [first]
        with pytest.raises(InvalidArgument, match="needs another session"):
            session.tell(5)
        talk(session, "two")


def n_held(model: Model) -> int:
    """Pages that somebody holds. The cache keeps others: of a prompt that fails, what steps before had read."""
    usage = model._runner.pool.usage()
    return usage.n_used - usage.n_cached


def test_a_damaged_model_leaves_the_session_as_it_was(tmp_path: Path) -> None:
    tensors = tiny.random_tensors()
    folder = tiny.write_model(tmp_path / "m", tensors=tensors)
    with Model.load(folder, threads=1) as model:
        (bad,) = model.tokenizer.encode("~")
    tensors["model.embed_tokens.weight"][bad] = float("nan")
    with pytest.warns(DamagedWeightWarning):
        model = Model.load(tiny.write_model(folder, tensors=tensors), threads=1)
    with model:
        session = model.session()
        session.tell(prompt="fine", params=SamplingParams(temperature=0, max_tokens=1)).text()
        head, held = session.head, n_held(model)
        reply = session.tell(prompt="~", params=SHORT)
        with pytest.raises(NonFinite):
            reply.text()
        assert reply.turn is None and session.turns == [head] and session.head is head
        del reply
        gc.collect()
        assert n_held(model) == held
        session.tell(prompt="fine again", params=SamplingParams(temperature=0, max_tokens=1)).text()


def test_no_template(tmp_path: Path) -> None:
    with (
        Model.load(tiny.write_model(tmp_path / "m", template=None), threads=1) as model,
        pytest.raises(TemplateError, match="no chat template"),
    ):
        model.session().say("hi")


# ---- Stories --------------------------------------------------------------------------------------------------


def test_a_story_in_pieces_is_the_story_in_one(model: Model) -> None:
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=24, ignore_eos=True)
    whole = model.session()
    whole.tell(prompt="the cat", params=params).text()
    pieces = model.session(sampling=params)
    pieces.tell(10, prompt="the cat").text()
    for _ in range(2):
        pieces.tell(7).text()
    assert pieces.head.ids() == whole.head.ids() and pieces.head.recomputed == 0
    assert "".join(turn.text for turn in pieces.path) == whole.head.text
    with pytest.raises(InvalidArgument, match="this session is a story"):
        pieces.say("hi")
    with pytest.raises(InvalidArgument, match="no text to continue"):
        model.session().tell(5)


def test_a_story_goes_on_behind_its_end(model: Model) -> None:
    session = model.session()
    for seed in range(60):
        session.rollback(0)
        session.tell(40, prompt="the", params=replace(SHORT, seed=seed)).text()
        if session.head.finish_reason == "stop":
            break
    end = session.head
    assert end.token_ids[-1] in model.tokenizer.eos_ids
    session.tell(3, prompt=" and", params=SHORT).text()
    assert session.head.kept == end.n_ids - 1 and session.head.token_ids == tuple(alone(model, session.head))


# ---- Three ways of drifting -----------------------------------------------------------------------------------

TRIMMED = tiny.CHATML.replace("message['content'] }}", "message['content'] | trim }}")
THOUGHTLESS = tiny.CHATML.replace(
    "message['content'] }}", "message['content'].split('e')[-1] if message.role == 'assistant' else message.content }}"
)
EXCITED = tiny.CHATML.replace("['content'] }}", "['content'] }}{% if messages | length > 1 %}!{% endif %}")
COUNTING = "{{ messages | length }}" + tiny.CHATML


@pytest.mark.parametrize("template", [tiny.CHATML, TRIMMED, THOUGHTLESS], ids=["plain", "trimmed", "thoughts stripped"])
def test_what_was_drawn_is_kept(tmp_path: Path, template: str) -> None:
    """Whatever the template does to the text of answers, and whatever ids that text would get if it were read again."""
    with Model.load(tiny.write_model(tmp_path / "m", template=template), threads=1) as model:
        session = model.session()
        turns = talk(session, "one <|im_end|> two", "more", "and more")
        for before, turn in pairwise(turns):
            assert turn.kept == before.n_ids and turn.recomputed == 0
        texts = [model.tokenizer.encode(turn.text) for turn in turns]
        drawn = [[i for i in turn.token_ids if i not in model.tokenizer.special_ids] for turn in turns]
        assert texts != drawn, "this model's answers must be such that reading them again gives other ids"


def test_a_template_that_rewords_the_past_is_noticed(tmp_path: Path) -> None:
    with Model.load(tiny.write_model(tmp_path / "m", template=COUNTING), threads=1) as model:
        first, second = talk(model.session(), "one", "two")
        assert second.kept < first.n_ids and second.recomputed > 0
        assert second.token_ids == tuple(alone(model, second))


def test_a_reworded_past_never_lends_its_pages(tmp_path: Path) -> None:
    """The second turn's pages were evicted; the third can use the first's only up to the start of the second."""
    with Model.load(tiny.write_model(tmp_path / "m", template=EXCITED), threads=1) as model:
        session = model.session()
        first, second = talk(session, "one", "two")
        assert 0 < second.kept < first.n_ids and second.kv is not None
        second.kv.close()
        third = talk(session, "three")[-1]
        assert third.kept == second.n_ids and third.reused == second.kept
        assert third.token_ids == tuple(alone(model, third))


# ---- Pages run out --------------------------------------------------------------------------------------------


def test_old_turns_give_up_their_pages(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, threads=1, context=128) as model:  # pages for four such contexts
        sessions = [model.session() for _ in range(12)]
        for i, session in enumerate(sessions):
            talk(session, f"{i} words to fill pages with, " * 2)
        assert any(session.head.kv is not None and not session.head.kv.n_tokens for session in sessions)
        for session in sessions:
            turn = talk(session, "x")[-1]
            assert turn.token_ids == tuple(alone(model, turn))
            assert turn.reused + turn.recomputed >= turn.parent.n_ids - 1 if turn.parent else False


def test_replies_that_give_way_say_the_same(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, threads=1, context=64) as model:
        long = replace(SHORT, max_tokens=50, ignore_eos=True)
        replies = [model.session().tell(prompt=f"{i} a", params=long) for i in range(9)]  # pages for four
        for _ in range(40):
            for reply in replies:
                next(reply)
        assert any(reply.generation._request.n_preempted for reply in replies)
        for reply in replies:
            reply.text()
            assert reply.turn is not None and list(reply.turn.token_ids) == alone(model, reply.turn)
            reply.turn = None


# ---- The law --------------------------------------------------------------------------------------------------


class Walks(RuleBasedStateMachine):
    """Any walk through any number of sessions gives the same turns as from scratch, and leaks no page."""

    model: Model

    def __init__(self) -> None:
        super().__init__()
        self.sessions = [self.model.session(system="s")]
        self.seed = 0

    def params(self, hot: bool) -> SamplingParams:
        self.seed += 1
        return SamplingParams(temperature=1.0 if hot else 0.0, seed=self.seed, max_tokens=8)

    def pick(self, i: int) -> Session:
        return self.sessions[i % len(self.sessions)]

    def done(self, session: Session) -> None:
        head = session.head
        assert list(head.token_ids) == alone(self.model, head)
        if head.parent is not None and head.parent.number:
            assert head.kept == head.parent.n_ids

    def fits(self, turn: Turn) -> bool:
        return turn.n_ids < 200

    @rule(i=st.integers(0, 9), text=st.sampled_from(["the sea", "a", "why <|im_end|>?", ""]), hot=st.booleans())
    def say(self, i: int, text: str, hot: bool) -> None:
        session = self.pick(i)
        if self.fits(session.head):
            session.say(text, self.params(hot)).text()
            self.done(session)

    @rule(i=st.integers(0, 9), n=st.integers(1, 6))
    def stop_early(self, i: int, n: int) -> None:
        session = self.pick(i)
        if self.fits(session.head):
            reply = session.say("stop", self.params(True))
            pieces = [piece for _, piece in zip(range(n), reply, strict=False)]
            reply.cancel()
            assert list(session.head.token_ids) == [piece.token_id for piece in pieces]

    @rule(i=st.integers(0, 9), n=st.integers(0, 9), prune=st.booleans())
    def rollback(self, i: int, n: int, prune: bool) -> None:
        session = self.pick(i)
        number = n % (session.head.number + 1)
        if not prune or number >= session._tree.root.number:
            assert session.rollback(number, prune=prune).number == number

    @rule(i=st.integers(0, 9))
    def redo(self, i: int) -> None:
        session = self.pick(i)
        if session._tree.can_redo:
            session.redo()

    @rule(i=st.integers(0, 9), hot=st.booleans())
    def again(self, i: int, hot: bool) -> None:
        session = self.pick(i)
        if session.head.number:
            session.regenerate(self.params(hot)).text()
            self.done(session)

    @rule(i=st.integers(0, 9), n=st.integers(1, 9))
    def replay(self, i: int, n: int) -> None:
        session = self.pick(i)
        turns = [turn for turn in session.turns if turn.finish_reason != "cancelled"]
        if turns:
            turn = turns[n % len(turns)]
            session.replay(turn).text()
            assert session.head.token_ids == turn.token_ids

    @precondition(lambda self: len(self.sessions) < 5)
    @rule(i=st.integers(0, 9), n=st.integers(0, 9))
    def fork(self, i: int, n: int) -> None:
        session = self.pick(i)
        self.sessions.append(session.fork(n % (session.head.number + 1)))

    @precondition(lambda self: len(self.sessions) > 1)
    @rule(i=st.integers(0, 9))
    def delete(self, i: int) -> None:
        self.sessions.pop(i % len(self.sessions)).delete()

    @rule(n=st.integers(1, 40))
    def evict(self, n: int) -> None:
        pool = self.model._runner.pool
        self.model._engine.cache._reclaim(pool.n_free + n)

    def teardown(self) -> None:
        for session in self.sessions:
            session.delete()
        self.sessions = []
        gc.collect()
        self.model.clear_cache()
        assert self.model._runner.pool.n_free == self.model._runner.pool.n_pages


@pytest.mark.parametrize("kv", ["f32", "f16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_walk_equals_doing_it_from_scratch(tiny_folder: Path, kv: Any, threads: int) -> None:
    with Model.load(tiny_folder, kv=kv, threads=threads) as model:
        machine = type("Machine", (Walks,), {"model": model})
        run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=25, deadline=None))


def test_a_deleted_session_says_nothing_more(model: Model) -> None:
    session = model.session()
    reply = session.say("one", replace(SHORT, max_tokens=200, ignore_eos=True))
    next(reply)
    failures: list[str] = []

    def wait() -> None:
        try:
            session.say("two", SHORT, wait=True)
        except InvalidArgument as error:
            failures.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_until(lambda: session._queue.waiting)
    session.delete()
    waiting.join()
    assert failures == [f"session {session.id} was deleted"] and session.turns == []
