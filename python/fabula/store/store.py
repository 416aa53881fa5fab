"""`Store`: durable sessions and turns."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

import sqlalchemy as sa

from fabula.errors import EngineError, InvalidArgument, StoreError
from fabula.files import FileLock
from fabula.store import changes, reading
from fabula.store.failures import translate
from fabula.store.location import Location, connect, find_location, make_engine, prepare_file
from fabula.store.migrate import migrate
from fabula.store.records import (
    Damaged,
    Match,
    SessionRecord,
    SessionSummary,
    TurnRecord,
    checked_tags,
    session_row,
    turn_row,
)
from fabula.store.writer import Snapshot, Watch, Writer

T = TypeVar("T")


class Store:
    """Sessions and turns on disk. Thread-safe.

    Writes are queued, and executed in order by the store's writer thread. Each returns a future whose `result()`
    returns when the change is committed and synced to disk. It raises a `StoreError` (full, read-only, corrupt) if that
    failed, and `InvalidArgument` if it refers to something that does not exist. A failed change has no effect, and
    later ones can succeed, for example when the disk has room again. Callbacks of a future run in the writer thread and
    must not wait for other writes. Reads see committed data.

    Close it by `close()` or a `with` block. It also closes itself when it is garbage collected and at exit. In a child
    of `os.fork` its methods raise `StoreError`.

    Attributes:
        name: the path, or the URL without its password.
    """

    def __init__(self, place: Location, engine: sa.Engine, writer: Writer, lock: FileLock | None) -> None:
        """Use `open`."""
        self.name = place.name
        self._place, self._engine, self._writer = place, engine, writer
        self._close = weakref.finalize(self, _shut, os.getpid(), writer, engine, lock)

    @classmethod
    def open(cls, place: str | os.PathLike[str], *, checkpoint_s: float = 0.5) -> Store:
        """Opens a store. Creates it if there is none, and migrates an older schema version.

        Args:
            place: a folder, file or URL; see `find_location`.
            checkpoint_s: seconds between checkpoints of unfinished turns.

        Raises:
            StoreLocked: another process, or another store in this one, uses the file.
            StoreTooNew: a newer version of Fabula wrote it.
            StoreReadOnly: the folder or file cannot be written.
            StoreCorrupt: the file is not a database, or a damaged one.
            StoreError: any other failure, such as an unreachable server.
            InvalidArgument: an invalid or unsupported URL.
        """
        found = find_location(place)
        try:
            with ExitStack() as undo:
                lock = prepare_file(found.file) if found.file is not None else None
                if lock is not None:
                    undo.callback(lock.close)
                engine = make_engine(found)
                undo.callback(engine.dispose)
                connection = undo.enter_context(connect(engine, write=True))
                migrate(connection, found.name)
                store = cls(found, engine, Writer(connection, found, checkpoint_s), lock)
                undo.pop_all()
                return store
        except Exception as error:
            translated = translate(error, found)
            raise translated from translated.__cause__

    # ---- Writing ----------------------------------------------------------------------------------------------------

    def put_session(self, session: SessionRecord) -> Future[None]:
        """Adds or updates a session.

        Raises:
            InvalidArgument: a value that cannot be stored. Raised immediately, as in every write.
            StoreError: the store is closed. Raised immediately, as in every write.
        """
        return self._writer.submit(partial(changes.put_session, row=session_row(session)))

    def put_turn(self, turn: TurnRecord, session: SessionRecord) -> Future[None]:
        """Adds or updates a turn with its tags, and its session, in one transaction. The parent turn must be stored or
        queued before."""
        if turn.session_id != session.id:
            raise InvalidArgument(f"turn {turn.id!r} is of session {turn.session_id!r}, not of {session.id!r}")
        row, tags = turn_row(turn, session.tenant), checked_tags(turn.tags)
        return self._writer.submit(partial(changes.put_turn, turn=row, tags=tags, session=session_row(session)))

    def put_tags(self, turn_id: str, tags: Iterable[str]) -> Future[None]:
        """Replaces the tags of a turn."""
        return self._writer.submit(partial(changes.put_tags, turn_id=turn_id, tags=checked_tags(tags)))

    def set_head(self, tenant: str, id: str, head_id: str | None, undone: Iterable[str] = ()) -> Future[None]:
        """Moves the head of a session, and replaces its redo stack."""
        return self._writer.submit(
            partial(
                changes.set_head, tenant=tenant, id=id, head_id=head_id, undone=tuple(undone), updated_at=time.time()
            )
        )

    def delete_turns(
        self, session: SessionRecord, turn_ids: Iterable[str], turn_ids_to_orphan: Iterable[str] = ()
    ) -> Future[None]:
        """Updates a session and deletes turns of it. Its base, head and redo stack must not contain them. Unknown turns
        are ignored; turns with children or forks are refused. Orphaned turns stay for forks, but leave the session."""
        ids = list(turn_ids)
        if kept := {session.base_id, session.head_id, *session.undone}.intersection(ids):
            raise InvalidArgument(f"session {session.id!r} still refers to turn {kept.pop()!r}")
        orphan = list(turn_ids_to_orphan)
        return self._writer.submit(partial(changes.delete_turns, session=session_row(session), ids=ids, orphan=orphan))

    def delete_session(
        self, tenant: str, id: str, turn_ids_to_delete: Iterable[str], turn_ids_to_orphan: Iterable[str] = ()
    ) -> Future[None]:
        """Deletes a session.

        Args:
            tenant, id: the session; unknown ones are ignored.
            turn_ids_to_delete: its turns, and orphaned ones that only it needed.
            turn_ids_to_orphan: its turns that forks need; with the former, all its turns.
        """
        return self._writer.submit(
            partial(
                changes.delete_session,
                tenant=tenant,
                id=id,
                delete=list(turn_ids_to_delete),
                orphan=list(turn_ids_to_orphan),
            )
        )

    def watch(self, snapshot: Snapshot) -> Watch:
        """Checkpoints an unfinished turn periodically, so that a crash leaves a partial turn.

        Args:
            snapshot: callback in the writer thread; returns the current turn and its session, or None if there is
                nothing to store yet. All writes wait for it, so it must be fast, and must not take a lock that a thread
                holds while it waits for a write. Its exceptions, and failed writes, go to `last_error`. ReferenceError
                ends the watch.

        Returns:
            The watch. Close it before storing the finished turn, under the same id.
        """
        return self._writer.watch(snapshot)

    def flush(self, timeout: float | None = None) -> None:
        """Waits until everything queued so far is committed or has failed.

        Args:
            timeout: in seconds; None for no limit.

        Raises:
            StoreError: timeout, or the store is closed.
        """
        try:
            self._writer.submit(lambda _: None).result(timeout)
        except TimeoutError:
            raise StoreError(f"{self.name}: what is queued was not written in {timeout} s", path=self.name) from None

    @property
    def last_error(self) -> EngineError | None:
        """The last background failure: of a checkpoint, or a damaged session in a list. None if there was none."""
        return self._writer.last_error

    # ---- Reading ----------------------------------------------------------------------------------------------------

    def sessions(self, tenant: str | None = None) -> list[SessionSummary]:
        """Sessions of a tenant, or all; the last changed first. Leaves out damaged ones; `check` lists them."""
        found, problems = self._read(partial(reading.list_sessions, tenant=tenant))
        if problems:
            self._writer.last_error = translate(Damaged("; ".join(problems)), self._place)
        return found

    def count(self, tenant: str | None = None, but: str = "") -> int:
        """The number of sessions, of one tenant or all; excludes names that begin with `but`."""
        return self._read(partial(reading.count_sessions, tenant=tenant, but=but))

    def search(
        self, tenant: str, text: str, *, session_id: str | None = None, but: str = "", limit: int = 100, offset: int = 0
    ) -> list[Match]:
        """Turns of a tenant, or of one session, whose prompt or answer has a text, in any case; the last made first.
        Leaves out sessions whose ids begin with `but`. Reads all of their texts."""
        return self._read(
            partial(
                reading.search, tenant=tenant, text=text, session_id=session_id, but=but, limit=limit, offset=offset
            )
        )

    def find(self, tenant: str, id: str) -> SessionRecord | None:
        """A session's record, without its turns; None if there is none.

        Raises:
            StoreCorrupt: the record is damaged.
        """
        return self._read(partial(reading.find_session, tenant=tenant, id=id))

    def load(self, tenant: str, id: str) -> tuple[SessionRecord, list[TurnRecord]]:
        """A session with its turns and the ancestors it was forked from: oldest first, parents before children.

        Raises:
            SessionNotFound: unknown session.
            StoreCorrupt: a row is damaged; names session and turn.
        """
        return self._read(partial(reading.load, tenant=tenant, id=id))

    def pasts_of_others(self, tenant: str, id: str) -> set[str]:
        """Ids of all ancestors of a tenant's forked sessions, except of session `id`."""
        return self._read(partial(reading.pasts_of_others, tenant=tenant, id=id))

    def check(self) -> list[str]:
        """Reads everything and returns a message for each problem."""
        try:
            return self._read(reading.check)
        except StoreError as error:
            return [error.message]

    def _read(self, query: Callable[[sa.Connection], T]) -> T:
        self._writer.check_usable()
        try:
            with connect(self._engine, write=False) as connection:
                return query(connection)
        except Exception as error:
            translated = translate(error, self._place)
            raise translated from translated.__cause__

    # ---- Ending -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Executes queued writes, checkpoints the database file, and releases the lock. Idempotent."""
        self._close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shut(pid: int, writer: Writer, engine: sa.Engine, lock: FileLock | None) -> None:
    if os.getpid() != pid:
        return  # in a forked child the resources belong to the parent
    writer.close()
    engine.dispose()
    if lock is not None:
        lock.close()
