"""An answer in the making."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace

from fabula.engine.generation import Generation, Piece, Timings
from fabula.errors import EngineError
from fabula.sessions.turn import Turn


class Reply(Iterator[Piece], AsyncIterator[Piece]):
    """Pieces of an answer as they come; the turn is in the tree when the last one was given out.

    Iterate over it (`for` or `async for`), or call `text()`. `cancel()`, leaving a `with` block or forgetting the reply
    ends it early; what was read so far stays, as a partial turn.

    Attributes:
        turn: the finished turn; None while pieces may come, and when an error ended the reply: then the session is as
            it was before.
        begun_text: what the answer begins with already, before the first piece.
        generation: what makes it.
    """

    def __init__(
        self,
        generation: Generation,
        draft: Turn,
        settle: Callable[[Reply, Turn | None], None],
        left: Callable[[Reply], None],
        *,
        selects: bool,
    ) -> None:
        """Args: settle: takes the turn in at the end. left: told of a reply that was forgotten before. selects: whether
        the turn becomes the head."""
        self.turn: Turn | None = None
        self.begun_text = generation.begun_text
        self.generation, self.selects = generation, selects
        self._draft = draft
        self._settle, self._left = settle, left
        self._done = False

    # ---- Reading ----------------------------------------------------------------------------------------------------

    def __next__(self) -> Piece:
        if self._done:
            raise StopIteration
        try:
            piece = next(self.generation)
        except StopIteration:  # cancelled by another thread, or out of time
            self._finish()
            raise
        except EngineError:
            self._fail()
            raise
        except BaseException:
            self.cancel()
            raise
        if piece.finish_reason:
            self._finish()
        return piece

    def __aiter__(self) -> Reply:
        return self

    async def __anext__(self) -> Piece:
        if self._done:
            raise StopAsyncIteration
        try:
            piece = await anext(self.generation)
        except StopAsyncIteration:
            await asyncio.to_thread(self._finish)
            raise
        except EngineError:
            await asyncio.to_thread(self._fail)  # it takes the session's lock
            raise
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self.cancel))
            raise
        if piece.finish_reason:
            await asyncio.to_thread(self._finish)  # it may wait for the disk
        return piece

    @property
    def number(self) -> int:
        """The number its turn has, or will have."""
        return self._draft.number

    @property
    def prompt(self) -> str:
        """What it answers, as a person reads it."""
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

    # ---- Ends -------------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Ends the reply; may be called at any time, and twice. A reply without any token leaves no turn."""
        if not self._done:
            self.generation.cancel()
            self._finish()

    @property
    def is_done(self) -> bool:
        """Whether it has ended, in one way or another."""
        return self._done

    def close(self, turn: Turn | None) -> None:
        """The session has taken the turn in, or nothing."""
        self.turn, self._done = turn, True

    def _finish(self) -> None:
        """The answer has ended: the session takes the turn in, unless nothing was drawn."""
        drawn = len(self.generation.token_ids) > self._draft.n_begun
        self._settle(self, self.draft() if drawn else None)

    def _fail(self) -> None:
        self._settle(self, None)

    def draft(self) -> Turn:
        """The turn as far as it was read; each time another object of the same name."""
        token_ids, text = self.generation.read_so_far()
        return replace(
            self._draft,
            text=text,
            token_ids=token_ids,
            finish_reason=self.generation.finish_reason,
            timings=self.generation.timings,
        )

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        if not getattr(self, "_done", True):
            self.generation.abandon()
            self._left(self)
