"""Speculation for tests: drafts that know the answer, more or less, and steps that take all of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from fabula import Model
from fabula.engine import policy, speculation
from fabula.engine.drafts import Draft
from fabula.engine.step_cost import StepCost


@contextmanager
def without(model: Model) -> Iterator[None]:
    """The model decodes one token a step."""
    before = model._engine
    model._engine = replace(before, speculation="off")
    try:
        yield
    finally:
        model._engine = before


class Guesses:
    """Stands in for lookup: drafts of answers that are known, with wrong tokens among them.

    Attributes:
        texts: prompts with their answers.
        right: share of the drafted tokens that are.
        n_computed, n_right: draft tokens that were verified, and those of them that were sampled.
    """

    texts: Sequence[Sequence[int]] = ()
    right = 0.8
    vocab_size = 0
    rng = random.Random(0)
    n_computed = n_right = 0

    def __init__(self, texts: Any = None) -> None:
        del texts

    def observe(self, history: Any) -> None:
        del history

    def propose(self, history: Any, most: int, n_decoding: int = 1) -> Draft:
        del n_decoding
        known = history.tolist()
        after = next((list(text[len(known) :]) for text in self.texts if list(text[: len(known)]) == known), [])
        after += [self.rng.randrange(self.vocab_size) for _ in range(most)]
        tokens = [t if self.rng.random() < self.right else self.rng.randrange(self.vocab_size) for t in after[:most]]
        return Draft(tokens, [1.0] * len(tokens))

    @classmethod
    def verified(cls, n_drafted: int, n_accepted: int) -> None:
        cls.n_computed += n_drafted
        cls.n_right += n_accepted

    def close(self) -> None: ...


def guess(
    monkeypatch: pytest.MonkeyPatch, model: Model, texts: Sequence[Sequence[int]], seed: int, right: float = 0.8
) -> type[Guesses]:
    """Drafts are guesses at these texts, and every step takes as many of them as chance has it."""
    attributes = {"texts": texts, "right": right, "vocab_size": model.config.vocab_size, "rng": random.Random(seed)}
    guesses = type("SeededGuesses", (Guesses,), attributes)
    monkeypatch.setattr(speculation, "LookupDrafts", guesses)

    def some(cost: StepCost, chances: Sequence[Sequence[float]], most: int) -> list[int]:
        del cost
        counts = []
        for row in chances:
            counts.append(min(guesses.rng.randint(0, len(row)), most - sum(counts)))
        return counts

    monkeypatch.setattr(policy, "draft_rows", some)
    return guesses


def cheap_rows(monkeypatch: pytest.MonkeyPatch, row: float = 0.1) -> None:
    """A step of one row takes a second, and each more row `row` seconds; whatever the machine does."""
    monkeypatch.setattr(StepCost, "seconds", lambda _, n: 1.0 + row * (n - 1))
