"""LRU list of KV sequences that no running request needs, and lookup of KV pages by prefix hash.

When the pool runs out of pages, the least recently used sequences are evicted. Their full pages may go to a folder on
disk and are read back when the same prefix comes again. Evicting loses nothing but time: tokens are the truth, and
keys and values are recomputed from them. Before that, sequences give up the windowed KV that none of their later tokens
sees (`windowed.py`), which costs time only after a rollback.

Locks: the pool's lock guards the list and is never held over disk I/O. Eviction copies the bytes of a page under the
lock and queues them (`Spill.put` does not wait); `find` and the threads of `read` wait for the disk with no lock held.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fabula._native import PAGE_POSITIONS
from fabula.kv.pages import HOLE, PagePool, PoolUsage, Sequence, pages_for
from fabula.kv.prefix import Window
from fabula.kv.prefix_read import PrefixRead, ReaderThreads, Source, StoredState, partial_key
from fabula.kv.states import I32, NO_IDS, State, state_key, tail_of
from fabula.lean_dataclasses import replace

DRAIN_BYTES = 64 << 20  # queued for the disk, while everything is saved


class Spill(Protocol):
    """Pages, and states, on disk by their prefix hashes; see `fabula.kv.spill` and `fabula.kv.spill_writer`."""

    def put(self, key: bytes, data: npt.NDArray[np.uint8]) -> bool:
        """Takes a page's or a state's bytes without waiting for a disk; False when they are there already, or there is
        no room."""

    def get(self, key: bytes, out: npt.NDArray[np.uint8]) -> bool:
        """Reads a page's bytes into `out`; False when they are not there or damaged. May wait for a disk."""

    def __contains__(self, key: bytes) -> bool: ...

    @property
    def n_pages(self) -> int: ...

    @property
    def n_states(self) -> int: ...

    def drain(self, max_bytes: int = 0) -> None:
        """Waits until at most so many bytes are still to be written."""


