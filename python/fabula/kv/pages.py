"""Page accounting: a pool counts who holds each page, a sequence lists the pages its positions lie in.

The tokens are the truth and KV is a cache: a sequence can be truncated to any length or forked at any length, and what
lies behind is computed anew when it is needed. A fork shares every page, so it costs nothing but counting. Positions
are only ever appended; so two holders may share a page that is partly filled, and the first that appends to it goes on
in place as long as nobody has written there before. Only one that finds its next position taken gets a copy.

A text whose tokens see a sliding window gives back the pages behind it: its list of pages has a hole.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fabula import _native
from fabula._native import PAGE_POSITIONS
from fabula.errors import InvalidArgument, OutOfMemory
from fabula.formats.checkpoint import DType
from fabula.kv.prefix import EVERYTHING, PrefixIndex, Window

HOLE = -1  # in place of a page that no token to come sees


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Pages of a pool at one moment.

    Attributes:
        n_pages: in all.
        n_used: held by somebody.
        n_shared: held by more than one.
        n_cached: of those used, held only by what no running request needs: given up when pages run out.
        n_spilled: on disk.
        n_evicted: that were given up for others since the model was loaded.
        page_bytes: bytes of a page.
    """

    n_pages: int
    n_used: int
    n_shared: int
    page_bytes: int
    n_cached: int = 0
    n_spilled: int = 0
    n_evicted: int = 0

    @property
    def used_bytes(self) -> int:
        return self.n_used * self.page_bytes

    @property
    def cached_bytes(self) -> int:
        return self.n_cached * self.page_bytes

    @property
    def spilled_bytes(self) -> int:
        return self.n_spilled * self.page_bytes


