"""One generation: prefill the prompt, then draw, decode and step until something ends it.

A `Generation` is an iterator of pieces. Work happens in `__next__`, one step of the model at a time, so stopping is
simply not asking for more: nothing runs on behind the caller's back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from fabula.engine.runner import Runner
from fabula.engine.sampling import Sampler, SamplingParams
from fabula.engine.stop import StopMatcher
from fabula.kv.pages import Sequence as KvSequence
from fabula.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token brought.

    Attributes:
        token_id: the token drawn.
        text: text that became certain with it; may be empty (half a character, a possible stop string) or belong to
        several tokens. logprob: natural log-probability of the token under the plain softmax of the logits.
        finish_reason: None while more may come; "stop" (end token, stop token or stop string), "length" (max_tokens,
        or the
            context is full).
        top_logprobs: the likeliest (token id, logprob), best first, as many as `SamplingParams.n_logprobs` asks for.
    """

    token_id: int
    text: str
    logprob: float
    finish_reason: FinishReason | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """How long a generation took.

    Attributes:
        prompt_tokens, generated_tokens: counts.
        reused_tokens: tokens of the prompt whose K and V were there already; only the others were computed.
        prompt_ms: time spent on the prompt.
        first_token_ms: from the start to the first token.
        total_ms: from the start to the last token.
        prompt_tokens_per_s: speed of the part of the prompt that was computed.
        tokens_per_s: speed of decoding, the first token left out; 0 before the second.
    """

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    prompt_ms: float
    first_token_ms: float
    total_ms: float
    prompt_tokens_per_s: float
    tokens_per_s: float


