"""KV pages: a pool with a reference count for each page, and sequences, each with its page table.

The tokens are the truth and KV is a cache: a sequence can be truncated or forked at any length, and what is missing is
recomputed when it is needed. A fork shares every page and costs only counting. Positions are only ever appended. So two
sequences may share a partly filled page, and the first that appends writes in place; one that finds its next position
already written gets a copy of the page (copy on write).

A sequence with a sliding window releases the pages before the window: its page table has a hole.

All arithmetic of positions and pages is here: `pages_for`, `Sequence.pages_needed`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fabula import _native
from fabula._native import PAGE_POSITIONS
from fabula.errors import InvalidArgument, OutOfMemory
from fabula.formats.checkpoint import DType
from fabula.kv.prefix import EVERYTHING, PrefixIndex, Window

HOLE = -1  # in a page table, in place of a page that no later token sees


def pages_for(n_tokens: int) -> int:
    """Pages that hold so many positions."""
    return -(-n_tokens // PAGE_POSITIONS)


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Pages of a pool at one moment.

    Attributes:
        n_pages: in all.
        n_used: with a reference.
        n_shared: with more than one.
        n_cached: of those used, referenced only by retained sequences: evicted when pages run out.
        n_spilled: on disk, or queued to be written there.
        n_evicted: since the model was loaded.
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
        dtypes: of keys and values, or of each: F32, F16, BF16, or Q8_0 for bytes with a scale.
        n_pages: pages in all; only touched ones take memory.
        layers: what a page holds of each layer.
        device: GPU they lie on, which takes memory for all at once; None for the CPU.
    """

    def __init__(
        self,
        dtypes: DType | tuple[DType, DType],
        n_pages: int,
        layers: Iterable[_native.KvLayer],
        device: _native.Device | None = None,
    ) -> None:
        self.native = _native.PagePool(dtypes, n_pages, tuple(layers), device)
        self._free = list(range(n_pages - 1, -1, -1))
        self._holders = [0] * n_pages  # references
        self._retained = [0] * n_pages  # of them, those of retained sequences
        self._n_shared = self._n_cached = 0  # pages with several references; pages with retained references only
        self._filled = [0] * n_pages  # positions of a page that were written through any reference
        self.index = PrefixIndex()  # under `lock`
        self.reclaim: Callable[[int], None] | None = None  # evicts until so many pages are free
        # Held for counting and copying in memory, never over disk I/O or a step.
        self.lock = threading.RLock()
        self._closed = False
        self._abandoned: deque[tuple[list[int], bool]] = deque()  # of collected sequences: pages, retained
        _pools.add(self)

    @property
    def n_pages(self) -> int:
        return self.native.n_pages

    @property
    def n_free(self) -> int:
        self._release_abandoned()
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        return self.native.page_bytes

    def usage(self) -> PoolUsage:
        """Pages in use, shared and cached. Reads counters and waits for no lock."""
        self._release_abandoned()
        n_used = self.n_pages - len(self._free)
        return PoolUsage(self.n_pages, n_used, self._n_shared, self.page_bytes, min(self._n_cached, n_used))

    def n_available(self) -> int:
        """Pages that are free or can be evicted."""
        return self.n_free + self._n_cached

    def abandon(self, pages: list[int], retained: bool) -> None:
        """`give_back` for destructors. The garbage collector runs them at any moment, in a thread that may hold any
        lock, so this waits for none: if another thread has the pool's lock, a later call releases the pages."""
        self._abandoned.append((pages, retained))
        self._release_abandoned()

    def _release_abandoned(self) -> None:
        while self._abandoned and self.lock.acquire(blocking=False):
            try:
                while self._abandoned:
                    pages, retained = self._abandoned.popleft()
                    if retained:
                        self.retain(pages, -1)
                    self.give_back(pages)
            finally:
                self.lock.release()

    def _count(self, page: int, n: int, n_retained: int) -> None:
        """Adds to a page's references, and to those of retained sequences. The caller holds the lock."""
        old, old_retained = self._holders[page], self._retained[page]
        new, new_retained = old + n, old_retained + n_retained
        self._n_shared += (new > 1) - (old > 1)
        self._n_cached += (0 < new == new_retained) - (0 < old == old_retained)
        self._holders[page], self._retained[page] = new, new_retained

    def take(self, n: int) -> list[int]:
        """Allocates n free pages, all or none, each with one reference.

        Raises:
            OutOfMemory: fewer are free, also after evicting; says how many.
            InvalidArgument: the model was closed.
        """
        with self.lock:
            self._check_open()
            self._release_abandoned()
            if n > len(self._free) and self.reclaim is not None:
                self.reclaim(n)
            if n > len(self._free):
                raise OutOfMemory(
                    f"the KV cache has {len(self._free)} of {self.n_pages} pages free, {n} are needed; close other "
                    f"generations or load the model with a smaller context"
                )
            pages = [self._free.pop() for _ in range(n)]
            for page in pages:
                self._count(page, 1, 0)
                self._filled[page] = 0
            return pages

    def read(self, page: int) -> npt.NDArray[np.uint8]:
        """A copy of a page's bytes, uint8 [page_bytes].

        Raises:
            InvalidArgument: the model was closed.
        """
        with self.lock:  # or another thread frees the memory meanwhile
            self._check_open()
            return self.native.read(page)

    def write(self, page: int, data: npt.NDArray[np.uint8]) -> None:
        """Sets a page's bytes, uint8 [page_bytes].

        Raises:
            InvalidArgument: the model was closed.
        """
        with self.lock:
            self._check_open()
            self.native.write(page, data)

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidArgument("the model is closed")

    def share(self, pages: list[int]) -> None:
        """Adds a reference to each page; holes are skipped."""
        with self.lock:
            for page in pages:
                if page != HOLE:
                    self._count(page, 1, 0)

    def give_back(self, pages: list[int]) -> None:
        """Releases a reference to each page; a page without any is free. Holes are skipped."""
        with self.lock:
            for page in pages:
                if page == HOLE:
                    continue
                self._count(page, -1, 0)
                if self._holders[page] == 0:
                    self.index.forget(page)
                    self._free.append(page)

    def retain(self, pages: list[int], n: int = 1) -> None:
        """Marks a reference to each page as that of a retained sequence (n = 1), or no longer (-1)."""
        with self.lock:
            for page in pages:
                if page != HOLE:
                    self._count(page, 0, n)

    def holders(self, page: int) -> int:
        """References to a page."""
        return self._holders[page]

    def name(self, page: int, key: bytes) -> None:
        """Publishes a full page under the hash of its prefix. The caller has a reference to it."""
        with self.lock:
            self._filled[page] = PAGE_POSITIONS
            self.index.add(key, page)

    def append_to(self, page: int, offset: int, end: int) -> int:
        """Reserves positions offset .. end-1 of a page for the caller to write.

        Args:
            page: that the caller has a reference to and has filled up to `offset`.
            offset, end: 0 <= offset < end <= PAGE_POSITIONS.

        Returns:
            The page, or a copy to put in its place in the caller's table, if those positions were written through
            another reference.

        Raises:
            OutOfMemory: a copy is needed and no page is free; nothing was changed.
        """
        with self.lock:
            if self._holders[page] > 1 and self._filled[page] > offset:
                (copy,) = self.take(1)
                self.native.copy(copy, page)
                self.give_back([page])
                page = copy
            self.index.forget(page)  # its contents change
            self._filled[page] = end
            return page

    def take_back(self, page: int, end: int) -> None:
        """Releases the unwritten tail of an `append_to` reservation; positions < `end` were written."""
        with self.lock:
            self._filled[page] = min(self._filled[page], end)

    def check(self, held: list[list[int]]) -> None:
        """Compares the counts with the page tables; for tests.

        Args:
            held: the page table of every sequence of this pool.

        Raises:
            AssertionError: a count is wrong, or a page is both free and held.
        """
        with self.lock:
            self._release_abandoned()
            really = [page for pages in held for page in pages if page != HOLE]
            counts = np.bincount(np.array(really, np.int64), minlength=self.n_pages)
            assert counts.tolist() == self._holders, "references are miscounted"
            assert all(0 <= few <= n for few, n in zip(self._retained, self._holders, strict=True))
            assert self._n_shared == sum(n > 1 for n in self._holders)
            assert self._n_cached == sum(0 < n == few for few, n in zip(self._retained, self._holders, strict=True))
            assert sorted(self._free) == [page for page in range(self.n_pages) if not counts[page]]
            assert all(counts[page] for page in self.index.pages()), "a free page can be found"

    def close(self) -> None:
        """Frees the memory; may be called twice. Sequences can only be closed afterwards."""
        with self.lock:
            self._closed = True
            self.native.close()


