"""Runs: answers being generated for clients, each with the log of events that its streams read.

A run keeps the events of its answers, so a client can rejoin a broken stream at any event. A run without readers is
cancelled unless it runs in the background.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fabula.engine.decoding import Piece
from fabula.engine.generation import Generation
from fabula.errors import EngineError
from fabula.server.failures import INTERNAL, ApiError, ended_early, of_engine, stopped
from fabula.server.observer import Observer, notify
from fabula.sessions.reply import Reply

Source = Reply | Generation

LAG = 64  # events a reader may be behind before the answer waits for it
MAX_BATCH = 64  # events that a reader gets at once: encoding them takes the event loop about 2 ms
LAG_S = 30.0  # seconds the answer waits; then the reader is dropped
MAX_KEPT = 256  # finished runs that can be rejoined
MAX_KEPT_EVENTS = 200_000  # of those runs together: some 100 MB, less without `n_logprobs`
KEEP_ALIVE_S = 15.0  # between comments on an idle stream; proxies close streams that are silent for longer

# Pieces of a fast answer are sent in batches, since every write wakes a reader, which takes CPU time from the engine.
# The first piece is sent at once. Later ones wait a tenth of the answer's time so far, at most a thirtieth of a second,
# and for eight others at most.
MAX_REST_S, REST_SHARE, MAX_TOGETHER = 1 / 30, 0.1, 8


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a run.

    Attributes:
        kind: "start", "token", "done", "cancelled" or "error".
        index: which of the run's answers, from 0.
        piece: of a token.
        data: JSON of any other event.
    """

    kind: str
    index: int = 0
    piece: Piece | None = None
    data: dict[str, Any] | None = None