class Generation(Iterator[Piece]):
    """Pieces of one answer, made as they are asked for.

    Iterate over it, or call `text()` for everything at once. `cancel()` ends it early; so does leaving a `with` block.

    Args:
        runner, tokenizer: of the model.
        prompt_ids: token ids to go on from.
        params: sampling settings.
        continues: whether the text goes on from the prompt's, so that a space at its beginning is kept.
        sequence: KV pages of a beginning of the prompt, shorter than it; they are extended and stay the caller's. None
            for pages of its own, given back at the end.

    Attributes:
        prompt_ids: the prompt's token ids.
        token_ids: ids drawn so far, the end token included.
        seed: the seed in use, so that a random answer can be had again.
        finish_reason: None until the end; then as in `Piece`, or "cancelled".
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        continues: bool = False,
        sequence: KvSequence | None = None,
    ) -> None:
        self._history = runner.token_ids(prompt_ids)
        if params.stop_tokens:
            runner.token_ids(params.stop_tokens)
        self.prompt_ids: list[int] = self._history.tolist()
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.seed = params.resolved_seed()
        self._params = replace(params, seed=self.seed)
        self._runner = runner
        self._ends = frozenset(params.stop_tokens) | (
            frozenset() if params.ignore_eos else frozenset(tokenizer.eos_ids)
        )
        breakers = [tokenizer.encode(text, add_bos=False) for text in params.dry_breakers if params.dry_multiplier]
        self._sampler = Sampler(self._params, runner.config.vocab_size, tuple({ids[-1] for ids in breakers if ids}))
        self._decoder = tokenizer.stream_decoder(continues=continues)
        self._stops = StopMatcher(params.stop)
        self._owned = sequence is None
        self._sequence = runner.sequence() if sequence is None else sequence
        self._reused = self._sequence.n_tokens
        runner.check_room(self._sequence, len(self.prompt_ids) - self._reused)
        self._logits: npt.NDArray[np.float32] | None = None
        self._start = self._prompt_end = self._first = self._last = 0.0

    # ---- Iteration --------------------------------------------------------------------------------------------------

    def __next__(self) -> Piece:
        if self.finish_reason is not None:
            raise StopIteration
        try:
            logits = self._next_logits()
            token, logprob = self._draw(logits)
            self.token_ids.append(token)
            text, reason = self._read(token)
        except BaseException:
            self.cancel()
            raise
        self._last = time.perf_counter()
        self._first = self._first or self._last
        piece = Piece(token, text, logprob, reason, self._top(logits))
        if reason:
            self._finish(reason)
        else:
            self._append(token)
        return piece

    def _next_logits(self) -> npt.NDArray[np.float32]:
        """Logits behind everything known so far."""
        if self._logits is None:
            self._start = time.perf_counter()
            self._logits = self._runner.prefill(self._sequence, self._history[self._reused :])
            self._prompt_end = time.perf_counter()
        else:
            self._logits = self._runner.step([(self._sequence, self._history[-1:])], [0])[0]
        return self._logits

    def _draw(self, logits: npt.NDArray[np.float32]) -> tuple[int, float]:
        held = sorted(self._ends) if len(self.token_ids) < self._params.min_tokens else []
        return self._sampler.sample(logits, self._history, len(self._history), banned=held)

    def _read(self, token: int) -> tuple[str, FinishReason | None]:
        """Text that is certain after this token, and whether it ends the answer."""
        if token in self._ends:
            return self._flush(), "stop"
        text = self._text_of(token)
        if len(self.token_ids) > self._params.min_tokens or not self._params.min_tokens:
            text, stop = self._stops.feed(text)
            if stop is not None:
                return text, "stop"
        full = self._runner.context - len(self.prompt_ids)
        limit = full if self._params.max_tokens is None else min(full, self._params.max_tokens)
        if len(self.token_ids) >= limit:
            return text + self._flush(), "length"
        return text, None

    def _text_of(self, token: int) -> str:
        """Text that is certain after this token; an id that only pads the model's vocabulary has none."""
        try:
            return self._decoder.push(token)
        except KeyError:
            return ""

    def _flush(self) -> str:
        """What decoder and stop matcher still hold back; a stop string may become complete in it."""
        text, stop = self._stops.feed(self._decoder.flush())
        return text if stop is not None else text + self._stops.flush()

    def _append(self, token: int) -> None:
        self._history = np.append(self._history, np.int32(token))

    def _top(self, logits: npt.NDArray[np.float32]) -> tuple[tuple[int, float], ...]:
        n = self._params.n_logprobs
        if not n:
            return ()
        best = np.argpartition(-logits, min(n, logits.size - 1))[:n]
        best = best[np.lexsort((best, -logits[best]))]
        wide = logits.astype(np.float64)
        total = float(wide.max() + np.log(np.exp(wide - wide.max()).sum()))
        return tuple((int(i), float(wide[i]) - total) for i in best)

    # ---- Ends -------------------------------------------------------------------------------------------------------

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        if self._owned:
            self._sequence.close()

    def cancel(self) -> None:
        """Ends the generation and gives its KV pages back; may be called at any time, and twice."""
        if self.finish_reason is None:
            self._finish("cancelled")

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    # ---- Results ----------------------------------------------------------------------------------------------------

    def text(self) -> str:
        """Runs to the end and returns the text of all pieces not yet taken."""
        return "".join(piece.text for piece in self)

    @property
    def timings(self) -> Timings:
        """Times so far."""
        n = len(self.token_ids)
        prompt_s, decode_s = self._prompt_end - self._start, self._last - self._first
        return Timings(
            prompt_tokens=len(self.prompt_ids),
            reused_tokens=self._reused,
            generated_tokens=n,
            prompt_ms=1e3 * prompt_s,
            first_token_ms=1e3 * max(0.0, self._first - self._start),
            total_ms=1e3 * max(0.0, self._last - self._start),
            prompt_tokens_per_s=(len(self.prompt_ids) - self._reused) / prompt_s if prompt_s > 0 else 0.0,
            tokens_per_s=(n - 1) / decode_s if n > 1 and decode_s > 0 else 0.0,
        )