_pools: weakref.WeakSet[PagePool] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child: a lock that another thread held would stay held for ever, and destructors need it."""
    for pool in list(_pools):
        pool.lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_locks)


class Sequence:
    """The page table of one growing text. Use as a context manager, or call `close()`.

    Args:
        pool: of its pages.
        window: what the text's tokens see.

    Attributes:
        pool: as given.
        n_tokens: positions whose keys and values were computed; pages that no later token sees may be released.
        window: as given.
        retained: whether it is in the eviction list: no running request needs it.
    """

    def __init__(self, pool: PagePool, window: Window = EVERYTHING) -> None:
        self.pool = pool
        self._pages: list[int] = []
        self._hole = 0  # pages after that of the sinks and before this one were released
        self.window = window
        self.n_tokens = 0
        self.retained = False

    @classmethod
    def of(cls, pool: PagePool, pages: list[int], window: Window = EVERYTHING) -> Sequence:
        """A sequence of full pages, which takes over the caller's references; holes where nothing is seen."""
        sequence = cls(pool, window)
        sequence._pages, sequence.n_tokens = pages, len(pages) * PAGE_POSITIONS
        sequence._hole = next((i for i in range(len(pages), 0, -1) if pages[i - 1] == HOLE), 0)
        return sequence

    @property
    def pages(self) -> list[int]:
        """The page table: entry i is the page of positions 32 i .. 32 i + 31, -1 for one that was released."""
        return list(self._pages)

    def pages_needed(self, n_tokens: int) -> int:
        """Pages to allocate at most for a length of `n_tokens`, one for the copy of a shared last page included."""
        return max(0, pages_for(n_tokens) - max(self.window.first_page(self.n_tokens), self.n_tokens // PAGE_POSITIONS))

    def retain(self) -> None:
        """Counts its pages as cached: only retained sequences reference them, so they can be evicted."""
        with self.pool.lock:
            if not self.retained:
                self.retained = True
                self.pool.retain(self._pages)

    def unretain(self) -> None:
        """Counts its pages as in use."""
        with self.pool.lock:
            if self.retained:
                self.retained = False
                self.pool.retain(self._pages, -1)

    def _release(self, pages: list[int]) -> None:
        if self.retained:
            self.pool.retain(pages, -1)
        self.pool.give_back(pages)

    def reserve(self, n_tokens: int) -> npt.NDArray[np.int32]:
        """Reserves pages for a length of up to `n_tokens` positions.

        Returns:
            The page table, int32 [n_pages].

        Raises:
            OutOfMemory: the pool has too few free pages; the sequence has the same contents as before.
        """
        if self.retained:  # in use meanwhile
            self.unretain()
            try:
                return self.reserve(n_tokens)
            finally:
                self.retain()
        first, offset = divmod(self.n_tokens, PAGE_POSITIONS)
        needed = pages_for(n_tokens)
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
        """Releases the reserved positions that were not written, so that forks may append there."""
        first, offset = divmod(self.n_tokens, PAGE_POSITIONS)
        for i in range(first, len(self._pages)):
            if self._pages[i] != HOLE:
                self.pool.take_back(self._pages[i], offset if i == first else 0)

    def slide(self, n_tokens: int) -> None:
        """Releases the pages that no token after the first `n_tokens` sees."""
        first = 1 if self.window.n_sinks else 0
        end = self.window.first_page(n_tokens)
        start = max(first, self._hole)
        if end > start:
            with self.pool.lock:
                self._release(self._pages[start:end])
                self._pages[start:end] = [HOLE] * (end - start)
                self._hole = end

    def usable(self, n_tokens: int) -> int:
        """The longest prefix, of at most `n_tokens`, after which a text can go on: all pages that it sees are there."""
        n_tokens = min(n_tokens, self.n_tokens)
        if not self._hole or self.window.first_page(n_tokens) >= self._hole:
            return n_tokens
        return min(n_tokens, PAGE_POSITIONS if self.window.n_sinks else 0)

    def fork(self, n_tokens: int | None = None) -> Sequence:
        """Another sequence with the first `n_tokens` positions (None: all) of this one; shares their pages.

        Raises:
            InvalidArgument: `n_tokens` is negative or more than the length, or pages it needs were released.
        """
        other = Sequence(self.pool, self.window)
        with self.pool.lock:
            n_tokens = self.n_tokens if n_tokens is None else n_tokens
            self._check("fork", n_tokens)
            pages = self._pages[: pages_for(n_tokens)]
            self.pool.share(pages)
            other._pages, other.n_tokens = pages, n_tokens
            other._hole = self._hole_within(len(pages))
        return other

    def truncate(self, n_tokens: int) -> None:
        """Removes the positions from `n_tokens` on and releases the pages after them.

        Raises:
            InvalidArgument: as `fork`.
        """
        keep = pages_for(n_tokens)
        with self.pool.lock:
            self._check("truncate", n_tokens)
            self._release(self._pages[keep:])
            del self._pages[keep:]
            self.n_tokens, self._hole = n_tokens, self._hole_within(keep)

    def _hole_within(self, n_pages: int) -> int:
        """`_hole` of the first pages; 0 where they are that of the sinks and none was released."""
        return min(self._hole, n_pages) if n_pages > (1 if self.window.n_sinks else 0) else 0

    def roll_back(self, n_tokens: int) -> None:
        """Removes the positions from `n_tokens` on as if they had not been reserved: pages after them are released, and
        forks may append in the page where the text ends now.

        Raises:
            InvalidArgument: as `fork`.
        """
        self.truncate(n_tokens)
        self.settle()

    def _check(self, verb: str, n_tokens: int) -> None:
        if not 0 <= n_tokens <= self.n_tokens:
            raise InvalidArgument(f"cannot {verb} at {n_tokens} tokens, {self.n_tokens} are held")
        if self.usable(n_tokens) < n_tokens:
            raise InvalidArgument(f"cannot {verb} at {n_tokens} tokens: the window has moved on")

    def close(self) -> None:
        """Releases every page; may be called twice."""
        self.truncate(0)

    def __del__(self) -> None:
        if hasattr(self, "retained") and self._pages:
            self.pool.abandon(self._pages, self.retained)

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