class Run:
    """Answers being generated.

    Args:
        sources: the answers.
        tenant: name of the key.
        model: name of the model.
        describe: JSON of an answer that has ended, by its index; called in a worker thread, released at the end.
        start: JSON of the first event.
        background: whether it continues without readers.
        partial_fails: whether an answer that the server ended early is an error: the APIs of others have no finish
            reason for it, and their clients would take it for complete, or for as long as it was asked to be.
        observers: notified of events.
        request_id: of the request that started it, for logs.

    Attributes:
        id: for rejoining.
        events: so far.
        session_id: of the session the answers belong to; None for none.
        is_done: whether all have ended.
        is_left: whether it ends because its last reader left.
        on_end: callback at the end of all answers; None for none.
        error: the first failure of any answer; None for none.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        tenant: str,
        model: str,
        describe: Callable[[int], dict[str, Any]],
        start: dict[str, Any] | None = None,
        session_id: str | None = None,
        background: bool = False,
        partial_fails: bool = False,
        observers: Sequence[Observer] = (),
        request_id: str = "",
    ) -> None:
        self.id = "run_" + secrets.token_urlsafe(16)
        self.sources, self.tenant, self.model, self.session_id = tuple(sources), tenant, model, session_id
        self.request_id = request_id
        self.background, self.is_done, self.is_left = background, False, False
        self.error: ApiError | None = None
        self.results: list[dict[str, Any] | None] = [None] * len(self.sources)
        self.finished_at = 0.0
        self._describe, self._observers = describe, observers
        self.events: list[Event] = [Event("start", data={"stream_id": self.id} | (start or {}))]
        self._readers: set[Reader] = set()
        self._stopping, self._partial_fails = False, partial_fails
        self._stopped_by: ApiError | None = None  # why `stop` was called
        self._moved = asyncio.Event()  # a reader took events, or left
        self._left = len(self.sources)
        self.on_end: Callable[[Run], None] | None = None
        for source in self.sources:
            notify(observers, Observer.answer_started, self, source)
        self._tasks = [asyncio.create_task(self._pump(i)) for i in range(len(self.sources))]

    # ---- Generating -------------------------------------------------------------------------------------------------

    async def _pump(self, index: int) -> None:
        """Takes the pieces of one answer to its end."""
        source, generation = self.sources[index], self._generation(index)
        last = begin = time.perf_counter()
        n_pieces = 0
        event: Event | None = None
        kind = "error"
        try:
            async for piece in source:
                seconds, last = generation.made_at - last, generation.made_at
                notify(self._observers, Observer.token, self, source, seconds)
                n_pieces += 1
                begin = last if n_pieces == 1 else begin
                self._append(Event("token", index, piece))
                if self._is_behind():
                    await self._wait_for_readers()
                elif not (generation.is_ready or piece.finish_reason or self._stopping):
                    taken = last - begin
                    await asyncio.sleep(min(MAX_REST_S, REST_SHARE * taken, MAX_TOGETHER * taken / n_pieces))
                if self._stopping:  # pieces generated ahead are dropped: the turn ends here
                    await asyncio.to_thread(source.cancel)
            event = await self._ended(index)
            kind = "cancelled" if generation.finish_reason == "cancelled" else "done"
        except EngineError as error:
            event = self._failed(of_engine(error), index, error)
        except asyncio.CancelledError:
            event = self._failed(stopped(), index, None)
            raise
        except Exception as error:
            event = self._failed(INTERNAL, index, error)
        finally:
            notify(self._observers, Observer.answer_ended, self, source, kind)
            self._left -= 1
            if not self._left:
                self._end()
            if event is not None:
                self._append(event)

    def _end(self) -> None:
        """All answers have ended. Events stay for rejoining; answers and the request are released."""
        self.is_done, self.finished_at = True, time.monotonic()
        self.sources, self._describe = (), _describe_nothing
        if self.on_end is not None:
            self.on_end(self)

    async def _ended(self, index: int) -> Event:
        result = self.results[index] = await asyncio.to_thread(self._describe, index)
        reason = self._generation(index).finish_reason
        error = ended_early(reason) if self._partial_fails else None
        if error is not None:
            return self._failed((reason == "cancelled" and self._stopped_by) or error, index, None)
        return Event("cancelled" if reason == "cancelled" else "done", index, data=result)

    def _failed(self, shown: ApiError, index: int, error: BaseException | None) -> Event:
        self.error = self.error or shown
        if error is not None:
            notify(self._observers, Observer.failed, self, error)
        return Event("error", index, data=shown.body())

    def _generation(self, index: int) -> Generation:
        source = self.sources[index]
        return source.generation if isinstance(source, Reply) else source

    def _append(self, event: Event) -> None:
        self.events.append(event)
        for reader in self._readers:
            reader.news.set()

    # ---- Reading ----------------------------------------------------------------------------------------------------

    def follow(self, after: int = -1) -> Follower:
        """Events after number `after`, in batches; an empty list when nothing happens for a while.

        The follower counts as a reader from this call on, even if it never takes an event. When the last reader leaves,
        the run ends.
        """
        return Follower(self, after)

    def join(self, reader: Reader) -> None:
        """Adds a reader."""
        self._readers.add(reader)

    def leave(self, reader: Reader) -> None:
        """Removes a reader; may be called twice."""
        if reader in self._readers:
            self._readers.discard(reader)
            self._moved.set()
            if not self._readers and not self.background and not self.is_done:
                self.is_left = True
                self.abandon()

    def taken(self) -> None:
        """A reader has taken events."""
        self._moved.set()

    async def finish(self) -> list[dict[str, Any]]:
        """Waits for the end.

        Returns:
            The results of `describe`, one for each answer.

        Raises:
            ApiError: an answer failed.
        """
        follower = self.follow()
        try:
            async for _ in follower:
                pass
        finally:
            follower.close()
        if self.error is not None:
            raise self.error
        return [result for result in self.results if result is not None]

    def _is_behind(self) -> bool:
        """Whether every reader is too far behind. One fast reader keeps the run going."""
        positions = [reader.position for reader in self._readers if not reader.given_up]
        return bool(positions) and len(self.events) - max(positions) > LAG

    async def _wait_for_readers(self) -> None:
        while self._is_behind() and not self._stopping:
            self._moved.clear()
            try:
                async with asyncio.timeout(LAG_S):
                    await self._moved.wait()
            except TimeoutError:
                if self._moved.is_set():  # just now: the loop itself was late
                    continue
                for reader in self._readers:
                    reader.given_up = True
                if not self.background:
                    self.abandon()
                return

    # ---- Ends -------------------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Requests the end of the answers; does not block."""
        self._stopping = True
        self._moved.set()
        for i in range(len(self.sources)):
            self._generation(i).abandon()

    async def stop(self, why: ApiError | None = None) -> None:
        """Ends the answers, which keep the pieces that were read. Returns when they have ended.

        Args:
            why: for clients that get an error for a partial answer; None: somebody asked for it.
        """
        self._stopped_by = self._stopped_by or why
        self.abandon()
        await asyncio.wait(self._tasks)


