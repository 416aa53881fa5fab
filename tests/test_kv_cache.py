"""The KV cache: pages found by a text's prefix hash are that text's, from memory or from disk."""

from __future__ import annotations

import random
from collections import Counter
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from fabula._native import PAGE_POSITIONS, kv_layers
from fabula.errors import OutOfMemory
from fabula.formats.checkpoint import DType
from fabula.kv.cache import KvEvictionList
from fabula.kv.pages import HOLE, PagePool, Sequence
from fabula.kv.prefix import EVERYTHING, KeyChain, Window

N_PAGES = 12
WINDOWS = [EVERYTHING, Window(40, 4), Window(40, 0), Window(96, 32)]
Text = tuple[int, ...]  # tokens


def ids_of(text: Text) -> npt.NDArray[np.int32]:
    return np.asarray(text, np.int32)


def spread(parts: list[int], last: int = PAGE_POSITIONS) -> Text:
    """A page of each token, of the last one fewer."""
    return tuple(np.repeat(parts, PAGE_POSITIONS)[: (len(parts) - 1) * PAGE_POSITIONS + last].tolist())


class Shelf:
    """A disk that forgets, fails and is slow to fill up."""

    def __init__(self) -> None:
        self.pages: dict[bytes, npt.NDArray[np.uint8]] = {}
        self.broken = False

    def put(self, key: bytes, data: npt.NDArray[np.uint8]) -> bool:
        if self.broken or key in self.pages:
            return False
        self.pages[key] = data.copy()
        return True

    def get(self, key: bytes, out: npt.NDArray[np.uint8]) -> bool:
        if self.broken or key not in self.pages:
            out[:] = 0xEE  # what a damaged page leaves behind
            return False
        out[:] = self.pages[key]
        return True

    def __contains__(self, key: bytes) -> bool:
        return key in self.pages

    @property
    def n_pages(self) -> int:
        return len(self.pages)

    def drain(self, max_bytes: int = 0) -> None:
        """Nothing is queued."""


class Held:
    """A sequence and what it should hold."""

    def __init__(self, sequence: Sequence, text: Text, salt: str) -> None:
        self.sequence, self.text, self.salt = sequence, text, salt


