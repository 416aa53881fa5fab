"""What happens when the context is full: an error with numbers, a window that slides, or turns that are left out."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from fabula import ContextOverflow, ContextPolicy, InvalidArgument, Model, SamplingParams, Session, Turn, Workspace
from fabula.engine.generation import Generation
from fabula.engine.request import READ_AHEAD
from fabula.engine.scheduler import Load
from fabula.kv.pages import HOLE, Sequence
from fabula.kv.prefix import Window
from waiting import wait_until

CONTEXT = 160
SHORT = SamplingParams(temperature=1.0, max_tokens=12, seed=11, ignore_eos=True)
ENDS = (1, 3)
SLIDE = ContextPolicy("slide", window=50, sinks=4)
DROP = ContextPolicy("drop_oldest_turns")


@pytest.fixture(scope="module")
def models(tiny_folder: Path) -> Iterator[tuple[Model, Model]]:
    """A model, and one of the same folder that never shares anything."""
    with (
        Model.load(tiny_folder, threads=1, context=CONTEXT) as model,
        Model.load(tiny_folder, threads=1, context=CONTEXT) as oracle,
    ):
        yield model, oracle


@pytest.fixture
def model(models: tuple[Model, Model]) -> Iterator[Model]:
    model = models[0]
    yield model
    gc.collect()
    while model._engine.scheduler.load != Load(0, 0):
        pass
    model.clear_cache()
    assert model._runner.pool.n_free == model._runner.pool.n_pages


@pytest.fixture
def oracle(models: tuple[Model, Model]) -> Model:
    return models[1]


def alone(oracle: Model, session: Session, turn: Turn) -> list[int]:
    """The answer of a turn from scratch, with the same window."""
    assert turn.params is not None
    oracle.clear_cache()
    generation = Generation(
        oracle._engine,
        prompt_of(turn),
        turn.params,
        continues=not turn.chat,
        begun=turn.token_ids[: turn.n_begun],
        window=session.policy.visible(oracle.context),
    )
    generation.text()
    return generation.token_ids


def prompt_of(turn: Turn) -> list[int]:
    return turn.ids()[: turn.n_ids - len(turn.token_ids)]


def say(session: Session, text: str, **changes: Any) -> Turn:
    session.say(text, replace(SHORT, **changes)).text()
    return session.head


def tell(session: Session, n: int, prompt: str = "", seed: int = 1) -> Turn:
    """A piece of a story that knows no end, which the next piece would leave out."""
    session.tell(n, prompt=prompt, params=replace(SHORT, seed=seed, banned_tokens=ENDS)).text()
    return session.head


def contains(ids: list[int], part: tuple[int, ...]) -> bool:
    return any(tuple(ids[i : i + len(part)]) == part for i in range(len(ids) - len(part) + 1))


# ---- error ----------------------------------------------------------------------------------------------------------


def test_error_carries_both_numbers_and_changes_nothing(model: Model, oracle: Model) -> None:
    session = model.session(system="s")
    first = say(session, "one")
    used = model._runner.pool.usage().n_used
    n_more = len(model.tokenizer.encode("word " * 100))
    for call in (
        lambda: session.say("word " * 100),
        lambda: session.edit(1, "word " * 100),
        lambda: session.branch(3, "word " * 100),
    ):
        with pytest.raises(ContextOverflow, match=f"{CONTEXT}") as caught:
            call()
        assert caught.value.context == CONTEXT and caught.value.n_tokens >= n_more > CONTEXT
        assert session.turns == [first] and session.head is first and not session.is_busy
    assert model._runner.pool.usage().n_used == used
    assert list(say(session, "two").token_ids) == alone(oracle, session, session.head)


def test_an_answer_may_fill_the_context(model: Model, oracle: Model) -> None:
    session = model.session()
    full = say(session, "one", max_tokens=None)
    assert full.finish_reason == "length" and full.n_ids == CONTEXT and full.cut is None
    with pytest.raises(ContextOverflow):
        session.say("two")
    n = len(full.token_ids)
    token = full.token_ids[0]
    session.fork_at(full, n - 1, token, SHORT).text()
    assert session.head.n_ids <= CONTEXT + 1 and session.head.finish_reason == "length"
    session.rollback(0)
    assert list(say(session, "two").token_ids) == alone(oracle, session, session.head)


# ---- drop_oldest_turns ----------------------------------------------------------------------------------------------


def test_a_chat_leaves_out_its_oldest_turns(model: Model, oracle: Model) -> None:
    session = model.session(system="be kind", context_policy=DROP)
    n_cuts = n_uncut = 0
    for number in range(1, 25):
        turn = say(session, f"word{number}x " + "and " * (number % 4), seed=number)
        prompt, cut = prompt_of(turn), turn.cut
        assert len(prompt) + 12 <= CONTEXT
        assert list(turn.token_ids) == alone(oracle, session, turn)
        n_left_out = cut.n_turns if cut is not None else 0
        seen = session.path[n_left_out:]
        text = model.tokenizer.decode(prompt, skip_special=False)
        assert text.startswith("<|im_start|>system\nbe kind<|im_end|>"), "the system message stays"
        assert [f"word{i}x" in text for i in range(1, number + 1)] == [i > n_left_out for i in range(1, number + 1)]
        assert all(contains(prompt, past.token_ids) for past in seen[:-1]), "answers stay as they were drawn"
        before = turn.parent
        assert before is not None
        if cut is not None and (before.cut is None or cut.n_turns > before.cut.n_turns):
            n_cuts += 1
            assert len(prompt) <= CONTEXT - CONTEXT // 4
            last = session.path[n_left_out - 1]
            words = f"<|im_start|>user\n{last.prompt}<|im_end|>\n<|im_start|>assistant\n{'x' * 12}<|im_end|>\n"
            n_last = len(model.tokenizer.encode(words, special=True))
            assert len(prompt) + n_last > CONTEXT - CONTEXT // 4, "no more than needed is left out"
            assert cut.policy == "drop_oldest_turns" and cut.n_tokens > (before.cut.n_tokens if before.cut else 0)
            assert turn.recomputed == 0 or "oldest turns" in turn.why_recomputed
        elif number > 1:
            n_uncut += 1
            assert turn.kept == before.n_ids and turn.recomputed == 0, "the next turns reuse K and V"
            assert cut == before.cut
    assert n_cuts >= 3 and n_uncut >= 10


def test_where_only_the_last_message_fits(model: Model, oracle: Model) -> None:
    session = model.session(system="be kind", context_policy=DROP)
    for number in range(1, 4):
        say(session, f"word{number}x")
    turn = say(session, "many words " * 8)
    assert turn.cut is not None and turn.cut.n_turns == 3
    text = model.tokenizer.decode(prompt_of(turn), skip_special=False)
    assert text.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nmany words")
    assert list(turn.token_ids) == alone(oracle, session, turn)


def test_going_back_to_before_the_cut(model: Model, oracle: Model) -> None:
    session = model.session(context_policy=DROP)
    turns = [say(session, f"word{number}x", seed=number) for number in range(1, 13)]
    first_cut = next(i for i, turn in enumerate(turns) if turn.cut is not None)
    for target in (turns[first_cut - 1], turns[0], turns[-1], turns[first_cut]):
        session.rollback(target)
        again = session.replay(turns[turns.index(target)])
        again.text()
        assert session.head.token_ids == target.token_ids and session.head.cut == target.cut
        fork = session.fork(target)
        on = say(fork, "something else", seed=99)
        assert list(on.token_ids) == alone(oracle, fork, on)
        assert (on.cut is None) == (target is turns[0])
    session.rollback(turns[0])
    assert say(session, "word2x", seed=2).token_ids == turns[1].token_ids


def test_a_story_leaves_out_its_beginning(model: Model, oracle: Model) -> None:
    session = model.session(context_policy=DROP)
    before = tell(session, 20, "the cat")
    n_cuts = 0
    for number in range(20):
        turn = tell(session, 20, " and then" if number % 5 == 4 else "", seed=number)
        prompt, cut = prompt_of(turn), turn.cut
        assert len(prompt) + 20 <= CONTEXT and list(turn.token_ids) == alone(oracle, session, turn)
        assert contains(prompt, before.token_ids), "it goes on from the end of what there is"
        if cut is not None and cut != before.cut:
            n_cuts += 1
            assert len(prompt) <= CONTEXT - CONTEXT // 4
            assert cut.n_tokens > (before.cut.n_tokens if before.cut else 0)
        else:
            assert turn.kept == before.n_ids and turn.recomputed == 0
        before = turn
    assert n_cuts >= 3


def test_a_story_of_one_long_turn_goes_on_from_its_end(model: Model, oracle: Model) -> None:
    session = model.session(context_policy=DROP)
    long = tell(session, 150, "the cat")
    on = tell(session, 20)
    prompt = prompt_of(on)
    assert on.cut is not None and on.cut.n_turns == 1 and on.cut.n_tokens == long.n_ids - len(prompt)
    assert prompt[-60:] == list(long.token_ids[-60:]) and len(prompt) <= CONTEXT - CONTEXT // 4
    assert list(on.token_ids) == alone(oracle, session, on)


def test_what_does_not_fit_even_alone_is_an_error(model: Model) -> None:
    session = model.session(context_policy=DROP)
    first = say(session, "one")
    with pytest.raises(ContextOverflow) as caught:
        session.say("word " * 100)
    assert caught.value.n_tokens > CONTEXT and session.turns == [first]


def test_cuts_survive_a_restart(tiny_folder: Path, tmp_path: Path, oracle: Model) -> None:
    cuts: dict[str, list[Any]] = {}
    for _ in range(2):
        with Workspace(tmp_path) as workspace:
            workspace.load(tiny_folder, name="tiny", threads=1, context=CONTEXT)
            for policy in (SLIDE, DROP):
                session = workspace.session(policy.name, context_policy=policy)
                assert session.policy == policy
                assert [turn.cut for turn in session.path] == cuts.get(policy.name, [])
                for number in range(8):
                    turn = say(session, f"word{number}x and more", seed=number)
                    assert list(turn.token_ids) == alone(oracle, session, turn)
                cuts[policy.name] = [turn.cut for turn in session.path]
                assert cuts[policy.name][-1].policy == policy.name
                assert json.dumps(session.head.to_json())
            del session, turn
        gc.collect()


# ---- slide ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "wrong"),
    [
        ({"name": "slide", "window": CONTEXT}, "do not fit the context"),
        ({"name": "slide", "window": 0}, "window is 0"),
        ({"name": "slide", "sinks": 33}, "sinks is 33"),
        ({"name": "slide", "window": 150, "sinks": 11}, "do not fit the context"),
        ({"name": "forget"}, "context_policy is 'forget'"),
    ],
)
def test_policies_that_make_no_sense(model: Model, policy: dict[str, Any], wrong: str) -> None:
    with pytest.raises(InvalidArgument, match=wrong):
        model.session(context_policy=ContextPolicy(**policy))


@pytest.mark.parametrize("sinks", [0, 1, 4, 32])
@pytest.mark.parametrize("window", [1, 31, 32, 33, 50, None])
def test_a_story_in_pieces_is_the_story_in_one(model: Model, oracle: Model, window: int | None, sinks: int) -> None:
    """However it is cut into turns, also where it is longer than the context; and pages stay few."""
    policy = ContextPolicy("slide", window=window, sinks=sinks)
    visible = policy.visible(CONTEXT)
    whole = model.session(context_policy=policy)
    tell(whole, 330, "the cat")
    assert list(whole.head.token_ids) == alone(oracle, whole, whole.head) and whole.head.n_ids > 2 * CONTEXT
    assert whole.head.cut is not None and whole.head.cut.n_tokens == whole.head.n_ids - visible.size - sinks
    rng = random.Random(sinks)
    session, left = model.session(context_policy=policy), 330
    while left:
        n = min(left, rng.choice([1, 2, 31, 32, 33, 70]))
        turn = tell(session, n, "" if session.head.number else "the cat")
        left -= n
        assert turn.kv is not None and turn.recomputed == 0
        held = [page for page in turn.kv.pages if page != HOLE]
        assert len(held) <= (sinks > 0) + -(-(visible.size + 31) // 32) + 1
    assert session.head.ids() == whole.head.ids()


def test_pages_do_not_grow_with_a_story(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while it runs, and when a reader takes in one go all that waits for him: five pages at most."""
    with Model.load(tiny_folder, threads=1, context=CONTEXT, kv_memory=8 * 5632) as model:
        pool, scheduler = model._runner.pool, model._engine.scheduler
        assert pool.n_pages == 8
        held = []
        reserve = Sequence.reserve

        def counted(sequence: Sequence, n_tokens: int) -> npt.NDArray[np.int32]:
            pages = reserve(sequence, n_tokens)
            held.append(pool.n_pages - pool.n_free)
            return pages

        monkeypatch.setattr(Sequence, "reserve", counted)
        session = model.session(context_policy=SLIDE)
        for i, _ in enumerate(session.tell(1500, prompt="the cat", params=SHORT)):
            if i % READ_AHEAD == 0:
                wait_until(lambda: all(request.paused for request in scheduler._running))
        assert session.head.finish_reason == "length" and len(session.head.token_ids) == 1500
        assert max(held) == 5, "a page of sinks, two of the window, one that is begun, one not yet read"
        del session


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_walk_with_a_window(models: tuple[Model, Model], data: st.DataObject) -> None:
    """Continues, forks and rolls back to any turn, also far before the window; KV is evicted now and then."""
    model, oracle = models
    window = Window(data.draw(st.integers(1, 100)), data.draw(st.integers(0, 32)))
    policy = ContextPolicy("slide", window=window.size, sinks=window.n_sinks)
    sessions = [model.session(context_policy=policy)]
    for n in range(data.draw(st.integers(2, 8))):
        session = data.draw(st.sampled_from(sessions))
        what = data.draw(st.integers(0, 5))
        if what == 0 and session.head.number:
            session.rollback(data.draw(st.integers(0, session.head.number)))
        elif what == 1 and session.turns:
            sessions.append(session.fork(data.draw(st.sampled_from(session.turns))))
        elif what == 2 and session.turns:
            found = data.draw(st.sampled_from(session.turns))
            place = data.draw(st.integers(0, len(found.token_ids)))
            session.fork_at(found, place, 40, replace(SHORT, seed=n)).text()
            assert list(session.head.token_ids) == alone(oracle, session, session.head)
        elif what == 3:
            model._engine.cache._reclaim(model._runner.pool.n_free + data.draw(st.integers(1, 20)))
        text = " ".join(data.draw(st.lists(st.sampled_from(["the", "sea", "stone"]), max_size=50)))
        turn = tell(session, data.draw(st.integers(1, 90)), text or ("" if session.head.number else "a"), seed=n)
        assert list(turn.token_ids) == alone(oracle, session, turn)
        hidden = window.first_visible(turn.n_ids - 1) - window.n_sinks
        assert (turn.cut.n_tokens if turn.cut else 0) == max(0, hidden)
    for session in sessions:
        session.delete()
    gc.collect()
    model.clear_cache()
    assert model._runner.pool.n_free == model._runner.pool.n_pages


