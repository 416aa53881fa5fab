"""Reading a prefix back: pages in memory are shared at once, those on disk are read by threads that may wait for it.

The prefix of a hybrid ends at a state: on disk it lies with the page that it ends in, which need not be full.

A `PrefixRead` has the pages that are read so far. It can be canceled at any moment without waiting for the disk: the
reader notices under the pool's lock, before it allocates the next page.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fabula._native import PAGE_POSITIONS
from fabula.errors import OutOfMemory
from fabula.kv.pages import HOLE, PagePool, Sequence
from fabula.kv.prefix import KEY_BYTES, Window
from fabula.kv.states import Rank, State, state_key
from fabula.lean_dataclasses import dataclass

MAX_READERS = 4  # threads of a model; more reads at once make a disk no faster (an estimate)


def partial_key(key: bytes) -> bytes:
    """The key on disk of a page without its windowed part; those bytes of the file mean nothing."""
    return blake2b(key, digest_size=KEY_BYTES, person=b"fabula partial").digest()


class Source(Protocol):
    """Where pages are read from; see `fabula.kv.cache.Spill`."""

    def get(self, key: bytes, out: npt.NDArray[np.uint8]) -> bool: ...


@dataclass(frozen=True, slots=True)
class StoredState:
    """A state on disk.

    Attributes:
        n_tokens: before it.
        name: see `State.name`.
    """

    n_tokens: int
    name: tuple[bytes, bytes]

    @property
    def key(self) -> bytes:
        return state_key(*self.name)


class PrefixRead:
    """The pages of one prefix, while they are read.

    Args:
        pool: they are read into.
        keys: prefix hashes of the pages, from the first on.
        is_seen: for each page, whether a token after the prefix sees it; the others become holes.
        first_whole: the first page whose windowed part is seen.
        window: of the sequence.
        source: the disk; None for pages in memory only.
        state: at which a hybrid's prefix ends, after the last of the pages; None without recurrent layers.

    Attributes:
        keys: as given.
        is_done: nothing more will be read.
    """

    def __init__(
        self,
        pool: PagePool,
        keys: list[bytes],
        is_seen: list[bool],
        first_whole: int,
        window: Window,
        source: Source | None,
        state: StoredState | None = None,
    ) -> None:
        self.keys = keys
        self.is_done = False
        self._wanted = state
        self._state: State | None = None
        self._pool, self._is_seen, self._window, self._source = pool, is_seen, window, source
        self._first_whole = first_whole
        self._pages: list[int] = []  # under the pool's lock, as the next two
        self._n_dropped = 0  # of those pages, as in a Sequence: a page without its windowed part is the last of them
        self._canceled = False

    def run(self) -> None:
        """Reads until a page is neither in memory nor on disk, or cannot be allocated. May wait for the disk: the
        caller holds no lock."""
        try:
            for key, seen in zip(self.keys, self._is_seen, strict=True):
                if not (self._add(key) if seen else self._append(HOLE)):
                    return
            if self._wanted is not None and self._source is not None:
                self._read_state(self._wanted, self._source)
        finally:
            self.is_done = True

    def _add(self, key: bytes) -> bool:
        if self._share(key):
            return True
        if self._canceled or self._source is None:
            return False
        data = np.empty(self._pool.page_bytes, np.uint8)
        is_whole = self._source.get(key, data)
        if not is_whole and (self._needs_whole or not self._source.get(partial_key(key), data)):
            return False
        with self._pool.lock:
            if self._canceled:
                return False
            if self._share(key):  # another thread has read it meanwhile
                return True
            try:
                (page,) = self._pool.take(1)
            except OutOfMemory:
                return False
            self._pool.write(page, data)
            if not is_whole:
                self._pool.drop([page])
            self._pool.name(page, key)
            return self._append(page, is_whole=is_whole)

    def _read_state(self, wanted: StoredState, source: Source) -> None:
        """Reads the state, and the page that it ends in unless that is full."""
        states, page_bytes = self._pool.states, self._pool.page_bytes
        data = np.empty(self._pool.state_record_bytes, np.uint8)
        if states is None or not source.get(wanted.key, data):
            return
        with self._pool.lock:
            if self._canceled:
                return
            try:
                tail = self._pool.take(1 if wanted.n_tokens % PAGE_POSITIONS else 0)
            except OutOfMemory:
                return
            try:
                state = states.take()
            except OutOfMemory:
                self._pool.give_back(tail)
                return
            states.write(state, data[page_bytes:])
            for page in tail:
                self._pool.write(page, data[:page_bytes])
                self._pool.append_to(page, 0, wanted.n_tokens % PAGE_POSITIONS)
                self._append(page)
            state.position, state.rank = wanted.n_tokens, Rank.END
            self._state = states.publish(state, wanted.name)
            state.pinned = True  # until a sequence has it
            states.touch(self._state)

    @property
    def _needs_whole(self) -> bool:
        """Whether the next page is needed with its windowed part."""
        return len(self._pages) >= self._first_whole

    def _share(self, key: bytes) -> bool:
        with self._pool.lock:
            page = self._pool.index.page(key)
            if page is None or self._canceled:
                return False
            is_whole = self._pool.is_whole(page)
            if not is_whole and self._needs_whole:
                return False
            self._pool.share([page], 0 if is_whole else 1)
            return self._append(page, is_whole=is_whole)

    def _append(self, page: int, *, is_whole: bool = True) -> bool:
        with self._pool.lock:
            if self._canceled:
                return False
            self._pages.append(page)
            if not is_whole:  # none before it is needed, either
                self._pool.drop(self._pages[self._n_dropped : -1])
                self._n_dropped = len(self._pages)
            return True

    @property
    def n_tokens(self) -> int:
        """Tokens of the prefix when all is read."""
        return len(self.keys) * PAGE_POSITIONS if self._wanted is None else self._wanted.n_tokens

    @property
    def n_pages(self) -> int:
        """Pages in its table so far, holes included."""
        return len(self._pages)

    def cancel(self) -> None:
        """Releases the pages, and reads no more. Waits for no disk; may be called twice."""
        with self._pool.lock:
            self._canceled = True
            pages, self._pages = self._pages, []
            self._state = None
            self._pool.give_back(pages, self._n_dropped)

    def take(self) -> Sequence | None:
        """What was read, as a sequence of the caller's; None if that is nothing, or a text could not go on after it."""
        with self._pool.lock:
            pages, self._pages = self._pages, []
            state, self._state = self._state, None
            if not pages:
                return None
            sequence = Sequence.of(self._pool, pages, self._window, self._n_dropped, state)
            if state is not None:
                state.pinned = False
        if sequence.usable(sequence.n_tokens) < sequence.n_tokens:
            sequence.close()
            return None
        return sequence

    def __del__(self) -> None:
        if getattr(self, "_pages", None):
            self._pool.abandon(self._pages, False, self._n_dropped)


class ReaderThreads:
    """Runs reads in threads of its own, at most MAX_READERS at a time; they end when nothing is left to read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held over no read
        self._queue: deque[tuple[PrefixRead, Callable[[], None]]] = deque()
        self._n_threads = 0

    def submit(self, read: PrefixRead, on_done: Callable[[], None]) -> None:
        """Runs a read soon, and then calls `on_done` in the reader's thread. Does not wait."""
        with self._lock:
            self._queue.append((read, on_done))
            if self._n_threads == MAX_READERS:
                return
            # Daemons: the process may end while a disk stands still.
            thread = threading.Thread(target=self._work, name="fabula-read", daemon=True)
            try:
                thread.start()
                self._n_threads += 1
                return
            except RuntimeError:  # no more threads, or the interpreter ends
                if self._n_threads:
                    return
                self._queue.pop()
        read.is_done = True  # without any page: they are recomputed
        on_done()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._n_threads -= 1
                    return
                read, on_done = self._queue.popleft()
            with suppress(Exception):  # what could not be read is recomputed
                read.run()
            on_done()
            del read, on_done  # or an idle thread would keep their pages
