"""The thread that writes: the only one that does, over one connection.

Everything queued while a transaction commits goes into the next one together (group commit), so that a disk which
takes its time to sync is asked once for many. If that transaction fails, its jobs run again one by one, so that only
those that are at fault fail.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

import sqlalchemy as sa

from fabula.errors import EngineError, StoreError
from fabula.store import changes
from fabula.store.failures import translate
from fabula.store.location import Place, checkpoint
from fabula.store.records import Row, SessionRecord, TurnRecord, checked_tags, session_row, turn_row

Change = Callable[[sa.Connection], None]
Snapshot = Callable[[], tuple[TurnRecord, SessionRecord] | None]


@dataclass(slots=True, eq=False)
class _Job:
    change: Change
    future: Future[None] = field(default_factory=Future)


@dataclass(slots=True, frozen=True)
class _Draft:
    """A turn that is being made, as rows."""

    turn: Row
    tags: tuple[str, ...]
    session: Row

    def write(self, connection: sa.Connection) -> None:
        changes.put_turn(connection, self.turn, self.tags, self.session)


class Watch:
    """A turn that is being made, which the writer stores from time to time. Made by `Store.watch`."""

    def __init__(self, writer: Writer, snapshot: Snapshot) -> None:
        self._writer, self._snapshot = writer, snapshot
        self._stored: _Draft | None = None

    def close(self, *, discard: bool = False) -> Future[None]:
        """Ends the watch. Once this returns, nothing of the draft is written any more; it waits for a checkpoint that
        is being written now. The snapshot function may still be called once, for nothing.

        Args:
            discard: also delete what was stored of the draft.

        Returns:
            Done when the draft is deleted; done already if there is nothing to delete.

        Raises:
            StoreError: the store is closed, and there is something to delete.
        """
        self._writer.unwatch(self)
        if discard and self._stored is not None:
            draft, self._stored = self._stored, None
            return self._writer.submit(partial(changes.discard_draft, turn=draft.turn))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def take(self) -> _Draft | None:
        """The draft as it is now; None when it is as it was stored last. For the writer.

        Raises:
            Exception: whatever the snapshot function raises.
        """
        records = self._snapshot()
        if records is None:
            return None
        turn, session = records
        row = turn_row(replace(turn, finish_reason=None), session.tenant)
        draft = _Draft(row, checked_tags(turn.tags), session_row(session))
        return None if draft == self._stored else draft

    def stored(self, draft: _Draft) -> None:
        """The draft is on disk. For the writer."""
        self._stored = draft


class Writer:
    """The thread, its queue and its watches.

    Args:
        connection: for writing; the thread closes it at its end.
        place: where that leads, for messages.
        checkpoint_s: seconds between two looks at the turns that are being made.

    Attributes:
        last_error: the last failure that nobody was waiting for; None so far.
    """

    def __init__(self, connection: sa.Connection, place: Place, checkpoint_s: float) -> None:
        self.last_error: EngineError | None = None
        self._connection, self._place, self._checkpoint_s = connection, place, checkpoint_s
        self._pid = os.getpid()
        # Reentrant, as Condition makes it: garbage collection may close a forgotten store in the middle of anything.
        self._changed = threading.Condition()
        self._jobs: list[_Job] = []
        self._watches: list[Watch] = []
        self._writing: list[Watch] = []  # whose drafts are in the transaction that runs now
        self._due = 0.0  # when the watches are looked at next, by the monotonic clock
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fabula-store", daemon=True)
        self._thread.start()

    def submit(self, change: Change) -> Future[None]:
        """Queues a change.

        Raises:
            StoreError: the store is closed, or belongs to the process that this one was forked from.
        """
        self.check_usable()
        job = _Job(change)
        with self._changed:
            self._check_open()
            self._jobs.append(job)
            self._changed.notify_all()
        return job.future

    def watch(self, snapshot: Snapshot) -> Watch:
        """Looks at a turn that is being made, until the watch is closed.

        Raises:
            StoreError: as `submit`.
        """
        self.check_usable()
        watch = Watch(self, snapshot)
        with self._changed:
            self._check_open()
            if not self._watches:
                self._due = time.monotonic() + self._checkpoint_s
            self._watches.append(watch)
            self._changed.notify_all()
        return watch

    def unwatch(self, watch: Watch) -> None:
        """Stops looking, and waits for the draft's transaction if it runs now."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            if watch in self._watches:
                self._watches.remove(watch)
            self._changed.wait_for(lambda: watch not in self._writing)

    def close(self) -> None:
        """Writes what is queued and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def check_usable(self) -> None:
        """Raises `StoreError` when the store is closed, or was forked from another process: no thread writes here then,
        and its locks may be held for ever."""
        if os.getpid() != self._pid:
            raise self._error("belongs to the process that this one was forked from; open it anew here")
        self._check_open()

    def _check_open(self) -> None:
        if self._closing:
            raise self._error("the store is closed")

    def _error(self, reason: str) -> StoreError:
        return StoreError(f"{self._place.name}: {reason}", path=self._place.name)

    # ---- In the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn_over():
                pass
            checkpoint(self._connection)
        except Exception as error:
            self.last_error = translate(error, self._place)
        finally:
            with self._changed:
                self._closing = True
                left, self._jobs, self._writing = self._jobs, [], []
                self._changed.notify_all()
            for job in left:
                job.future.set_exception(self._error("the store is closed"))
            with suppress(Exception):
                self._connection.close()

    def _turn_over(self) -> bool:
        """Writes what is there to write, waiting for it first; False when the store is closing and nothing is left."""
        with self._changed:
            while not self._jobs and not self._closing and not self._is_due():
                self._changed.wait(max(0.0, self._due - time.monotonic()) if self._watches else None)
            jobs, self._jobs = self._jobs, []
            due = list(self._watches) if self._is_due() and not self._closing else []
            if due:
                self._due = time.monotonic() + self._checkpoint_s
            if not jobs and not due:
                return not self._closing
        jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        # Outside the lock, as a snapshot may wait for a lock whose holder closes its watch.
        taken = [(watch, draft) for watch in due if (draft := self._take(watch)) is not None]
        with self._changed:
            drafts = [(watch, draft) for watch, draft in taken if watch in self._watches]
            self._writing = [watch for watch, _ in drafts]
        # Drafts last: the turns before them may be among the jobs.
        outcomes = self._write([*(job.change for job in jobs), *(draft.write for _, draft in drafts)])
        for (watch, draft), error in zip(drafts, outcomes[len(jobs) :], strict=True):
            if error is None:
                watch.stored(draft)
            else:
                self.last_error = error
        with self._changed:
            self._writing = []
            self._changed.notify_all()
        for job, error in zip(jobs, outcomes, strict=False):
            if error is None:
                job.future.set_result(None)
            else:
                job.future.set_exception(error)
        return True

    def _is_due(self) -> bool:
        return bool(self._watches) and time.monotonic() >= self._due

    def _take(self, watch: Watch) -> _Draft | None:
        try:
            return watch.take()
        except ReferenceError:  # what made the draft is gone: it stays as it was stored last
            with self._changed:
                if watch in self._watches:
                    self._watches.remove(watch)
            return None
        except Exception as error:
            self.last_error = translate(error, self._place)
            return None

    def _write(self, all_changes: list[Change]) -> list[EngineError | None]:
        """Makes changes together or, if that fails, each for itself; what went wrong with each, None for nothing."""
        if not all_changes:
            return []
        error = self._transaction(all_changes)
        if error is None or len(all_changes) == 1:
            return [error] * len(all_changes)
        return [self._transaction([change]) for change in all_changes]

    def _transaction(self, all_changes: list[Change]) -> EngineError | None:
        try:
            with self._connection.begin():
                for change in all_changes:
                    change(self._connection)
        except Exception as error:
            return translate(error, self._place)
        return None
