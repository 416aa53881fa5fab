"""Decoding of one answer: logits in, tokens and certain text out. No threads, no KV pages, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from fabula import _program
from fabula.engine.sampling import Sampler, SamplingParams
from fabula.engine.stop import StopMatcher
from fabula.errors import InvalidArgument, NonFinite
from fabula.lean_dataclasses import dataclass, replace
from fabula.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fabula.engine.grammar import Guide
    from fabula.engine.thinking import Thought

# "interrupted": the process ended during the answer; seen on turns that were read from a store.
FinishReason = Literal["stop", "length", "cancelled", "timeout", "interrupted"]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Piece:
    """One sampled token and the text that became certain with it.

    Attributes:
        token_id: the sampled token.
        text: may be empty (half a character, a possible stop string) or belong to
            several tokens.
        logprob: natural log-probability of the token under the plain softmax of the logits, before any constraint.
        finish_reason: None while more may come; "stop" (end token, stop token, stop string, or a complete
            constraint), "length" (max_tokens, or the context is full).
        top_logprobs: the most probable (token id, logprob), best first, `SamplingParams.n_logprobs` of them.
        offset: where the token begins in the answer's text, in characters. It does not depend on what is held back;
            tokens that share a character have the offset of that character.
        n_certain: number of leading tokens that are certain to be part of the text. A token that may be part of a stop
            string is not, nor is an end token or one after the truncation. Never decreases.
    """

    token_id: int
    text: str
    logprob: float
    finish_reason: FinishReason | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    offset: int = 0
    n_certain: int = 0


class History:
    """Token ids that grow at the end without being copied each time."""

    def __init__(self, ids: I32) -> None:
        self._buffer = np.empty(max(64, 2 * len(ids)), np.int32)
        self._buffer[: len(ids)] = ids
        self._n = len(ids)

    def __len__(self) -> int:
        return self._n

    @property
    def ids(self) -> I32:
        """int32 [n], a view."""
        return self._buffer[: self._n]

    def room_for(self, n: int) -> I32:
        """The buffer of `ids`, with room for n more tokens."""
        while self._n + n > len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        return self._buffer

    def append(self, token: int) -> None:
        self.room_for(1)[self._n] = token
        self._n += 1


class Decoding:
    """Samples the tokens of one answer and decodes their text until the answer ends.

    Under a constraint only tokens that it allows are sampled, whatever the other settings: `min_tokens` and
    `ignore_eos` do not apply where only an end token may follow. Stop strings and `stop_tokens` end the answer
    anywhere, also where the constraint requires more, but not inside a thought (`engine/thinking.py`).

    Args:
        tokenizer: of the model.
        vocab_size: length of the logits.
        prompt: token ids to continue.
        params: sampling settings; the seed is resolved.
        room: the maximum number of tokens, besides the limits of `params`.
        continues: whether the text continues the prompt's, so that a leading space is kept.
        begun: ids the answer starts with; they count as sampled, but not for the limits of `params`.

    Attributes:
        history: prompt and answer so far.
        begun_text: the text of `begun`.
        params: with the seed in use.

    Raises:
        InvalidArgument: the constraint cannot be compiled or forbids what the answer starts with.
        EngineBusy: too many constraints are being compiled.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        prompt: I32,
        params: SamplingParams,
        *,
        room: int,
        continues: bool = False,
        begun: Sequence[int] = (),
    ) -> None:
        self.params = replace(params, seed=params.resolved_seed())
        self.history = History(np.concatenate([prompt, np.asarray(begun, np.int32)]))
        self._n_sampled = 0
        self._room = room if params.max_tokens is None else min(room, params.max_tokens)
        self._ends = frozenset(params.stop_tokens) | (
            frozenset() if params.ignore_eos else frozenset(tokenizer.eos_ids)
        )
        self._end_ids = np.array(sorted(self._ends), np.int32)
        self._may_stop = True  # whether the answer may end before the last sampled token
        self._ignored_ends = list(tokenizer.eos_ids) if params.ignore_eos else []
        self._all_ends = sorted(self._ends | set(self._ignored_ends))
        breakers = [tokenizer.encode(text, add_bos=False) for text in params.dry_breakers if params.dry_multiplier]
        self._sampler = Sampler(self.params, vocab_size, tuple({ids[-1] for ids in breakers if ids}))
        self._thought: Thought | None = None
        if params.thinking is not None:
            from fabula.engine.thinking import Thought

            self._thought = Thought(params.thinking, tokenizer)
        shown = params.constraint.shown if params.constraint is not None else ()
        shown = shown if self._thought is None else (*shown, *self._thought.shown)
        self._shown = frozenset(shown)
        self._decoder = tokenizer.stream_decoder(continues=continues, shown=shown)
        self._tokenizer = tokenizer
        self._n_chars = 0  # that the tokens so far are certain to make
        self._n_certain = 0
        self._starts: deque[int] = deque()  # of tokens that are not certain, as positions of the stop matcher
        self._stops = StopMatcher(params.stop)
        texts, n_before = [], 0  # n_before: tokens of `begun` that the constraint does not apply to
        for i, token in enumerate(begun, 1):
            n_before = i if self._is_unconstrained else n_before
            texts.append(self._text_of(token))
        self.begun_text = "".join(texts)
        self._guide: Guide | None = None
        if params.constraint is not None:
            from fabula.engine.grammar import Guide

            self._guide = Guide(tokenizer, vocab_size, params.constraint, begun[n_before:])

    def accept(self, logits: F32) -> Piece:
        """Samples the next token.

        Args:
            logits: float32 [vocab_size], after the last token of the history.

        Raises:
            NonFinite, InvalidArgument: as `Sampler.sample`; also if every token that the constraint allows is banned,
                or its grammar becomes too complex.
        """
        history = self.history
        forced = self._forced()
        if forced is not None:
            token, logprob = forced, float(logits[forced]) - finite_sum(logits)
            if self._guide is not None and not self._is_unconstrained:
                self._guide.advance(token)
        elif self._guide is None or self._is_unconstrained:
            no_end = self._n_sampled < self.params.min_tokens or self._guide is not None
            held = sorted(self._ends) if no_end else []
            token, logprob = self._sampler.sample(logits, history.ids, len(history), banned=held)
        else:
            token, logprob = self._sample_allowed(logits, self._guide)
        return self.take(token, logprob, likeliest(logits, self.params.n_logprobs))

    def take(self, token: int, logprob: float, top_logprobs: tuple[tuple[int, float], ...] = ()) -> Piece:
        """Appends a sampled token."""
        self.history.append(token)
        self._n_sampled += 1
        n_broken = self._breaks_character(token)
        offset = self._n_chars + n_broken
        self._starts.append(self._stops.n_fed + n_broken)
        text, reason = self._read(token)
        self._count_certain(token, reason)
        return Piece(token, text, logprob, reason, top_logprobs, offset, self._n_certain)

    def _count_certain(self, token: int, reason: FinishReason | None) -> None:
        """Advances `_n_certain` past tokens that start before the text that is held back or truncated."""
        stops, starts = self._stops, self._starts
        if stops.matched is None and (reason is not None or not self.params.stop):
            self._n_certain += len(starts)
            starts.clear()
            if reason == "stop" and self._ends_answer(token):
                self._n_certain -= 1  # it ended the answer and is no part of it
        while starts and starts[0] < stops.n_certain:
            starts.popleft()
            self._n_certain += 1

    @property
    def _is_unconstrained(self) -> bool:
        """Whether the answer is inside a thought to which its constraint does not apply; that of tools does."""
        thought, constraint = self._thought, self.params.constraint
        return (
            thought is not None
            and constraint is not None
            and constraint.kind != "tools"
            and thought.delays
            and thought.is_thinking
        )

    def _forced(self) -> int | None:
        """The token that must come next, as the thought has used its budget and the constraint allows it."""
        if self._thought is None or (token := self._thought.forced) is None:
            return None
        if self._guide is not None and not self._is_unconstrained and not self._guide.allowed[token]:
            self._thought.stop_forcing()
            return None
        return token

    @property
    def n_left(self) -> int:
        """Tokens that may be sampled before the answer has its maximum length, or a token may be forced."""
        n_left = self._room - self._n_sampled
        n_free = None if self._thought is None else self._thought.n_free
        return n_left if n_free is None else min(n_left, n_free)

    @property
    def samples_natively(self) -> bool:
        """Whether the native library can sample the next tokens: Python needs neither logits nor every token."""
        if self._thought is not None and self._thought.forced is not None:
            return False
        return self._guide is None and not self.params.n_logprobs and self._n_sampled >= self.params.min_tokens

    def decode_sequence(self, share: _program.BatchSequence, n_steps: int) -> _program.DecodeSequence:
        """Input of `Program.decode`: computes a share, then samples up to `n_steps` tokens."""
        history, n_history = self.history.room_for(n_steps), share.n_past + len(share.tokens)
        return _program.DecodeSequence(share, n_steps, history, n_history, self._end_ids, self._sampler.sampling)

    def forced_tokens(self, most: int) -> list[int]:
        """Tokens of the text that the constraint forces next, at most so many; empty where it leaves a choice."""
        return [] if self._guide is None else self._guide.forced(most)

    def n_possible(self, tokens: Sequence[int]) -> int:
        """How many leading ones of `tokens` may be sampled next, one after the other: none after an end token, and none
        that the constraint forbids, if that is found out soon."""
        n = next((i for i, token in enumerate(tokens, 1) if token in self._ends), len(tokens))
        return n if self._guide is None or not n else self._guide.n_allowed(tokens[:n])

    def _sample_allowed(self, logits: F32, guide: Guide) -> tuple[int, float]:
        """A token that the constraint allows, and its log-probability among all."""
        allowed = guide.allowed
        held = self._all_ends if self._n_sampled < self.params.min_tokens else self._ignored_ends
        if held and not guide.is_complete:
            others = allowed.copy()
            others[held] = False
            allowed = others if others.any() else allowed
        total = finite_sum(logits)
        masked = np.where(allowed, logits, np.float32(-np.inf))
        token, _ = self._sampler.sample(masked, self.history.ids, len(self.history))
        self._may_stop = guide.may_end
        guide.advance(token)
        return token, float(logits[token]) - total

    def _read(self, token: int) -> tuple[str, FinishReason | None]:
        """Text that is certain after this token, and whether it ends the answer."""
        hidden = self._hidden_text(token)
        if self._ends_answer(token):
            return self._flush(hidden), "stop"
        may_stop = self._n_sampled > self.params.min_tokens or not self.params.min_tokens
        is_thinking = self._thought is not None and self._thought.is_thinking
        text, guide = self._text_of(token), self._guide
        if may_stop and not is_thinking:
            text, stop = self._stops.feed(text, hidden)
            if stop is not None:
                return text, "stop"
        else:
            text = self._stops.let_pass(text, hidden)
        if guide is not None and guide.is_complete and not self._is_unconstrained:
            return text + self._flush(), "stop"
        if self._n_sampled >= self._room:
            return text + self._flush(), "length"
        return text, None

    def _ends_answer(self, token: int) -> bool:
        """Whether this token, the last one sampled, ends the answer. Under a constraint the model's end tokens count
        only where the answer may end; those of `stop_tokens` always count."""
        return token in self._ends and (self._may_stop or token in self.params.stop_tokens)

    def _text_of(self, token: int) -> str:
        """Text that is certain after this token; an id that only pads the model's vocabulary has none."""
        try:
            text = self._decoder.push(token)
        except KeyError:
            text = ""
        self._n_chars += len(text)
        if self._thought is not None:
            self._thought.take(token, text)
        return text

    def _breaks_character(self, token: int) -> int:
        """1 if a character before this token can no longer be completed and becomes U+FFFD, else 0."""
        try:
            return int(self._decoder.breaks(token))
        except KeyError:  # an id that only pads the model's vocabulary
            return 0

    def _hidden_text(self, token: int) -> str:
        """The text of a control or end token, where a stop string might contain it; "" for a token that is shown."""
        if not self.params.stop:
            return ""
        tokenizer = self._tokenizer
        is_hidden = token in tokenizer.special_ids or self._ends_answer(token)
        if not is_hidden or token in self._shown:
            return ""
        try:
            return tokenizer.token_bytes(token).decode("utf-8", "replace")
        except InvalidArgument:  # an id that only pads the model's vocabulary
            return ""

    def _flush(self, hidden: str = "") -> str:
        """The text that decoder and stop matcher hold back; a stop string may become complete in it, or with an end
        token whose text is `hidden`."""
        text, stop = self._stops.feed(self._decoder.flush(), hidden)
        return text if stop is not None else text + self._stops.flush()


def likeliest(logits: npt.NDArray[np.float32], n: int) -> tuple[tuple[int, float], ...]:
    """The n most probable tokens and their natural log-probabilities under the plain softmax, best first."""
    if not n:
        return ()
    best = np.argpartition(-logits, min(n, logits.size - 1))[:n]
    best = best[np.lexsort((best, -logits[best]))]
    wide = logits.astype(np.float64)
    total = float(wide.max() + np.log(np.exp(wide - wide.max()).sum()))
    return tuple((int(i), float(wide[i]) - total) for i in best)


def log_sum_exp(logits: F32) -> float:
    """The logarithm of the plain softmax's denominator; NaN if the logits hold NaN or infinity, or nothing finite."""
    with np.errstate(invalid="ignore"):
        top = logits.max()
        return float(top) + float(np.log(np.exp(logits - top).sum(dtype=np.float64)))


def finite_sum(logits: F32) -> float:
    """`log_sum_exp`; raises NonFinite instead of returning NaN."""
    total = log_sum_exp(logits)
    if not np.isfinite(total):
        raise NonFinite("the logits hold NaN or infinity: the model's weights or its input are damaged")
    return total
