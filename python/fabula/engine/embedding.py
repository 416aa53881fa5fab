"""Embeddings: texts as vectors, pooled from the hidden states of a model's last layer.

Texts share batches with each other, not with answers: other requests run between two steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as Items
from contextlib import ExitStack
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from fabula.engine.runner import Runner
from fabula.errors import ContextOverflow, EngineError, InvalidArgument, OutOfMemory
from fabula.kv.pages import Sequence
from fabula.lean_dataclasses import dataclass

F32 = npt.NDArray[np.float32]
Pooling = Literal["mean", "last", "first"]
STEP_TOKENS = 256  # of all texts in a step: few, so that other requests hardly wait


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Texts as vectors.

    Attributes:
        vectors: float32 [n_texts, hidden_size].
        n_tokens: of each text.
    """

    vectors: F32
    n_tokens: tuple[int, ...]


def checked_texts(texts: Items[str | Items[int]]) -> Items[str | Items[int]]:
    """Checks that there are texts, as text or as token ids, and none is empty.

    Raises:
        InvalidArgument: names the first text at fault.
    """
    if isinstance(texts, str) or not isinstance(texts, Items) or not texts:
        raise InvalidArgument("texts must be a list of at least one string")
    for i, text in enumerate(texts):
        if not isinstance(text, str | list | tuple) or not text:
            raise InvalidArgument(f"texts[{i}] is {text!r:.40}, must be a string that is not empty, or token ids")
    return texts


class Embedder:
    """Computes vectors with a model's weights and its own buffers. One caller at a time; others wait.

    Args:
        runner: of the model.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._step_tokens = min(STEP_TOKENS, runner.context)
        self._program = runner.hidden_program(self._step_tokens)
        self._lock = threading.Lock()

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
                    f"texts[{i}] has {len(text)} tokens, the context length is {self._runner.context}",
                    n_tokens=len(text),
                    context=self._runner.context,
                )
        vectors = np.zeros((len(tokens), self._runner.config.hidden_size), np.float64)
        with self._lock, ExitStack() as held:
            work = [(i, text) for i, text in enumerate(tokens)]
            open_sequence: Sequence | None = None  # of a text that continues from the previous step
            while work:
                if should_stop():
                    raise EngineError("the embedding was stopped")
                used: list[Sequence] = []
                parts, rows, room = [], [], self._step_tokens
                while work and room:
                    i, text = work[0]
                    sequence = open_sequence or held.enter_context(self._runner.sequence())
                    share, rest = text[:room], text[room:]
                    try:
                        parts.append(self._runner.prepare(sequence, share))
                    except OutOfMemory:
                        if not parts:
                            raise
                        open_sequence = sequence  # with the next step, when others have ended
                        break
                    rows.append((i, len(share), sequence.n_tokens == 0, not len(rest)))
                    room -= len(share)
                    if len(rest):
                        work[0], open_sequence = (i, rest), sequence
                    else:
                        work.pop(0)
                        open_sequence = None
                        used.append(sequence)
                n_rows = sum(n for _, n, _, _ in rows)
                states = self._runner.run(parts, np.arange(n_rows), self._program)
                _pool(vectors, states, rows, pooling)
                for sequence in used:
                    sequence.close()
        if pooling == "mean":
            vectors /= np.array([[len(text)] for text in tokens])
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return Embeddings(vectors.astype(np.float32), tuple(len(text) for text in tokens))


def _pool(vectors: npt.NDArray[np.float64], states: F32, rows: list[tuple[int, int, bool, bool]], pooling: str) -> None:
    """Adds a step's hidden states to the texts' vectors, token by token: the order of the sum does not depend on how a
    text was split.

    Args:
        rows: for each part, in order: its text, its tokens, whether it has the first and the last of the text.
    """
    start = 0
    for i, n, has_first, has_last in rows:
        share = states[start : start + n]
        start += n
        if pooling == "mean":
            for state in share:
                vectors[i] += state
        elif pooling == "first" and has_first:
            vectors[i] = share[0]
        elif pooling == "last" and has_last:
            vectors[i] = share[-1]
