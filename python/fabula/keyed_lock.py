"""A lock for each name that somebody uses just now: work on one name may take long, and holds up no other."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class _Entry:
    __slots__ = ("lock", "n_users")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.n_users = 0  # those that hold it or wait for it


class KeyedLocks:
    """Re-entrant locks by name."""

    def __init__(self) -> None:
        self._guard = threading.Lock()  # of the dict alone
        self._entries: dict[Hashable, _Entry] = {}

    @contextmanager
    def of(self, name: Hashable) -> Iterator[None]:
        """Holds a name's lock during a `with` block."""
        with self._guard:
            entry = self._entries.setdefault(name, _Entry())
            entry.n_users += 1
        try:
            with entry.lock:
                yield
        finally:
            with self._guard:
                entry.n_users -= 1
                if not entry.n_users:
                    del self._entries[name]
