"""Drafts: guesses of an answer's next tokens, which the model verifies in one step. See `speculation.py`.

A `DraftSource` guesses. `LookupDrafts` takes what came after the same tokens before, in the answer, in its prompt, or
in other branches of its session (`DraftTexts`). `draft_model.py` asks a smaller model. Heads that a model itself has
for this purpose (multi-token prediction) would be a third source.

A draft comes with the chance of each token, as measured: how long it should be is decided from them and from the cost
of a step. Lookup measures for nothing: every sampled token is compared with what it would have drafted, drafted or not.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fabula.engine.ngrams import GAP, MAX_MATCH, NONE, N, NgramIndex

I32 = npt.NDArray[np.int32]

MAX_TREE_TOKENS = 1 << 15  # of one session's other branches
_CONTEXT = 8  # tokens before a text that are indexed with it, so that a match may begin before it


class Draft(NamedTuple):
    """Guesses of the next tokens.

    Attributes:
        tokens: in order; empty for none.
        chances: for each, the chance that it and those before it are sampled; never rising.
    """

    tokens: list[int]
    chances: list[float]


NO_DRAFT = Draft([], [])


class DraftSource(Protocol):
    """Guesses the next tokens of one answer. Called by the scheduler's thread only."""

    def propose(self, history: I32, most: int, n_decoding: int) -> Draft:
        """Guesses what follows a history.

        Args:
            history: int32 [n], prompt and answer so far; extends that of the last call.
            most: tokens to guess at most, 1 or more.
            n_decoding: requests that decode in the next step, this one included: they wait for the guess.
        """

    def verified(self, n_drafted: int, n_accepted: int) -> None:
        """How many of the drafted tokens were sampled. Not called for drafts that did not enter a step."""

    def close(self) -> None:
        """Releases what it holds. The answer has ended, or lost its KV."""


class Rate:
    """The share of hits among the last trials, older ones counting less.

    Args:
        prior: the share before the first trial.
        weight: trials that the prior counts for.
        memory: trials that are remembered, about.
    """

    __slots__ = ("_hits", "_keep", "_prior", "_trials", "_weight")

    def __init__(self, prior: float, weight: float = 4.0, memory: float = 64.0) -> None:
        self._prior, self._weight, self._keep = prior, weight, 1.0 - 1.0 / memory
        self._hits = self._trials = 0.0

    def count(self, hit: bool) -> None:
        """Adds a trial."""
        self._hits = self._hits * self._keep + hit
        self._trials = self._trials * self._keep + 1.0

    @property
    def value(self) -> float:
        return (self._hits + self._weight * self._prior) / (self._trials + self._weight)


# Chances that a drafted token is right, by the number of tokens before it that match: priors, until they are measured.
# The first is that of the token after one that did not match: a word was replaced, and the text goes on.
_LENGTHS = (1, N, N + 2, 8, 12, 18, 26, MAX_MATCH)  # the first number of each further class
_PRIORS = (0.4, 0.4, 0.4, 0.5, 0.65, 0.75, 0.8, 0.85, 0.9)
_CLASS_OF = tuple(sum(length >= first for first in _LENGTHS) for length in range(MAX_MATCH + 1))


class Acceptance:
    """How often lookup is right, by the length of the match; of one session, or of one answer."""

    def __init__(self) -> None:
        self._rates = [Rate(prior) for prior in _PRIORS]

    def count(self, length: int, hit: bool) -> None:
        """A match of so many tokens was right about the next token, or not."""
        self._rates[_CLASS_OF[min(length, MAX_MATCH)]].count(hit)

    def chances(self, length: int, n: int) -> list[float]:
        """For each of n tokens after a match of so many, the chance that it and those before it are right."""
        chance, found = 1.0, []
        for i in range(length, length + n):
            chance *= self._rates[_CLASS_OF[min(i, MAX_MATCH)]].value
            found.append(chance)
        return found


