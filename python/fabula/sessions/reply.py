"""A reply: a generation, and a callback for its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace

from fabula.engine.drafts import DraftTexts
from fabula.engine.generation import Generation, Piece, Timings
from fabula.errors import EngineError
from fabula.sessions.model_handle import LoadedModel
from fabula.sessions.planning import Plan
from fabula.sessions.policy import ContextPolicy
from fabula.sessions.turn import Turn


class Reply(Iterator[Piece], AsyncIterator[Piece]):
    """Pieces of an answer as they are generated; the turn is in the tree when the last one is returned.

    Iterate over it (`for` or `async for`), or call `text()`. `cancel()`, leaving a `with` block or dropping the last
    reference ends it early; the pieces that were read stay as a partial turn.

    Attributes:
        turn: the finished turn; None while pieces may come, and when an error ended the reply: then the session is as
            it was before.
        begun_text: text the answer begins with, before the first piece.
        generation: generates it.
        selects: whether the turn becomes the head.
    """

    def __init__(
        self,
        generation: Generation,
        draft: Turn,
        lock: threading.RLock,
        on_end: Callable[[Reply, Turn | None], None],
        on_forgotten: Callable[[Reply], None],
        *,
        selects: bool,
    ) -> None:
        """Args: draft: the turn without an answer. lock: held while the reply ends. on_end: called once, with the turn,
        or None if there is none to keep. on_forgotten: called by the destructor of a reply that has not ended."""
        self.turn: Turn | None = None
        self.begun_text = generation.begun_text
        self.generation, self.selects = generation, selects
        self._draft, self._lock = draft, lock
        self._on_end, self._left = on_end, on_forgotten
        self._done = False

    # ---- Reading ----------------------------------------------------------------------------------------------------

    def __next__(self) -> Piece:
        if self._done:
            raise StopIteration
        try:
            piece = next(self.generation)
        except BaseException as error:  # StopIteration too: cancelled by another thread, or out of time
            self._end(failed=isinstance(error, EngineError))
            raise
        if piece.finish_reason:
            self._end()
        return piece

    def __aiter__(self) -> Reply:
        return self

    async def __anext__(self) -> Piece:
        if self._done:
            raise StopAsyncIteration
        try:
            piece = await anext(self.generation)
        except BaseException as error:  # CancelledError too
            await self._end_in_thread(failed=isinstance(error, EngineError))
            raise
        if piece.finish_reason:
            await self._end_in_thread()
        return piece

    @property
    def number(self) -> int:
        """The number of its turn."""
        return self._draft.number

    @property
    def prompt(self) -> str:
        """The user input as text for display."""
        return self._draft.prompt

    @property
    def parent_id(self) -> str:
        """The turn it follows; "" for the empty start."""
        return self._draft.parent.id if self._draft.parent is not None else ""

    def text(self) -> str:
        """Runs to the end and returns the whole text, with `begun_text`."""
        for _ in self:
            pass
        return self.generation.read_so_far()[1]

    async def atext(self) -> str:
        """`text`, without blocking the event loop."""
        async for _ in self:
            pass
        return self.generation.read_so_far()[1]

    @property
    def timings(self) -> Timings:
        """Times so far."""
        return self.generation.timings

    def draft(self) -> Turn:
        """The turn with the pieces that were read: a new object with the same id each time."""
        token_ids, text = self.generation.read_so_far()
        return replace(
            self._draft,
            text=text,
            token_ids=token_ids,
            finish_reason=self.generation.finish_reason,
            timings=self.generation.timings,
        )

    # ---- The end ----------------------------------------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        """Whether it has ended, for any reason."""
        return self._done

    def cancel(self) -> None:
        """Ends the reply; may be called at any time, and twice. A reply without any token leaves no turn.

        Raises:
            StoreError: the turn could not be kept; the session is as it was before.
        """
        self._end()

    def _end(self, *, failed: bool = False) -> None:
        """Ends the reply: the first call stops the generation and calls `on_end`; later ones do nothing."""
        if self._done:
            return
        self.generation.cancel()  # before the lock: it waits for the engine; nothing happens if it has finished
        with self._lock:
            if self._done:
                return
            has_answer = len(self.generation.token_ids) > self._draft.n_begun
            turn = self.draft() if has_answer and not failed else None
            try:
                self._on_end(self, turn)
                self.turn = turn
            finally:
                self._done = True

    async def _end_in_thread(self, *, failed: bool = False) -> None:
        """`_end`, which may wait for the disk; it runs to its end even if the task is cancelled."""
        await asyncio.shield(asyncio.to_thread(self._end, failed=failed))

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        if not getattr(self, "_done", True):
            self.generation.abandon()
            self._left(self)


def start_generation(
    model: LoadedModel,
    plan: Plan,
    policy: ContextPolicy,
    tenant: str,
    timeout: float | None = None,
    texts: DraftTexts | None = None,
) -> Generation:
    """Starts the generation of a planned turn, which reuses as much KV as the plan's source has.

    Args:
        model: generates it.
        plan: the turn.
        policy: of the session; gives the window of a turn without KV to reuse.
        tenant: owner whose cached KV may be shared.
        timeout: seconds until it ends by itself; None for no limit.
        texts: of the session, for drafts.
    """
    engine = model.engine
    sequence = plan.source.fork_kv(plan.n_reusable, engine.cache)
    if sequence is None:
        sequence = engine.runner.sequence(policy.visible_in(engine.runner))
    return Generation(
        engine,
        plan.prompt.ids,
        plan.params,
        continues=not plan.chat,
        begun=plan.begun,
        sequence=sequence,
        salt=tenant,
        timeout=timeout,
        texts=texts,
    )
