"""Perplexity of a text: how surprised a model is by each next token, the usual check of a precision.

The text's tokens are cut into windows that do not overlap; each is read from an empty cache, behind the start token
where the model's tokenizer puts one. perplexity = exp(mean of -ln p(token)), in float64, over every token that has
one before it in its window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fabula.bench.status import Status, silent
from fabula.errors import InvalidArgument
from fabula.model import Model

DEFAULT_WINDOW = 512
_MAX_FILE_BYTES = 1 << 30
_ROWS = 64  # rows of logits widened to float64 at a time


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What was measured.

    Attributes:
        n_tokens: tokens that were predicted.
        n_windows: windows that were read, the last perhaps shorter.
    """

    perplexity: float
    n_tokens: int
    n_windows: int
    window: int
    weights: str
    kv: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_text(path: Path) -> str:
    """The file's text.

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
        raise InvalidArgument(f"{path}: is not a text in UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise InvalidArgument(f"{path}: is empty")
    return text


def perplexity(model: Model, text: str, *, window: int = DEFAULT_WINDOW, status: Status = silent) -> Perplexity:
    """Measures the perplexity of a text.

    Args:
        model: a loaded model.
        text: at least long enough for one prediction.
        window: tokens of a window, the start token not counted.
        status: told how far it is.

    Raises:
        InvalidArgument: the text is too short, or the window out of range.
    """
    start = [model.tokenizer.bos_id] if model.tokenizer.add_bos and model.tokenizer.bos_id is not None else []
    highest = model.context - len(start)
    if not 2 <= window <= highest:
        raise InvalidArgument(f"window is {window}, must be 2 .. {highest}, what the model's context holds")
    ids = model.tokenizer.encode(text, add_bos=False)
    windows = [w for i in range(0, len(ids), window) if len(w := start + ids[i : i + window]) > 1]
    if not windows:
        raise InvalidArgument(f"the text has {len(ids)} tokens, too few to predict one")
    losses = []
    for i, tokens in enumerate(windows):
        status(f"{model.weights}: window {i + 1} of {len(windows)}")
        losses += list(_losses(model.logits(tokens), np.asarray(tokens[1:])))
    total = math.fsum(losses)
    n_tokens = sum(len(tokens) - 1 for tokens in windows)
    return Perplexity(math.exp(total / n_tokens), n_tokens, len(windows), window, model.weights, model.kv)


def _losses(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]) -> Iterator[float]:
    """Sums of -ln p(target), some rows at a time; the last row of `logits` predicts what nobody knows."""
    for first in range(0, len(targets), _ROWS):
        wanted = targets[first : first + _ROWS]
        rows = logits[first : first + len(wanted)].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        chosen = rows[np.arange(len(wanted)), wanted]
        yield float((np.log(np.exp(rows).sum(axis=1)) - chosen).sum())
