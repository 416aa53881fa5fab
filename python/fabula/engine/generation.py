"""One generation, for its reader: an iterator of pieces over a request that the scheduler runs.

The engine runs a few pieces ahead of the reader and then pauses. A cancelled generation has exactly the tokens that
were read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from fabula.choices import SpeculationName
from fabula.engine.decoding import Decoding, FinishReason, Piece
from fabula.engine.drafts import DraftTexts
from fabula.engine.request import Item, Request
from fabula.engine.runner import Runner
from fabula.engine.sampling import SamplingParams
from fabula.engine.scheduler import Scheduler
from fabula.engine.speculation import Speculation
from fabula.errors import InvalidArgument
from fabula.kv.cache import KvEvictionList
from fabula.kv.pages import Sequence as KvSequence
from fabula.kv.prefix import EVERYTHING, Window
from fabula.lean_dataclasses import dataclass, field
from fabula.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fabula.engine.draft_model import DraftModel


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts of a model that a generation uses.

    Attributes:
        runner, tokenizer: of the model.
        cache: retained KV sequences.
        scheduler: runs requests; other models may share it.
        defaults: sampling settings that the model recommends, by name; used for those that are not given.
        speculation: whether drafts of several tokens are verified in one step, which changes no result: "auto", where
            it pays, or "off".
        draft_model: drafts, too; None for none.
    """

    runner: Runner
    tokenizer: Tokenizer
    cache: KvEvictionList
    scheduler: Scheduler
    defaults: Mapping[str, float] = field(default_factory=dict)
    speculation: SpeculationName = "auto"
    draft_model: DraftModel | None = None

    def drafts(self, decoding: Decoding, window: Window, salt: str, texts: DraftTexts | None) -> Speculation | None:
        """Speculation of an answer; None for none. On a GPU there is none: sampling runs there, behind each step."""
        if self.speculation == "off" or self.runner.device is not None:
            return None
        if self.draft_model is None:
            return Speculation(decoding, texts, None)
        from fabula.engine.draft_model import ModelDrafts

        cost = partial(self.scheduler.cost, self.runner)
        return Speculation(decoding, texts, ModelDrafts(self.draft_model, cost, window, salt))


@dataclass(frozen=True, slots=True)
class Timings:
    """How long a generation took.

    Attributes:
        prompt_tokens, generated_tokens: counts.
        reused_tokens: prompt tokens with KV in the cache; only the others were computed.
        queued_ms: time before prefill started.
        prompt_ms: time of prefill, shared with other requests.
        first_token_ms: from the request to the first token.
        total_ms: from the request to the last token.
        prompt_tokens_per_s: prefill speed, of the tokens that were computed.
        tokens_per_s: decode speed, without the first token; 0 before the second.
        drafted: tokens that were guessed and verified, see `Model.load`.
        accepted: those of them that are part of the answer, so decode steps that were saved.
    """

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    queued_ms: float
    prompt_ms: float
    first_token_ms: float
    total_ms: float
    prompt_tokens_per_s: float
    tokens_per_s: float
    drafted: int = 0
    accepted: int = 0


