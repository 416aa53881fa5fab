"""Recurrent states: a sequence goes on only from states of its own text, and every slot is accounted for."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fabula._native import PAGE_POSITIONS, kv_layers
from fabula.engine.policy import kept_of_draft
from fabula.errors import InvalidArgument, OutOfMemory
from fabula.formats.checkpoint import DType
from fabula.kv.cache import KvEvictionList
from fabula.kv.pages import PagePool, Sequence
from fabula.kv.prefix import EVERYTHING, KeyChain, Window
from fabula.kv.states import MAX_SLOTS, MIN_SLOTS, Rank, State, slots_for

FLOATS = (6, 10)  # of two recurrent layers
SLOT_BYTES = 128
N_PAGES, N_SLOTS, EVERY = 24, 9, 64
Text = tuple[int, ...]


class Shelf:
    """A disk that forgets and fails."""

    def __init__(self, pool: PagePool) -> None:
        self.pages: dict[bytes, npt.NDArray[np.uint8]] = {}
        self.broken = False
        self._page_bytes = pool.page_bytes

    def put(self, key: bytes, data: npt.NDArray[np.uint8]) -> bool:
        if self.broken or key in self.pages:
            return False
        self.pages[key] = data.copy()
        return True

    def get(self, key: bytes, out: npt.NDArray[np.uint8]) -> bool:
        found = self.pages.get(key)
        if self.broken or found is None or found.size != out.size:
            out[:] = 0xEE
            return False
        out[:] = found
        return True

    def __contains__(self, key: bytes) -> bool:
        return key in self.pages

    @property
    def n_pages(self) -> int:
        return len(self.pages) - self.n_states

    @property
    def n_states(self) -> int:
        return sum(page.size != self._page_bytes for page in self.pages.values())

    def drain(self, max_bytes: int = 0) -> None:
        """Nothing is queued."""


def ids_of(text: Text) -> npt.NDArray[np.int32]:
    return np.asarray(text, np.int32)


def bytes_of(text: Text, n: int) -> npt.NDArray[np.uint8]:
    """What follows from a text alone, like a state or a page."""
    return np.resize(np.frombuffer(blake2b(repr(text).encode()).digest(), np.uint8), n)


def new_pool(n_pages: int = N_PAGES, n_slots: int = N_SLOTS) -> PagePool:
    pool = PagePool(DType.F32, n_pages, kv_layers(1, 1, 4), state_floats=FLOATS, state_memory=n_slots * SLOT_BYTES)
    assert pool.states is not None and (pool.states.n_slots, pool.states.slot_bytes) == (n_slots, SLOT_BYTES)
    pool.states.every = EVERY
    return pool


def compute(sequence: Sequence, text: Text, end: int, salt: str = "", n_wrong: int = 0) -> None:
    """A step up to `end`, as the runner makes it; of `n_wrong` tokens more, which a draft has."""
    states, start, n_drafted = sequence.pool.states, sequence.n_tokens, n_wrong
    assert states is not None
    pages = sequence.reserve(end + n_wrong)
    share = sequence.reserve_state(end + n_wrong - start, [start + 1] if n_drafted else [])
    assert share is not None and (share.state_in >= 0) == (start > 0)
    if start:
        known = states.native.read(share.state_in)
        assert known.tolist() == bytes_of(text[:start], SLOT_BYTES).tolist(), "it goes on from a state of its own"
    wrong = (*text[:end], *[99] * n_wrong)
    for n, slot in (*share.keeps, (end + n_wrong - start, share.state_out)):
        states.native.write(slot, bytes_of(wrong[: start + n], SLOT_BYTES))
    sequence.advance(end + n_wrong - start, n_drafted)
    keys = KeyChain(salt, sequence.window).keys(ids_of(text))
    for place in range(start // PAGE_POSITIONS, end // PAGE_POSITIONS):
        page = int(pages[place])
        sequence.pool.native.write(page, bytes_of(text[: (place + 1) * PAGE_POSITIONS], sequence.pool.page_bytes))
        sequence.pool.name(page, keys[place])


class Held:
    def __init__(self, sequence: Sequence, text: Text, salt: str) -> None:
        self.sequence, self.text, self.salt = sequence, text, salt


class Trails(RuleBasedStateMachine):
    """Texts that begin alike are computed, found, forked, cut, kept and evicted, at random."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = new_pool()
        self.cache = KvEvictionList(self.pool, n_anonymous=3)
        self.cache.spill = self.shelf = Shelf(self.pool)
        self.held: list[Held] = []

    @property
    def states(self) -> list[State]:
        return [state for held in self.held for state in held.sequence.states()]

    def running(self) -> list[Held]:
        return [held for held in self.held if not held.sequence.retained]

    def go_on(self, held: Held, step: int) -> None:
        """Computes the rest of a text, in steps; keeps what it has if there is no room."""
        sequence, chain = held.sequence, KeyChain(held.salt, EVERYTHING)
        sequence.keep_states(len(held.text) - 1)
        keys = chain.keys(ids_of(held.text))
        while sequence.n_tokens < len(held.text):
            end = min(len(held.text), sequence.n_tokens + step)
            try:
                compute(sequence, held.text, end, held.salt)
            except OutOfMemory:
                break
            sequence.publish_states(keys, ids_of(held.text), also_passing=False)
            sequence.drop_passing(sequence.n_tokens - 3)
        held.text = held.text[: sequence.n_tokens]

    @rule(
        parts=st.lists(st.integers(0, 1), min_size=1, max_size=5),
        last=st.integers(1, 32),
        salt=st.sampled_from(["", "other"]),
        step=st.integers(5, 90),
        disk=st.booleans(),
    )
    def begin(self, parts: list[int], last: int, salt: str, step: int, disk: bool) -> None:
        text = tuple(np.repeat(parts, PAGE_POSITIONS)[: (len(parts) - 1) * PAGE_POSITIONS + last].tolist())
        keys = KeyChain(salt, EVERYTHING).keys(ids_of(text))[: (len(text) - 1) // PAGE_POSITIONS]
        find = self.cache.find if disk else self.cache.find_in_memory
        expected = self.cache.n_findable(keys, EVERYTHING, ids_of(text)[:-1])
        sequence = find(keys, EVERYTHING, ids_of(text)[:-1])
        if disk and not self.shelf.broken and self.pool.n_free > len(parts):
            assert (sequence.n_tokens if sequence else 0) == expected
        sequence = sequence or Sequence(self.pool)
        assert sequence.n_tokens < len(text)
        self.held.append(Held(sequence, text, salt))
        self.go_on(self.held[-1], step)

    @precondition(lambda self: self.running())
    @rule(i=st.integers(0, 99), token=st.integers(0, 1), n=st.integers(1, 70), step=st.integers(1, 40))
    def append(self, i: int, token: int, n: int, step: int) -> None:
        held = self.running()[i % len(self.running())]
        held.text = held.text[: held.sequence.n_tokens] + (token,) * n
        self.go_on(held, step)

    @precondition(lambda self: self.running())
    @rule(i=st.integers(0, 99), token=st.integers(0, 1), n=st.integers(1, 8), right=st.integers(0, 8))
    def draft(self, i: int, token: int, n: int, right: int) -> None:
        """A step with a draft of which some tokens are right."""
        held = self.running()[i % len(self.running())]
        sequence, n_past = held.sequence, held.sequence.n_tokens
        text = (*held.text[:n_past], *[token] * (1 + n))
        right = min(n, right)
        try:
            compute(sequence, text, n_past + 1 + right, held.salt, n - right)
        except OutOfMemory:
            return
        sequence.n_tokens = n_past + 1 + right
        sequence.roll_back(sequence.usable(sequence.n_tokens))
        assert sequence.n_tokens >= n_past, "the state before the step is still there"
        assert right < n or sequence.n_tokens == n_past + 1 + n
        held.text = text[: sequence.n_tokens]

    @precondition(lambda self: self.held)
    @rule(i=st.integers(0, 99), n=st.integers(0, 200))
    def fork(self, i: int, n: int) -> None:
        held = self.held[i % len(self.held)]
        n_tokens = held.sequence.usable(n)
        assert n_tokens <= n
        if n_tokens:
            self.held.append(Held(held.sequence.fork(n_tokens), held.text[:n_tokens], held.salt))

    @precondition(lambda self: self.held)
    @rule(i=st.integers(0, 99), n=st.integers(0, 200))
    def truncate(self, i: int, n: int) -> None:
        held = self.held[i % len(self.held)]
        with self.pool.lock:
            held.sequence.truncate(held.sequence.usable(n))
        held.text = held.text[: held.sequence.n_tokens]

    @precondition(lambda self: self.held)
    @rule(i=st.integers(0, 99), owned=st.booleans())
    def keep(self, i: int, owned: bool) -> None:
        held = self.held[i % len(self.held)]
        keys = KeyChain(held.salt, EVERYTHING).keys(ids_of(held.text))
        held.sequence.publish_states(keys, ids_of(held.text), also_passing=True)
        self.cache.keep(held.sequence, owned=owned)

    @precondition(lambda self: self.held)
    @rule(i=st.integers(0, 99), closes=st.booleans())
    def let_go(self, i: int, closes: bool) -> None:
        held = self.held.pop(i % len(self.held))
        if closes:
            held.sequence.close()

    @rule(n=st.integers(1, N_PAGES))
    def evict_pages(self, n: int) -> None:
        self.cache._reclaim(n)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        assert all(not held.sequence.n_tokens for held in self.held if held.sequence.retained)

    @rule(broken=st.booleans())
    def disk_fails(self, broken: bool) -> None:
        self.shelf.broken = broken

    @rule(share=st.integers(0, 3))
    def disk_forgets(self, share: int) -> None:
        for i, key in enumerate(list(self.shelf.pages)):
            if i % 4 <= share:
                del self.shelf.pages[key]

    @invariant()
    def states_follow_from_their_texts(self) -> None:
        gc.collect(0)
        assert self.pool.states is not None
        for held in self.held:
            sequence = held.sequence
            for state in sequence.states():
                content = self.pool.states.native.read(state.slot)
                assert content.tolist() == bytes_of(held.text[: state.position], SLOT_BYTES).tolist()
            if not sequence.retained:
                assert sequence.usable(sequence.n_tokens) == sequence.n_tokens, "what is in use is not evicted"
            for place in range(sequence.n_tokens // PAGE_POSITIONS):
                expected = bytes_of(held.text[: (place + 1) * PAGE_POSITIONS], self.pool.page_bytes)
                assert self.pool.read(sequence.pages[place]).tolist() == expected.tolist()

    @invariant()
    def every_slot_is_accounted_for(self) -> None:
        sequences = self.pool.sequences()
        self.pool.check([sequence.pages for sequence in sequences if sequence.pages])
        usage = self.cache.usage()
        assert usage.n_slots == N_SLOTS and usage.state_bytes == usage.n_slots_used * SLOT_BYTES

    def teardown(self) -> None:
        self.held.clear()
        self.cache._anonymous.clear()
        gc.collect()
        assert self.pool.states is not None
        assert self.pool.states.n_used == 0 and self.pool.usage().n_used == 0
        self.pool.close()


def test_a_text_goes_on_from_states_of_its_own() -> None:
    run_state_machine_as_test(
        Trails,
        settings=settings(
            max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# ---- Slots ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[PagePool]:
    made = new_pool(n_slots=MIN_SLOTS)
    yield made
    made.close()


def grown(pool: PagePool, n_tokens: int, step: int = 1000) -> Sequence:
    sequence = Sequence(pool)
    sequence.keep_states()
    while sequence.n_tokens < n_tokens:
        compute(sequence, (0,) * n_tokens, min(n_tokens, sequence.n_tokens + step))
        sequence.drop_passing(sequence.n_tokens)
    return sequence


def test_budget_in_slots() -> None:
    assert slots_for(10 * SLOT_BYTES + 3, SLOT_BYTES) == 10
    assert slots_for(1, SLOT_BYTES) == MIN_SLOTS and slots_for(None, SLOT_BYTES) == MAX_SLOTS
    assert slots_for(None, 20_000_000) == (1 << 30) // 20_000_000


def test_lower_ranks_are_evicted_first(pool: PagePool) -> None:
    sequence = grown(pool, 130)
    sequence.retain()
    ranks = {state.position: state.rank for state in sequence.states()}
    assert ranks == {64: Rank.FIXED, 128: Rank.FIXED, 130: Rank.END}
    states = pool.states
    assert states is not None
    taken: list[State] = []
    states.in_use = lambda: taken
    left = []
    for _ in range(4):
        taken.append(states.take())
        left.append([state.position for state in sequence.states()])
    assert left == [[64, 128, 130], [128, 130], [130], []], "a free slot, then the oldest fixed state"
    assert states.n_evicted == 3 and sequence.usable(130) == 0
    with pytest.raises(OutOfMemory, match="all 4 slots for recurrent states are in use; close other generations"):
        states.take()


def test_fixed_states_never_cost_the_end_of_a_turn(pool: PagePool) -> None:
    kept = [grown(pool, 40) for _ in range(2)]
    for sequence in kept:
        sequence.retain()
    long = grown(pool, 200)  # two slots are left, for the state after the step and one on the way
    assert [state.position for state in long.states()] == [64, 200]
    assert all(sequence.usable(40) == 40 for sequence in kept)


def test_what_is_in_use_is_not_evicted(pool: PagePool) -> None:
    sequences = [grown(pool, 40) for _ in range(3)]
    assert pool.n_slots_available() == 1
    for sequence in sequences:
        compute(sequence, (0,) * 41, 41)  # the slot that the one before it went on from is free again
    fourth = grown(pool, 33)
    assert pool.n_slots_available() == 0
    for sequence in (*sequences, fourth):
        with pytest.raises(OutOfMemory):
            compute(sequence, (0,) * 42, 42)
        assert sequence.usable(100) == sequence.n_tokens
    fourth.retain()
    compute(sequences[0], (0,) * 42, 42)
    assert fourth.usable(33) == 0


def test_forks_share_slots_and_a_step_copies_nothing(pool: PagePool) -> None:
    sequence = grown(pool, 50)
    fork = sequence.fork()
    assert pool.usage().n_slots_used == 1 and fork.states() == sequence.states()
    compute(fork, (0,) * 50 + (1,), 51)
    assert pool.usage().n_slots_used == 2
    fork.close()
    sequence.close()
    assert pool.usage().n_slots_used == 0


def test_a_text_cannot_go_on_where_no_state_was_kept(pool: PagePool) -> None:
    sequence = grown(pool, 100)
    assert [sequence.usable(n) for n in (5, 64, 99, 100, 200)] == [0, 64, 64, 100, 100]
    with pytest.raises(InvalidArgument, match="cannot fork at 80 tokens: no recurrent state was kept there"):
        sequence.fork(80)
    with pytest.raises(InvalidArgument, match="cannot truncate at 80 tokens"):
        sequence.truncate(80)


def test_a_window_that_moves_on_drops_states_behind_it() -> None:
    pool = new_pool(n_slots=30)
    cache = KvEvictionList(pool)
    cache.spill = shelf = Shelf(pool)
    with Sequence(pool, Window(40, 4)) as sequence:
        text = (0,) * 250
        sequence.keep_states(70, 150)
        for end in range(10, 251, 10):
            compute(sequence, text, end)
            sequence.slide(sequence.n_tokens)
            sequence.drop_passing(sequence.n_tokens)
        positions = [state.position for state in sequence.states()]
        assert positions[-1] == 250 and 70 not in positions and sequence.usable(150) == 0
        keys = KeyChain("", sequence.window).keys(ids_of(text))
        sequence.publish_states(keys, ids_of(text), also_passing=True)
        cache.keep(sequence)
        cache.evict(sequence)
        assert shelf.n_states == len(positions)
    assert pool.usage().n_slots_used == 0
    pool.close()


def test_passing_states_are_kept_until_the_reader_has_passed_them(pool: PagePool) -> None:
    pool = new_pool(n_slots=30)
    sequence = Sequence(pool)
    sequence.keep_states()
    text = (0,) * 60
    for end in range(1, 61):
        compute(sequence, text, end)
        sequence.drop_passing(max(0, end - 40))
    positions = [state.position for state in sequence.states()]
    assert positions[-1] == 60 and len(positions) <= 5
    assert max(b - a for a, b in itertools.pairwise(positions)) <= 17
    assert positions[0] <= 20, "a canceled answer goes back to what was read"
    sequence.drop_passing(60)
    assert [state.position for state in sequence.states()][-1] == 60 and len(sequence.states()) <= 2
    pool.close()


# ---- Policy ---------------------------------------------------------------------------------------------------------


def test_states_within_a_draft_are_kept_where_that_costs_less_than_rows() -> None:
    likely, unlikely = [0.99, 0.98, 0.97], [0.3, 0.1, 0.05]
    assert kept_of_draft(unlikely, row=0.2, base=1.0, share=0.05)[0] == 0, "a wrong first token is the likeliest"
    assert kept_of_draft(likely, row=0.2, base=1.0, share=0.05) == []
    assert kept_of_draft(unlikely, row=0.2, base=1.0, share=5.0) == [], "a large state costs more than rows"
    assert kept_of_draft(unlikely, row=0.0, base=0.0, share=0.1) == [], "nothing was measured yet"
    assert kept_of_draft([1.0], row=0.2, base=1.0, share=0.001) == []