def test_going_back_behind_the_window(model: Model) -> None:
    """To a turn whose pages were released as the text grew: its own are still there, or are recomputed."""
    session = model.session(context_policy=SLIDE)
    turns = [tell(session, 40, "the cat" if not i else "", seed=i) for i in range(8)]
    assert turns[-1].n_ids > 2 * CONTEXT
    for give_up in (False, True):
        for target in (turns[5], turns[1], turns[6], turns[0]):
            if give_up:
                model.clear_cache()
            session.rollback(target)
            again = tell(session, 40, seed=turns.index(target) + 1)
            assert again.token_ids == turns[turns.index(target) + 1].token_ids
            assert (again.recomputed > 0) == give_up
            if give_up:
                assert "evicted" in again.why_recomputed
        again = session.alternatives(turns[3], 7, 5)
        assert [a.token_id for a in again if a.chosen] in ([], [turns[3].token_ids[7]])


def test_a_cancelled_story_holds_what_was_read(model: Model, oracle: Model) -> None:
    """The engine is up to 32 tokens ahead, with a window of 20: pages that the reader's next token sees must stay."""
    session = model.session(context_policy=ContextPolicy("slide", window=20, sinks=2))
    for seed, n in enumerate((1, 30, 32, 65, 100)):
        params = replace(SHORT, seed=seed, banned_tokens=ENDS)
        with session.tell(400, prompt="go on", params=params) as reply:
            for _ in range(n):
                next(reply)
            while not reply.generation._request.paused:
                pass
        assert len(session.head.token_ids) == n
        turn = tell(session, 10, seed=seed)
        assert turn.recomputed == 0 and list(turn.token_ids) == alone(oracle, session, turn)


