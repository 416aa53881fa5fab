"""Speculation: every answer has the bits that it has without, and steps are saved where texts repeat."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from constrained import PERSON
from drafting import Guesses, cheap_rows, guess, without
from fabula import Constraint, DamagedWeightWarning, InvalidArgument, Model, NonFinite, Piece, SamplingParams
from fabula._native import PAGE_POSITIONS, kv_layers, page_bytes
from fabula.engine.grammar import Guide
from fabula.formats.checkpoint import DType
from fabula.kv.pages import PagePool, Sequence
from fabula.kv.prefix import EVERYTHING, Window
from scheduling import Wish, ids_of, settled
from test_decode_steps import SETTINGS

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
CONSTRAINTS = [
    None,
    Constraint.json_schema(PERSON),
    Constraint.regex("(the (cat|stone) is on the hill[.] )+"),
    Constraint.gbnf('root ::= "in the west, " [a-f]+ " the stone is on the hill"'),
]


@pytest.fixture
def model(tiny_model: Model) -> Model:
    return tiny_model


def mixed(n: int, seed: int, longest: int = 100) -> list[Wish]:
    """Requests with everything that sampling and ends can depend on."""
    rng, common = random.Random(seed), ids_of(longest, seed)
    found = []
    for i in range(n):
        params = replace(
            rng.choice(SETTINGS),
            seed=i,
            max_tokens=rng.randrange(1, 40),
            ignore_eos=rng.random() < 0.5,
            n_logprobs=rng.choice([0, 0, 3]),
            stop=rng.choice([(), ("e",), ("th", "a ")]),
            frequency_penalty=rng.choice([0.0, 0.7]),
            constraint=rng.choice([None, *CONSTRAINTS]),
        )
        params = replace(params, min_tokens=rng.choice([0, min(5, params.max_tokens or 1)]))
        ids = [*common[: rng.randrange(longest)], *ids_of(rng.randrange(1, 40), i)]
        found.append(Wish(ids, params, rng.choice([EVERYTHING, Window(40, 4)]), rng.choice(["", "a"])))
    return found


def alone(model: Model, wanted: list[Wish]) -> list[list[Piece]]:
    """Each one's pieces, one token a step and without others."""
    with without(model):
        return [wish.alone(model) for wish in wanted]


def together(model: Model, wanted: list[Wish], rng: random.Random) -> list[list[Piece]]:
    """Their pieces when they run at once, read in any order."""
    running = {i: wanted[i].begin(model) for i in rng.sample(range(len(wanted)), len(wanted))}
    pieces: list[list[Piece]] = [[] for _ in wanted]
    while running:
        i = rng.choice(list(running))
        piece = next(running[i], None)
        if piece is None:
            del running[i]
        else:
            pieces[i].append(piece)
    return pieces


def texts_of(wanted: list[Wish], pieces: list[list[Piece]]) -> list[list[int]]:
    return [[*wish.ids, *(p.token_id for p in found)] for wish, found in zip(wanted, pieces, strict=True)]


# ---- The same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_answers_are_those_without(model: Model, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Tokens, texts and log-probabilities, bit for bit; with any settings, in batches, whatever the drafts are."""
    wanted = mixed(10, seed)
    expected = alone(model, wanted)
    guesses = guess(monkeypatch, model, texts_of(wanted, expected), seed, right=(0.5, 0.9, 1.0)[seed % 3])
    assert together(model, wanted, random.Random(seed)) == expected
    assert guesses.n_computed > guesses.n_right > 0 or guesses.right == 1.0
    assert settled(model)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(6, 60))
