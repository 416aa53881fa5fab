"""Drafts of a second, smaller model with the same vocabulary.

Each answer has a sequence of KV in the draft model's own pool. A draft is greedy, some decode steps of the draft model
in one native call. It costs these steps, so it is as long as its tokens pay for them, and there is none where too few
are accepted: then one is tried now and then.

The draft model computes an answer's prompt too, a chunk before each of the first steps, and meanwhile there are no
drafts. Its KV is found again by prefix hash like any other: the next turn of a conversation computes new tokens only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fabula import _native, _program
from fabula._native import PAGE_POSITIONS
from fabula.engine.drafts import NO_DRAFT, Draft, Rate
from fabula.engine.policy import common_length
from fabula.engine.runner import Runner
from fabula.engine.sampling import Sampler, SamplingParams
from fabula.engine.step_cost import StepCost
from fabula.errors import EngineError, InvalidArgument
from fabula.kv.cache import KvEvictionList
from fabula.kv.pages import Sequence
from fabula.kv.prefix import KeyChain, Window
from fabula.text.tokenizer import Tokenizer

I32 = npt.NDArray[np.int32]

CHUNK = 128  # prompt tokens before a step: other answers wait for them
TRY_EVERY = 32  # tokens between two drafts of a model whose drafts do not pay


class DraftModel:
    """A model that drafts for a larger one.

    Args:
        runner, tokenizer, cache: of the draft model.

    Attributes:
        runner, tokenizer, cache: as given.
        step_s: seconds of one of its decode steps, 0 before the first.
    """

    def __init__(self, runner: Runner, tokenizer: Tokenizer, cache: KvEvictionList) -> None:
        self.runner, self.tokenizer, self.cache = runner, tokenizer, cache
        self.step_s = 0.0
        greedy = Sampler(SamplingParams(temperature=0.0, seed=0), runner.config.vocab_size)
        self._sampling, self._no_ends, self._never = greedy.sampling, np.empty(0, np.int32), _native.Flag()

    def check_vocabulary(self, tokenizer: Tokenizer) -> None:
        """Raises InvalidArgument unless token ids of the other tokenizer mean the same here."""
        own = self.tokenizer
        same = own.vocab_size == tokenizer.vocab_size and own.eos_ids == tokenizer.eos_ids
        if not same or any(_bytes(own, i) != _bytes(tokenizer, i) for i in range(own.vocab_size)):
            raise InvalidArgument(
                "the draft model has another vocabulary than the model; take one of the same family, whose token ids"
                " mean the same"
            )

    def decode(self, sequence: Sequence, history: I32, n: int) -> list[int]:
        """Computes the tokens of a history that a sequence lacks and samples the next n greedily.

        Raises:
            EngineError: there are no free pages, or the draft model fails.
        """
        tokens, n_known = history[sequence.n_tokens :].copy(), len(history)
        part = self.runner.prepare(sequence, tokens, n - 1)
        buffer = np.empty(n_known + n, np.int32)
        buffer[:n_known] = history
        given = _program.DecodeSequence(part.share, n, buffer, n_known, self._no_ends, self._sampling)
        (found,), seconds = self.runner.decode([(sequence, given)], n, self._never)
        step = float(seconds[-1]) / len(seconds)
        self.step_s = step if not self.step_s else self.step_s + 0.1 * (min(step, 3 * self.step_s) - self.step_s)
        drafted: list[int] = found[0].tolist()
        return drafted


class ModelDrafts:
    """A draft model's drafts of one answer.

    Args:
        model: drafts.
        cost: returns the cost of the larger model's steps.
        window: what the answer's tokens see.
        salt: of its owner; KV of the draft model is shared under the same salt only.
    """

    def __init__(self, model: DraftModel, cost: Callable[[], StepCost], window: Window, salt: str) -> None:
        self._model, self._cost, self._window = model, cost, window
        self._chain = KeyChain(salt, window)
        self._sequence: Sequence | None = None
        self._n_published = 0
        self._drafted: tuple[int, list[int]] = (0, [])  # length of the history at the last draft, and the draft
        self._rate = Rate(0.6)
        self._try_at = 0

    def propose(self, history: I32, most: int, n_decoding: int) -> Draft:
        model = self._model
        if model.runner.room(len(history) + most, self._window) < 0:
            return NO_DRAFT
        try:
            sequence = self._caught_up(history)
            if sequence is None:
                return NO_DRAFT
            n, rate = self._length(most, n_decoding), self._rate.value()
            if not n:
                if len(history) < self._try_at:
                    return NO_DRAFT
                n = rate = 1  # only to measure it again
            self._try_at = len(history) + TRY_EVERY
            tokens = model.decode(sequence, history, n)
        except EngineError:  # no pages, or it was closed: the answer does not need it
            return NO_DRAFT
        self._drafted = len(history), tokens
        return Draft(tokens, [rate ** (i + 1) for i in range(len(tokens))])

    def verified(self, n_drafted: int, n_accepted: int) -> None:
        for i in range(min(n_accepted + 1, n_drafted)):
            self._rate.count(i < n_accepted)

    def close(self) -> None:
        sequence, self._sequence = self._sequence, None
        if sequence is not None and sequence.n_tokens:
            self._model.cache.keep(sequence, owned=True)

    def _length(self, most: int, n_decoding: int) -> int:
        """Tokens to draft: those that give the most tokens per second, the draft model's steps included."""
        cost, step_s = self._cost(), self._model.step_s
        plain = cost.seconds(n_decoding)
        if plain <= 0:
            return 0
        rate, chance, tokens = self._rate.value(), 1.0, float(n_decoding)
        best, n_best = tokens / plain, 0
        for n in range(1, most + 1):
            chance *= rate
            tokens += chance
            if (speed := tokens / (cost.seconds(n_decoding + n) + n * step_s)) > best:
                best, n_best = speed, n
        return n_best

    def _caught_up(self, history: I32) -> Sequence | None:
        """The sequence, once it has all but the last few tokens of a history; computes a chunk of them until then."""
        model, sequence = self._model, self._sequence
        if sequence is None:
            keys = self._chain.keys(history)[: (len(history) - 1) // PAGE_POSITIONS]
            found = model.cache.find_in_memory(keys, self._window, history[:-1])
            sequence = found or model.runner.sequence(self._window)
            sequence.keep_states()
            self._sequence, self._n_published = sequence, sequence.n_tokens // PAGE_POSITIONS
        n_before, drafted = self._drafted
        if drafted:  # the KV of drafted tokens that were not sampled
            n_right = common_length(history[n_before:], np.array(drafted, np.int32))
            n_right = min(sequence.n_tokens, n_before + n_right, len(history) - 1)
            sequence.roll_back(sequence.usable(n_right))
            self._drafted = 0, []
        n_missing = len(history) - sequence.n_tokens
        if n_missing > CHUNK:
            start = sequence.n_tokens
            model.runner.step([(sequence, history[start : start + CHUNK].copy())], [])
        n_full = sequence.n_tokens // PAGE_POSITIONS
        if n_full > self._n_published:
            keys, pages = self._chain.keys(history), sequence.pages
            for i in range(self._n_published, n_full):
                model.runner.pool.name(pages[i], keys[i])
            self._n_published = n_full
        sequence.publish_states(self._chain.keys(history), history, also_passing=True)
        sequence.drop_passing(sequence.n_tokens)
        if sequence.window.slides:
            sequence.slide(sequence.n_tokens - CHUNK)
        return sequence if n_missing <= CHUNK else None


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    try:
        return tokenizer.token_bytes(token)
    except InvalidArgument:
        return b""
