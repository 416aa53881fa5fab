"""Embeddings: texts as vectors, pooled from the hidden states of a model's last layer.

Texts share steps with each other but not with answers, whose steps go first and whose pages too: a text whose K and V
were taken away is begun again, to the same bits.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from fabula.engine.runner import Runner
from fabula.errors import ContextOverflow, EngineError, InvalidArgument
from fabula.kv.pages import Sequence

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]
Pooling = Literal["mean", "last", "first"]
STEP_TOKENS = 256  # of all texts together, at most: more are not computed faster
POLL_S = 0.1  # how often a caller that waits for others asks whether to stop


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Texts as vectors.

    Attributes:
        vectors: float32 [n_texts, hidden_size].
        n_tokens: of each text.
    """

    vectors: F32
    n_tokens: tuple[int, ...]


def checked_texts(texts: Items[str]) -> Items[str]:
    """The texts, if there are some and none is empty.

    Raises:
        InvalidArgument: otherwise; names the first at fault.
    """
    if isinstance(texts, str) or not isinstance(texts, Items) or not texts:
        raise InvalidArgument("texts must be a list of texts, with one at least")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise InvalidArgument(f"texts[{i}] is {text!r:.40}, must be text with a character at least")
    return texts


class _Text:
    """A text on its way to a vector.

    Args:
        tokens: int32 [n_tokens].
        vector: float64 [hidden_size], filled in place; for "mean" with the sum.
        pooling: how.
    """

    def __init__(self, tokens: I32, vector: npt.NDArray[np.float64], pooling: Pooling) -> None:
        self.tokens = tokens
        self._vector, self._pooling = vector, pooling

    def add(self, before: int, states: F32) -> bool:
        """Takes in the hidden states of tokens before, before + 1, ...; True when they end the text."""
        last = before + len(states) == len(self.tokens)
        if self._pooling == "mean":
            if not before:  # also when it was begun again
                self._vector[:] = 0
            for state in states:  # one by one: the sum has one order, however the text was cut
                self._vector += state
        elif self._pooling == "first" and not before:
            self._vector[:] = states[0]
        elif self._pooling == "last" and last:
            self._vector[:] = states[-1]
        return last


class Embedder:
    """Makes vectors with a model's weights, in buffers of its own. May be called by several threads.

    Args:
        runner: of the model.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._most = min(STEP_TOKENS, runner.context)
        self._program = runner.hidden_program(self._most)
        self._lock = threading.Lock()  # held from a text's first step to its last: one at a time is half computed

    def embed(
        self,
        ids: Items[Items[int]],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Embeddings:
        """The vectors of texts given as token ids; settings and errors as `Model.embed`."""
        if pooling not in get_args(Pooling):
            raise InvalidArgument(f"pooling is {pooling!r}, must be one of {', '.join(get_args(Pooling))}")
        tokens = [self._runner.token_ids(text) for text in ids]
        for i, text in enumerate(tokens):
            if len(text) > self._runner.context:
                raise ContextOverflow(
                    f"texts[{i}] has {len(text)} tokens, which do not fit the context of {self._runner.context}",
                    n_tokens=len(text),
                    context=self._runner.context,
                )
        vectors = np.zeros((len(tokens), self._runner.config.hidden_size), np.float64)
        work = deque(_Text(text, vector, pooling) for text, vector in zip(tokens, vectors, strict=True))
        while work:
            self._wait_for_turn(should_stop)
            try:
                self._until_whole(work, should_stop)
            finally:
                self._lock.release()
        if pooling == "mean":
            vectors /= np.array([[len(text)] for text in tokens])
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return Embeddings(vectors.astype(np.float32), tuple(len(text) for text in tokens))

    def _wait_for_turn(self, should_stop: Callable[[], bool]) -> None:
        while not self._lock.acquire(timeout=POLL_S):
            _check(should_stop)

    def _until_whole(self, work: deque[_Text], should_stop: Callable[[], bool]) -> None:
        """Takes steps until some texts are done and none is half done. Whoever waits for its turn comes next."""
        with ExitStack() as held:
            half: Sequence | None = None  # that of the first text, where a step ended within it
            while True:
                _check(should_stop)
                room = min(self._most, self._runner.n_beside())
                shares: list[tuple[Sequence, I32, int]] = []
                for text in work:
                    if not room:
                        break
                    sequence = half or held.enter_context(self._runner.sequence())
                    half = None
                    n = min(room, len(text.tokens) - sequence.n_tokens)
                    shares.append((sequence, text.tokens, n))
                    room -= n
                done = self._runner.run_beside(self._program, shares)
                for (sequence, _, _), (before, states) in zip(shares, done, strict=False):
                    if work[0].add(before, states):
                        work.popleft()
                        sequence.close()
                    else:
                        half = sequence
                if half is None:
                    return


def _check(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise EngineError("the embedding was stopped")
