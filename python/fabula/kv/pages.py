"""Page accounting: a pool hands out page numbers, a sequence lists the pages its positions lie in.

The tokens are the truth and KV is a cache: a sequence can be truncated to any length, and what lies behind is
computed anew when it is needed. Pages are given back when the sequence is truncated below them or closed.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from fabula import _native
from fabula._native import PAGE_POSITIONS
from fabula.errors import InvalidArgument, OutOfMemory
from fabula.formats.checkpoint import DType


class PagePool:
    """A fixed number of pages of `PAGE_POSITIONS` positions each. Thread-safe.

    Args:
        dtype: F32 or F16.
        n_pages: pages in all; only touched ones take memory.
        n_layers, n_kv_heads, head_dim: shape of a position's K and V.
    """

    def __init__(self, dtype: DType, n_pages: int, n_layers: int, n_kv_heads: int, head_dim: int) -> None:
        self.native = _native.PagePool(dtype, n_pages, n_layers, n_kv_heads, head_dim)
        self._free = list(range(n_pages - 1, -1, -1))
        # Re-entrant: the garbage collector may give back a forgotten sequence's pages in the middle of `take`.
        self._lock = threading.RLock()

    @property
    def n_pages(self) -> int:
        return self.native.n_pages

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        return self.native.page_bytes

    def take(self, n: int) -> list[int]:
        """Takes n pages, all or none.

        Raises:
            OutOfMemory: fewer are free; says how many.
        """
        with self._lock:
            if n > len(self._free):
                raise OutOfMemory(
                    f"the KV cache has {len(self._free)} of {self.n_pages} pages free, {n} are needed; close other "
                    f"generations or load the model with a smaller context"
                )
            return [self._free.pop() for _ in range(n)]

    def give_back(self, pages: list[int]) -> None:
        """Returns pages that `take` handed out."""
        with self._lock:
            self._free.extend(pages)

    def close(self) -> None:
        """Frees the memory; may be called twice. No sequence may be used afterwards."""
        self.native.close()


class Sequence:
    """The pages of one growing text. Use as a context manager, or call `close()`.

    Attributes:
        n_tokens: positions whose K and V are held.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: list[int] = []
        self.n_tokens = 0

    def reserve(self, n_tokens: int) -> npt.NDArray[np.int32]:
        """Makes room for `n_tokens` positions in all and returns the page table, int32 [n_pages].

        Raises:
            OutOfMemory: the pool has too few free pages; nothing was taken.
        """
        missing = -(-n_tokens // PAGE_POSITIONS) - len(self._pages)
        if missing > 0:
            self._pages += self._pool.take(missing)
        return np.asarray(self._pages, np.int32)

    def truncate(self, n_tokens: int) -> None:
        """Forgets the positions from `n_tokens` on and gives back pages that hold nothing else.

        Raises:
            InvalidArgument: `n_tokens` is negative or more than is held.
        """
        if not 0 <= n_tokens <= self.n_tokens:
            raise InvalidArgument(f"cannot truncate to {n_tokens} tokens, {self.n_tokens} are held")
        keep = -(-n_tokens // PAGE_POSITIONS)
        self._pool.give_back(self._pages[keep:])
        del self._pages[keep:]
        self.n_tokens = n_tokens

    def close(self) -> None:
        """Gives back every page; may be called twice."""
        self.truncate(0)

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
