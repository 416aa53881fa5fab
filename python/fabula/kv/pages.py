"""KV pages: a pool with a reference count for each page, and sequences, each with its page table.

The tokens are the truth and KV is a cache: a sequence can be truncated or forked at any length, and what is missing is
recomputed when it is needed. A fork shares every page and costs only counting. Positions are only ever appended. So two
sequences may share a partly filled page, and the first that appends writes in place; one that finds its next position
already written gets a copy of the page (copy on write).

A sequence with a sliding window releases the pages before the window: its page table has a hole.

A hybrid's sequence has states of its recurrent layers beside its pages (`states.py`). A text can go on only where one
was kept, which `Sequence.usable` knows.

Where layers have windows of their own, a page has two parts with a count of references each: the KV of windowed layers,
and the rest. A sequence may drop its references to windowed parts that none of its later tokens sees; the memory of one
without references serves other sequences. So a pool counts bytes: it has more page numbers than whole pages fit.

All arithmetic of positions and pages is here and in `windowed.py`: `pages_for`, `Sequence.pages_needed`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from fabula import _native
from fabula._native import PAGE_POSITIONS
from fabula.errors import InvalidArgument, OutOfMemory
from fabula.formats.checkpoint import DType
from fabula.kv.prefix import EVERYTHING, PrefixIndex, Window
from fabula.kv.references import References
from fabula.kv.stateful import Stateful
from fabula.kv.states import State, StateSlots, Trail, slots_for
from fabula.kv.windowed import MOST_IDS, NONE_WINDOWED, TAKE_BACK, WindowedLayers
from fabula.lean_dataclasses import dataclass, replace

HOLE = -1  # in a page table, in place of a page that no later token sees


def pages_for(n_tokens: int) -> int:
    """Pages that hold so many positions."""
    return -(-n_tokens // PAGE_POSITIONS)


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Pages, and slots of recurrent states, of a pool at one moment. Pages whose windowed KV was dropped count for the
    bytes they still take; the sums are rounded up to whole pages.

    Attributes:
        n_pages: in all.
        n_used: with a reference.
        n_shared: with more than one.
        n_cached: of those used, referenced only by retained sequences: evicted when pages run out.
        n_spilled: on disk, or queued to be written there.
        n_evicted: since the model was loaded.
        n_dropped: page numbers in use whose windowed KV was dropped.
        page_bytes: bytes of a page.
        n_slots: slots of recurrent states in all; 0 for a model without recurrent layers.
        n_slots_used: that hold a state.
        n_states_spilled: states on disk, or queued to be written there.
        n_states_evicted: since the model was loaded.
        slot_bytes: bytes of a state.
    """

    n_pages: int
    n_used: int
    n_shared: int
    page_bytes: int
    n_cached: int = 0
    n_spilled: int = 0
    n_evicted: int = 0
    n_dropped: int = 0
    n_slots: int = 0
    n_slots_used: int = 0
    n_states_spilled: int = 0
    n_states_evicted: int = 0
    slot_bytes: int = 0

    @property
    def used_bytes(self) -> int:
        return self.n_used * self.page_bytes

    @property
    def cached_bytes(self) -> int:
        return self.n_cached * self.page_bytes

    @property
    def spilled_bytes(self) -> int:
        return self.n_spilled * self.page_bytes

    @property
    def state_bytes(self) -> int:
        """Of the slots that hold a state."""
        return self.n_slots_used * self.slot_bytes


