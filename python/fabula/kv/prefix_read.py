"""Reading a prefix back: pages in memory are shared at once, those on disk are read by threads that may wait for it.

A `PrefixRead` has the pages that are read so far. It can be canceled at any moment without waiting for the disk: the
reader notices under the pool's lock, before it allocates the next page.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fabula.errors import OutOfMemory
from fabula.kv.pages import HOLE, PagePool, Sequence
from fabula.kv.prefix import Window

MAX_READERS = 4  # threads of a model; more reads at once make a disk no faster (an estimate)


class Source(Protocol):
    """Where pages are read from; see `fabula.kv.cache.Spill`."""

    def get(self, key: bytes, out: npt.NDArray[np.uint8]) -> bool: ...


class PrefixRead:
    """The pages of one prefix, while they are read.

    Args:
        pool: they are read into.
        keys: prefix hashes of the pages, from the first on.
        is_seen: for each page, whether a token after the prefix sees it; the others become holes.
        window: of the sequence.
        source: the disk; None for pages in memory only.

    Attributes:
        keys: as given.
        is_done: nothing more will be read.
    """

    def __init__(
        self, pool: PagePool, keys: list[bytes], is_seen: list[bool], window: Window, source: Source | None
    ) -> None:
        self.keys = keys
        self.is_done = False
        self._pool, self._is_seen, self._window, self._source = pool, is_seen, window, source
        self._pages: list[int] = []  # under the pool's lock, as the next one
        self._canceled = False

    def run(self) -> None:
        """Reads until a page is neither in memory nor on disk, or cannot be allocated. May wait for the disk: the
        caller holds no lock."""
        try:
            for key, seen in zip(self.keys, self._is_seen, strict=True):
                if not (self._add(key) if seen else self._append(HOLE)):
                    return
        finally:
            self.is_done = True

    def _add(self, key: bytes) -> bool:
        if self._share(key):
            return True
        if self._canceled or self._source is None:
            return False
        data = np.empty(self._pool.page_bytes, np.uint8)
        if not self._source.get(key, data):
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
            self._pool.name(page, key)
            return self._append(page)

    def _share(self, key: bytes) -> bool:
        with self._pool.lock:
            page = self._pool.index.page(key)
            if page is None or self._canceled:
                return False
            self._pool.share([page])
            return self._append(page)

    def _append(self, page: int) -> bool:
        with self._pool.lock:
            if not self._canceled:
                self._pages.append(page)
            return not self._canceled

    @property
    def n_pages(self) -> int:
        """Pages in its table so far, holes included."""
        return len(self._pages)

    def cancel(self) -> None:
        """Releases the pages, and reads no more. Waits for no disk; may be called twice."""
        with self._pool.lock:
            self._canceled = True
            pages, self._pages = self._pages, []
            self._pool.give_back(pages)

    def take(self) -> Sequence | None:
        """What was read, as a sequence of the caller's; None if that is nothing, or a text could not go on after it."""
        with self._pool.lock:
            pages, self._pages = self._pages, []
        if not pages:
            return None
        sequence = Sequence.of(self._pool, pages, self._window)
        if sequence.usable(sequence.n_tokens) < sequence.n_tokens:
            sequence.close()
            return None
        return sequence

    def __del__(self) -> None:
        if getattr(self, "_pages", None):
            self._pool.abandon(self._pages, False)


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
