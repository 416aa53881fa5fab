"""The scheduler's policy, budgets hold, no request starves, preempted requests run again, order is kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fabula._native import PAGE_POSITIONS
from fabula.engine.policy import (
    DRAFT_GAIN,
    DRAFT_STRETCH,
    Budget,
    Prefix,
    admits,
    decode_steps,
    draft_rows,
    fits,
    plan,
    preempted,
    shares_prefix,
)
from fabula.engine.step_cost import FORGET_STEPS, MIN_CHUNK, StepCost
from fabula.kv.pages import pages_for


@dataclass(eq=False)
class Stub:
    """A request: `n_tokens` of it are known, `n_computed` have KV, and it ends at `n_total`."""

    n_tokens: int
    n_total: int = 0
    n_computed: int = 0
    paused: bool = False
    n_preempted: int = 0
    first_step: int = -1
    admitted: int = -1
    chances: tuple[float, ...] = ()

    @property
    def n_pending(self) -> int:
        return self.n_tokens - self.n_computed

    @property
    def n_pages(self) -> int:
        return pages_for(self.n_computed)


def cost_of(base: float, token: float) -> StepCost:
    cost = StepCost()
    for n in (1, 8, 64, 256, 2, 100):
        cost.measured(n, base + token * n)
    return cost


costs = st.one_of(st.just(StepCost()), st.builds(cost_of, st.floats(0, 0.1), st.floats(1e-6, 0.01)))
stubs = st.lists(st.builds(Stub, st.integers(1, 3000), paused=st.sampled_from([False, False, True])), max_size=20)


@given(stubs, st.integers(1, 600), costs)
@settings(max_examples=400, deadline=None)
def test_a_plan(requests: list[Stub], max_tokens: int, cost: StepCost) -> None:
    planned = plan(requests, Budget(max_tokens, cost))
    order, share = [requests.index(r) for r, _ in planned], {id(r): n for r, n in planned}
    assert order == sorted(set(order))
    assert sum(share.values()) <= max_tokens
    assert all(1 <= n <= r.n_pending and not r.paused for r, n in planned)
    active = [r for r in requests if not r.paused]
    decoding, prefilling = [r for r in active if r.n_pending == 1], [r for r in active if r.n_pending > 1]
    assert [r for r in decoding if id(r) in share] == decoding[:max_tokens], "the oldest decode, all if they fit"
    room = max_tokens - min(len(decoding), max_tokens)
    budget = cost.prefill_tokens(len(decoding[:max_tokens]), room)
    assert budget == room if not decoding else min(MIN_CHUNK, room) <= budget <= room
    given_out = sum(share.get(id(r), 0) for r in prefilling)
    assert given_out == min(budget, sum(r.n_pending for r in prefilling)), "nothing of the budget is left unused"
    if prefilling:
        oldest, *others = prefilling
        assert share.get(id(oldest), 0) >= min(oldest.n_pending, (budget + 1) // 2)
        for shorter, longer in ((a, b) for a in others for b in others if a.n_pending < b.n_pending):
            assert id(longer) not in share or share[id(shorter)] == shorter.n_pending
    assert planned == plan(requests, Budget(max_tokens, cost)), "it has no memory and changes nothing"
    assert bool(planned) == bool(active)


def run(requests: list[Stub], n_pages: int, budget: Budget, max_running: int) -> None:
    """Carries the policy out as the scheduler does, until every request has ended."""
    waiting, running, arrived = deque(requests), list[Stub](), list(requests)
    step = 0
    bound = 4 * sum(r.n_total for r in requests) * (len(requests) + 1)

    def preempt(request: Stub) -> None:
        running.remove(request)
        request.n_computed, request.n_preempted = 0, request.n_preempted + 1
        waiting.appendleft(request)

    while waiting or running:
        step += 1
        assert step <= bound, "somebody starves"
        blocked = False
        for request in list(waiting):
            if not admits(request, len(running), max_running, blocked=blocked):
                continue
            free = n_pages - sum(r.n_pages for r in running)
            if not fits(pages_for(request.n_tokens + 1), free, len(running)):
                blocked = True
                continue
            waiting.remove(request)
            running.append(request)
            if request.admitted < 0:
                request.admitted = step
        served: dict[int, tuple[Stub, int]] = {}
        for request, n in plan(running, budget):
            while request in running:
                used = sum(r.n_pages for r in running if id(r) not in served and r is not request)
                used += sum(pages_for(r.n_computed + more) for r, more in served.values())
                if used + pages_for(request.n_computed + n) <= n_pages:
                    served[id(request)] = (request, n)
                    break
                done, holding = [r for r, _ in served.values()], [r for r in running if r.n_pages]
                victim = preempted(running, request, done, holding)
                assert victim is not request and victim not in done
                assert victim is not None or len(running) > 1, "alone, everything fits"
                if victim is not None:
                    younger = running[running.index(victim) + 1 :]
                    assert not any(r in holding and r not in done and r is not request for r in younger)
                preempt(victim or request)
        assert served, "a step in which nothing is computed"
        for request, n in served.values():
            assert request in running
            if request.first_step < 0:
                request.first_step = step
            done = n == request.n_pending
            request.n_computed += n
            if done:
                request.n_tokens += 1
                if request.n_tokens > request.n_total:
                    running.remove(request)
        assert sum(r.n_pages for r in running) <= n_pages
    admitted = [r.admitted for r in arrived]
    assert admitted == sorted(admitted), "requests of one model start in order of arrival"


@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(1, 60)), min_size=1, max_size=8),
    st.integers(0, 6),
    st.integers(1, 64),
    st.integers(1, 8),
    costs,
)
@example([(100, 60)] * 6, 0, 16, 8, StepCost())
@settings(max_examples=150, deadline=None)
def test_nobody_starves_and_preempted_requests_come_back(
    sizes: list[tuple[int, int]], spare: int, max_tokens: int, max_running: int, cost: StepCost
) -> None:
    """Whatever the prompts and answers are, as long as the pool holds the largest alone."""
    requests = [Stub(prompt, prompt + made) for prompt, made in sizes]
    run(requests, max(pages_for(r.n_total + 1) for r in requests) + spare, Budget(max_tokens, cost), max_running)
    assert all(r.n_tokens > r.n_total for r in requests)


def test_pages_run_out_for_the_youngest_first() -> None:
    requests = [Stub(60, 150) for _ in range(4)]
    run(requests, 8, Budget(64, StepCost()), 8)
    assert requests[0].n_preempted == 0 < sum(r.n_preempted for r in requests)


def test_who_is_preempted() -> None:
    a, b, c, d = (Stub(10) for _ in range(4))
    everybody = [a, b, c, d]
    assert preempted(everybody, a, [], everybody) is d
    assert preempted(everybody, a, [d], everybody) is c
    assert preempted(everybody, d, [], everybody) is c
    assert preempted(everybody, a, [d], [a, b, d]) is b
    assert preempted(everybody, d, [a, b, c], everybody) is None
    assert preempted([a], a, [], [a]) is None


def test_admission() -> None:
    request, paused = Stub(10), Stub(10, paused=True)
    assert admits(request, 3, 4, blocked=False)
    assert not admits(request, 4, 4, blocked=False)
    assert not admits(request, 0, 4, blocked=True)
    assert not admits(paused, 0, 4, blocked=False)
    assert fits(5, 5, 3) and not fits(6, 5, 3) and fits(6, 5, 0)


@given(
    st.lists(st.tuples(st.integers(1, 32), st.integers(1, PAGE_POSITIONS)), min_size=1, max_size=8),
    st.integers(0, 12),
    costs,
)
@settings(deadline=None)
def test_decode_steps(requests: list[tuple[int, int]], n_free: int, cost: StepCost) -> None:
    ahead, room = zip(*requests, strict=True)
    n = decode_steps(cost, ahead, room, n_free=n_free, emit_seconds=0.016, max_steps=PAGE_POSITIONS)
    base, token = cost.cost()
    assert n <= min(*ahead, PAGE_POSITIONS)
    assert n * (base + token * len(requests)) <= 0.016 or n == 1
    if n_free < len(requests):
        assert n <= min(room)


def test_a_shared_prefix_is_used_waited_for_or_left() -> None:
    page = PAGE_POSITIONS
    assert shares_prefix(Prefix(100, 100, prefills=False), 0) is True
    assert shares_prefix(Prefix(100, 100, prefills=False), 100) is False
    assert shares_prefix(Prefix(100, 10, prefills=True), 0) is None, "it is being computed"
    assert shares_prefix(Prefix(page + 3, 10, prefills=True), 4) is False, "less than a page: not worth waiting"
    assert shares_prefix(Prefix(100, 120, prefills=True), 0) is True, "that part of the prompt is done"


# ---- Drafts ---------------------------------------------------------------------------------------------------------

drafts = st.lists(st.floats(0.01, 1.0), max_size=8).map(lambda row: [min(row[: i + 1]) for i in range(len(row))])
tiles = st.lists(st.floats(0.01, 2.0), min_size=40, max_size=40)


def rows_cost(seconds: Sequence[float]) -> StepCost:
    """The cost of steps of 1, 2, ... rows, each so many seconds longer than the one before it."""
    cost, total = StepCost(), 0.0
    for n, more in enumerate(seconds, 1):
        total += more
        cost.measured_rows(n, total)
    return cost


@given(st.lists(drafts, min_size=1, max_size=4), tiles, st.integers(0, 12))
@settings(max_examples=300, deadline=None)
def test_drafts_are_as_long_as_they_pay(chances: list[list[float]], seconds: list[float], most: int) -> None:
    """No draft is taken that promises no more tokens per second than plain decoding, nor at the cost of other requests;
    and for one request, no other length promises more."""
    cost, n = rows_cost(seconds), len(chances)
    counts = draft_rows(cost, chances, most)
    assert all(0 <= count <= len(row) for count, row in zip(counts, chances, strict=True)) and sum(counts) <= most

    def speed(lengths: Sequence[int]) -> float:
        tokens = n + sum(sum(row[:length]) for row, length in zip(chances, lengths, strict=True))
        return tokens / cost.seconds(n + sum(lengths))

    plain = DRAFT_GAIN * speed([0] * n)
    if any(counts):
        assert speed(counts) > plain * (1 - 1e-9)
        slowest = min(1 + sum(row[:count]) for row, count in zip(chances, counts, strict=True))
        assert n == 1 or cost.seconds(n + sum(counts)) <= DRAFT_STRETCH * cost.seconds(n) * slowest * (1 + 1e-9)
    if n == 1:
        best = max(speed([length]) for length in range(min(len(chances[0]), most) + 1))
        assert speed(counts) >= best * (1 - 1e-9) if any(counts) else best <= plain * (1 + 1e-9)


def test_no_draft_before_a_step_was_measured_nor_where_rows_cost_as_much_as_steps() -> None:
    assert draft_rows(StepCost(), [[1.0] * 8], 100) == [0]
    assert draft_rows(rows_cost([1.0] * 40), [[1.0] * 8], 100) == [0]
    assert draft_rows(rows_cost([1.0] + [0.1] * 39), [[1.0] * 8, []], 100) == [5, 0], "the other one waits, too"
    assert draft_rows(rows_cost([1.0] + [0.1] * 39), [[1.0] * 8, [0.99] * 8], 9) == [8, 1]
    assert draft_rows(rows_cost([1.0] + [0.1] * 39), [[0.9, 0.5, 0.05, 0.01]], 100) == [2]


def test_a_plan_counts_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCost, "seconds", lambda _, n: 1 + 0.01 * n)
    drafting, plain, reading = Stub(40, 0, 39, chances=(0.9,) * 5), Stub(9, 0, 8), Stub(500, chances=(0.9,) * 5)
    planned = plan([drafting, plain, reading], Budget(64, StepCost()))
    assert planned[:2] == [(drafting, 6), (plain, 1)] and planned[2][0] is reading
    assert MIN_CHUNK <= planned[2][1] <= 64 - 7
    assert plan([drafting, plain], Budget(4, StepCost())) == [(drafting, 3), (plain, 1)], "within the batch"
    assert plan([plain, drafting], Budget(1, StepCost())) == [(plain, 1)]


def test_the_cost_of_rows() -> None:
    cost = StepCost()
    assert cost.seconds(1) == cost.seconds(5) == 0.0
    cost.measured_rows(1, 0.010)
    assert cost.seconds(1) == 0.010 < cost.seconds(2) < cost.seconds(4) <= 0.020, "a guess, until it is measured"
    cost.measured_rows(4, 0.040)
    assert cost.seconds(4) == 0.040 and abs(cost.seconds(2) - 0.020) < 1e-9, "between two that were"
    cost.measured_rows(4, 10.0)
    assert cost.seconds(4) <= 0.060, "one slow step does not say much"
    cost.measured_rows(1, 0.010, FORGET_STEPS + 1)
    assert cost.seconds(4) <= 0.020, "measured long ago: it is tried again"