# ---- A model with windows of its own --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistral_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"model_type": "mistral", "sliding_window": 40}
    return tiny.write_model(tmp_path_factory.mktemp("mistral") / "m", config=config)


@pytest.mark.parametrize(
    "policy", [ContextPolicy(), ContextPolicy("slide", 60, 4), ContextPolicy("slide", 20, 0), DROP]
)
def test_mistral_goes_back_behind_its_window(mistral_folder: Path, policy: ContextPolicy) -> None:
    with (
        Model.load(mistral_folder, threads=1, context=CONTEXT) as model,
        Model.load(mistral_folder, threads=1, context=CONTEXT) as oracle,
    ):
        assert model.config.windows == (40, 40)
        session = model.session(context_policy=policy)
        turns = [
            tell(session, 30, "the cat" if not i else "", seed=i) for i in range(5 if policy.name == "error" else 9)
        ]
        for turn in turns:
            assert list(turn.token_ids) == alone(oracle, session, turn)
        for target in (turns[3], turns[0], turns[2]):
            session.rollback(target)
            again = tell(session, 30, seed=turns.index(target) + 1)
            assert again.token_ids == turns[turns.index(target) + 1].token_ids
            assert again.recomputed == 0 or policy == DROP  # whose pages do not last that long
        session.delete()
        del session, turns, turn, target, again
        gc.collect()
        model.clear_cache()
        assert model._runner.pool.n_free == model._runner.pool.n_pages


def test_the_window_of_mistral_matters(mistral_folder: Path, oracle: Model) -> None:
    """Else the test above would hold for any model."""
    ids = oracle.tokenizer.encode("the cat and the stone " * 8)
    with Model.load(mistral_folder, threads=1, context=CONTEXT) as model:
        ours, theirs = model.logits(ids), oracle.logits(ids)
    assert (ours[:40] == theirs[:40]).all() and not (ours[41:] == theirs[41:]).all(axis=1).any()
