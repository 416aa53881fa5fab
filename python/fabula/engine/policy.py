"""The scheduler's policy: pure functions of the requests' state, without threads, clocks or side effects.

    plan             the requests of a step, and how many tokens of each
    draft_rows       how many draft tokens of each request are verified in a step
    kept_of_draft    after which of them the state of recurrent layers is kept
    decode_steps     number of decode steps in one native call
    admits           whether a waiting request may start
    fits             whether there are pages for it
    preempted        the request that releases its pages when there are none left
    shares_prefix    whether a waiting request uses, or waits for, KV pages of a running one

`scheduler.py` executes the decisions. Lists of running requests are in order of admission, the oldest first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fabula._native import PAGE_POSITIONS
from fabula.engine.step_cost import StepCost
from fabula.lean_dataclasses import dataclass


class Schedulable(Protocol):
    """The state of a request that the policy needs.

    Attributes:
        n_pending: tokens known but not computed; 1: the request decodes, more: it prefills.
        paused: its reader has too many unread pieces.
        chances: for each token of its draft, the chance that it and those before it are right; empty: it has none.
    """

    @property
    def n_pending(self) -> int: ...

    @property
    def chances(self) -> Sequence[float]: ...

    @property
    def paused(self) -> bool: ...


R = TypeVar("R", bound=Schedulable)

MAX_DRAFT_ROWS = 48  # of a step: further ones cost what their share of a prefill chunk does
DRAFT_STRETCH = 1.5  # how much longer a step may take because of other requests' drafts
DRAFT_GAIN = 1.05  # a draft must promise so many times the tokens per second: chances and costs are estimates


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of one step of a model.

    Attributes:
        max_tokens: of a batch, 1 or more.
        cost: measured cost of a step; limits prefill while other requests decode.
    """

    max_tokens: int
    cost: StepCost


def plan(requests: Sequence[R], budget: Budget) -> list[tuple[R, int]]:
    """The requests of the next step, and how many tokens of each.

    Decoding requests come first, one token each, and draft tokens as far as they pay. Prefill gets the rest of the
    budget: the oldest prompt at least half, the shortest ones what is left. So no prompt starves, and a long one does
    not delay a short one.

    Args:
        requests: running requests of one model, in order of admission.
        budget: of the step.

    Returns:
        Requests with 1 or more tokens, in the order given; at most `budget.max_tokens` in all. A request that decodes
        has one token, and those of its draft.
    """
    active = [r for r in requests if not r.paused]
    decoding = [r for r in active if r.n_pending == 1][: budget.max_tokens]
    prefilling = [r for r in active if r.n_pending > 1]
    drafts = draft_rows(budget.cost, [r.chances for r in decoding], budget.max_tokens - len(decoding))
    share = {id(r): 1 + n for r, n in zip(decoding, drafts, strict=True)}
    n_rows = sum(share.values())
    left = budget.cost.prefill_tokens(n_rows, budget.max_tokens - n_rows)
    if prefilling:
        oldest = prefilling[0]
        shortest = sorted(prefilling[1:], key=lambda r: r.n_pending)
        least = (left + 1) // 2 if shortest else left
        share[id(oldest)] = min(oldest.n_pending, least)
        left -= share[id(oldest)]
        for request in shortest:
            share[id(request)] = min(request.n_pending, left)
            left -= share[id(request)]
        share[id(oldest)] += min(oldest.n_pending - share[id(oldest)], left)
    return [(r, share[id(r)]) for r in active if share.get(id(r), 0) > 0]


def draft_rows(cost: StepCost, chances: Sequence[Sequence[float]], most: int) -> list[int]:
    """How many draft tokens of each request pay: with them, the step gives the most tokens per second, and DRAFT_GAIN
    times as many as without any.

    A step of n requests with r draft tokens gives n tokens and the sum of the r chances. The likeliest come first, and
    since chances never rise along a draft, those before a token are taken before it. Among several requests, none may
    get its tokens DRAFT_STRETCH times as slowly as without drafts, for the sake of the others.

    Args:
        cost: of a step.
        chances: of each request that decodes; see `Schedulable`.
        most: draft tokens in all.

    Returns:
        A number for each request.
    """
    n, counts = len(chances), [0] * len(chances)
    plain = cost.seconds(n)
    ranked = sorted(((-chance, i) for i, row in enumerate(chances) for chance in row), key=lambda one: one[0])
    ranked = ranked[: min(most, MAX_DRAFT_ROWS)] if plain > 0 else []
    expected = [1.0] * n  # tokens of each request
    best, n_best, total = DRAFT_GAIN * n / plain if ranked else 0.0, 0, float(n)
    for n_drafted, (chance, i) in enumerate(ranked, 1):
        expected[i] -= chance
        total -= chance
        seconds = cost.seconds(n + n_drafted)
        if total / seconds > best and (n == 1 or seconds <= DRAFT_STRETCH * plain * min(expected)):
            best, n_best = total / seconds, n_drafted
    for _, i in ranked[:n_best]:
        counts[i] += 1
    return counts