def _describe_nothing(index: int) -> dict[str, Any]:
    raise AssertionError(f"answer {index} has been described")


class Reader:
    """A reader of a run: its position, and whether there are new events."""

    def __init__(self, position: int) -> None:
        self.position, self.news, self.given_up = position, asyncio.Event(), False


class Follower(AsyncIterator[list[tuple[int, Event]]]):
    """Follows a run from an event on; see `Run.follow`. It leaves when it is closed or destroyed."""

    def __init__(self, run: Run, after: int) -> None:
        self._run, self._reader = run, Reader(after + 1)
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        self._timer = self._loop.call_later(KEEP_ALIVE_S, _wake_silent, weakref.ref(self))
        run.join(self._reader)

    async def __anext__(self) -> list[tuple[int, Event]]:
        run, reader = self._run, self._reader
        while not reader.given_up:
            if reader.position < len(run.events):
                self._heard = self._loop.time()
                first = reader.position
                reader.position = min(first + MAX_BATCH, len(run.events))
                run.taken()
                if reader.position < len(run.events):
                    await asyncio.sleep(0)  # a long replay yields to other tasks after each batch
                return list(enumerate(run.events[first : reader.position], first))
            if run.is_done:
                break
            reader.news.clear()
            await reader.news.wait()
            if self._loop.time() - self._heard >= KEEP_ALIVE_S and reader.position == len(run.events):
                self._heard = self._loop.time()
                if not (run.is_done or reader.given_up):
                    return []
        self.close()
        raise StopAsyncIteration

    def wake_if_silent(self) -> None:
        """Wakes the reader for a keep-alive if nothing happened for a while; checks again later."""
        silent = self._loop.time() - self._heard
        if silent >= KEEP_ALIVE_S:
            self._reader.news.set()
        wait = KEEP_ALIVE_S - silent if silent < KEEP_ALIVE_S else KEEP_ALIVE_S
        self._timer = self._loop.call_later(wait, _wake_silent, weakref.ref(self))

    def close(self) -> None:
        """Stops reading; may be called twice."""
        self._timer.cancel()
        self._run.leave(self._reader)

    def __del__(self) -> None:
        if hasattr(self, "_loop"):
            with suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(self._run.leave, self._reader)


def _wake_silent(follower: weakref.ref[Follower]) -> None:
    found = follower()
    if found is not None:
        found.wake_if_silent()


class Runs:
    """Runs of a server: the active ones and, for a while, finished ones of sessions. Other runs are dropped when they
    end, as no client knows their id.

    Args:
        keep_s: seconds to keep a finished run, unless there are too many.
    """

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None  # while there are finished runs

    def add(self, run: Run) -> None:
        """Adds a run that has just started."""
        self._runs[run.id] = run
        run.on_end = self._ended

    def _ended(self, run: Run) -> None:
        if run.session_id is None:
            del self._runs[run.id]
        else:
            self.forget_old()

    def find(self, id: str, tenant: str) -> Run | None:
        """A run of this key; None if there is none."""
        run = self._runs.get(id)
        return run if run is not None and run.tenant == tenant else None

    def forget_old(self) -> None:
        """Drops finished runs that are too old or too many, and schedules the next call."""
        old, n_kept, n_events = time.monotonic() - self._keep_s, 0, 0
        for run in reversed([run for run in self._runs.values() if run.is_done]):
            n_kept, n_events = n_kept + 1, n_events + len(run.events)
            if run.finished_at < old or n_kept > MAX_KEPT or n_events > MAX_KEPT_EVENTS:
                del self._runs[run.id]
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        ends = [run.finished_at for run in self._runs.values() if run.is_done]
        if ends:
            wait = max(0.0, min(ends) + self._keep_s - time.monotonic()) + 0.001
            self._timer = asyncio.get_running_loop().call_later(wait, self.forget_old)

    def active(self, tenant: str | None = None) -> list[Run]:
        """Active runs, of one key or all."""
        return [run for run in self._runs.values() if not run.is_done and tenant in (None, run.tenant)]

    def of_session(self, tenant: str, session_id: str) -> list[Run]:
        """Active runs of a session."""
        return [run for run in self.active(tenant) if run.session_id == session_id]
