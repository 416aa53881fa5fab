"""The store: sessions and turns that outlive the process."""

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
from fabula.store.location import Place, connect, find_place, make_engine, prepare_file
from fabula.store.migrate import migrate
from fabula.store.records import (
    Damaged,
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
    """Sessions and turns on disk. May be used by any number of threads.

    Writes are queued and made in order by a thread of the store's own. Each gives a future whose `result()` returns
    once the change is committed, and synced to the disk. It raises a `StoreError` (full, read-only, corrupt) when that
    failed, and `InvalidArgument` when what it refers to does not exist; nothing of that change is kept then, and later
    ones succeed once the disk has room again. Callbacks of a future run in the store's thread, and must not wait for
    other writes. Reads see what is committed.

    Leave it by `close()` or a `with` block; at the interpreter's end, and when it is forgotten, it closes itself. It is
    of no use in a child made by `os.fork`, where it raises `StoreError`.

    Attributes:
        name: the path, or the URL without its password.
    """

    def __init__(self, place: Place, engine: sa.Engine, writer: Writer, lock: FileLock | None) -> None:
        """For `open`."""
        self.name = place.name
        self._place, self._engine, self._writer = place, engine, writer
        self._close = weakref.finalize(self, _shut, os.getpid(), writer, engine, lock)

    @classmethod
    def open(cls, place: str | os.PathLike[str], *, checkpoint_s: float = 0.5) -> Store:
        """Opens a store; makes one where there is none, and brings one of an older version up to date.

        Args:
            place: a folder, a file or a URL, as `find_place` reads it.
            checkpoint_s: seconds between two checkpoints of turns that are being made.

        Raises:
            StoreLocked: another process, or another store of this one, uses the file.
            StoreTooNew: a newer Fabula wrote it.
            StoreReadOnly: the folder or file cannot be written.
            StoreCorrupt: the file is no database, or a damaged one.
            StoreError: any other failure, such as a server that does not answer.
            InvalidArgument: the URL means nothing here.
        """
        found = find_place(place)
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
            InvalidArgument: a value that cannot be kept; at once, as with every write.
            StoreError: the store is closed; at once, as with every write.
        """
        return self._writer.submit(partial(changes.put_session, row=session_row(session)))

    def put_turn(self, turn: TurnRecord, session: SessionRecord) -> Future[None]:
        """Adds or updates a turn with its tags, and its session, which must be `session`; together or not at all. The
        turn before must be stored, or be queued before."""
        if turn.session_id != session.id:
            raise InvalidArgument(f"turn {turn.id!r} is of session {turn.session_id!r}, not of {session.id!r}")
        row, tags = turn_row(turn, session.tenant), checked_tags(turn.tags)
        return self._writer.submit(partial(changes.put_turn, turn=row, tags=tags, session=session_row(session)))

    def put_tags(self, turn_id: str, tags: Iterable[str]) -> Future[None]:
        """Replaces the tags of a turn."""
        return self._writer.submit(partial(changes.put_tags, turn_id=turn_id, tags=checked_tags(tags)))

    def set_head(self, tenant: str, id: str, head_id: str | None, undone: Iterable[str] = ()) -> Future[None]:
        """Moves the head of a session, and replaces the heads that redo goes back to."""
        return self._writer.submit(
            partial(
                changes.set_head, tenant=tenant, id=id, head_id=head_id, undone=tuple(undone), updated_at=time.time()
            )
        )

    def delete_turns(
        self, session: SessionRecord, turn_ids: Iterable[str], turn_ids_to_orphan: Iterable[str] = ()
    ) -> Future[None]:
        """Deletes turns of a session and updates it, whose head and `undone` must be others. Turns that are not there
        are deleted already; those that a turn or session goes on from are refused. Those to orphan stay for forks, and
        are no longer listed by the session."""
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
            tenant, id: the session; one that is not there is deleted already.
            turn_ids_to_delete: turns to delete with it: its own, and those left by others that only it needed.
            turn_ids_to_orphan: its turns that forks go on from; with the former, all that it lists.
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
        """Stores a turn from time to time while it is being made, so that a crash leaves a partial turn.

        Args:
            snapshot: called by the store's thread; gives the turn and its session as they are now, or None while there
                is nothing to keep. All writes wait for it, so it must be quick, and must not take a lock whose holder
                waits for a write. What it raises, and a failure to write, go to `last_error`; ReferenceError says that
                there will be nothing any more.

        Returns:
            To be closed before the finished turn is put, under the same id.
        """
        return self._writer.watch(snapshot)

    def flush(self, timeout: float | None = None) -> None:
        """Waits until everything queued so far is committed, or has failed.

        Args:
            timeout: seconds; None for no limit.

        Raises:
            StoreError: it takes longer, or the store is closed.
        """
        try:
            self._writer.submit(lambda _: None).result(timeout)
        except TimeoutError:
            raise StoreError(f"{self.name}: what is queued was not written in {timeout} s", path=self.name) from None

    @property
    def last_error(self) -> EngineError | None:
        """The last failure that nobody was waiting for: a checkpoint, or a damaged session in a list; None so far."""
        return self._writer.last_error

    # ---- Reading ----------------------------------------------------------------------------------------------------

    def sessions(self, tenant: str | None = None) -> list[SessionSummary]:
        """Sessions, the one changed last first: of a tenant, or all. Damaged ones are left out; `check` names them."""
        found, problems = self._read(partial(reading.list_sessions, tenant=tenant))
        if problems:
            self._writer.last_error = translate(Damaged("; ".join(problems)), self._place)
        return found

    def count(self, tenant: str | None = None, but: str = "") -> int:
        """How many sessions there are, of a tenant or of all; without those whose names begin with `but`."""
        return self._read(partial(reading.count_sessions, tenant=tenant, but=but))

    def find(self, tenant: str, id: str) -> SessionRecord | None:
        """A session's record, without its turns; None if there is no such session.

        Raises:
            StoreCorrupt: it is not as it was written.
        """
        return self._read(partial(reading.find_session, tenant=tenant, id=id))

    def load(self, tenant: str, id: str) -> tuple[SessionRecord, list[TurnRecord]]:
        """A session with its own turns and the past it was forked from: oldest first, parents before children.

        Raises:
            SessionNotFound: there is no such session.
            StoreCorrupt: a row is not as it was written; names session and turn.
        """
        return self._read(partial(reading.load, tenant=tenant, id=id))

    def pasts_of_others(self, tenant: str, id: str) -> set[str]:
        """Ids of every turn that a tenant's sessions, but for `id`, were forked from, up to the beginning."""
        return self._read(partial(reading.pasts_of_others, tenant=tenant, id=id))

    def check(self) -> list[str]:
        """Reads everything and says what is wrong, in words; nothing, if all is well."""
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
        """Writes what is queued, moves it into the database file, and releases the lock. May be called twice."""
        self._close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shut(pid: int, writer: Writer, engine: sa.Engine, lock: FileLock | None) -> None:
    if os.getpid() != pid:
        return  # forked: everything is the parent's
    writer.close()
    engine.dispose()
    if lock is not None:
        lock.close()
