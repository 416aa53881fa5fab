"""Reference counts of KV pages, and how many pages are used, shared and cached; kept up to date at each change."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class References:
    """Counts the references to one part of each page.

    Attributes:
        holders: references to each page;  retained: of them, those of retained sequences.
        n_used, n_shared, n_cached: pages with a reference, with several, and with those of retained sequences only.
    """

    def __init__(self, n_pages: int) -> None:
        self.holders, self.retained = [0] * n_pages, [0] * n_pages
        self.n_used = self.n_shared = self.n_cached = 0

    def count(self, page: int, n: int, n_retained: int) -> int:
        """Adds to a page's references, and to those of retained sequences; returns the references it has then."""
        old, old_retained = self.holders[page], self.retained[page]
        new, new_retained = old + n, old_retained + n_retained
        self.n_used += (new > 0) - (old > 0)
        self.n_shared += (new > 1) - (old > 1)
        self.n_cached += (0 < new == new_retained) - (0 < old == old_retained)
        self.holders[page], self.retained[page] = new, new_retained
        return new

    def check(self, counts: npt.NDArray[np.int64]) -> None:
        """Raises AssertionError unless these are the references to each page."""
        assert counts.tolist() == self.holders, "references are miscounted"
        assert all(0 <= few <= n for few, n in zip(self.retained, self.holders, strict=True))
        assert self.n_used == sum(n > 0 for n in self.holders)
        assert self.n_shared == sum(n > 1 for n in self.holders)
        assert self.n_cached == sum(0 < n == few for few, n in zip(self.retained, self.holders, strict=True))