def test_answers_are_those_without_many_times(model: Model, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    test_answers_are_those_without(model, monkeypatch, seed)


@pytest.mark.parametrize("seed", range(3))
def test_in_a_tight_pool(tiny_folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Requests are preempted all the time, and drafts take no page from them."""
    wanted = mixed(8, seed, longest=150)
    expected = alone(model, wanted)
    guess(monkeypatch, model, texts_of(wanted, expected), seed)
    with Model.load(tiny_folder, threads=2, kv_memory=9 * page_bytes(DType.F16, kv_layers(2, 2, 6))) as small:
        assert together(small, wanted, random.Random(seed)) == expected
        assert settled(small)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), right=st.sampled_from([0.0, 0.6, 0.95, 1.0]))
def test_any_request_alone(loaded_tiny: Model, seed: int, right: float) -> None:
    wanted = mixed(1, seed)
    expected = alone(loaded_tiny, wanted)
    with pytest.MonkeyPatch.context() as patch:
        guess(patch, loaded_tiny, texts_of(wanted, expected), seed, right)
        assert together(loaded_tiny, wanted, random.Random(seed)) == expected
    loaded_tiny.clear_cache()


def test_lookup_gives_them_too(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drafts that lookup, constraints and costs lead to."""
    cheap_rows(monkeypatch)
    for seed in range(4):
        wanted = [replace(wish, params=replace(wish.params, temperature=0.0)) for wish in mixed(6, seed)]
        assert together(model, wanted, random.Random(seed)) == alone(model, wanted)


# ---- Rollback -------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 15), st.integers(0, 15), st.sampled_from(["step", "fork", "cut"])),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from([EVERYTHING, Window(40, 4)]),
)
def test_a_rejected_draft_leaves_pages_and_tables_as_without(moves: list[Any], window: Window) -> None:
    """Two pools go through the same forks and steps; in one of them, steps have drafts that are rolled back."""
    pools = [PagePool(DType.F16, 200, kv_layers(1, 1, 8)) for _ in range(2)]
    groups = [[Sequence(pool, window)] for pool in pools]
    for which, n_accepted, n_more, what in moves:
        for group, extra in zip(groups, (0, n_more), strict=True):
            sequence = group[which % len(group)]
            n = sequence.n_tokens
            if what == "step":
                end = n + 1 + 3 * n_accepted
                sequence.reserve(end + extra)
                sequence.n_tokens = end + extra
                sequence.roll_back(end)
                sequence.slide(sequence.n_tokens)
            elif what == "fork":
                group.append(sequence.fork(sequence.usable(n * n_more // 15)))
            elif len(group) > 1:
                group.remove(sequence)
                sequence.close()
        plain, drafted = ([view(sequence) for sequence in group] for group in groups)
        assert plain == drafted
        assert pools[0].n_free == pools[1].n_free
        for pool, group in zip(pools, groups, strict=True):
            pool.check([sequence.pages for sequence in group])
    for group in groups:
        for sequence in group:
            sequence.close()


def test_a_fork_of_the_sinks_alone_has_no_hole() -> None:
    """It grows like any text; what its source released is none of its pages."""
    pool = PagePool(DType.F16, 20, kv_layers(1, 1, 8))
    with Sequence(pool, Window(40, 4)) as long:
        long.reserve(150)
        long.n_tokens = 150
        long.slide(150)
        with long.fork(long.usable(100)) as fork:
            assert fork.n_tokens == PAGE_POSITIONS
            fork.reserve(40)
            fork.n_tokens = 40
            fork.roll_back(34)
            assert fork.usable(33) == 33 and len(fork.pages) == 2
        long.truncate(long.usable(100))
        long.reserve(40)
        long.n_tokens = 40
        long.roll_back(34)
    assert pool.n_free == pool.n_pages


def view(sequence: Sequence) -> Any:
    """A page table without the pages' numbers: of each entry, the references to it and its filled positions."""
    pool = sequence.pool
    entries = [(pool.holders(page), pool._filled[page]) if page >= 0 else None for page in sequence.pages]
    return sequence.n_tokens, entries


def test_nobody_copies_a_page_because_of_a_draft(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with without(model):
        first = model.generate([5, 6, 7], replace(GREEDY, max_tokens=40))
        text = [5, 6, 7, *(piece.token_id for piece in first)]
    guess(monkeypatch, model, [text], 0, right=0.5)
    copies: list[Any] = []
    copy = model._runner.pool.native.copy
    monkeypatch.setattr(model._runner.pool.native, "copy", lambda *pages: copies.append(pages) or copy(*pages))
    session = model.session()
    for i in range(10):
        session.tell(7, prompt="the cat" if i == 0 else "", params=replace(GREEDY, banned_tokens=(0, 1, 2, 3))).text()
    assert session.head.n_ids > 2 * PAGE_POSITIONS and not copies
    session.delete()
    del first, session


# ---- Steps ----------------------------------------------------------------------------------------------------------


class Counted:
    """Counts the steps of a model, those inside native calls too."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        run, decode = model._runner.run, model._runner.decode

        def one(*arguments: Any) -> Any:
            self.n += 1
            return run(*arguments)

        def several(*arguments: Any) -> Any:
            found = decode(*arguments)
            self.n += len(found[1])
            return found

        monkeypatch.setattr(model._runner, "run", one)
        monkeypatch.setattr(model._runner, "decode", several)


def test_repeating_text_takes_fewer_steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model says the same token again and again: most steps give many tokens."""
    params = replace(GREEDY, max_tokens=300)
    counted = Counted(model, monkeypatch)
    with without(model):
        expected = [piece.token_id for piece in model.generate([15], params)]
    assert counted.n == 300 and len(set(expected)) == 1, "it does not repeat itself"
    cheap_rows(monkeypatch)
    counted.n = 0
    with model.generate([15], params) as generation:
        assert [piece.token_id for piece in generation] == expected
    timings = generation.timings
    assert counted.n < 60
    assert timings.drafted >= timings.accepted > 300 - 60 and counted.n + timings.accepted == 300


def test_a_swipe_repeats_its_sibling(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another branch says is drafted, also a branch that is not on the path."""
    cheap_rows(monkeypatch)
    session = model.session()
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=60, ignore_eos=True)
    first = session.tell(prompt="the cat", params=params)
    first.text()
    session.rollback(0)
    second = session.tell(prompt="the cat", params=replace(params, seed=4, max_tokens=5))
    second.text()
    session.rollback(0)
    again = session.tell(prompt="the cat", params=params)
    again.text()
    assert first.turn is not None and again.turn is not None
    assert again.turn.token_ids == first.turn.token_ids
    assert again.timings.accepted > 30 > first.timings.accepted
    with model.generate("the cat", params) as stranger:
        stranger.text()
    assert stranger.timings.accepted < 30, "nobody else's text is drafted"
    session.delete()
    assert len(session._texts.index) == 0
    del first, second, again, session


def test_forced_text_is_a_draft(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_rows(monkeypatch)
    params = replace(
        GREEDY, max_tokens=200, constraint=Constraint.gbnf('root ::= "' + "the stone is on the hill. " * 4 + '"')
    )
    counted = Counted(model, monkeypatch)
    with without(model):
        expected = list(model.generate([5], params))
    plain, counted.n = counted.n, 0
    generation = model.generate([5], params)
    assert list(generation) == expected
    assert counted.n < plain / 2 and generation.timings.accepted > plain / 2
    del generation


@pytest.mark.parametrize("constraint", [c for c in CONSTRAINTS if c is not None])
def test_masks_do_not_depend_on_drafts(model: Model, constraint: Constraint) -> None:
    """The state of a grammar is the same, whether or not forced text and allowed tokens were asked for."""
    rng = random.Random(0)
    for _ in range(5):
        asked, left = (Guide(model.tokenizer, tiny.VOCAB, constraint) for _ in range(2))
        for _ in range(60):
            n_most = rng.randrange(1, 16)
            forced = asked.forced(n_most)
            assert len(forced) <= n_most and asked.n_allowed(forced) == len(forced)
            guesses = [rng.randrange(tiny.VOCAB) for _ in range(3)]
            assert asked.n_allowed(guesses) >= bool(asked.allowed[guesses[0]])
            assert (asked.allowed == left.allowed).all()
            assert (asked.may_end, asked.is_complete) == (left.may_end, left.is_complete)
            if left.is_complete:
                break
            token = int(rng.choice(np.flatnonzero(left.allowed)))
            asked.advance(token)
            left.advance(token)


def test_it_is_off_where_it_is_not_wanted(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_rows(monkeypatch)
    with Model.load(tiny_folder, threads=1, speculation="off") as model:
        assert model.speculation == "off"
        generation = model.generate([5], replace(GREEDY, max_tokens=200))
        generation.text()
        assert generation.timings.drafted == generation.timings.accepted == 0
    for options in ({"speculation": "on"}, {"speculation": "off", "draft_model": tiny_folder}):
        with pytest.raises(InvalidArgument, match="speculation is"):
            Model.load(tiny_folder, **options)  # type: ignore[arg-type]


def test_expensive_rows_are_not_computed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each row costs a step, drafts do not pay, however right they are."""
    cheap_rows(monkeypatch, row=1.0)
    generation = model.generate([5], replace(GREEDY, max_tokens=200))
    generation.text()
    assert generation.timings.drafted == 0
    del generation


# ---- Damage ---------------------------------------------------------------------------------------------------------


def test_a_draft_of_a_damaged_token_is_left_out(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are not finite, but it would never have been sampled."""
    params = replace(GREEDY, max_tokens=30)
    tensors = tiny.random_tensors()
    with Model.load(tiny_folder, threads=1) as model, without(model):
        expected = [piece.token_id for piece in model.generate([5], params)]
    unused = next(i for i in range(20, tiny.VOCAB) if i not in [5, *expected])
    tensors["model.embed_tokens.weight"][unused] = np.nan
    tiny.write_model(tmp_path, tensors=tensors)
    with pytest.warns(DamagedWeightWarning):
        damaged = Model.load(tmp_path, threads=1)
    with damaged:
        wrong = [5, *expected[:9], unused, *expected[10:]]
        guess(monkeypatch, damaged, [wrong, [5, *expected]], 0, right=1.0)
        pair = [damaged.generate([5], params), damaged.generate([5, *expected[:3]], params)]
        assert [piece.token_id for piece in pair[0]] == expected
        assert [piece.token_id for piece in pair[1]][:27] == expected[3:]


def test_a_damaged_token_that_is_sampled_ends_the_answer_where_it_would(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = replace(GREEDY, max_tokens=12)
    with Model.load(tiny_folder, threads=1) as model, without(model):
        expected = [piece.token_id for piece in model.generate([5], params)]
    n_good = next(i for i in range(4, 12) if expected[i] not in [5, *expected[:i]])
    tensors = tiny.random_tensors()
    tensors["model.embed_tokens.weight"][expected[n_good]] = np.nan
    tiny.write_model(tmp_path, tensors=tensors)
    with pytest.warns(DamagedWeightWarning):
        damaged = Model.load(tmp_path, threads=1)
    with damaged:
        guess(monkeypatch, damaged, [[5, *expected]], 0, right=1.0)
        with damaged.generate([5], params) as generation:
            assert [next(generation).token_id for _ in range(n_good + 1)] == expected[: n_good + 1]
            with pytest.raises(NonFinite):
                next(generation)


def test_an_error_of_sampling_comes_after_the_tokens_before_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with without(model):
        expected = [piece.token_id for piece in model.generate([5], replace(GREEDY, max_tokens=10))]
    guess(monkeypatch, model, [[5, *expected]], 1, right=1.0)
    n = 0

    def fails(self: Any, logits: Any, history: Any, position: int, banned: Any = ()) -> Any:
        nonlocal n
        n += 1
        if n > 7:
            raise InvalidArgument("nothing is left")
        return sample(self, logits, history, position, banned)

    from fabula.engine.sampling import Sampler

    sample = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", fails)
    generation = model.generate([5], replace(GREEDY, max_tokens=10, n_logprobs=1))
    found = []
    with pytest.raises(InvalidArgument, match="nothing is left"):
        for piece in generation:
            found.append(piece.token_id)
    assert found == expected[:7]
    del generation


# ---- A draft model --------------------------------------------------------------------------------------------------


def test_a_draft_model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model itself, whose greedy drafts are all right, and another one, whose are not."""
    cheap_rows(monkeypatch)
    params = [replace(p, max_tokens=60, ignore_eos=True) for p in SETTINGS]
    other = tiny.write_model(tmp_path / "other", tensors=tiny.random_tensors(seed=7))
    for folder, is_same in ((tiny_folder, True), (other, False)):
        with Model.load(tiny_folder, threads=1, draft_model=folder) as model:
            monkeypatch.setattr(model._engine.draft_model, "step_s", 1e-9)
            wanted = [Wish(ids_of(200, i), p, w) for i, p in enumerate(params) for w in (EVERYTHING, Window(40, 4))]
            expected = alone(model, wanted)
            greedy = wanted[0].begin(model)
            assert list(greedy) == expected[0]
            if is_same:
                assert greedy.timings.accepted > 40
            assert together(model, wanted, random.Random(0)) == expected
            drafter = model._drafter
            del greedy
            assert settled(model) and drafter is not None
            drafter.clear_cache()
            assert drafter._runner.pool.n_free == drafter._runner.pool.n_pages


def test_a_draft_model_has_the_same_vocabulary(tiny_folder: Path, tmp_path: Path) -> None:
    longer = tiny.write_model(
        tmp_path / "m",
        n_more_tokens=3,
        config={"vocab_size": tiny.VOCAB + 3},
        tensors=tiny.random_tensors({**tiny.CONFIG, "vocab_size": tiny.VOCAB + 3}),
    )
    with pytest.raises(InvalidArgument, match="vocabulary"):
        Model.load(tiny_folder, threads=1, draft_model=longer)


def test_guesses_stand_in_for_lookup() -> None:
    from fabula.engine.drafts import LookupDrafts

    for name in ("observe", "propose", "verified", "close"):
        assert callable(getattr(Guesses, name)) and callable(getattr(LookupDrafts, name))