def kept_of_draft(chances: Sequence[float], row: float, base: float, share: float) -> list[int]:
    """After how many draft tokens the state of recurrent layers is kept, for a draft that may be right up to there.

    A rejected draft goes back to the last state at or before its last right token; the tokens between are rows of the
    next step. The state before the step is there anyway, and so is the one after the whole draft.

    Args:
        chances: of the draft; see `Schedulable`.
        row, base: seconds of a further row of a step, and of its first one.
        share: of a step's first row that a copy of the state takes.

    Returns:
        Numbers of right draft tokens, 0 .. len(chances) - 1, ascending.
    """
    kept: list[int] = []
    before = -1  # the state before the step lacks the last known token, too
    for n, chance in enumerate([1.0, *chances[:-1]]):
        goes_back = chance - chances[-1]  # to here or a later token, but not beyond the draft
        if goes_back * (n - before) * row > share * base:
            kept.append(n)
            before = n
    return kept


def decode_steps(
    cost: StepCost,
    read_ahead: Iterable[int],
    page_room: Iterable[int],
    *,
    n_free: int,
    emit_seconds: float,
    max_steps: int,
) -> int:
    """Number of decode steps in one native call, for requests that all decode.

    Args:
        cost: of a step.
        read_ahead: for each request, tokens it may sample before it pauses.
        page_room: for each request, free positions of its last page.
        n_free: free pages; if there are fewer than requests, no request goes beyond its page, since nothing is evicted
            for tokens that are not sampled yet.
        emit_seconds: the longest time between two pieces for a reader.
        max_steps: of a call.
    """
    room = list(page_room)
    base, token = cost.cost()
    step = base + token * len(room)
    most = min(int(emit_seconds / step) if step > 0 else 1, max_steps, *read_ahead)
    return most if n_free >= len(room) else min(most, *room)


# ---- Admission and preemption ---------------------------------------------------------------------------------------


def admits(request: Schedulable, n_running: int, max_running: int, *, blocked: bool) -> bool:
    """Whether a waiting request may start, by its position in the queue.

    Args:
        request: the waiting one.
        n_running, max_running: requests of its model.
        blocked: an earlier request of the same model waits for pages; later ones wait too, so that it does not starve.
    """
    return not blocked and not request.paused and n_running < max_running


def fits(n_needed: int, n_available: int, n_running: int) -> bool:
    """Whether there are pages for a request.

    Args:
        n_needed: pages for its tokens and one more.
        n_available: pages that are free or can be evicted.
        n_running: requests of its model. With none it starts anyway: no more pages will become free, so it either
            succeeds or fails with an error.
    """
    return n_needed <= n_available or n_running == 0


def preempted(running: Sequence[R], request: R, served: Collection[R], holding: Collection[R]) -> R | None:
    """The request that is preempted so that `request` gets pages: the youngest that is not in this step yet.

    Args:
        running: requests of the model, in order of admission.
        request: needs pages.
        served: requests with reserved pages for this step.
        holding: requests with any pages.

    Returns:
        None if there is no other: then `request` itself is preempted, or fails if it runs alone.
    """
    others = [r for r in reversed(running) if r is not request]
    return next((r for r in others if r in holding and r not in served), None)


# ---- Shared prefixes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prefix:
    """The prefix that a running request shares with a waiting one.

    Attributes:
        n_common: length of the common prefix of their tokens.
        n_computed: tokens of the running request whose keys and values are computed.
        prefills: it is still computing its prompt.
    """

    n_common: int
    n_computed: int
    prefills: bool


def shares_prefix(prefix: Prefix, n_have: int) -> bool | None:
    """Whether a waiting request, which has KV for `n_have` tokens, uses the KV of a running one.

    Returns:
        None: it should wait, since the running request is computing at least a page of what it needs. False: there is
        nothing to use, or not yet.
    """
    computing = prefix.prefills and prefix.n_computed < prefix.n_common
    if computing:
        return None if prefix.n_common >= n_have + PAGE_POSITIONS else False
    return prefix.n_common > n_have


def common_length(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> int:
    """Length of the common prefix of two sequences of token ids."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(different.argmax()) if different.any() else n
