"""A request: one answer in the making, as the scheduler sees it.

Only the scheduler's thread touches a request between `Scheduler.submit` and `done`; what leaves it are items in a
queue, which any thread may read.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from fabula._native import PAGE_POSITIONS
from fabula.engine.decoding import Decoding, FinishReason, Piece
from fabula.engine.runner import Runner
from fabula.kv.cache import KvEvictionList
from fabula.kv.pages import HOLE, Sequence
from fabula.kv.prefix import KeyChain

READ_AHEAD = 32  # pieces that may wait for their reader; then the request pauses


@dataclass(frozen=True, slots=True)
class Item:
    """What the scheduler tells the reader: a piece, or how it ended without one.

    Attributes:
        piece: None at an end that no token brought.
        at: time.perf_counter() when it was made.
        reason: how the request ended, with or without a piece; None while more may come.
        error: what ended it, if it failed.
    """

    piece: Piece | None
    at: float
    reason: FinishReason | None = None
    error: BaseException | None = None


class Clock:
    """When what happened, in time.perf_counter() seconds; 0 before.

    Attributes:
        submitted, started, prompt_done: the request was made, its prompt begun, its prompt computed.
    """

    __slots__ = ("prompt_done", "started", "submitted")

    def __init__(self) -> None:
        self.submitted, self.started, self.prompt_done = time.perf_counter(), 0.0, 0.0


class State(Enum):
    WAITING = auto()
    RUNNING = auto()
    DONE = auto()


class Request:
    """One answer in the making.

    Args:
        runner, cache: of its model.
        decoding: draws its tokens.
        sequence: pages of a beginning of its prompt; they become the request's, to be extended.
        salt: of its owner; K and V are shared with requests of the same salt only.
        deadline: time.monotonic() at which it ends with reason "timeout"; None for never.

    Attributes:
        items: what the reader takes.
        done: set when the scheduler has let go of it: the sequence is the reader's again.
        abandoned: nobody reads any more; set without any lock, seen at the next step.
        n_reused: tokens of the prompt that were not computed.
        n_preempted: how often its K and V were given up for others.
    """

    def __init__(
        self,
        runner: Runner,
        cache: KvEvictionList,
        decoding: Decoding,
        sequence: Sequence,
        *,
        salt: str = "",
        deadline: float | None = None,
    ) -> None:
        self.runner, self.cache, self.decoding, self.sequence = runner, cache, decoding, sequence
        self.salt, self.deadline = salt, deadline
        self.items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self.done = threading.Event()
        self.abandoned = False
        self.state = State.WAITING
        self.clock = Clock()
        self.n_prompt = len(decoding.history)
        self.n_reused = 0
        self.n_preempted = 0
        self.n_made = self.n_read = 0
        self._chain = KeyChain(salt, sequence.window)
        self._n_named = 0
        self._listener: Callable[[], None] | None = None

    # ---- What the scheduler asks ------------------------------------------------------------------------------------

    @property
    def n_pending(self) -> int:
        """Tokens known but not computed yet; 1 when only the next token is wanted."""
        return len(self.decoding.history) - self.sequence.n_tokens

    @property
    def paused(self) -> bool:
        """The reader is far behind."""
        return self.read_ahead <= 0

    def may_share(self, other: Request) -> bool:
        """Whether both may use the same K and V where their tokens are the same."""
        return other.runner is self.runner and other.salt == self.salt and other.sequence.window == self.sequence.window

    @property
    def read_ahead(self) -> int:
        """Pieces that may be made before the request pauses."""
        return READ_AHEAD - (self.n_made - self.n_read)

    def next_tokens(self, n: int) -> npt.NDArray[np.int32]:
        """The next n tokens to compute."""
        start = self.sequence.n_tokens
        return self.decoding.history.ids[start : start + n].copy()

    def keys(self) -> list[bytes]:
        """Names of the full pages of everything known but the last token, which must be computed for its logits."""
        history = self.decoding.history.ids
        return self._chain.keys(history)[: (len(history) - 1) // PAGE_POSITIONS]

    def publish_pages(self, n_untold: int = 0) -> None:
        """Lets others find the pages that are full by now, and gives back those behind the window. The reader will get
        `n_untold` more pieces of what was made."""
        n_full = self.sequence.n_tokens // PAGE_POSITIONS
        if n_full > self._n_named:
            keys, pages = self._chain.keys(self.decoding.history.ids), self.sequence.pages
            for i in range(self._n_named, n_full):
                if pages[i] != HOLE:
                    self.runner.pool.name(pages[i], keys[i])
            self._n_named = n_full
        if self.sequence.window.slides:  # as far as the reader is: what he has not read may be taken back
            self.sequence.slide(self.sequence.n_tokens - (self.n_made + n_untold - self.n_read))

    def adopt(self, sequence: Sequence) -> None:
        """Takes a sequence with more of the prompt in place of its own."""
        self.sequence.close()
        self.sequence = sequence
        self._n_named = sequence.n_tokens // PAGE_POSITIONS

    def release(self) -> None:
        """Gives up K and V; they are computed again, or found, when it runs next."""
        sequence = self.sequence
        self.sequence = self.runner.sequence(sequence.window)
        self._n_named = 0
        self.cache.evict(sequence)

    # ---- Talking to the reader --------------------------------------------------------------------------------------

    def tell(self, item: Item) -> None:
        """Hands the reader an item and wakes it."""
        self.n_made += item.piece is not None
        self.items.put(item)
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(Exception):  # the reader's fault must not end the engine's thread
                listener()

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Calls `listener` once, from the scheduler's thread, when the next item is there."""
        self._listener = listener