class KvEvictionList:
    """Retained sequences, least recently used first, and lookup of pages by prefix. Thread-safe by the pool's lock.

    Args:
        pool: of the model; it calls this list when it has too few free pages.
        n_anonymous: sequences to retain that have no other owner (`keep` with `owned`).

    Attributes:
        spill: where evicted pages go; None for nowhere.
    """

    def __init__(self, pool: PagePool, n_anonymous: int = 16) -> None:
        self._pool = pool
        self._n_anonymous = n_anonymous
        self._n_evicted = 0
        self.spill: Spill | None = None
        self._kept: OrderedDict[int, weakref.KeyedRef[int, Sequence]] = OrderedDict()  # by id
        # References to sequences that were collected. Callbacks only append here, as they may come at any moment, also
        # while `_kept` is iterated; `_collect` removes the entries.
        self._dead: deque[weakref.KeyedRef[int, Sequence]] = deque()
        self._anonymous: OrderedDict[int, Sequence] = OrderedDict()
        self._readers = ReaderThreads()
        # The pool must not keep alive what keeps the pool alive.
        method = weakref.WeakMethod(self._reclaim)
        pool.reclaim = lambda n: call(n) if (call := method()) else None
        if pool.states is not None:
            save = weakref.WeakMethod(self._save_evicted)
            pool.states.on_evict = lambda state: call(state) if (call := save()) else None

    def keep(self, sequence: Sequence, *, owned: bool = False) -> None:
        """Retains a sequence that no running request needs, as the most recently used.

        Args:
            sequence: its owner may go on using and closing it; it may be found closed after an eviction.
            owned: it has no other owner: this list keeps it alive until others were used more recently.
        """
        with self._pool.lock:
            self._collect()
            key = id(sequence)
            if key not in self._kept:
                self._kept[key] = weakref.KeyedRef(sequence, self._dead.append, key)
                sequence.retain()
            self._kept.move_to_end(key)
            if owned:
                self._anonymous[key] = sequence
                while len(self._anonymous) > self._n_anonymous:
                    self._anonymous.popitem(last=False)[1].close()

    def _collect(self) -> None:
        """Removes the entries of sequences that were collected."""
        while self._dead:
            ref = self._dead.popleft()
            if self._kept.get(ref.key) is ref:  # or another sequence has the same id by now
                del self._kept[ref.key]

    @property
    def lock(self) -> threading.RLock:
        """Hold it to look at several sequences at one moment."""
        return self._pool.lock

    def owns(self, sequence: Sequence) -> bool:
        """Whether a sequence's pages are of this list's pool, not of a model that was unloaded."""
        return sequence.pool is self._pool

    def touch(self, sequence: Sequence) -> None:
        """Marks a retained sequence as used."""
        with self._pool.lock:
            self._collect()
            if id(sequence) in self._kept:
                self._kept.move_to_end(id(sequence))

    # ---- Lookup -----------------------------------------------------------------------------------------------------

    def find(self, keys: list[bytes], window: Window, ids: I32 = NO_IDS) -> Sequence | None:
        """The longest prefix of a text whose full pages are in memory or on disk, as a new sequence. That of a hybrid
        ends where a state was kept, perhaps within a page.

        May wait for the disk: the caller should hold no lock. `read` does not.

        Args:
            keys: prefix hashes of the text's full pages, see `KeyChain`.
            window: what its tokens see; pages that no later token sees need not be there.
            ids: int32 [n_tokens], the text; of use with recurrent layers only.
        """
        held = self.find_in_memory(keys, window, ids) if self._pool.states is not None else None
        found = self._prefix(keys, window, self.spill, ids)
        if held is not None and found.n_tokens <= held.n_tokens:
            return held
        found.run()
        return found.take() or held

    def find_in_memory(self, keys: list[bytes], window: Window, ids: I32 = NO_IDS) -> Sequence | None:
        """`find` without the disk: does not wait."""
        with self._pool.lock:  # nothing is evicted between the search and the sharing
            if self._pool.states is not None:
                holder, n_tokens = self._state_holder(keys, window, ids)
                return None if holder is None else holder.fork(n_tokens)
            found = self._prefix(keys, window, None)
            if not found.keys:
                return None
            found.run()
        return found.take()

    def n_findable(self, keys: list[bytes], window: Window, ids: I32 = NO_IDS) -> int:
        """Tokens of the prefix that `find` would return now. Does not wait."""
        if not keys:
            return 0
        with self._pool.lock:
            if self._pool.states is None:
                return self._longest(keys, window, self.spill) * PAGE_POSITIONS
            stored = self._stored_state(keys, window, ids, self.spill)
            return max(self._state_holder(keys, window, ids)[1], 0 if stored is None else stored.n_tokens)

    def n_known(self, keys: list[bytes], window: Window) -> int:
        """Tokens of the prefix whose KV is in memory or on disk, whether or not a state was kept there."""
        with self._pool.lock:
            return self._longest(keys, window, self.spill) * PAGE_POSITIONS

    def read(self, keys: list[bytes], window: Window, on_done: Callable[[], None], ids: I32 = NO_IDS) -> PrefixRead:
        """`find` in a thread that may wait for the disk, which this does not. States in memory are not looked for.

        Args:
            keys, window, ids: as `find`.
            on_done: called in that thread when nothing more will be read.
        """
        found = self._prefix(keys, window, self.spill, ids)
        self._readers.submit(found, on_done)
        return found

    def read_state(self, keys: list[bytes], window: Window, state: StoredState, source: Source) -> Sequence | None:
        """A sequence up to a state that is read from elsewhere; None unless its pages are in memory."""
        found = self._read(keys[: state.n_tokens // PAGE_POSITIONS], window, source, state)
        found.run()
        return found.take()

    def _prefix(self, keys: list[bytes], window: Window, spill: Spill | None, ids: I32 = NO_IDS) -> PrefixRead:
        """The longest prefix after which a text can go on: all that later tokens see is in memory or on disk."""
        state: StoredState | None = None
        with self._pool.lock:
            if self._pool.states is None:
                n_pages = self._longest(keys, window, spill)
            else:
                state = self._stored_state(keys, window, ids, spill)
                n_pages = 0 if state is None else state.n_tokens // PAGE_POSITIONS
        return self._read(keys[:n_pages], window, spill, state)

    def _read(self, keys: list[bytes], window: Window, source: Source | None, state: StoredState | None) -> PrefixRead:
        n_pages = len(keys)
        first = window.first_page(n_pages * PAGE_POSITIONS)
        is_seen = [i >= first or (i == 0 and window.n_sinks > 0) for i in range(n_pages)]
        first_whole = 0 if window.slides else self._pool.windowed.first_page(n_pages * PAGE_POSITIONS)
        return PrefixRead(self._pool, keys, is_seen, first_whole, window, source, state)

    def _state_holder(self, keys: list[bytes], window: Window, ids: I32) -> tuple[Sequence | None, int]:
        """A sequence that has the last state in memory of a text, and its position; (None, 0) if there is none. The
        caller holds the lock."""
        states = self._pool.states
        if states is None:
            return None, 0
        for n_pages in range(len(keys), 0, -1):
            for state in states.find(keys[n_pages - 1], ids[n_pages * PAGE_POSITIONS :]):
                for sequence in self._pool.sequences():
                    if sequence.window == window and sequence.has_state(state):
                        return sequence, state.position
        return None, 0

    def _stored_state(self, keys: list[bytes], window: Window, ids: I32, spill: Spill | None) -> StoredState | None:
        """The last state on disk of a text, whose KV is in memory or on disk; None if there is none."""
        if spill is None or not spill.n_states:
            return None
        for n_pages in range(len(keys), 0, -1):
            page_key, start = keys[n_pages - 1], n_pages * PAGE_POSITIONS
            if not self._has(page_key, spill) and not self._has_part(page_key, spill):
                continue
            for n_tail in range(max(0, min(PAGE_POSITIONS - 1, len(ids) - start)), -1, -1):
                name = page_key, tail_of(ids[start : start + n_tail])
                if state_key(*name) in spill and self._longest(keys[:n_pages], window, spill) == n_pages:
                    return StoredState(start + n_tail, name)
        return None

    def _longest(self, keys: list[bytes], window: Window, spill: Spill | None) -> int:
        windowed = self._pool.windowed
        best = run_start = whole_start = 0  # runs of pages that are there, and that have their windowed part
        sinks = False
        for i, key in enumerate(keys):
            is_whole = self._has(key, spill)
            if not is_whole and not window.slides:
                if not self._has_part(key, spill):
                    return best
                whole_start = i + 1
                continue
            if not is_whole:
                run_start = i + 1
                continue
            sinks = sinks or i == 0
            n_tokens = (i + 1) * PAGE_POSITIONS
            continues = whole_start == 0 or whole_start <= windowed.first_page(n_tokens)
            if continues and run_start <= window.first_page(n_tokens) and (sinks or not window.n_sinks):
                best = i + 1
        return best

    def _has(self, key: bytes, spill: Spill | None) -> bool:
        """Whether a whole page is in memory or on disk."""
        page = self._pool.index.page(key)
        return (page is not None and self._pool.is_whole(page)) or (spill is not None and key in spill)

    def _has_part(self, key: bytes, spill: Spill | None) -> bool:
        """Whether a page without its windowed part is."""
        return self._pool.index.page(key) is not None or (spill is not None and partial_key(key) in spill)

    # ---- Eviction ---------------------------------------------------------------------------------------------------

    def _reclaim(self, n_free: int) -> None:
        """Drops dead windowed KV, then evicts, the least recently used first, until `n_free` pages are free or nothing
        is left."""
        with self._pool.lock:
            self._collect()
            for each in (*self._sequences(), *self._pool.sequences()) if self._pool.windowed else ():
                if self._pool.n_free >= n_free:
                    return
                each.drop_windowed()
            before = self._pool.n_free
            for ref in list(self._kept.values()):
                sequence = ref()
                while sequence is not None and sequence.n_tokens and self._pool.n_free < n_free:
                    self._shorten(sequence)
            self._n_evicted += max(0, self._pool.n_free - before)

    def _shorten(self, sequence: Sequence) -> None:
        """Evicts the last page of a sequence, or those after the state before it; all of them, if a text could not go
        on after the rest."""
        n_left = (sequence.n_tokens - 1) // PAGE_POSITIONS * PAGE_POSITIONS
        usable = sequence.usable(n_left)
        if not usable or (usable < n_left and sequence.trail is None):
            self.evict(sequence)
            return
        self._save(sequence.pages[pages_for(usable) :])
        self._save_states(sequence, usable)
        sequence.truncate(usable)

    def evict(self, sequence: Sequence) -> None:
        """Closes a sequence; its full pages that nothing else references are spilled if there is a place."""
        with self._pool.lock:
            self._save(sequence.pages)
            self._save_states(sequence)
            sequence.close()
            sequence.unretain()
            self._kept.pop(id(sequence), None)
            self._anonymous.pop(id(sequence), None)

    def _save(self, pages: list[int], n_references: int | None = 1) -> None:
        """Spills full pages that have at most so many references; None: all. The caller holds the lock."""
        spill = self.spill
        if spill is None:
            return
        for page in pages:
            key = self._pool.index.key(page) if page != HOLE else None
            few = n_references is None or self._pool.holders(page) <= n_references
            if key is None or not few or key in spill:
                continue
            name = key if self._pool.is_whole(page) else partial_key(key)
            if name not in spill and not spill.put(name, self._pool.read(page)):
                return  # no room: copying the pages after it would be in vain

    def _save_states(self, sequence: Sequence, after: int = -1) -> None:
        """Spills the states of a sequence after a position that no other sequence has. The caller holds the lock."""
        if self.spill is None or sequence.trail is None:
            return
        others = [other for other in self._pool.sequences() if other is not sequence]
        elsewhere = {id(state) for other in others for state in other.states()}
        for state in sequence.states():
            if state.position > after and id(state) not in elsewhere:
                self._save_state(state, sequence)

    def _save_state(self, state: State, holder: Sequence) -> None:
        """Spills a state that texts are expected to go back to, with the page that it ends in."""
        spill = self.spill
        if spill is None or state.name is None or not state.rank or state_key(*state.name) in spill:
            return
        spill.put(state_key(*state.name), holder.read_state(state))

    def _save_evicted(self, state: State) -> None:
        """Spills a state whose slot is needed for another. The pool calls it under its lock."""
        if self.spill is not None and state.rank:
            holder = next((sequence for sequence in self._pool.sequences() if sequence.has_state(state)), None)
            if holder is not None:
                self._save_state(state, holder)

    def _save_patiently(self, sequence: Sequence, n_references: int | None = None) -> None:
        """Spills a sequence's full pages, and states, at the speed of the disk. The caller must hold no lock."""
        spill = self.spill
        if spill is None:
            return
        for state in sequence.states():
            spill.drain(DRAIN_BYTES)
            with self._pool.lock:
                if state.slot >= 0 and sequence.has_state(state):
                    self._save_state(state, sequence)
        i, n_pages = 0, 1
        while i < n_pages:  # page by page: meanwhile others may evict it
            spill.drain(DRAIN_BYTES)
            with self._pool.lock:
                pages = sequence.pages
                self._save(pages[i : i + 1], n_references)
            i, n_pages = i + 1, len(pages)

    def save_all(self) -> None:
        """Writes every retained page to disk, so that a later process finds it. Waits for the disk."""
        for sequence in self._sequences():
            self._save_patiently(sequence)
        if self.spill is not None:
            self.spill.drain()

    def clear(self) -> None:
        """Evicts everything; waits until it is on disk, if there is a place."""
        for sequence in self._sequences():
            self._save_patiently(sequence, 1)
            self.evict(sequence)
        if self.spill is not None:
            self.spill.drain()
        if self._pool.states is not None:
            with self._pool.lock:
                self._pool.states.discard_free()

    def close(self) -> None:
        """Evicts everything for good, as the pool goes; nothing is spilled any more."""
        self.spill = None
        self.clear()

    def _sequences(self) -> list[Sequence]:
        with self._pool.lock:
            self._collect()
            return [sequence for ref in self._kept.values() if (sequence := ref()) is not None]

    # ---- Usage ------------------------------------------------------------------------------------------------------

    def usage(self) -> PoolUsage:
        """Pages used, shared, cached and on disk. Reads counters and waits for no lock."""
        usage, spill = self._pool.usage(), self.spill
        n_states = spill.n_states if spill is not None and usage.n_slots else 0
        n_spilled = spill.n_pages if spill is not None else 0
        return replace(usage, n_spilled=n_spilled, n_evicted=self._n_evicted, n_states_spilled=n_states)