class Generation(Iterator[Piece], AsyncIterator[Piece]):
    """Pieces of one answer, as the engine emits them.

    Iterate over it (`for` or `async for`), or call `text()` for everything at once. `cancel()` ends it early; so does
    leaving a `with` block, or dropping the last reference.

    Args:
        engine: of the model.
        prompt_ids: token ids to continue.
        params: sampling settings; those not given are the model's defaults.
        continues: whether the text continues the prompt's, so that a leading space is kept.
        begun: ids the answer starts with.
        sequence: KV of a prefix of the prompt; the generation takes ownership and extends it. None: a new one, which
            the cache retains at the end.
        window: what tokens see, if `sequence` is None.
        salt: of the owner; KV is shared under the same salt only.
        timeout: seconds until it ends with reason "timeout"; None for never.
        texts: of the session, where drafts may be found; None for none.

    Attributes:
        prompt_ids: the prompt's token ids.
        token_ids: ids of `begun` and those read so far, the end token included.
        begun_text: the text of `begun`.
        seed: the seed in use, to repeat a random answer.
        params: the settings in use, complete, with that seed.
        engine: as given.
        finish_reason: None until the end; then as in `Piece`, or "cancelled", or "timeout".

    Raises:
        InvalidArgument: an empty prompt, an id outside the vocabulary, or a setting out of its range.
        ContextOverflow: the prompt is longer than the context; carries both numbers.
        EngineBusy: too many requests wait already.
    """

    def __init__(
        self,
        engine: Engine,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        continues: bool = False,
        begun: Sequence[int] = (),
        sequence: KvSequence | None = None,
        window: Window = EVERYTHING,
        salt: str = "",
        timeout: float | None = None,
        texts: DraftTexts | None = None,
    ) -> None:
        runner = engine.runner
        runner.check_head()
        prompt = runner.token_ids(prompt_ids)
        for ids in (params.stop_tokens, begun):
            if ids:
                runner.token_ids(ids)
        if timeout is not None and not timeout > 0:
            raise InvalidArgument(f"timeout is {timeout!r}, must be a number of seconds above 0")
        self.engine, self._owned = engine, sequence is None
        sequence = runner.sequence(window) if sequence is None else sequence
        n_known = len(prompt) + len(begun)
        runner.check_room(n_known, sequence.window)
        decoding = Decoding(
            engine.tokenizer,
            runner.config.vocab_size,
            prompt,
            params.resolved(engine.defaults),
            room=runner.room(n_known, sequence.window),
            continues=continues,
            begun=begun,
        )
        self.prompt_ids: list[int] = prompt.tolist()
        self.token_ids: list[int] = list(begun)
        self.begun_text = decoding.begun_text
        self._texts: list[str] = [decoding.begun_text]
        self.params = decoding.params
        self.seed = decoding.params.resolved_seed()
        self.finish_reason: FinishReason | None = None
        self._n_prefix = len(begun)
        self._first = self._last = 0.0
        self._lock = threading.Lock()  # one thread may read while another cancels
        deadline = None if timeout is None else time.monotonic() + timeout
        drafts = engine.drafts(decoding, sequence.window, salt, texts)
        self._request = Request(
            runner, engine.cache, decoding, sequence, salt=salt, deadline=deadline, speculation=drafts
        )
        engine.scheduler.submit(self._request)

    # ---- Reading ----------------------------------------------------------------------------------------------------

    def __next__(self) -> Piece:
        if self.finish_reason is not None:
            raise StopIteration
        try:
            item = self._request.items.get()
        except BaseException:  # Ctrl-C
            self.cancel()
            raise
        piece = self._read(item)
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Piece:
        if self.finish_reason is not None:
            raise StopAsyncIteration
        import asyncio  # here, as most programs do without it and it takes long

        try:
            await self._arrival()
        except BaseException:  # the task was cancelled
            self._request.abandoned = True
            await asyncio.shield(asyncio.to_thread(self.cancel))
            raise
        piece = self._read(self._request.items.get())
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def _arrival(self) -> None:
        """Waits until an item can be read."""
        if not self._request.items.empty():
            return
        import asyncio

        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(arrived.set)

        self._request.listen(wake)
        if self._request.items.empty():
            await arrived.wait()

    def _read(self, item: Item) -> Piece | None:
        """Takes an item of the scheduler; returns None at an end without a piece."""
        request = self._request
        with self._lock:
            if self.finish_reason is not None:  # cancelled meanwhile
                return None
            if item.piece is not None:
                self.token_ids.append(item.piece.token_id)
                self._texts.append(item.piece.text)
                self._last = item.at
                self._first = self._first or item.at
                was_paused = request.paused
                request.n_read += 1
                if was_paused:
                    self.engine.scheduler.wake()
            if item.error is not None:
                self._finish("cancelled")
                raise item.error
            if item.reason is not None:
                self._finish(item.reason)
            return item.piece

    def text(self) -> str:
        """Runs to the end and returns the text of all pieces not yet taken."""
        return "".join(piece.text for piece in self)

    async def atext(self) -> str:
        """`text`, without blocking the event loop."""
        return "".join([piece.text async for piece in self])

    # ---- Ends -------------------------------------------------------------------------------------------------------

    def _finish(self, reason: FinishReason) -> None:
        """The scheduler released the request; tokens that were not read are removed."""
        self.finish_reason = reason
        sequence = self._request.sequence
        with self.engine.cache.lock:  # nothing is evicted in between
            sequence.truncate(sequence.usable(len(self.prompt_ids) + len(self.token_ids)))
        if self._owned and sequence.n_tokens:
            self.engine.cache.keep(sequence, owned=True)

    def cancel(self) -> None:
        """Ends the generation; may be called at any time, and twice. Pieces that were read stay."""
        if self.finish_reason is None:
            self.engine.scheduler.cancel(self._request)
            with self._lock:
                if self.finish_reason is None:
                    self._finish("cancelled")

    def abandon(self) -> None:
        """Ends it without waiting; `cancel` may follow. Safe in a destructor."""
        if self.finish_reason is None:
            self._request.abandoned = True
            self.engine.scheduler.wake()

    def __del__(self) -> None:
        if hasattr(self, "_request"):
            self.abandon()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    # ---- Results ----------------------------------------------------------------------------------------------------

    def read_so_far(self) -> tuple[tuple[int, ...], str]:
        """The ids and the text that were read so far, `begun` included; a consistent pair."""
        with self._lock:
            return tuple(self.token_ids), "".join(self._texts)

    @property
    def is_ready(self) -> bool:
        """Whether the next piece can be read without waiting."""
        return not self._request.items.empty()

    @property
    def made_at(self) -> float:
        """time.perf_counter() when the engine emitted the last piece that was read; 0 before the first."""
        return self._last

    @property
    def sequence(self) -> KvSequence:
        """KV of the computed tokens; belongs to the caller once `finish_reason` is set."""
        return self._request.sequence

    @property
    def timings(self) -> Timings:
        """Times so far."""
        request, clock, drafts = self._request, self._request.clock, self._request.speculation
        n = len(self.token_ids) - self._n_prefix
        prompt_s = max(0.0, clock.prompt_done - clock.started)
        decode_s = self._last - self._first
        return Timings(
            prompt_tokens=request.n_prompt,
            reused_tokens=request.n_reused,
            generated_tokens=n,
            queued_ms=1e3 * max(0.0, clock.started - clock.submitted),
            prompt_ms=1e3 * prompt_s,
            first_token_ms=1e3 * max(0.0, self._first - clock.submitted),
            total_ms=1e3 * max(0.0, self._last - clock.submitted),
            prompt_tokens_per_s=(request.n_prompt - request.n_reused) / prompt_s if prompt_s > 0 else 0.0,
            tokens_per_s=(n - 1) / decode_s if n > 1 and decode_s > 0 else 0.0,
            drafted=drafts.n_drafted if drafts is not None else 0,
            accepted=drafts.n_accepted if drafts is not None else 0,
        )


__all__ = ["Engine", "FinishReason", "Generation", "Piece", "Timings"]