class DraftTexts:
    """The texts of a session's tree, for lookup, and what was measured with them. Thread-safe: sessions add texts while
    the scheduler looks for matches.

    Attributes:
        lock: held while `index` is used.
        index: the texts.
        acceptance: of all answers of the session.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.index = NgramIndex(MAX_TREE_TOKENS)
        self.acceptance = Acceptance()
        self._keys: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, key: str, before: Sequence[int], ids: Sequence[int]) -> None:
        """Adds a text under a key, unless it was added before.

        Args:
            key: of the text.
            before: the tokens it follows; the last ones are enough.
            ids: its own tokens.
        """
        with self.lock:
            if key in self._keys:
                return
            self._keys.add(key)
            self.index.begin()
            self.index.extend([*before[-_CONTEXT:], *ids])

    def forget(self) -> None:
        """Removes all texts."""
        with self.lock:
            self._keys.clear()
            self.index = NgramIndex(MAX_TREE_TOKENS)


class _Match:
    """Where an index has what comes next.

    Attributes:
        index: of the text.
        position: of the next token.
        length: tokens before it that match; 0 after one that did not.
    """

    __slots__ = ("index", "length", "position")

    def __init__(self, index: NgramIndex, position: int, length: int) -> None:
        self.index, self.position, self.length = index, position, length


class LookupDrafts:
    """Drafts by prompt lookup: what came after the longest match of the answer's end.

    A match is followed token by token as long as it is right. Where it is wrong, the text may go on behind one replaced
    token, which is assumed until a longer match is found.

    Args:
        texts: other texts of the session; None for the answer and its prompt alone.
    """

    def __init__(self, texts: DraftTexts | None = None) -> None:
        self._texts = texts or DraftTexts()
        self._own = NgramIndex()
        self._n_seen = 0
        self._match: _Match | None = None

    def propose(self, history: I32, most: int, n_decoding: int = 1) -> Draft:
        del n_decoding  # it costs nothing
        self.observe(history)
        match = self._match
        if match is None:
            return NO_DRAFT
        with self._texts.lock:
            tokens = match.index.tokens(match.position, most)
        period = self._own.end - match.position
        if match.index is self._own and len(tokens) == period:  # what repeats without a pause goes on repeating
            tokens = [tokens[i % period] for i in range(most)]
        return Draft(tokens, self._texts.acceptance.chances(match.length, len(tokens))) if tokens else NO_DRAFT

    def verified(self, n_drafted: int, n_accepted: int) -> None:
        """Nothing: `observe` compares every token."""

    def close(self) -> None:
        """Frees the index; `observe` builds it again."""
        self._own, self._n_seen, self._match = NgramIndex(), 0, None

    def observe(self, history: I32) -> None:
        """Follows the match over the tokens that are new since the last call, and looks for a longer one."""
        new = history[self._n_seen :].tolist()
        if not new:
            return
        if not self._n_seen:  # the prompt: there is nothing to follow yet
            self._own.extend(history)
            new = []
        self._n_seen = len(history)
        with self._texts.lock:
            for i, token in enumerate(new, len(history) - len(new)):
                self._follow(token)
                self._own.append(token)
                if self._match is None or self._match.length < N:
                    self._look(history[max(0, i + 1 - MAX_MATCH) : i + 1].tolist())
            if not new:
                self._look(history[-MAX_MATCH:].tolist())

    def _follow(self, token: int) -> None:
        """Moves the match behind a sampled token."""
        match = self._match
        if match is None:
            return
        expected = match.index.token(match.position)
        if expected == GAP:  # the text ended
            self._match = None
            return
        hit = expected == token
        self._texts.acceptance.count(match.length, hit)
        match.position += 1
        if hit:
            match.length += 1
        elif match.length == 0:  # wrong twice
            self._match = None
        else:
            match.length = 0

    def _look(self, tail: list[int]) -> None:
        """Takes the longest match of the text's end, if there is one."""
        longest = max(N - 1, self._match.length if self._match is not None else 0)
        for index in (self._own, self._texts.index):
            position, length = index.find(tail)
            if position != NONE and length > longest:
                self._match, longest = _Match(index, position, length), length