class PagePool:
    """A fixed number of pages of `PAGE_POSITIONS` positions each. Thread-safe.

    Args:
        dtypes: of K and V, or of each: F32, F16, BF16, or Q8_0 for bytes with a scale.
        n_pages: pages in all; only touched ones take memory.
        n_layers, n_kv_heads, head_dim: shape of a position's K and V.
        device: GPU they lie on, which takes memory for all at once; None for the CPU.
    """

    def __init__(
        self,
        dtypes: DType | tuple[DType, DType],
        n_pages: int,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        device: _native.Device | None = None,
    ) -> None:
        self.native = _native.PagePool(dtypes, n_pages, n_layers, n_kv_heads, head_dim, device)
        self._free = list(range(n_pages - 1, -1, -1))
        self._holders = [0] * n_pages
        self._filled = [0] * n_pages  # positions of a page that some holder has written
        self.index = PrefixIndex()  # under `lock`
        self.reclaim: Callable[[int], None] | None = None  # asked to set pages free until so many are
        # Re-entrant: the garbage collector may give back a forgotten sequence's pages in the middle of `take`.
        self.lock = threading.RLock()
        _pools.add(self)

    @property
    def n_pages(self) -> int:
        return self.native.n_pages

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        return self.native.page_bytes

    def usage(self) -> PoolUsage:
        """How many pages are held, and how many of them by several."""
        with self.lock:
            used = sum(1 for n in self._holders if n)
            return PoolUsage(self.n_pages, used, sum(1 for n in self._holders if n > 1), self.page_bytes)

    def take(self, n: int) -> list[int]:
        """Takes n pages that nobody holds, all or none.

        Raises:
            OutOfMemory: fewer are free; says how many.
        """
        with self.lock:
            if n > len(self._free) and self.reclaim is not None:
                self.reclaim(n)
            if n > len(self._free):
                raise OutOfMemory(
                    f"the KV cache has {len(self._free)} of {self.n_pages} pages free, {n} are needed; close other "
                    f"generations or load the model with a smaller context"
                )
            pages = [self._free.pop() for _ in range(n)]
            for page in pages:
                self._holders[page], self._filled[page] = 1, 0
            return pages

    def share(self, pages: list[int]) -> None:
        """Counts one more holder of each page; holes count for nothing."""
        with self.lock:
            for page in pages:
                if page != HOLE:
                    self._holders[page] += 1

    def give_back(self, pages: list[int]) -> None:
        """Counts one holder less of each page; a page without any is free."""
        with self.lock:
            for page in pages:
                if page == HOLE:
                    continue
                self._holders[page] -= 1
                if self._holders[page] == 0:
                    self.index.forget(page)
                    self._free.append(page)

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return self._holders[page]

    def name(self, page: int, key: bytes) -> None:
        """Lets others find a full page that the caller holds by the hash of its text."""
        with self.lock:
            self._filled[page] = PAGE_POSITIONS
            self.index.add(key, page)

    def append_to(self, page: int, offset: int, end: int) -> int:
        """Makes positions offset .. end-1 of a page a holder's own to write.

        Args:
            page: that the caller holds, with its own positions 0 .. offset-1.
            offset, end: 0 <= offset < end <= PAGE_POSITIONS.

        Returns:
            The page, or a copy that takes its place in the caller's list, if another holder wrote there before.

        Raises:
            OutOfMemory: a copy is needed and no page is free; nothing was changed.
        """
        with self.lock:
            if self._holders[page] > 1 and self._filled[page] > offset:
                (copy,) = self.take(1)
                self.native.copy(copy, page)
                self.give_back([page])
                page = copy
            self.index.forget(page)  # it will hold something else
            self._filled[page] = end
            return page

    def take_back(self, page: int, end: int) -> None:
        """Of what `append_to` made its holder's own, only positions before `end` were written."""
        with self.lock:
            self._filled[page] = min(self._filled[page], end)

    def check(self, held: list[list[int]]) -> None:
        """Compares the counts with what is really held; for tests.

        Args:
            held: the page lists of every sequence of this pool.

        Raises:
            AssertionError: a count is wrong, or a page is both free and held.
        """
        with self.lock:
            really = [page for pages in held for page in pages if page != HOLE]
            counts = np.bincount(np.array(really, np.int64), minlength=self.n_pages)
            assert counts.tolist() == self._holders, "holders are miscounted"
            assert sorted(self._free) == [page for page in range(self.n_pages) if not counts[page]]
            assert all(counts[page] for page in self.index.pages()), "a free page can be found"

    def close(self) -> None:
        """Frees the memory; may be called twice. No sequence may be used afterwards."""
        self.native.close()


