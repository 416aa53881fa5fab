"""A tensor of a file to be written, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the file: its canonical sources, in order, and their rows (None: all, as they are).

    Attributes:
        needed: whether a model without it is incomplete.
        n_heads: rows of the result where a vector becomes a matrix of one row for each head; 0 for none.
        stacked: whether the result has one more dimension, that of the sources.
        shape: of the result, where the sources do not say it.
        columns: in order; None for all, as they are.
    """

    name: str
    sources: tuple[str, ...]
    rows: Rows | None = None
    needed: bool = True
    n_heads: int = 0
    stacked: bool = False
    shape: tuple[int, ...] = ()
    columns: Rows | None = None
