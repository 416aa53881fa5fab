"""Write-behind for the disk tier: evicting a page never waits for a disk.

    evict (pool's lock held)      put: the page's bytes, already copied, join a queue in memory
    thread "fabula-spill"         takes them from the queue and writes them to the folder, without a lock
    find  (no lock held)          get: from the queue while they are there, from the folder afterwards

The queue is bounded: what does not fit is not spilled, for a page on disk is only a cache. The thread ends when the
queue is empty.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from fabula.kv.spill import SpillFolder

MAX_QUEUED_BYTES = 256 << 20  # 1,000 pages of a 1B model; a disk of 500 MB/s writes them in half a second


class SpillWriter:
    """A SpillFolder that is written to by a thread of its own. Thread-safe.

    Args:
        folder: where pages go; closed by `close`.
        max_queued_bytes: of pages that wait to be written.
    """

    def __init__(self, folder: SpillFolder, max_queued_bytes: int = MAX_QUEUED_BYTES) -> None:
        self.folder = folder
        self._max_queued = max_queued_bytes
        self._queue: OrderedDict[bytes, npt.NDArray[np.uint8]] = OrderedDict()  # a page stays until it is on disk
        self._queued_bytes = self._n_queued_states = 0
        self._changed = threading.Condition()  # held over no I/O
        self._thread: threading.Thread | None = None
        self._closed = False
        self._pid = os.getpid()  # a forked child has neither the thread nor a lock that is safe to take

    def put(self, key: bytes, data: npt.NDArray[np.uint8]) -> bool:
        """Queues a page without waiting.

        Args:
            key: of the page.
            data: uint8 [page_bytes], the caller's no longer.

        Returns:
            False when the page is queued or on disk already, or the queue is full.
        """
        if os.getpid() != self._pid:
            return False
        with self._changed:
            full = self._queued_bytes + data.nbytes > self._max_queued
            if self._closed or full or key in self:
                return False
            if self._thread is None:
                thread = threading.Thread(target=self._write, name="fabula-spill")
                try:
                    thread.start()
                except RuntimeError:  # no more threads, or the interpreter ends: go on without
                    return False
                self._thread = thread
            self._queue[key] = data
            self._queued_bytes += data.nbytes
            self._n_queued_states += data.nbytes != self.folder.page_bytes
        return True

    def get(self, key: bytes, out: npt.NDArray[np.uint8]) -> bool:
        """Reads a page's bytes into `out`; False when it is not there or damaged. May wait for the disk."""
        queued = self._queue.get(key)
        if queued is not None:
            out[:] = queued
            return True
        return self.folder.get(key, out)

    def __contains__(self, key: bytes) -> bool:
        return key in self._queue or key in self.folder

    @property
    def n_pages(self) -> int:
        """Pages on disk and in the queue."""
        return self.folder.n_pages + len(self._queue) - self._n_queued_states

    @property
    def n_states(self) -> int:
        """States on disk and in the queue."""
        return self.folder.n_states + self._n_queued_states

    def drain(self, max_bytes: int = 0) -> None:
        """Waits for the disk until at most so many bytes are queued. The caller must hold no lock."""
        if os.getpid() == self._pid:
            with self._changed:
                self._changed.wait_for(lambda: self._queued_bytes <= max_bytes)

    def close(self) -> None:
        """Writes what is queued and closes the folder; may be called twice."""
        if os.getpid() == self._pid:
            with self._changed:
                self._closed = True
            self.drain()
        self.folder.close()

    def _write(self) -> None:
        """The thread: writes the oldest queued page until there is none."""
        while True:
            with self._changed:
                if not self._queue:
                    self._thread = None
                    return
                key, data = next(iter(self._queue.items()))
            with suppress(Exception):  # `last_error` has it; the pages after it are written all the same
                self.folder.put(key, data)
            with self._changed:
                del self._queue[key]
                self._queued_bytes -= data.nbytes
                self._n_queued_states -= data.nbytes != self.folder.page_bytes
                self._changed.notify_all()
