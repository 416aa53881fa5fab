"""Timing of functions: repeated calls, and interleaved calls, so that a slow moment affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fabula.errors import InvalidArgument

_T = TypeVar("_T")

Clock = Callable[[], float]

MAX_REPEATS = 100_000


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of `n` calls.

    Attributes:
        mean, median: in seconds. low, high: fastest and slowest call.
        n: number of measured calls.
    """

    mean: float
    median: float
    n: int
    low: float = field(default=0.0, compare=False)
    high: float = field(default=0.0, compare=False)

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        return cls(statistics.fmean(seconds), statistics.median(seconds), len(seconds), min(seconds), max(seconds))


def measure(
    function: Callable[[], object],
    *,
    warmup: int = 1,
    repeats: int = 5,
    min_seconds: float = 0.0,
    clock: Clock = time.perf_counter,
) -> Times:
    """Times a function call by call.

    Args:
        function: called without arguments.
        warmup: uncounted calls before.
        repeats: minimal number of counted calls.
        min_seconds: minimal total time of counted calls (at most 100,000 calls).
        clock: returns seconds.
    """
    _check_repeats("repeats", repeats)
    for _ in range(warmup):
        function()
    seconds: list[float] = []
    while len(seconds) < repeats or (sum(seconds) < min_seconds and len(seconds) < MAX_REPEATS):
        seconds.append(_time(function, clock))
    return Times.of(seconds)


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[str, Times]:
    """Times functions in turns: each once a round; the order rotates every round."""
    _check_repeats("rounds", rounds)
    for function in functions.values():
        for _ in range(warmup):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for name in turns(list(functions), rounds):
        seconds[name].append(_time(functions[name], clock))
    return {name: Times.of(values) for name, values in seconds.items()}


def turns(items: Sequence[_T], rounds: int) -> Iterator[_T]:
    """Each item once a round; the order rotates every round."""
    for r in range(rounds):
        first = r % len(items)
        yield from items[first:]
        yield from items[:first]


def _time(function: Callable[[], object], clock: Clock) -> float:
    start = clock()
    function()
    return clock() - start


def _check_repeats(name: str, value: int) -> None:
    if not 1 <= value <= MAX_REPEATS:
        raise InvalidArgument(f"{name} is {value}, must be 1 .. {MAX_REPEATS}")
