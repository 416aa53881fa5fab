"""The writer thread: executes all writes over one connection.

Jobs queued during a commit go into the next transaction together (group commit), so that many share one sync to disk.
If a transaction fails, its jobs run again one by one, so that only the faulty ones fail.
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
from fabula.store.location import Location, checkpoint
from fabula.store.records import Row, SessionRecord, TurnRecord, checked_tags, session_row, turn_row

Change = Callable[[sa.Connection], None]
Snapshot = Callable[[], tuple[TurnRecord, SessionRecord] | None]


@dataclass(slots=True, eq=False)
class _Job:
    change: Change
    future: Future[None] = field(default_factory=Future)


@dataclass(slots=True, frozen=True)
class _Draft:
    """An unfinished turn, as rows."""

    turn: Row
    tags: tuple[str, ...]
    session: Row

    def write(self, connection: sa.Connection) -> None:
        changes.put_turn(connection, self.turn, self.tags, self.session)


class Watch:
    """An unfinished turn, which the writer checkpoints periodically. Made by `Store.watch`."""

    def __init__(self, writer: Writer, snapshot: Snapshot) -> None:
        self._writer, self._snapshot = writer, snapshot
        self._stored: _Draft | None = None

    def close(self, *, discard: bool = False) -> Future[None]:
        """Ends the watch. Waits for a running checkpoint; afterwards the draft is not written any more. The snapshot
        function may still be called once; its result is ignored.

        Args:
            discard: also delete the stored draft.

        Returns:
            Done when the draft is deleted; done already if none was stored.

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
        """The current draft; None if it has not changed since it was stored. For the writer.

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
        """Marks a draft as stored. For the writer."""
        self._stored = draft


class Writer:
    """The thread, its queue and its watches.

    Args:
        connection: for writing; the thread closes it at its end.
        place: its location, for messages.
        checkpoint_s: seconds between checkpoints of unfinished turns.

    Attributes:
        last_error: the last background failure; None if there was none.
    """

    def __init__(self, connection: sa.Connection, place: Location, checkpoint_s: float) -> None:
        self.last_error: EngineError | None = None
        self._connection, self._place, self._checkpoint_s = connection, place, checkpoint_s
        self._pid = os.getpid()
        # Reentrant (Condition's default), because garbage collection may close a store at any point.
        self._changed = threading.Condition()
        self._jobs: list[_Job] = []
        self._watches: list[Watch] = []
        self._writing: list[Watch] = []  # whose drafts are in the current transaction
        self._due = 0.0  # time of the next checkpoint, by the monotonic clock
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fabula-store", daemon=True)
        self._thread.start()

    def submit(self, change: Change) -> Future[None]:
        """Queues a change.

        Raises:
            StoreError: the store is closed, or this is a forked child.
        """
        self.check_usable()
        job = _Job(change)
        with self._changed:
            self._check_open()
            self._jobs.append(job)
            self._changed.notify_all()
        return job.future

    def watch(self, snapshot: Snapshot) -> Watch:
        """Starts to checkpoint an unfinished turn, until the watch is closed.

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
        """Ends a watch, and waits for a running transaction with its draft."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            if watch in self._watches:
                self._watches.remove(watch)
            self._changed.wait_for(lambda: watch not in self._writing)

    def close(self) -> None:
        """Executes queued writes and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def check_usable(self) -> None:
        """Raises `StoreError` if the store is closed, or in a forked child, where no writer thread runs and locks may
        never be released."""
        if os.getpid() != self._pid:
            raise self._error("was opened before os.fork(); open it again in this process")
        self._check_open()

    def _check_open(self) -> None:
        if self._closing:
            raise self._error("the store is closed")

    def _error(self, reason: str) -> StoreError:
        return StoreError(f"{self._place.name}: {reason}", path=self._place.name)

    # ---- In the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._run_once():
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

    def _run_once(self) -> bool:
        """Waits for work and does it; False when the store is closing and nothing is left."""
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
        # Outside the lock: a snapshot may wait for a lock of a thread that is closing its watch.
        taken = [(watch, draft) for watch in due if (draft := self._take(watch)) is not None]
        with self._changed:
            drafts = [(watch, draft) for watch, draft in taken if watch in self._watches]
            self._writing = [watch for watch, _ in drafts]
        # Drafts last: their parents may be among the jobs.
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
        except ReferenceError:  # the owner of the draft is gone: keep the stored one
            with self._changed:
                if watch in self._watches:
                    self._watches.remove(watch)
            return None
        except Exception as error:
            self.last_error = translate(error, self._place)
            return None

    def _write(self, all_changes: list[Change]) -> list[EngineError | None]:
        """Commits changes together or, if that fails, one by one. Returns the error of each, or None."""
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