class Cache(RuleBasedStateMachine):
    """Texts that begin alike are computed, found, forked, cut, kept and given up, at random."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(DType.F32, N_PAGES, kv_layers(1, 1, 4))
        self.cache = KvEvictionList(self.pool, n_anonymous=3)
        self.cache.spill = self.shelf = Shelf()
        self.held: list[Held] = []
        self.n_found = 0

    def content(self, held: Held, page: int) -> npt.NDArray[np.uint8]:
        """What a full page holds: it follows from owner, window and the text up to its end."""
        window = held.sequence.window
        sees = (window.size, window.n_sinks) if window.first_visible((page + 1) * PAGE_POSITIONS - 1) else ()
        name = repr((held.salt, sees, held.text[: (page + 1) * PAGE_POSITIONS])).encode()
        return np.resize(np.frombuffer(blake2b(name).digest(), np.uint8), self.pool.page_bytes)

    def compute(self, held: Held) -> None:
        """Appends the rest of the text, page by page like a prefill; full pages are published."""
        sequence, n_tokens = held.sequence, len(held.text)
        keys = KeyChain(held.salt, sequence.window).keys(ids_of(held.text))
        while sequence.n_tokens < n_tokens:
            end = min(n_tokens, (sequence.n_tokens // PAGE_POSITIONS + 1) * PAGE_POSITIONS)
            pages = sequence.reserve(end)
            place = (end - 1) // PAGE_POSITIONS
            sequence.n_tokens = end
            if end % PAGE_POSITIONS == 0:
                self.pool.native.write(int(pages[place]), self.content(held, place))
                self.pool.name(int(pages[place]), keys[place])
            sequence.slide(end)

    @rule(
        text=st.lists(st.integers(0, 1), min_size=1, max_size=7),
        part=st.integers(1, 32),
        window=st.sampled_from(WINDOWS),
        salt=st.sampled_from(["", "a"]),
        fate=st.integers(0, 3),
    )
    def say(self, text: list[int], part: int, window: Window, salt: str, fate: int) -> None:
        self.held = [held for held in self.held if held.sequence.n_tokens]  # those that were not given up
        tokens = spread(text, part)
        keys = KeyChain(salt, window).keys(ids_of(tokens))[: (len(tokens) - 1) // PAGE_POSITIONS]
        found = self.cache.find(keys, window)
        if found is not None:
            self.n_found += 1
            assert found.n_tokens % PAGE_POSITIONS == 0 and 0 < found.n_tokens <= len(keys) * PAGE_POSITIONS
            assert found.usable(found.n_tokens) == found.n_tokens
        held = Held(found or Sequence(self.pool, window), tokens, salt)
        self.held.append(held)
        try:
            self.compute(held)
        except OutOfMemory:
            assert self.pool.n_free == 0 and not self.cache.usage().n_cached
            self.let_go(len(self.held) - 1)
            return
        if fate < 3:
            self.keep(len(self.held) - 1, owned=fate == 0)

    @rule(i=st.integers(0, 20), owned=st.booleans())
    def keep(self, i: int, owned: bool) -> None:
        if self.held:
            held = self.held[i % len(self.held)]
            self.cache.keep(held.sequence, owned=owned)

    @rule(i=st.integers(0, 20), n=st.integers(1, 250), then=st.lists(st.integers(1, 40), max_size=2), cut=st.booleans())
    def fork_and_go_on(self, i: int, n: int, then: list[int], cut: bool) -> None:
        """Other words from any place on, also in the middle of a page that others hold."""
        self.held = [held for held in self.held if held.sequence.n_tokens]
        if not self.held:
            return
        held = self.held[i % len(self.held)]
        sequence = held.sequence
        n = sequence.usable(1 + n % sequence.n_tokens)
        if cut:
            self.held.remove(held)
            sequence.truncate(n)
        else:
            sequence = sequence.fork(n)
        self.held.append(Held(sequence, (*held.text[:n], *[k % 2 for k in then for _ in range(k)]), held.salt))
        try:
            self.compute(self.held[-1])
        except OutOfMemory:
            self.let_go(len(self.held) - 1)

    @rule(i=st.integers(0, 20))
    def let_go(self, i: int) -> None:
        if self.held:
            self.held.pop(i % len(self.held)).sequence.close()

    @rule(n=st.integers(1, N_PAGES))
    def reclaim(self, n: int) -> None:
        self.cache._reclaim(n)
        assert self.pool.n_free >= n or not self.cache.usage().n_cached

    @rule(what=st.integers(0, 4), seed=st.integers(0, 9))
    def disturb(self, what: int, seed: int) -> None:
        if what == 0:
            self.cache.clear()
        elif what == 1:
            self.cache.save_all()
        elif what == 2:
            self.shelf.broken = not self.shelf.broken
        else:
            for key in random.Random(seed).sample(sorted(self.shelf.pages), len(self.shelf.pages) // 2):
                del self.shelf.pages[key]

    @invariant()
    def pages_hold_what_their_texts_say(self) -> None:
        for held in self.held:
            sequence = held.sequence
            first = sequence.window.first_page(sequence.n_tokens)
            for i, page in enumerate(sequence.pages[: sequence.n_tokens // PAGE_POSITIONS]):
                if page == HOLE:
                    assert (sequence.window.n_sinks == 0 or i > 0) and i < first
                else:
                    assert (self.pool.native.read(page) == self.content(held, i)).all()

    @invariant()
    def every_page_is_counted(self) -> None:
        sequences = {id(held.sequence): held.sequence for held in self.held}
        sequences |= {id(sequence): sequence for sequence in self.cache._anonymous.values()}
        self.pool.check([sequence.pages for sequence in sequences.values()])
        usage = self.cache.usage()
        retained = Counter(p for s in self.cache._sequences() for p in s.pages if p != HOLE)
        assert usage.n_cached == sum(n == self.pool.holders(page) for page, n in retained.items())
        assert usage.n_used == N_PAGES - self.pool.n_free and 0 <= usage.n_cached <= usage.n_used
        assert len(self.cache._anonymous) <= 3

    def teardown(self) -> None:
        self.held.clear()
        self.cache.clear()
        self.pool.check([])
        self.pool.close()


def test_what_is_found_is_what_was_kept() -> None:
    run_state_machine_as_test(
        Cache,
        settings=settings(
            max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@settings(max_examples=200, deadline=None)
@given(
    a=st.lists(st.integers(0, 1), min_size=1, max_size=6),
    b=st.lists(st.integers(0, 1), min_size=1, max_size=6),
    salts=st.tuples(st.sampled_from(["", "a", "b"]), st.sampled_from(["", "a", "b"])),
    windows=st.tuples(st.sampled_from(WINDOWS), st.sampled_from(WINDOWS)),
)
def test_names_are_equal_for_equal_pasts_of_one_owner(
    a: list[int], b: list[int], salts: tuple[str, str], windows: tuple[Window, Window]
) -> None:
    names = [
        KeyChain(salt, window).keys(ids_of(spread(text)))
        for text, salt, window in zip((a, b), salts, windows, strict=True)
    ]
    for i in range(min(len(a), len(b))):
        hidden = [bool(window.first_visible(32 * i + 31)) for window in windows]
        alike = windows[0] == windows[1] or not any(hidden)
        assert (names[0][i] == names[1][i]) == (salts[0] == salts[1] and a[: i + 1] == b[: i + 1] and alike)


def test_names_do_not_depend_on_how_a_text_grew() -> None:
    ids = np.arange(300, dtype=np.int32)
    for window in WINDOWS:
        chain = KeyChain("x", window)
        for n in (1, 31, 32, 33, 100, 299, 300):
            grown = list(chain.keys(ids[:n]))
        assert grown == KeyChain("x", window).keys(ids) and len(set(grown)) == 9


@pytest.mark.parametrize("n_anonymous", [0, 1, 16])
def test_nobodys_sequences_live_until_others_are_newer(n_anonymous: int) -> None:
    pool = PagePool(DType.F32, 64, kv_layers(1, 1, 4))
    cache = KvEvictionList(pool, n_anonymous=n_anonymous)
    for _ in range(20):
        sequence = Sequence(pool)
        sequence.reserve(40)
        sequence.n_tokens = 40
        cache.keep(sequence, owned=True)
    del sequence
    assert pool.n_pages - pool.n_free == 2 * n_anonymous == cache.usage().n_cached
    cache.clear()
    assert pool.n_free == pool.n_pages
