"""Perplexity of a text, the usual check of a precision, and the divergence from a reference model.

The text's tokens are split into windows that do not overlap. Each starts with an empty cache and the start token, if
the tokenizer adds one. perplexity = exp(mean of -ln p(token)), in float64, over all tokens with a predecessor in their
window. The Kullback-Leibler divergence, sum of r (ln r - ln p) over the vocabulary in nats, is taken at the same
tokens; r are the reference's probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fabula.bench.status import Status, silent
from fabula.errors import InvalidArgument
from fabula.model import Model

DEFAULT_WINDOW = 512
_MAX_FILE_BYTES = 1 << 30
F32 = npt.NDArray[np.float32]

_ROWS = 64  # rows of logits widened to float64 at a time


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Result of `perplexity`.

    Attributes:
        n_tokens: number of predicted tokens.
        n_windows: number of windows; the last may be shorter.
    """

    perplexity: float
    n_tokens: int
    n_windows: int
    window: int
    weights: str
    kv: str


@dataclass(slots=True)
class Tally:
    """Sums over windows, in float64.

    Attributes:
        losses: -ln p of each token, in chunks. divergences: sums of chunks.
        divergence_max: largest divergence of one token.
        n_same: number of tokens with the same most likely successor as the reference.
    """

    n_tokens: int = 0
    losses: list[npt.NDArray[np.float64]] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    divergence_max: float = 0.0
    n_same: int = 0

    def add(self, logits: F32, targets: npt.NDArray[np.int64], reference: F32 | None = None) -> None:
        """Adds a window. Row i of `logits`, and of `reference`, predicts target i."""
        for first in range(0, len(targets), _ROWS):
            wanted = targets[first : first + _ROWS]
            part = slice(first, first + len(wanted))
            log_p = _log_softmax(logits[part])
            self.losses.append(-log_p[np.arange(len(wanted)), wanted])
            if reference is None:
                continue
            log_r = _log_softmax(reference[part])
            divergences = np.maximum((np.exp(log_r) * (log_r - log_p)).sum(axis=1), 0.0)  # rounding may give < 0
            self.divergences.append(float(divergences.sum()))
            self.divergence_max = max(self.divergence_max, float(divergences.max()))
            self.n_same += int((logits[part].argmax(axis=1) == reference[part].argmax(axis=1)).sum())
        self.n_tokens += len(targets)

    @property
    def perplexity(self) -> float:
        return math.exp(math.fsum(np.concatenate(self.losses)) / self.n_tokens)

    def error_to(self, other: Tally) -> float | None:
        """Standard error of the relative difference of two perplexities, from the paired differences of the tokens;
        None for a single token."""
        differences = np.concatenate(self.losses) - np.concatenate(other.losses)
        return float(differences.std(ddof=1)) / math.sqrt(self.n_tokens) if self.n_tokens > 1 else None

    @property
    def divergence_mean(self) -> float:
        return math.fsum(self.divergences) / self.n_tokens


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
        InvalidArgument: it is missing, empty, too large or not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise InvalidArgument(f"{path}: has {size} bytes, at most {_MAX_FILE_BYTES} are read")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path}: is not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise InvalidArgument(f"{path}: is empty")
    return text


def perplexity(model: Model, text: str, *, window: int = DEFAULT_WINDOW, status: Status = silent) -> Perplexity:
    """Measures the perplexity of a text.

    Args:
        model: a loaded model.
        text: long enough for at least one prediction.
        window: tokens per window, without the start token.
        status: callback for progress.

    Raises:
        InvalidArgument: the text is too short, or the window out of range.
    """
    windows = windows_of(model, text, window)
    tally = Tally()
    for i, tokens in enumerate(windows):
        status(f"{model.weights}: window {i + 1} of {len(windows)}")
        tally.add(model.logits(tokens)[:-1], np.asarray(tokens[1:]))
    return Perplexity(tally.perplexity, tally.n_tokens, len(windows), window, model.weights, model.kv)


def windows_of(model: Model, text: str, window: int) -> list[list[int]]:
    """Splits a text into windows of ids, each with something to predict.

    Raises:
        InvalidArgument: the text is too short, or the window out of range.
    """
    start = [model.tokenizer.bos_id] if model.tokenizer.add_bos and model.tokenizer.bos_id is not None else []
    highest = model.context - len(start)
    if not 2 <= window <= highest:
        raise InvalidArgument(f"window is {window}, must be 2 .. {highest}, by the model's context")
    ids = model.tokenizer.encode(text, add_bos=False)
    windows = [w for i in range(0, len(ids), window) if len(w := start + ids[i : i + window]) > 1]
    if not windows:
        raise InvalidArgument(f"the text has {len(ids)} tokens, too few to predict one")
    return windows


def _log_softmax(logits: F32) -> npt.NDArray[np.float64]:
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return rows
