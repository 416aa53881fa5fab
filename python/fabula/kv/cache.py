"""K and V that no running request needs, kept as long as there is room: found again by whose they are or by their text.

When pages run out, the sequences unused for longest give theirs up. Full pages may then go to a folder on disk, from
where they are read back instead of computed. Either way nothing is lost: tokens are the truth.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fabula._native import PAGE_POSITIONS
from fabula.errors import OutOfMemory
from fabula.kv.pages import HOLE, PagePool, PoolUsage, Sequence
from fabula.kv.prefix import Window


class Spill(Protocol):
    """Pages on disk, by the names of their texts; see `fabula.kv.spill`."""

    def put(self, key: bytes, data: npt.NDArray[np.uint8]) -> bool:
        """Keeps a page's bytes; False when they were there or there is no room."""

    def get(self, key: bytes, out: npt.NDArray[np.uint8]) -> bool:
        """Reads a page's bytes into `out`; False when they are not there or damaged."""

    def __contains__(self, key: bytes) -> bool: ...

    @property
    def n_pages(self) -> int: ...


class KvCache:
    """Kept sequences by last use, and where a text's pages can be found. Thread-safe by the pool's lock.

    Args:
        pool: of the model; asks here when it has too few free pages.
        n_anonymous: sequences to keep that nobody else holds (`keep` with `owned`).

    Attributes:
        spill: where pages go that are given up; None for nowhere.
    """

    def __init__(self, pool: PagePool, n_anonymous: int = 16) -> None:
        self._pool = pool
        self._n_anonymous = n_anonymous
        self._n_evicted = 0
        self.spill: Spill | None = None
        self._kept: OrderedDict[int, weakref.ref[Sequence]] = OrderedDict()
        self._anonymous: OrderedDict[int, Sequence] = OrderedDict()
        # The pool must not keep what keeps the pool.
        method = weakref.WeakMethod(self._reclaim)
        pool.reclaim = lambda n: call(n) if (call := method()) else None

    def keep(self, sequence: Sequence, *, owned: bool = False) -> None:
        """Takes charge of a sequence that no running request needs, as the one used last.

        Args:
            sequence: its holder may use and close it as before; it may be found closed when pages ran out.
            owned: nobody else holds it: it lives until others are used more recently.
        """
        with self._pool.lock:
            key, kept = id(sequence), self._kept
            kept[key] = weakref.ref(sequence, lambda _: kept.pop(key, None))
            kept.move_to_end(key)
            if owned:
                self._anonymous[key] = sequence
                while len(self._anonymous) > self._n_anonymous:
                    self._anonymous.popitem(last=False)[1].close()

    @property
    def lock(self) -> threading.RLock:
        """Held by whoever looks at several sequences at once."""
        return self._pool.lock

    def owns(self, sequence: Sequence) -> bool:
        """Whether a sequence's pages are of this cache's pool, not of a model that was unloaded."""
        return sequence.pool is self._pool

    def touch(self, sequence: Sequence) -> None:
        """A kept sequence was used."""
        with self._pool.lock:
            if id(sequence) in self._kept:
                self._kept.move_to_end(id(sequence))

    # ---- Finding ----------------------------------------------------------------------------------------------------

    def find(self, keys: list[bytes], window: Window) -> Sequence | None:
        """The longest beginning of a text whose full pages are in memory or on disk, as a sequence of its own.

        Args:
            keys: names of the text's full pages, see `KeyChain`.
            window: what its tokens see; pages that none to come sees need not be there.
        """
        with self._pool.lock:
            n_pages = self._longest(keys, window)
            if not n_pages:
                return None
            first = window.first_page(n_pages * PAGE_POSITIONS)
            pages: list[int] = []
            for i, key in enumerate(keys[:n_pages]):
                seen = i >= first or (i == 0 and window.n_sinks > 0)
                page = self._take(key) if seen else HOLE
                if page is None:  # damaged on disk, or no page free to read it into
                    break
                pages.append(page)
            sequence = Sequence.of(self._pool, pages, window)
            if (len(pages) < n_pages and sequence.usable(sequence.n_tokens) < sequence.n_tokens) or not pages:
                sequence.close()
                return None
            return sequence

    def _longest(self, keys: list[bytes], window: Window) -> int:
        """How many pages of a text can be had such that everything behind them can be computed."""
        index, spill = self._pool.index, self.spill
        best = run_start = 0
        sinks = False
        for i, key in enumerate(keys):
            here = index.page(key) is not None or (spill is not None and key in spill)
            if not here:
                if not window.slides:
                    return best
                run_start = i + 1
                continue
            sinks = sinks or i == 0
            if run_start <= window.first_page((i + 1) * PAGE_POSITIONS) and (sinks or not window.n_sinks):
                best = i + 1
        return best

    def _take(self, key: bytes) -> int | None:
        """A page by its name, held once more; read from disk if need be."""
        page = self._pool.index.page(key)
        if page is not None:
            self._pool.share([page])
            return page
        data = np.empty(self._pool.page_bytes, np.uint8)
        if self.spill is None or not self.spill.get(key, data):
            return None
        try:
            (page,) = self._pool.take(1)
        except OutOfMemory:
            return None
        self._pool.native.write(page, data)
        self._pool.name(page, key)
        return page

    # ---- Giving up --------------------------------------------------------------------------------------------------

    def _reclaim(self, n_free: int) -> None:
        """Gives up K and V, the longest unused first, until `n_free` pages are free or nothing is left."""
        before = self._pool.n_free
        for ref in list(self._kept.values()):
            sequence = ref()
            while sequence is not None and sequence.n_tokens and self._pool.n_free < n_free:
                self._shorten(sequence)
        self._n_evicted += max(0, self._pool.n_free - before)

    def _shorten(self, sequence: Sequence) -> None:
        """Gives up the last page of a sequence; all of it, if what is left would not do."""
        n_left = (sequence.n_tokens - 1) // PAGE_POSITIONS * PAGE_POSITIONS
        if not n_left or sequence.usable(n_left) < n_left:
            self.give_up(sequence)
            return
        self._save(sequence.pages[-1:])
        sequence.truncate(n_left)

    def give_up(self, sequence: Sequence) -> None:
        """Closes a sequence; its full pages that nobody else holds go to disk if there is a place."""
        with self._pool.lock:
            self._save(sequence.pages)
            sequence.close()
            self._kept.pop(id(sequence), None)
            self._anonymous.pop(id(sequence), None)

    def _save(self, pages: list[int], *, shared: bool = False) -> None:
        """Writes full pages to disk that nobody else holds, or all of them."""
        if self.spill is None:
            return
        for page in pages:
            key = self._pool.index.key(page) if page != HOLE else None
            if key is not None and (shared or self._pool.holders(page) == 1) and key not in self.spill:
                self.spill.put(key, self._pool.native.read(page))

    def save_all(self) -> None:
        """Writes every kept page to disk, so that a process to come finds it."""
        for sequence in self._sequences():
            with self._pool.lock:
                self._save(sequence.pages, shared=True)

    def clear(self) -> None:
        """Gives everything up."""
        for sequence in self._sequences():
            self.give_up(sequence)

    def close(self) -> None:
        """Gives everything up for good, as its pool is going; nothing goes to disk any more."""
        self.spill = None
        self.clear()

    def _sequences(self) -> list[Sequence]:
        with self._pool.lock:
            return [sequence for ref in self._kept.values() if (sequence := ref()) is not None]

    # ---- Counting ---------------------------------------------------------------------------------------------------

    def usage(self) -> PoolUsage:
        """Pages used, shared, cached and on disk."""
        with self._pool.lock:
            usage = self._pool.usage()
            counts: dict[int, int] = {}
            for sequence in self._sequences():
                for page in sequence.pages:
                    counts[page] = counts.get(page, 0) + 1
            cached = sum(1 for page, n in counts.items() if page != HOLE and n == self._pool.holders(page))
            n_spilled = 0 if self.spill is None else self.spill.n_pages
            return PoolUsage(
                usage.n_pages, usage.n_used, usage.n_shared, usage.page_bytes, cached, n_spilled, self._n_evicted
            )
