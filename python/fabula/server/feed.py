"""Sends changes of sessions to the pages that show them.

A page first gets the state, then every change, in order. Changes are not stored: a page that reconnects gets the state
again. The text of answers is not sent here; a page follows the stream of each answer.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

from fabula.server.failures import ApiError
from fabula.server.observer import Observer
from fabula.server.runs import KEEP_ALIVE_S, Run, Source
from fabula.sessions.session import Session

What = Literal["state", "begun", "ended", "head", "tree", "tags", "settings", "deleted"]
Change = tuple[int, What, dict[str, Any]]

MOST = 256  # streams of one key at a time
LAG = 256  # changes a page may be behind before it is dropped; it reconnects and gets the state again


class Feed(Observer):
    """The changes of every session of a server."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._readers: dict[tuple[str, str], set[asyncio.Queue[Change | None]]] = {}
        self._closed = False

    # ---- Events -----------------------------------------------------------------------------------------------------

    def answer_started(self, run: Run, source: Source) -> None:
        if run.session_id is not None and source is run.sources[0]:
            self._send(run.tenant, run.session_id, "begun", run.events[0].data or {})

    def answer_ended(self, run: Run, source: Source, kind: str) -> None:
        if run.session_id is not None:
            data = {"stream_id": run.id, "answer": run.sources.index(source), "how": kind}
            self._send(run.tenant, run.session_id, "ended", data)

    def changed(self, session: Session, what: What, **data: Any) -> None:
        """A request changed or deleted a session."""
        now = {} if what == "deleted" else {"head_id": session.head.id, "can_redo": session.can_redo}
        self._send(session.tenant, session.id, what, now | data)

    def _send(self, tenant: str, session_id: str, what: What, data: dict[str, Any]) -> None:
        readers = self._readers.get((tenant, session_id))
        if not readers:
            return
        change = (next(self._numbers), what, data)
        for queue in list(readers):
            if queue.qsize() >= LAG:
                readers.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(change)

    # ---- Readers ----------------------------------------------------------------------------------------------------

    def check(self, tenant: str) -> None:
        """Raises ApiError 429 if a key has too many streams of changes."""
        n = sum(len(readers) for (owner, _), readers in self._readers.items() if owner == tenant)
        if n >= MOST:
            raise ApiError(429, "too_many_listeners", f"at most {MOST} streams of events at a time", retry_after=5)

    def close(self) -> None:
        """Ends every stream; for the end of the server."""
        self._closed = True
        for readers in self._readers.values():
            for queue in readers:
                queue.put_nowait(None)

    async def follow(
        self, tenant: str, session_id: str, state: Callable[[], dict[str, Any]]
    ) -> AsyncIterator[Change | None]:
        """The state and then every change; None when nothing happens for a while.

        Args:
            tenant, session_id: of the session.
            state: makes the JSON of the event `state`.
        """
        queue: asyncio.Queue[Change | None] = asyncio.Queue()
        readers = self._readers.setdefault((tenant, session_id), set())
        readers.add(queue)
        try:
            yield next(self._numbers), "state", state()
            while not self._closed:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        change = await queue.get()
                except TimeoutError:
                    yield None
                    continue
                if change is None:
                    return
                yield change
                if change[1] == "deleted":
                    return
        finally:
            readers.discard(queue)
            if not readers and self._readers.get((tenant, session_id)) is readers:
                del self._readers[tenant, session_id]
