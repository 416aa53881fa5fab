"""KV pages: counting, sharing, and forks that never see each other's words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fabula import Model
from fabula._native import PAGE_POSITIONS, kv_layers
from fabula.engine.runner import Runner
from fabula.errors import InvalidArgument, OutOfMemory
from fabula.formats.checkpoint import DType
from fabula.kv.pages import PagePool, PoolUsage, Sequence


@pytest.fixture
def pool() -> Iterator[PagePool]:
    made = PagePool(DType.F32, 8, kv_layers(1, 1, 8))
    yield made
    made.close()


def grown(pool: PagePool, n_tokens: int) -> Sequence:
    sequence = Sequence(pool)
    sequence.reserve(n_tokens)
    sequence.n_tokens = n_tokens
    return sequence


def test_a_fork_takes_no_page(pool: PagePool) -> None:
    sequence = grown(pool, 70)
    fork = sequence.fork()
    assert pool.usage() == PoolUsage(n_pages=8, n_used=3, n_shared=3, page_bytes=pool.page_bytes)
    assert fork.pages == sequence.pages and fork.n_tokens == 70
    pool.check([sequence.pages, fork.pages])
    sequence.close()
    assert pool.n_free == 5
    fork.close()
    fork.close()
    assert pool.n_free == 8 and pool.usage().used_bytes == 0


def test_only_the_second_to_append_gets_a_copy(pool: PagePool) -> None:
    sequence = grown(pool, 40)
    fork = sequence.fork()
    shared = sequence.pages
    sequence.reserve(45)
    assert sequence.pages == shared, "the first goes on in place"
    fork.reserve(41)
    assert fork.pages[0] == shared[0] and fork.pages[1] != shared[1]
    pool.check([sequence.pages, fork.pages])


def test_a_copy_holds_what_was_there(pool: PagePool) -> None:
    sequence = grown(pool, 10)
    raw = np.random.default_rng(0).integers(0, 256, pool.page_bytes).astype(np.uint8)
    pool.native.write(sequence.pages[0], raw)
    fork = sequence.fork(4)
    fork.reserve(5)
    assert fork.pages != sequence.pages
    np.testing.assert_array_equal(pool.native.read(fork.pages[0]), raw)


def test_a_lone_holder_never_copies(pool: PagePool) -> None:
    sequence = grown(pool, 60)
    pages = sequence.pages
    sequence.truncate(35)
    sequence.reserve(60)
    assert sequence.pages == pages


def test_no_page_left_changes_nothing(pool: PagePool) -> None:
    sequence = grown(pool, 7 * PAGE_POSITIONS + 1)
    fork = sequence.fork(7 * PAGE_POSITIONS + 1)
    sequence.reserve(7 * PAGE_POSITIONS + 2)
    before = fork.pages
    with pytest.raises(OutOfMemory, match="0 of 8 pages free, 1 are needed"):
        fork.reserve(7 * PAGE_POSITIONS + 2)
    assert fork.pages == before
    pool.check([sequence.pages, fork.pages])
    with pytest.raises(OutOfMemory):
        Sequence(pool).reserve(1)


@pytest.mark.parametrize("n_tokens", [-1, 11])
def test_lengths_out_of_range(pool: PagePool, n_tokens: int) -> None:
    sequence = grown(pool, 10)
    with pytest.raises(InvalidArgument, match=f"cannot fork at {n_tokens} tokens, 10 are held"):
        sequence.fork(n_tokens)
    with pytest.raises(InvalidArgument, match="cannot truncate"):
        sequence.truncate(n_tokens)


class Forks(RuleBasedStateMachine):
    """Sequences that grow, fork, shrink and end in any order: what each computes is what it would compute alone."""

    runner: Runner

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[tuple[Sequence, list[int]]] = [(self.runner.sequence(), [])]
        self.rng = np.random.default_rng(0)

    @rule(i=st.integers(0, 99), n=st.integers(1, 40))
    def append(self, i: int, n: int) -> None:
        sequence, tokens = self.alive[i % len(self.alive)]
        new = self.rng.integers(4, 100, n).astype(np.int32)
        if len(tokens) + n > 150:
            return
        logits = self.runner.step([(sequence, new)], [n - 1])
        tokens += new.tolist()
        with self.runner.sequence() as alone:
            expected = self.runner.step([(alone, np.array(tokens, np.int32))], [len(tokens) - 1])
        np.testing.assert_array_equal(logits, expected)

    @precondition(lambda self: len(self.alive) < 8)
    @rule(i=st.integers(0, 99), cut=st.integers(0, 150))
    def fork(self, i: int, cut: int) -> None:
        sequence, tokens = self.alive[i % len(self.alive)]
        n = min(cut, len(tokens))
        self.alive.append((sequence.fork(n), tokens[:n]))

    @rule(i=st.integers(0, 99), cut=st.integers(0, 150))
    def truncate(self, i: int, cut: int) -> None:
        sequence, tokens = self.alive[i % len(self.alive)]
        n = min(cut, len(tokens))
        sequence.truncate(n)
        del tokens[n:]

    @precondition(lambda self: len(self.alive) > 1)
    @rule(i=st.integers(0, 99))
    def end(self, i: int) -> None:
        self.alive.pop(i % len(self.alive))[0].close()

    @invariant()
    def counts_are_right(self) -> None:
        self.runner.pool.check([sequence.pages for sequence, _ in self.alive])

    def teardown(self) -> None:
        for sequence, _ in self.alive:
            sequence.close()
        assert self.runner.pool.n_free == self.runner.pool.n_pages


@pytest.mark.parametrize("kv", ["f32", "f16"])
def test_forks_never_see_each_other(tiny_folder: Path, kv: Any) -> None:
    with Model.load(tiny_folder, kv=kv, threads=1) as model:
        machine = type("Machine", (Forks,), {"runner": model._runner})
        from hypothesis.stateful import run_state_machine_as_test

        run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=30, deadline=None))
