"""Requests for tests of the scheduler, and a look at each of its steps."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from fabula import Model, Piece, SamplingParams
from fabula.engine import generation as generation_module
from fabula.engine import scheduler as scheduler_module
from fabula.engine.generation import Generation
from fabula.engine.runner import Part
from fabula.engine.scheduler import Load
from fabula.kv.prefix import EVERYTHING, Window
from waiting import wait_until

HOT = SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True, n_logprobs=2)


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context that is not read in one step."""
    return tiny.write_model(tmp_path_factory.mktemp("long") / "m", config={"max_position_embeddings": 4096})


def ids_of(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(4, tiny.VOCAB, n).tolist()


@dataclass(frozen=True)
class Wish:
    """A request."""

    ids: list[int]
    params: SamplingParams
    window: Window = EVERYTHING
    salt: str = ""

    def begin(self, model: Model, timeout: float | None = None) -> Generation:
        return Generation(
            model._engine, self.ids, self.params, window=self.window, salt=self.salt, timeout=timeout, continues=True
        )

    def alone(self, model: Model) -> list[Piece]:
        model.clear_cache()
        pieces = list(self.begin(model))
        model.clear_cache()
        return pieces


def wishes(n: int, seed: int, longest: int = 150) -> list[Wish]:
    """Requests of all kinds: long and short, greedy and not, alike at the beginning, with windows and salts."""
    rng, common = random.Random(seed), ids_of(longest, seed)
    found = []
    for i in range(n):
        ids = [*common[: rng.randrange(longest)], *ids_of(rng.randrange(1, 40), i)]
        params = replace(HOT, temperature=rng.choice([0.0, 0.7, 1.5]), seed=i, max_tokens=rng.randrange(1, 40))
        params = replace(params, top_k=rng.choice([0, 5]), repetition_penalty=rng.choice([1.0, 1.2]))
        found.append(Wish(ids, params, rng.choice([EVERYTHING, Window(40, 4)]), rng.choice(["", "a"])))
    return found


class Steps:
    """What each step of a model holds, and a gate before them. Every token is a step of its own.

    Attributes:
        held: of each step, the tokens of each request's sequence.
    """

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[dict[int, int]] = []
        self.before: Callable[[list[Part]], None] = lambda _: None
        self._inside, self._gate = threading.Event(), threading.Event()
        self._gate.set()
        run = model._runner.run

        def watched(parts: list[Part], outputs: Any) -> Any:
            self._inside.set()
            self._gate.wait()
            self.held.append({id(part.sequence): part.n_tokens for part in parts})
            self.before(parts)
            return run(parts, outputs)

        monkeypatch.setattr(model._runner, "run", watched)
        monkeypatch.setattr(scheduler_module, "MAX_STEPS", 1)

    @property
    def n_computed(self) -> int:
        return sum(sum(step.values()) for step in self.held)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """No step gets anywhere; the first that tries is waited for by `reached`."""
        self._inside.clear()
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()

    def reached(self) -> None:
        """Waits until a step waits at the gate."""
        self._inside.wait()

    @contextmanager
    def all_at_once(self, model: Model) -> Iterator[None]:
        """What is begun in the block comes to the scheduler at one time."""
        with self.stopped():
            first = model.generate([7], SamplingParams(max_tokens=1))
            self.reached()
            yield
            self.held.clear()
        first.text()
        self.held[:] = self.held[1:]


@pytest.fixture
def steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(model, monkeypatch)


class Clock:
    """Time as the engine's deadlines see it: it passes when a test says so.

    Attributes:
        now: seconds.
    """

    perf_counter = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (generation_module, scheduler_module):
        monkeypatch.setattr(module, "time", made)
    return made


def settled(model: Model) -> bool:
    gc.collect()
    wait_until(lambda: model._engine.scheduler.load == Load(0, 0), "requests do not come to rest")
    model.clear_cache()
    return model._runner.pool.n_free == model._runner.pool.n_pages
