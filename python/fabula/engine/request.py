"""A request: one answer that is being generated, as the scheduler sees it.

Only the scheduler's thread touches a request between `Scheduler.submit` and `done`. It emits items into a queue, which
any thread may read.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from fabula._native import PAGE_POSITIONS
from fabula.engine.decoding import Decoding, FinishReason, Piece
from fabula.engine.runner import Runner
from fabula.engine.speculation import Speculation, sampled_rows
from fabula.kv.cache import KvEvictionList
from fabula.kv.pages import HOLE, Sequence
from fabula.kv.prefix import KeyChain
from fabula.kv.prefix_read import PrefixRead
from fabula.lean_dataclasses import dataclass

READ_AHEAD = 32  # unread pieces at which the request pauses
MAX_CATCH_UP = 64  # tokens computed again at the end of an answer, for its state: those of one native call, with room
WORTH_SAVING = 128  # tokens after the last kept state at which that of a preempted request goes to disk (an estimate)
PAGES_TO_SPARE = 2  # for each request: a copy of its last page, and one more behind it


@dataclass(frozen=True, slots=True)
class Item:
    """An item of a request's queue: a piece, or the end of the request without one.

    Attributes:
        piece: None at an end without a token.
        at: time.perf_counter() when it was sampled.
        reason: finish reason, with or without a piece; None while more may come.
        error: why it failed, if it did.
    """

    piece: Piece | None
    at: float
    reason: FinishReason | None = None
    error: BaseException | None = None


class Clock:
    """Times of events, time.perf_counter() seconds; 0 before the event.

    Attributes:
        submitted, started, prompt_done: the request was made, was admitted first, had its prompt computed.
    """

    __slots__ = ("prompt_done", "started", "submitted")

    def __init__(self) -> None:
        self.submitted, self.started, self.prompt_done = time.perf_counter(), 0.0, 0.0


class State(Enum):
    WAITING = auto()
    LOADING = auto()  # waits while KV of its prefix is read from disk
    RUNNING = auto()
    DONE = auto()


class Request:
    """One answer that is being generated.

    Args:
        runner, cache: of its model.
        decoding: samples its tokens.
        sequence: KV of a prefix of its prompt; the request takes ownership and extends it.
        salt: of its owner; KV is shared with requests of the same salt only.
        deadline: time.monotonic() at which it ends with reason "timeout"; None for never.
        speculation: drafts its tokens; None for one token a step.

    Attributes:
        items: queue for the reader.
        done: set when the scheduler has released it; the sequence then belongs to the reader.
        abandoned: nobody reads it any more; set without a lock, seen at the next step.
        n_reused: prompt tokens whose KV was there already.
        n_preempted: how often it was preempted.
        read: of KV of its prefix from disk; None before and after.
        has_read: what is on disk was read once, as far as it could be: the rest is recomputed.
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
        speculation: Speculation | None = None,
    ) -> None:
        self.speculation = speculation
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
        self.read: PrefixRead | None = None
        self.has_read = False
        self._keep_states()
        self._chain = KeyChain(salt, sequence.window)
        self._n_published = 0
        self._listener: Callable[[], None] | None = None

    # ---- For the scheduler -------------------------------------------------------------------------------------------

    @property
    def n_pending(self) -> int:
        """Tokens known but not computed; 1: it decodes, more: it prefills."""
        return len(self.decoding.history) - self.sequence.n_tokens

    @property
    def paused(self) -> bool:
        """Whether the reader has READ_AHEAD unread pieces."""
        return self.read_ahead <= 0

    def may_share(self, other: Request) -> bool:
        """Whether both may share the KV of a common prefix."""
        return other.runner is self.runner and other.salt == self.salt and other.sequence.window == self.sequence.window

    @property
    def read_ahead(self) -> int:
        """Pieces that may be emitted before the request pauses."""
        return READ_AHEAD - (self.n_made - self.n_read)

    def next_tokens(self, n: int) -> npt.NDArray[np.int32]:
        """The next n tokens to compute; those after the history are of the draft."""
        start, n_drafted = self.sequence.n_tokens, n - self.n_pending
        known = self.decoding.history.ids[start : start + n]
        return known.copy() if n_drafted <= 0 else np.concatenate([known, np.array(self.draft[:n_drafted], np.int32)])

    # ---- Drafts -----------------------------------------------------------------------------------------------------

    def propose(self, n_decoding: int) -> None:
        """Drafts tokens for the next step, of so many requests that decode, if this one does.

        A draft takes no page that others need: it goes beyond the last page only while pages are free, as nothing is
        evicted for tokens that are not sampled yet.
        """
        if self.speculation is None:
            return
        if self.n_pending != 1 or self.paused:
            self.speculation.drop()
            return
        room = PAGE_POSITIONS - self.sequence.n_tokens % PAGE_POSITIONS
        if self.runner.pool.n_free >= PAGES_TO_SPARE * n_decoding:
            room += PAGE_POSITIONS
        self.speculation.propose(min(self.read_ahead, room) - 1, n_decoding)

    @property
    def draft(self) -> list[int]:
        """Draft tokens of the next step."""
        return [] if self.speculation is None else self.speculation.draft.tokens

    @property
    def chances(self) -> list[float]:
        """For each of them, the chance that it and those before it are right."""
        return [] if self.speculation is None else self.speculation.draft.chances

    @property
    def blind_steps(self) -> int:
        """Decode steps that may run before it is asked for a draft again, or a state is kept."""
        n = READ_AHEAD if self.speculation is None else self.speculation.blind_steps
        trail = self.sequence.trail
        return n if trail is None else min(n, trail.steps_to_fixed(self.sequence.n_tokens) or n)

    def stop_drafts(self) -> None:
        """No more drafts for this answer."""
        if self.speculation is not None:
            self.speculation.stop()

    def sample(self, logits: npt.NDArray[np.float32]) -> tuple[list[Piece], BaseException | None]:
        """Samples the tokens of a step. The KV of draft tokens that are sampled is added to its sequence, and the rest
        of what was reserved for the draft is released.

        Args:
            logits: float32 [1 + draft tokens that were computed, vocab_size].

        Returns:
            As `sampled_rows`.
        """
        draft = self.draft[: len(logits) - 1]
        pieces, error = sampled_rows(self.decoding, logits, draft)
        if self.speculation is not None and draft:
            n_accepted = sum(piece.token_id == token for piece, token in zip(pieces, draft, strict=False))
            self.speculation.verified(len(draft), n_accepted)
            self.sequence.n_tokens = len(self.decoding.history) - (error is None)  # the last one is not computed
            self.sequence.roll_back(self.sequence.usable(self.sequence.n_tokens))
            self.publish_pages(len(pieces))
        return pieces, error

    def keys(self) -> list[bytes]:
        """Prefix hashes of the full pages, without the last token, which must be computed for its logits."""
        history = self.decoding.history.ids
        return self._chain.keys(history)[: (len(history) - 1) // PAGE_POSITIONS]

    @property
    def n_findable(self) -> int:
        """Tokens that a prefix of its text may have which is found by its hashes."""
        n_known = len(self.decoding.history) - 1
        n_full = n_known // PAGE_POSITIONS * PAGE_POSITIONS
        return n_full if self.sequence.trail is None or not n_full else n_known

    def find_in_memory(self) -> Sequence | None:
        """KV of a prefix of its text that is in memory; None for none."""
        return self.cache.find_in_memory(self.keys(), self.sequence.window, self.decoding.history.ids[:-1])

    def n_stored(self) -> int:
        """Tokens of the longest prefix of its text that is in memory or on disk."""
        return self.cache.n_findable(self.keys(), self.sequence.window, self.decoding.history.ids[:-1])

    # ---- States of recurrent layers ---------------------------------------------------------------------------------

    def _keep_states(self) -> None:
        """Lets its sequence keep states where texts will go on: a new answer to the same prompt needs the one before
        the last token of the prompt, for the logits of that."""
        self.sequence.keep_states(self.n_prompt - 1)

    def keep_branch(self) -> None:
        """Keeps the state where its text leaves another one, whose KV is known but no state was kept there: what two
        texts have in common, a third one may have too."""
        if self.sequence.trail is not None:
            n_known = self.cache.n_known(self.keys(), self.sequence.window)
            if n_known > self.sequence.n_tokens + PAGE_POSITIONS:
                self.sequence.keep_states(n_known)

    @property
    def n_behind(self) -> int:
        """Tokens at the end of its answer whose state was not kept, as a step went beyond them; 0 for too many."""
        n = len(self.decoding.history) - 1 - self.sequence.n_tokens
        return n if self.sequence.trail is not None and 0 < n <= MAX_CATCH_UP else 0

    # ---- Pages ------------------------------------------------------------------------------------------------------

    def publish_pages(self, n_unsent: int = 0) -> None:
        """Publishes full pages under their prefix hashes, and releases KV that no later token sees.

        Args:
            n_unsent: pieces of computed tokens that are not emitted yet.
        """
        n_full = self.sequence.n_tokens // PAGE_POSITIONS
        if n_full > self._n_published:
            keys, pages = self._chain.keys(self.decoding.history.ids), self.sequence.pages
            for i in range(self._n_published, n_full):
                if pages[i] != HOLE:
                    self.runner.pool.name(pages[i], keys[i])
            self._n_published = n_full
        self.publish_states()
        self.release_passed(n_unsent)

    def publish_states(self, *, all_of_them: bool = False) -> None:
        """Publishes states; `all_of_them`: also those that are dropped soon while it runs."""
        history = self.decoding.history.ids
        if self.sequence.trail is not None:
            self.sequence.publish_states(self._chain.keys(history), history, also_passing=all_of_them)

    def release_passed(self, n_unsent: int = 0) -> None:
        """Releases KV that no token after those already read sees; unread ones may still be removed."""
        if self.sequence.window.slides:
            self.sequence.slide(self.sequence.n_tokens - (self.n_made + n_unsent - self.n_read))
        elif self.runner.pool.drops:
            self.sequence.drop_windowed()
        if self.sequence.trail is not None:
            self.sequence.drop_passing(self.sequence.n_tokens - (self.n_made + n_unsent - self.n_read))

    def adopt(self, sequence: Sequence) -> None:
        """Replaces its sequence by one with KV of more of the prompt."""
        self.sequence.close()
        self.sequence = sequence
        self._keep_states()
        self._n_published = sequence.n_tokens // PAGE_POSITIONS

    def load(self, on_done: Callable[[], None]) -> None:
        """Starts to read KV of its prefix from disk, in another thread. Does not wait."""
        self.state, self.has_read = State.LOADING, True
        self.read = self.cache.read(self.keys(), self.sequence.window, on_done, self.decoding.history.ids[:-1].copy())

    def loaded(self) -> None:
        """Adopts what was read; nothing, if that is less than it has."""
        assert self.read is not None
        found, self.read, self.state = self.read.take(), None, State.WAITING
        if found is not None:
            self.adopt_longer(found)

    def stop_loading(self) -> None:
        """Releases the pages that are being read; waits for no disk."""
        if self.read is not None:
            self.read.cancel()
            self.read, self.state = None, State.WAITING

    @property
    def holds_pages(self) -> bool:
        """Whether it holds pages, also such that are being read."""
        return bool(self.sequence.pages) or (self.read is not None and self.read.n_pages > 0)

    def adopt_longer(self, sequence: Sequence) -> None:
        """Adopts a sequence that has more of the prompt, or closes it."""
        if sequence.n_tokens > self.sequence.n_tokens:
            self.adopt(sequence)
        else:
            sequence.close()

    def release(self) -> None:
        """Evicts its KV, which is recomputed, or found, when it runs next."""
        self.stop_loading()
        self.has_read = False
        if self.speculation is not None:
            self.speculation.close()
        sequence = self.sequence
        kept = sequence.usable(sequence.n_tokens - 1) if sequence.trail is not None and sequence.n_tokens else 0
        if sequence.n_tokens - kept >= WORTH_SAVING:
            sequence.keep_states(sequence.n_tokens)
        self.publish_states(all_of_them=True)  # what is spilled must be found again
        self.sequence = self.runner.sequence(sequence.window)
        self._keep_states()
        self._n_published = 0
        self.cache.evict(sequence)

    # ---- For the reader ---------------------------------------------------------------------------------------------

    def emit(self, item: Item) -> None:
        """Puts an item into the queue and wakes the reader."""
        self.n_made += item.piece is not None
        self.items.put(item)
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(Exception):  # an error of the reader must not end the engine's thread
                listener()

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Calls `listener` once, in the scheduler's thread, when the next item is emitted."""
        self._listener = listener