_pools: weakref.WeakSet[PagePool] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child: a lock that another thread held there stays held for ever, and destructors want it."""
    for pool in _pools:
        pool.lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_locks)


class Sequence:
    """The pages of one growing text. Use as a context manager, or call `close()`.

    Args:
        pool: where the pages lie.
        window: what the text's tokens see.

    Attributes:
        pool: as given.
        n_tokens: positions whose K and V were computed; of those no token to come sees, the pages may be gone.
        window: as given.
    """

    def __init__(self, pool: PagePool, window: Window = EVERYTHING) -> None:
        self.pool = pool
        self._pages: list[int] = []
        self._hole = 0  # pages from that of the sinks up to here are given back
        self.window = window
        self.n_tokens = 0

    @classmethod
    def of(cls, pool: PagePool, pages: list[int], window: Window = EVERYTHING) -> Sequence:
        """A sequence of full pages that the caller holds and hands over; holes where nothing is seen."""
        sequence = cls(pool, window)
        sequence._pages, sequence.n_tokens = pages, len(pages) * PAGE_POSITIONS
        sequence._hole = next((i for i in range(len(pages), 0, -1) if pages[i - 1] == HOLE), 0)
        return sequence

    @property
    def pages(self) -> list[int]:
        """Page numbers, that of positions 32 i .. 32 i + 31 at place i; -1 for one that was given back."""
        return list(self._pages)

    def reserve(self, n_tokens: int) -> npt.NDArray[np.int32]:
        """Makes room to append up to `n_tokens` positions in all and returns the page table, int32 [n_pages].

        Raises:
            OutOfMemory: the pool has too few free pages; nothing was changed that anybody could see.
        """
        first, offset = divmod(self.n_tokens, PAGE_POSITIONS)
        needed = -(-n_tokens // PAGE_POSITIONS)
        fresh = self.pool.take(max(0, needed - len(self._pages)))
        try:
            for i in range(first, min(needed, len(self._pages))):
                end = min(n_tokens - i * PAGE_POSITIONS, PAGE_POSITIONS)
                self._pages[i] = self.pool.append_to(self._pages[i], offset if i == first else 0, end)
        except OutOfMemory:
            self.pool.give_back(fresh)
            raise
        for i, page in enumerate(fresh, len(self._pages)):
            self.pool.append_to(page, 0, min(n_tokens - i * PAGE_POSITIONS, PAGE_POSITIONS))
        self._pages += fresh
        return np.asarray(self._pages, np.int32)

    def settle(self) -> None:
        """Lets others append where room was reserved and nothing written."""
        first, offset = divmod(self.n_tokens, PAGE_POSITIONS)
        for i in range(first, len(self._pages)):
            if self._pages[i] != HOLE:
                self.pool.take_back(self._pages[i], offset if i == first else 0)

    def slide(self, n_tokens: int) -> None:
        """Gives back the pages that no token behind the first `n_tokens` sees."""
        first = 1 if self.window.n_sinks else 0
        end = self.window.first_page(n_tokens)
        start = max(first, self._hole)
        if end > start:
            with self.pool.lock:
                self.pool.give_back(self._pages[start:end])
                self._pages[start:end] = [HOLE] * (end - start)
                self._hole = end

    def usable(self, n_tokens: int) -> int:
        """The longest beginning, of `n_tokens` at most, behind which a text can go on: all that it sees is held."""
        n_tokens = min(n_tokens, self.n_tokens)
        if not self._hole or self.window.first_page(n_tokens) >= self._hole:
            return n_tokens
        return min(n_tokens, PAGE_POSITIONS if self.window.n_sinks else 0)

    def fork(self, n_tokens: int | None = None) -> Sequence:
        """Another sequence with the first `n_tokens` positions (None: all) of this one; shares their pages.

        Raises:
            InvalidArgument: `n_tokens` is negative or more than is held, or pages it needs were given back.
        """
        other = Sequence(self.pool, self.window)
        with self.pool.lock:
            n_tokens = self.n_tokens if n_tokens is None else n_tokens
            self._check("fork", n_tokens)
            pages = self._pages[: -(-n_tokens // PAGE_POSITIONS)]
            self.pool.share(pages)
            other._pages, other.n_tokens = pages, n_tokens
            other._hole = min(self._hole, len(pages))
        return other

    def truncate(self, n_tokens: int) -> None:
        """Forgets the positions from `n_tokens` on and gives back pages that hold nothing else.

        Raises:
            InvalidArgument: as `fork`.
        """
        keep = -(-n_tokens // PAGE_POSITIONS)
        with self.pool.lock:
            self._check("truncate", n_tokens)
            self.pool.give_back(self._pages[keep:])
            del self._pages[keep:]
            self.n_tokens, self._hole = n_tokens, min(self._hole, keep)

    def _check(self, verb: str, n_tokens: int) -> None:
        if not 0 <= n_tokens <= self.n_tokens:
            raise InvalidArgument(f"cannot {verb} at {n_tokens} tokens, {self.n_tokens} are held")
        if self.usable(n_tokens) < n_tokens:
            raise InvalidArgument(f"cannot {verb} at {n_tokens} tokens: the window has moved on")

    def close(self) -> None:
        """Gives back every page; may be called twice."""
        self.truncate(0)

    def __del__(self) -> None:
        if hasattr(self, "n_tokens"):
            self.close()

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
