"""State slots: the pool, what a batch may do with them, and decode steps over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fabula import _native
from fabula._native import Flag, StatePool
from fabula._program import BatchSequence, DecodeSequence, Sampling
from fabula._sampling import sampling_struct
from fabula.errors import InvalidArgument, OutOfMemory
from recurrent import CONVS, DELTAS, N_ROWS, SSMS, Case, Machine, Text, random, tokens_of

PAGE = 4096  # of the system


def test_a_slot_holds_bytes() -> None:
    pool = StatePool([5, 100, 17], 4)
    assert pool.slot_bytes == (16 + 112 + 32) * 4  # each layer in whole cache lines
    assert _native.state_bytes([5, 100, 17]) == pool.slot_bytes
    assert not pool.read(3).any()
    data = np.arange(pool.slot_bytes, dtype=np.uint8)
    pool.write(2, data)
    pool.copy(0, 2)
    np.testing.assert_array_equal(pool.read(0), data)
    assert not pool.read(1).any() and not pool.read(3).any()
    pool.zero(2)
    assert not pool.read(2).any()
    np.testing.assert_array_equal(pool.read(0), data)


def test_large_slots_are_whole_pages_and_are_returned() -> None:
    pool = StatePool([3 * PAGE + 1], 1 << 20)  # 50 GB of address space
    assert pool.slot_bytes == 13 * PAGE
    data = np.full(pool.slot_bytes, 7, np.uint8)
    pool.write(1, data)
    pool.write((1 << 20) - 1, data)
    pool.discard(1)
    np.testing.assert_array_equal(pool.read((1 << 20) - 1), data)
    pool.write(1, data)
    np.testing.assert_array_equal(pool.read(1), data)


@pytest.mark.parametrize("layers", [[], [0], [-1], [(1 << 40) + 1]])
def test_a_bad_pool_is_refused(layers: list[int]) -> None:
    with pytest.raises(InvalidArgument):
        StatePool(layers, 1)


def test_a_bad_number_of_slots_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="n_slots is 0"):
        StatePool([1], 0)
    with pytest.raises(OutOfMemory):
        StatePool([1 << 40] * 64, (1 << 31) - 1)


def test_slots_and_sizes_are_checked() -> None:
    pool = StatePool([8], 2)
    for call in (lambda: pool.zero(2), lambda: pool.copy(0, -1), lambda: pool.read(-1), lambda: pool.discard(5)):
        with pytest.raises(InvalidArgument, match="the pool has 2"):
            call()
    with pytest.raises(InvalidArgument, match="src has 3 bytes, a state slot has 64"):
        pool.write(0, np.zeros(3, np.uint8))


# ---- Batches --------------------------------------------------------------------------------------------------------

CASE = CONVS[0]


def part(n: int, page: int = 0, n_past: int = 0, **slots: Any) -> BatchSequence:
    return BatchSequence(np.array([page], np.int32), n_past, np.arange(n, dtype=np.int32), **slots)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([part(3, state_out=-1)], "state_out is slot -1 of a pool of 12"),
        ([part(3, state_out=12)], "state_out is slot 12"),
        ([part(3, state_in=12, state_out=0)], "state_in is slot 12"),
        ([part(3, n_past=1, state_in=-1, state_out=0)], "state_in is slot -1 of a pool of 12, after 1 tokens"),
        ([part(3, state_out=0, keeps=((0, 1),))], "after 0 of 3 tokens"),
        ([part(3, state_out=0, keeps=((3, 1),))], "after 3 of 3 tokens"),
        ([part(3, state_out=0, keeps=((2, 1), (2, 2)))], "after 2 of 3 tokens"),
        ([part(3, state_out=0, keeps=((1, 1), (2, 1)))], "keeps two states in slot 1"),
        ([part(3, state_out=0, keeps=((1, 0),))], "keeps its state in slot 0"),
        ([part(3, state_in=1, state_out=0, keeps=((1, 1),))], "keeps its state in slot 1"),
        ([part(3, state_out=0, keeps=((1, 12),))], "slot 12"),
        ([part(3, state_out=0), part(1, 1, state_out=0)], "writes state slot 0, which sequence"),
        (
            [part(3, state_out=0), part(1, 1, state_in=0, state_out=1)],
            "sequence 0 writes state slot 0, which sequence 1",
        ),
        ([part(3, state_out=0, keeps=((1, 4),)), part(1, 1, state_out=4)], "state slot 4"),
        ([part(3, state_out=0, keeps=((1, 4),)), part(2, 1, state_out=2, keeps=((1, 4),))], "state slot 4"),
    ],
)
def test_a_batch_that_misuses_slots_is_refused(batch: list[BatchSequence], message: str) -> None:
    machine = Machine(CASE)
    machine.states.write(0, np.full(machine.states.slot_bytes, 7, np.uint8))
    before = [machine.states.read(slot) for slot in range(12)]
    with pytest.raises(InvalidArgument, match=message):
        machine.program.run(machine.pages, batch, [0], states=machine.states)
    for slot, was in enumerate(before):
        np.testing.assert_array_equal(machine.states.read(slot), was)


def test_several_sequences_may_read_one_slot() -> None:
    machine = Machine(CASE)
    tokens = tokens_of(1, 20)
    first = Text(tokens, 0)
    machine.step([(first, 10)])
    branches = [part(10, i, 10, state_in=0, state_out=1 + i) for i in range(3)]
    rows = machine.program.run(machine.pages, branches, np.arange(30), states=machine.states)
    np.testing.assert_array_equal(rows[:10], rows[10:20])
    np.testing.assert_array_equal(rows[:10], rows[20:])
    np.testing.assert_array_equal(machine.states.read(1), machine.states.read(3))


def test_a_program_needs_its_pool() -> None:
    machine = Machine(CASE)
    with pytest.raises(InvalidArgument, match="1 recurrent operators and needs a state pool"):
        machine.program.run(machine.pages, [part(3, state_out=0)], [0])
    for layers, message in (
        ([CASE.floats] * 2, "has 2 layers, the program 1"),
        ([CASE.floats + 1], "layer 0 of the state"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            machine.program.run(machine.pages, [part(3, state_out=0)], [0], states=StatePool(layers, 1))


# ---- Decode steps ---------------------------------------------------------------------------------------------------


STEPS = 6


def request(tokens: list[int], page: int, n_past: int, n_steps: int, **slots: Any) -> DecodeSequence:
    """Computes the tokens behind n_past and samples n_steps, the likeliest."""
    history = np.array([*tokens, *[-1] * n_steps], np.int32)
    pages = np.array([page, page + 1], np.int32)
    share = BatchSequence(pages, n_past, history[n_past : len(tokens)], **slots)
    none = np.zeros(0, np.int32)
    sampling = Sampling(sampling_struct(temperature=0.0), none, none.astype(np.float32), none)
    return DecodeSequence(share, n_steps, history, len(tokens), none, sampling)


def greedy(machine: Machine, tokens: list[int], slot: int) -> list[int]:
    """As many single steps. The last token is not computed."""
    text = Text(list(tokens), slot)
    machine.step([(text, len(tokens))])
    for _ in range(STEPS - 1):
        text.tokens.append(int(text.rows[-1][-1].argmax()))
        machine.step([(text, 1)])
    return [*text.tokens[len(tokens) :], int(text.rows[-1][-1].argmax())]


@pytest.mark.parametrize("case", [CONVS[2], DELTAS[0], SSMS[0]], ids=lambda case: case.name)
def test_decode_steps_are_those_of_single_runs(case: Case) -> None:
    machine = Machine(case, n_threads=2, head=random(20, N_ROWS, case.width))
    prompts = [tokens_of(1, 20), tokens_of(2, 3), tokens_of(3, 24)]
    expected = [greedy(machine, prompt, slot=9 + i) for i, prompt in enumerate(prompts[:2])]
    first = Text(prompts[0], 0)
    machine.step([(first, 5)])
    before = machine.states.read(0)
    requests = [
        request(prompts[0], 0, 5, STEPS, state_in=0, state_out=1),
        request(prompts[1], 2, 0, STEPS, state_out=2),
        request(prompts[2], 4, 0, 0, state_out=3, keeps=((16, 4),)),  # a prefill chunk
    ]
    seen: list[int] = []
    sampled, _ = machine.program.decode(
        machine.pages, requests, STEPS, Flag().memory, states=machine.states, state_positions=seen
    )
    assert [tokens.tolist() for tokens, _ in sampled] == [*expected, []]
    assert seen == [20 + STEPS - 1, 3 + STEPS - 1, 24]
    np.testing.assert_array_equal(machine.states.read(0), before)
    for slot, as_slot in ((1, 9), (2, 10)):
        np.testing.assert_array_equal(machine.states.read(slot), machine.states.read(as_slot))
    for slot, n in ((3, 24), (4, 16)):
        machine.run(prompts[2][:n], [n], slot=11)
        np.testing.assert_array_equal(machine.states.read(slot), machine.states.read(11))


def test_a_later_step_that_fails_tells_whose_state_is_lost() -> None:
    head = random(20, N_ROWS, CASE.width)
    prompts = [tokens_of(1, 4), tokens_of(2, 5), tokens_of(3, 6)]
    good = [greedy(Machine(CASE, head=head), prompt, slot=0) for prompt in prompts]
    known = {token for prompt in prompts for token in prompt} | set(good[1][:STEPS])
    n = next(i for i, token in enumerate(good[0], start=1) if token not in known)  # tokens before one that fails
    damaged = good[0][n - 1]
    table = CASE.tables[0].copy()
    table[damaged] = np.nan
    machine = Machine(replace(CASE, tables=[table]), head=head)
    requests = [request(prompt, 2 * i, 0, STEPS if i < 2 else 0, state_out=i) for i, prompt in enumerate(prompts)]
    seen: list[int] = []
    sampled, seconds = machine.program.decode(
        machine.pages, requests, STEPS, Flag().memory, states=machine.states, state_positions=seen
    )
    assert (
        1 <= n < STEPS
        and len(seconds) == n
        and [tokens.tolist() for tokens, _ in sampled] == [good[0][:n], good[1][:n], []]
    )
    assert seen == [-1, -1, 6]
