"""File utilities: a lock between processes, durable file names, and files that appear only when complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, ClassVar

from fabula.errors import InvalidArgument, StoreError, StoreFull, StoreLocked, StoreReadOnly

# Error classes for the errno of a failed write.
ERRORS_OF_WRITING: Mapping[int, type[StoreError]] = {
    errno.ENOSPC: StoreFull,
    errno.EDQUOT: StoreFull,
    errno.EROFS: StoreReadOnly,
    errno.EACCES: StoreReadOnly,
    errno.EPERM: StoreReadOnly,
}


class FileLock:
    """An exclusive lock, which the kernel releases when this process ends, even by a crash.

    Args:
        file: to lock; created if missing.
        what: the locked resource, for the message.

    Raises:
        StoreLocked: another process, or another lock in this one, holds it.
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
        """Releases the lock. Idempotent. In a forked child it only closes the child's copy."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()

    @classmethod
    def leave_to_parent(cls) -> None:
        """In a forked child: closes its copies, which would keep the parent's locks after its end."""
        for lock in list(cls._held):
            lock.close()


os.register_at_fork(after_in_child=FileLock.leave_to_parent)


def fsync_folder(folder: Path) -> None:
    """Syncs a folder, so that new names in it survive a power failure."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def writing_whole(path: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears under its name, synced to disk, only when the block ends normally.

    Until then it has a hidden temporary name; if the block raises, it is removed.

    Args:
        path: of the file.
        overwrite: whether to replace an existing file.

    Raises:
        InvalidArgument: the file exists, is a folder, or its folder does not exist.
        StoreFull, StoreReadOnly, StoreError: the file cannot be written.
    """
    if path.is_dir():
        raise InvalidArgument(f"{path}: is a folder; give the path of a file")
    if not path.parent.is_dir():
        raise InvalidArgument(f"{path}: there is no folder {path.parent}")
    _refuse_existing(path, overwrite)
    draft = path.with_name(f".{path.name[:40]}.{os.urandom(4).hex()}.part")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _refuse_existing(path, overwrite)
        draft.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        if isinstance(error, StoreError) or error.errno is None:
            raise
        kind = ERRORS_OF_WRITING.get(error.errno, StoreError)
        raise kind(f"{path}: cannot be written: {error.strerror}", path=path) from error
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or could not be created
            draft.unlink()


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if not overwrite and path.exists():
        raise InvalidArgument(f"{path}: exists already; pass overwrite=True to replace it")
