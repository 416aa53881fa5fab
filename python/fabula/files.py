"""What the keepers of files share: a lock for one process at a time, names that survive a loss of power, and files that
appear only when they are whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, ClassVar

from fabula.errors import InvalidArgument, StoreError, StoreFull, StoreLocked, StoreReadOnly

# What a failure of the system means for whoever keeps files.
ERRORS_OF_WRITING: Mapping[int, type[StoreError]] = {
    errno.ENOSPC: StoreFull,
    errno.EDQUOT: StoreFull,
    errno.EROFS: StoreReadOnly,
    errno.EACCES: StoreReadOnly,
    errno.EPERM: StoreReadOnly,
}


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


@contextlib.contextmanager
def writing_whole(path: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name, on disk for good, when the block ends well, and never otherwise.

    Until then it lies beside that name, hidden; a block that raises leaves nothing.

    Args:
        path: its name.
        overwrite: whether a file of that name may be replaced.

    Raises:
        InvalidArgument: there is a file of that name, or a folder, or no folder to put it in.
        StoreFull, StoreReadOnly, StoreError: the system refused.
    """
    if path.is_dir():
        raise InvalidArgument(f"{path}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise InvalidArgument(f"{path}: there is no folder {path.parent}")
    _refuse_existing(path, overwrite)
    draft = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
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
        with contextlib.suppress(OSError):  # it is in place by now, or could not be made
            draft.unlink()


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if not overwrite and path.exists():
        raise InvalidArgument(f"{path}: exists already, and was not to be overwritten")
