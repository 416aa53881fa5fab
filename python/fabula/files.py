"""What the keepers of files share: a lock for one process at a time, and names that survive a loss of power."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path
from typing import ClassVar

from fabula.errors import StoreLocked


class FileLock:
    """An exclusive lock, which the kernel releases when this process ends, however it ends.

    Args:
        file: to lock; made if missing.
        what: it stands for, for the message.

    Raises:
        StoreLocked: another process holds it, or another lock of this one.
        OSError: the file cannot be opened for writing.
    """

    _held: ClassVar[weakref.WeakSet[FileLock]] = weakref.WeakSet()

    def __init__(self, file: Path, what: Path) -> None:
        self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise StoreLocked(f"{what}: another process uses it, or this one does already", path=what) from None
        except OSError:
            self.close()
            raise
        self._held.add(self)

    def close(self) -> None:
        """Releases it; may be called twice. In a child made by fork this only closes the child's copy."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()

    @classmethod
    def leave_to_parent(cls) -> None:
        """After fork, in the child: a copy of the lock must not outlive the process that holds it."""
        for lock in list(cls._held):
            lock.close()


os.register_at_fork(after_in_child=FileLock.leave_to_parent)


def fsync_folder(folder: Path) -> None:
    """Makes new names in a folder survive a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