class PagePool:
    """Memory for a fixed number of pages of `PAGE_POSITIONS` positions each. Thread-safe.

    Args:
        dtypes: of keys and values, or of each: F32, F16, BF16, or Q8_0 for bytes with a scale.
        n_pages: whole pages that fit; only touched ones take memory.
        layers: what a page holds of each layer.
        device: GPU they lie on, which takes memory for all at once; None for the CPU.
        windowed: the windowed layers, whose KV can be dropped. None of a GPU's pool.
        drops: whether sequences drop dead windowed KV as they grow; else when pages run out.
        state_floats: floats of the state of each recurrent layer; none for a model without such layers.
        state_memory: bytes of states; None for the default.

    Attributes:
        n_pages, windowed, drops: as given.
        windowed_bytes: of the windowed part of a page.
        n_dropped_ever: windowed parts dropped since the pool was made.
        states: slots of recurrent states; None without recurrent layers.
    """

    def __init__(
        self,
        dtypes: DType | tuple[DType, DType],
        n_pages: int,
        layers: Iterable[_native.KvLayer],
        device: _native.Device | None = None,
        *,
        windowed: WindowedLayers = NONE_WINDOWED,
        drops: bool = False,
        state_floats: tuple[int, ...] = (),
        state_memory: int | None = None,
    ) -> None:
        layers = tuple(layers)
        self.n_pages, self.drops = n_pages, drops
        self.windowed = NONE_WINDOWED if device else windowed
        self.windowed_bytes = self.windowed.part_bytes(dtypes, layers)
        n_ids = n_pages
        if self.windowed:
            whole = _native.page_bytes(dtypes, layers)
            n_ids = min(MOST_IDS * n_pages, n_pages * whole // max(1, whole - self.windowed_bytes))
        try:
            self.native = _native.PagePool(dtypes, n_ids, layers, device)
        except OutOfMemory:
            if n_ids == n_pages:
                raise
            n_ids = n_pages  # address space is limited: dropping then makes no room for more pages
            self.native = _native.PagePool(dtypes, n_ids, layers, device)
        self._limit = n_pages * self.page_bytes
        self._layers, self._runs = len(layers), self.windowed.runs()
        self._fresh = list(range(n_ids - 1, -1, -1))  # free page numbers that take no memory
        self._free: deque[int] = deque()  # the other free ones, those used last at the end
        self._touched = [0] * n_ids  # bytes of each page that were used and not discarded since
        self._touched_bytes = 0
        self._references = References(n_ids)
        self._windowed = References(n_ids if self.windowed else 0)  # to the windowed parts
        self._filled = [0] * n_ids  # positions of a page that were written through any reference
        self.n_dropped_ever = 0
        self.index = PrefixIndex()  # under `lock`
        self.reclaim: Callable[[int], None] | None = None  # evicts until so many pages are free
        # Held for counting and copying in memory, never over disk I/O or a step.
        self.lock = threading.RLock()
        self._closed = False
        self._sequences: weakref.WeakSet[Sequence] = weakref.WeakSet()  # of a pool with windowed or recurrent layers
        self.states: StateSlots | None = None
        if state_floats:
            n_slots = slots_for(state_memory, _native.state_bytes(state_floats))
            self.states = StateSlots(state_floats, n_slots)
            registered = weakref.ref(self)
            self.states.in_use = lambda: pool._states_in_use() if (pool := registered()) else ()
        # Of collected sequences: pages, whether retained, and n_dropped.
        self._abandoned: deque[tuple[list[int], bool, int]] = deque()
        _pools.add(self)

    @property
    def n_free(self) -> int:
        """Whole pages that can be allocated without evicting anything."""
        self._release_abandoned()
        return min(len(self._free) + len(self._fresh), (self._limit - self.n_bytes) // self.page_bytes)

    @property
    def n_bytes(self) -> int:
        """Bytes of the pages with references."""
        n_windowed = self._windowed.n_used if self.windowed else 0
        return self._references.n_used * (self.page_bytes - self.windowed_bytes) + n_windowed * self.windowed_bytes

    @property
    def n_bytes_held(self) -> int:
        """Bytes of the pages with references, and of the slots with states."""
        return self.n_bytes + (0 if self.states is None else self.states.n_used * self.states.slot_bytes)

    @property
    def page_bytes(self) -> int:
        return self.native.page_bytes

    @property
    def state_record_bytes(self) -> int:
        """Bytes of a state outside the pool: the page that it ends in, and its slot; 0 without recurrent layers."""
        return 0 if self.states is None else self.page_bytes + self.states.slot_bytes

    def usage(self) -> PoolUsage:
        """Pages in use, shared and cached. Reads counters and waits for no lock."""
        self._release_abandoned()
        n_used = -(-self.n_bytes // self.page_bytes)
        n_cached = min(-(-self._cached_bytes() // self.page_bytes), n_used)
        n_dropped = max(0, self._references.n_used - self._windowed.n_used) if self.windowed else 0
        usage = PoolUsage(
            self.n_pages, n_used, self._references.n_shared, self.page_bytes, n_cached, n_dropped=n_dropped
        )
        states = self.states
        if states is None:
            return usage
        return replace(
            usage,
            n_slots=states.n_slots,
            n_slots_used=states.n_used,
            n_states_evicted=states.n_evicted,
            slot_bytes=states.slot_bytes,
        )

    def _cached_bytes(self) -> int:
        n_windowed = self._windowed.n_cached if self.windowed else 0
        return self._references.n_cached * (self.page_bytes - self.windowed_bytes) + n_windowed * self.windowed_bytes

    def n_available(self, wanted: int = 0) -> int:
        """Whole pages that are free or can be evicted. While there are fewer than `wanted`, sequences in use drop dead
        windowed KV."""
        self._release_abandoned()
        for sequence in self.sequences() if self.windowed else ():
            if self._n_available() >= wanted:
                break
            if not sequence.retained:  # what is retained can be evicted as it is
                sequence.drop_windowed()
        return self._n_available()

    def _n_available(self) -> int:
        n_numbers = len(self._free) + len(self._fresh) + self._references.n_cached
        return min(n_numbers, (self._limit - self.n_bytes + self._cached_bytes()) // self.page_bytes)

    def register(self, sequence: Sequence) -> None:
        """Makes a sequence known: its dead windowed KV is dropped when pages run out, and its states are found."""
        if self.windowed or self.states is not None:
            with self.lock:
                self._sequences.add(sequence)

    def sequences(self) -> list[Sequence]:
        """Sequences that may have dead windowed KV, or states; none without windowed or recurrent layers."""
        with self.lock:
            return list(self._sequences)

    def _states_in_use(self) -> Iterator[State]:
        """States that running requests need."""
        for sequence in self.sequences():
            if not sequence.retained:
                yield from sequence.states_in_use()

    def n_slots_available(self) -> int | None:
        """Slots of states that are free or can be evicted; None without recurrent layers."""
        if self.states is None:
            return None
        with self.lock:
            return self.states.n_available()

    def in_whole_pages(self, n_pages: int, n_step: int) -> int:
        """Whole pages that as many bytes take as `n_pages` of one sequence whose dead windowed KV is dropped."""
        n_windowed = min(n_pages, self.windowed.most_pages(n_step))
        n_bytes = n_pages * (self.page_bytes - self.windowed_bytes) + n_windowed * self.windowed_bytes
        return -(-n_bytes // self.page_bytes)

    def abandon(self, pages: list[int], retained: bool, n_dropped: int = 0) -> None:
        """`give_back` for destructors. The garbage collector runs them at any moment, in a thread that may hold any
        lock, so this waits for none: if another thread has the pool's lock, a later call releases the pages."""
        self._abandoned.append((pages, retained, n_dropped))
        self._release_abandoned()

    def _release_abandoned(self) -> None:
        while self._abandoned and self.lock.acquire(blocking=False):
            try:
                while self._abandoned:
                    pages, retained, n_dropped = self._abandoned.popleft()
                    if retained:
                        self.retain(pages, -1, n_dropped)
                    self.give_back(pages, n_dropped)
            finally:
                self.lock.release()

    def take(self, n: int) -> list[int]:
        """Allocates n free pages, all or none, each with one reference.

        Raises:
            OutOfMemory: fewer are free, also after evicting; says how many.
            InvalidArgument: the model was closed.
        """
        with self.lock:
            self._check_open()
            if n > self.n_free and self.reclaim is not None:
                self.reclaim(n)
            if n > self.n_free:
                raise OutOfMemory(
                    f"the KV cache has {self.n_free} of {self.n_pages} pages free, {n} are needed; close other "
                    f"generations or load the model with a smaller context"
                )
            return [self._take_one() for _ in range(n)]

    def _take_one(self) -> int:
        page = self._free.pop() if self._free else self._fresh.pop()
        self._references.count(page, 1, 0)
        self._filled[page] = 0
        if self.windowed:
            self._windowed.count(page, 1, 0)
            self._touch(page, self.page_bytes)
            self._discard_unused()
        return page

    def _touch(self, page: int, n_bytes: int) -> None:
        self._touched_bytes += n_bytes - self._touched[page]
        self._touched[page] = n_bytes

    def _discard_unused(self) -> None:
        """Returns the memory of free pages to the system while more was touched than the pool may take."""
        while self._touched_bytes > self._limit and self._free:
            page = self._free.popleft()
            self.native.discard(page, 0, self._layers)
            self._touch(page, 0)
            self._fresh.append(page)

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

    def share(self, pages: list[int], n_dropped: int = 0) -> None:
        """Adds a reference to each page, without the windowed part in the first `n_dropped`; holes are skipped."""
        with self.lock:
            for page in pages:
                if page != HOLE:
                    self._references.count(page, 1, 0)
            for page in self._windowed_of(pages, n_dropped):
                self._windowed.count(page, 1, 0)

    def _windowed_of(self, pages: list[int], n_dropped: int) -> Iterator[int]:
        """The pages of a table whose windowed parts it references."""
        return (page for page in pages[n_dropped:] if page != HOLE) if self.windowed else iter(())

    def give_back(self, pages: list[int], n_dropped: int = 0) -> None:
        """Releases a reference to each page, without the windowed part in the first `n_dropped`; a page without any is
        free. Holes are skipped."""
        with self.lock:
            windowed = list(self._windowed_of(pages, n_dropped))
            for page in windowed:
                self._windowed.count(page, -1, 0)
            for page in pages:
                if page != HOLE and self._references.count(page, -1, 0) == 0:
                    self.index.forget(page)
                    self._free.append(page)
            self._discard_dropped(windowed)

    def retain(self, pages: list[int], n: int = 1, n_dropped: int = 0) -> None:
        """Marks a reference to each page, without the windowed part in the first `n_dropped`, as that of a retained
        sequence (n = 1), or no longer (-1)."""
        with self.lock:
            for page in pages:
                if page != HOLE:
                    self._references.count(page, 0, n)
            for page in self._windowed_of(pages, n_dropped):
                self._windowed.count(page, 0, n)

    def drop(self, pages: list[int], *, retained: bool = False) -> None:
        """Releases a reference to the windowed part of each page.

        Args:
            pages: that the caller keeps its other reference to.
            retained: whether it is that of a retained sequence.
        """
        with self.lock:
            for page in pages:
                self._windowed.count(page, -1, -1 if retained else 0)
            self._discard_dropped(pages)

    def _discard_dropped(self, pages: Iterable[int]) -> None:
        """Returns the memory of windowed parts without references to the system, where the page itself has some."""
        for page in pages if not self._closed else ():
            if self._references.holders[page] and not self._windowed.holders[page]:
                self.n_dropped_ever += 1
                for first, n in self._runs:
                    self.native.discard(page, first, n)
                self._touch(page, self.page_bytes - self.windowed_bytes)

    def is_whole(self, page: int) -> bool:
        """Whether a page with a reference has its windowed part."""
        return not self.windowed or self._windowed.holders[page] > 0

    def holders(self, page: int) -> int:
        """References to a page."""
        return self._references.holders[page]

    def name(self, page: int, key: bytes) -> None:
        """Publishes a full page under the hash of its prefix, in place of one whose windowed part was dropped. The
        caller has a reference to it."""
        with self.lock:
            self._filled[page] = PAGE_POSITIONS
            known = self.index.page(key)
            if known is not None and known != page and not self.is_whole(known):
                self.index.forget(known)
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
            if self._references.holders[page] > 1 and self._filled[page] > offset:
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

    def check(self, held: list[list[int]], dropped: list[int] | None = None) -> None:
        """Compares the counts with the page tables; for tests.

        Args:
            held: the page table of every sequence of this pool.
            dropped: for each, the leading pages whose windowed part it dropped; None where that is not known.

        Raises:
            AssertionError: a count is wrong, or a page is both free and held.
        """
        with self.lock:
            self._release_abandoned()
            n_ids = len(self._filled)
            really = [page for pages in held for page in pages if page != HOLE]
            counts = np.bincount(np.array(really, np.int64), minlength=n_ids)
            self._references.check(counts)
            assert sorted([*self._free, *self._fresh]) == [page for page in range(n_ids) if not counts[page]]
            assert all(counts[page] for page in self.index.pages()), "a free page can be found"
            if self.states is not None:
                self.states.check(state for sequence in self.sequences() for state in sequence.held_states())
            if not self.windowed:
                return
            if dropped is not None:
                parts = [p for pages, n in zip(held, dropped, strict=True) for p in self._windowed_of(pages, n)]
                self._windowed.check(np.bincount(np.array(parts, np.int64), minlength=n_ids))
            assert all(n <= whole for n, whole in zip(self._windowed.holders, self._references.holders, strict=True))
            assert self.n_bytes <= self._limit and self._touched_bytes == sum(self._touched) <= self._limit

    def close(self) -> None:
        """Frees the memory; may be called twice. Sequences can only be closed afterwards."""
        with self.lock:
            self._closed = True
            self.native.close()
            if self.states is not None:
                self.states.close()


_pools: weakref.WeakSet[PagePool] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child: a lock that another thread held would stay held for ever, and destructors need it."""
    for pool in list(_pools):
        pool.lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_locks)


class Sequence(Stateful):
    """The page table of one growing text. Use as a context manager, or call `close()`.

    Args:
        pool: of its pages.
        window: what the text's tokens see.

    Attributes:
        pool: as given.
        n_tokens: positions whose keys and values were computed; pages that no later token sees may be released.
        window: as given.
        n_dropped: leading pages whose windowed part it gave up; 0 under a sliding window, which releases whole pages.
        retained: whether it is in the eviction list: no running request needs it.
        trail: its states; None without recurrent layers. One that is not retained has the state after `n_tokens`.
    """

    def __init__(self, pool: PagePool, window: Window = EVERYTHING) -> None:
        self.pool = pool
        self._pages: list[int] = []
        self._hole = 0  # pages after that of the sinks and before this one were released
        self.window = window
        self.n_tokens = self.n_dropped = 0
        self.retained = False
        self.trail = Trail(pool.states) if pool.states is not None else None
        pool.register(self)

    @classmethod
    def of(
        cls,
        pool: PagePool,
        pages: list[int],
        window: Window = EVERYTHING,
        n_dropped: int = 0,
        state: State | None = None,
    ) -> Sequence:
        """A sequence of full pages, which takes over the caller's references, those to the windowed parts of the first
        `n_dropped` excepted; holes where nothing is seen. With a state it ends there, perhaps within the last page."""
        sequence = cls(pool, window)
        if state is not None and sequence.trail is not None:
            sequence.trail.add(state)
        # The length comes last: without it, a thread that drops windowed KV leaves the sequence as it is.
        n_tokens = len(pages) * PAGE_POSITIONS if state is None else state.position
        sequence.n_dropped, sequence._pages, sequence.n_tokens = n_dropped, pages, n_tokens
        sequence._hole = next((i for i in range(len(pages), 0, -1) if pages[i - 1] == HOLE), 0)
        return sequence

    @property
    def pages(self) -> list[int]:
        """The page table: entry i is the page of positions 32 i .. 32 i + 31, -1 for one that was released."""
        return list(self._pages)

    def pages_needed(self, n_tokens: int, n_step: int = 0) -> int:
        """Pages to allocate at most for a length of `n_tokens`, one for the copy of a shared last page included.

        Args:
            n_tokens: the length.
            n_step: tokens of a step at most; only with it, dead windowed KV does not count.
        """
        n = max(0, pages_for(n_tokens) - max(self.window.first_page(self.n_tokens), self.n_tokens // PAGE_POSITIONS))
        return self.pool.in_whole_pages(n, n_step) if n_step and not self.window.slides else n

    def retain(self) -> None:
        """Counts its pages as cached: only retained sequences reference them, so they can be evicted."""
        with self.pool.lock:
            if not self.retained:
                self.retained = True
                self.pool.retain(self._pages, 1, self.n_dropped)
                if self.trail is not None:
                    self.trail.end(self.n_tokens)

    def unretain(self) -> None:
        """Counts its pages as in use."""
        with self.pool.lock:
            if self.retained:
                self.retained = False
                self.pool.retain(self._pages, -1, self.n_dropped)

    def _release(self, first: int, end: int | None = None) -> None:
        """Releases pages of its table; the caller removes them from it."""
        pages, n_dropped = self._pages[first:end], max(0, self.n_dropped - first)
        if self.retained:
            self.pool.retain(pages, -1, n_dropped)
        self.pool.give_back(pages, n_dropped)

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
                self._release(start, end)
                self._pages[start:end] = [HOLE] * (end - start)
                self._hole = end
                self._drop_hidden_states()

    def drop_windowed(self) -> None:
        """Drops windowed KV that no token after it sees, nor one after TAKE_BACK fewer tokens."""
        if self.pool.windowed and not self.window.slides:
            with self.pool.lock:
                end = self.pool.windowed.first_page(max(0, self.n_tokens - TAKE_BACK))
                if end > self.n_dropped:
                    self.pool.drop(self._pages[self.n_dropped : end], retained=self.retained)
                    self.n_dropped = end

    def usable(self, n_tokens: int) -> int:
        """The longest prefix, of at most `n_tokens`, after which a text can go on: all that it sees is there."""
        if self.trail is None:
            return self._visible(n_tokens)
        with self.pool.lock:
            positions = self.trail.positions(min(n_tokens, self.n_tokens))
            return next((position for position in positions if self._visible(position) == position), 0)

    def _visible(self, n_tokens: int) -> int:
        """The longest prefix, of at most `n_tokens`, after which all keys and values that a text sees are there."""
        n_tokens = min(n_tokens, self.n_tokens)
        if self.n_dropped and self.pool.windowed.first_page(n_tokens) < self.n_dropped:
            return 0
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
            other.n_dropped = min(self.n_dropped, len(pages))
            self.pool.share(pages, other.n_dropped)
            other._pages, other.n_tokens = pages, n_tokens
            if self.trail is not None:
                other.trail = self.trail.fork(n_tokens)
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
            self._release(keep)
            del self._pages[keep:]
            self.n_tokens, self._hole = n_tokens, self._hole_within(keep)
            self.n_dropped = min(self.n_dropped, keep)
            if self.trail is not None:
                self.trail.truncate(n_tokens)
                if self.retained:
                    self.trail.end(n_tokens)
                    self.trail.drop_all_passing()

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

    def take_back(self, n_tokens: int) -> None:
        """Removes computed positions from `n_tokens` on, or more where no state was kept there, and releases reserved
        ones."""
        if self.n_tokens > n_tokens and self.trail is not None:
            self.truncate(self.usable(n_tokens))
        self.n_tokens = min(self.n_tokens, n_tokens)
        self.settle()

    def _check(self, verb: str, n_tokens: int) -> None:
        if not 0 <= n_tokens <= self.n_tokens:
            raise InvalidArgument(f"cannot {verb} at {n_tokens} tokens, {self.n_tokens} are held")
        if self.usable(n_tokens) < n_tokens:
            gone = "its windowed KV was dropped" if self.n_dropped else "the window has moved on"
            gone = gone if self.trail is None else "no recurrent state was kept there"
            raise InvalidArgument(f"cannot {verb} at {n_tokens} tokens: {gone}")

    def close(self) -> None:
        """Releases every page; may be called twice."""
        self.truncate(0)

    def __del__(self) -> None:
        if hasattr(self, "retained") and self._pages:
            self.pool.abandon(self._pages, self.retained, self.n_dropped)

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
