"""Sampling settings, checked once, and the sampler that passes them to C.

`SamplingParams` documents every setting with its source. The arithmetic is in native/src/ops/sample*.c, and again in
plain NumPy in tests/reference/sampling.py.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from fabula import _program, _sampling
from fabula.engine.constraint import Constraint
from fabula.engine.thinking import Thinking
from fabula.errors import InvalidArgument
from fabula.lean_dataclasses import dataclass, field, replace

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

# Names of the chain's steps; the values are those of `enum fb_sampler` in fabula.h.
STEPS: Mapping[str, int] = MappingProxyType(
    {
        "bias": 1,
        "penalties": 2,
        "dry": 3,
        "temperature": 4,
        "top_k": 5,
        "typical_p": 6,
        "top_p": 7,
        "min_p": 8,
        "xtc": 9,
    }
)

# llama.cpp's order, after the bias; see fb_sampling_default.
DEFAULT_CHAIN = ("bias", "penalties", "dry", "top_k", "typical_p", "top_p", "min_p", "xtc", "temperature")


class _UnsetFloat(float):
    """The neutral value of a setting that was not given; a model's default may replace it."""


class _UnsetInt(int):
    """As `_UnsetFloat`."""


# Settings that a model may have defaults for (`engine/defaults.py`), with their neutral values.
_NEUTRAL: Mapping[str, float] = MappingProxyType(
    {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0,
        "penalty_window": -1, "xtc_probability": 0.0, "xtc_threshold": 0.1,
    }
)  # fmt: skip
MODEL_SETTINGS = tuple(_NEUTRAL)
_TEMPERATURE, _TOP_P, _TYPICAL_P, _REPETITION = (_UnsetFloat(1.0) for _ in range(4))
_MIN_P, _XTC_PROBABILITY, _XTC_THRESHOLD = _UnsetFloat(0.0), _UnsetFloat(0.0), _UnsetFloat(0.1)
_TOP_K, _PENALTY_WINDOW = _UnsetInt(0), _UnsetInt(-1)

MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
_INT_MAX = 2**31 - 1
_SEED_MAX = 2**64 - 1
_FLOAT_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a generation ends.

    A setting that is not given has the model's default (`Model.defaults`), or is neutral if the model has none: plain
    sampling at temperature 1. A given value always wins, also one that equals the neutral one.

    Steps run in the order of `chain`. A step that is neutral or not in the chain does nothing, except for the
    bias, which comes first if the chain does not name it. Each step that removes tokens works on the renormalized
    distribution of the steps before it and keeps at least one token. Of equal logits that of the lower id counts
    as the higher. The windows of penalties and DRY cover the prompt too.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token after bias, penalties and DRY,
            whatever else is set.
        top_k: keep the k likeliest (Fan et al., 2018); 0 is off.
        top_p: keep the fewest likeliest tokens that together have this probability (nucleus, Holtzman et al.,
            2019); in (0, 1], 1 is off.
        min_p: keep tokens at least this many times as likely as the likeliest (Nguyen et al., 2024); in [0,
            1], 0 is off.
        typical_p: keep the tokens whose surprise is nearest to the entropy until they have this probability
            (Meister et al., 2022); in (0, 1], 1 is off.
        repetition_penalty: a logit above 0 is divided by it, any other multiplied, once per token seen (CTRL,
            Keskar et al., 2019); above 0, 1 is off.
        penalty_window: how many last tokens the three penalties see; -1 all, 0 none.
        frequency_penalty: subtracted once per occurrence (OpenAI API).
        presence_penalty: subtracted once per token seen (OpenAI API).
        dry_multiplier: DRY (p-e-w, text-generation-webui, 2024): a token that would prolong a repetition of
            L tokens loses multiplier * base^(L - allowed_length); 0 is off.
        dry_base: 1 or more.
        dry_allowed_length: shorter repetitions have no penalty; 1 or more.
        dry_window: how many last tokens DRY sees; -1 all, 0 none.
        dry_breakers: texts that end a repetition; each stands for the last of its tokens.
        xtc_probability: XTC (p-e-w, 2024): with this probability, drop all tokens that reach the threshold
            but the least likely of them; in [0, 1], 0 is off.
        xtc_threshold: in [0, 1]; has an effect in (0, 0.5].
        logit_bias: number added per token id, -inf bans; given as a mapping, stored as sorted pairs; 1,024 at
            most.
        banned_tokens: ids never sampled.
        seed: 0 .. 2^64 - 1; None lets the caller pick one by `resolved_seed`. The same seed, logits and
            position give the same token.
        chain: names of steps, each at most once, out of STEPS.
        max_tokens: tokens to generate at most; None leaves it to the context.
        min_tokens: end tokens are banned before that many tokens.
        stop: texts that end the generation and are not part of it; at most 16 of at most 256 bytes of UTF-8.
        stop_tokens: ids that end the generation like the model's own end tokens.
        ignore_eos: the model's end tokens do not end the generation.
        n_logprobs: how many of the likeliest tokens are reported with each token; 0 .. 20.
        constraint: what the answer must satisfy; None for anything. It wins over other settings: end tokens come only
            where the answer may end, and always where nothing else may follow. But `stop` and `stop_tokens` end the
            answer anywhere, even where it is not complete.
        thinking: marks of the answer's thoughts and their limit; None: thoughts are text like any other.
        given: names in MODEL_SETTINGS that were given; the others are neutral until `resolved` fills them in. Not an
            argument: `replace` keeps it. Settings compare by their values alone.

    Raises:
        InvalidArgument: a value has the wrong type or is out of its range.
    """

    temperature: float = _TEMPERATURE
    top_k: int = _TOP_K
    top_p: float = _TOP_P
    min_p: float = _MIN_P
    typical_p: float = _TYPICAL_P
    repetition_penalty: float = _REPETITION
    penalty_window: int = _PENALTY_WINDOW
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_window: int = -1
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = _XTC_PROBABILITY
    xtc_threshold: float = _XTC_THRESHOLD
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    banned_tokens: tuple[int, ...] = ()
    seed: int | None = None
    chain: tuple[str, ...] = DEFAULT_CHAIN
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    n_logprobs: int = 0
    constraint: Constraint | None = None
    thinking: Thinking | None = None
    given: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        unset = (_UnsetFloat, _UnsetInt)
        given = (name for name in MODEL_SETTINGS if not isinstance(getattr(self, name), unset))
        object.__setattr__(self, "given", frozenset(given))
        for name in ("temperature", "dry_multiplier"):
            self._number(name, 0.0, _FLOAT_MAX)
        for name in ("min_p", "xtc_probability", "xtc_threshold"):
            self._number(name, 0.0, 1.0)
        for name in ("top_p", "typical_p"):
            self._number(name, 0.0, 1.0, above=True)
        for name in ("frequency_penalty", "presence_penalty"):
            self._number(name, -_FLOAT_MAX, _FLOAT_MAX)
        self._number("repetition_penalty", 0.0, _FLOAT_MAX, above=True)
        self._number("dry_base", 1.0, _FLOAT_MAX)
        for name, low, high in (
            ("top_k", 0, _INT_MAX),
            ("penalty_window", -1, _INT_MAX),
            ("dry_allowed_length", 1, _INT_MAX),
            ("dry_window", -1, _INT_MAX),
            ("min_tokens", 0, _INT_MAX),
            ("n_logprobs", 0, MAX_LOGPROBS),
        ):
            _check_integer(name, getattr(self, name), low, high)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, _SEED_MAX)
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1, _INT_MAX)
            if self.min_tokens > self.max_tokens:
                raise InvalidArgument(f"min_tokens is {self.min_tokens}, must be at most max_tokens {self.max_tokens}")
        if not isinstance(self.ignore_eos, bool):
            raise InvalidArgument(f"ignore_eos is {self.ignore_eos!r}, must be True or False")
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise InvalidArgument(f"constraint is {self.constraint!r:.80}, must be a Constraint or None")
        if self.thinking is not None and not isinstance(self.thinking, Thinking):
            raise InvalidArgument(f"thinking is {self.thinking!r:.80}, must be a Thinking or None")
        for name in ("banned_tokens", "stop_tokens"):
            ids = self._sequence(name, "token ids")
            for token in ids:
                _check_integer(name, token, 0, _INT_MAX)
        for name in ("stop", "dry_breakers"):
            self._texts(name)
        self._chain()
        self._bias()

    # ---- Checks --------------------------------------------------------------------------------------------

    def _number(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        """A number in low .. high, as float32 too, since that is what the library holds."""
        value = getattr(self, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        if not good or (above and float(np.float32(value)) <= low):
            limits = f"above {low:g} and at most {high:g}" if above else f"in {low:g} .. {high:g}"
            raise InvalidArgument(f"{name} is {value!r}, must be a number {limits}")
        if not isinstance(value, _UnsetFloat):
            object.__setattr__(self, name, float(value))

    def _sequence(self, name: str, of_what: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise InvalidArgument(f"{name} is {value!r}, must be a sequence of {of_what}, such as a tuple")
        object.__setattr__(self, name, tuple(value))
        return tuple(value)

    def _texts(self, name: str) -> None:
        texts = self._sequence(name, "strings")
        if len(texts) > MAX_STOPS:
            raise InvalidArgument(f"{name} holds {len(texts)} strings, at most {MAX_STOPS} are allowed")
        for text in texts:
            try:
                n_bytes = len(text.encode()) if isinstance(text, str) else 0
            except UnicodeEncodeError:
                n_bytes = 0  # a lone surrogate
            if not 1 <= n_bytes <= MAX_STOP_BYTES:
                raise InvalidArgument(f"{name} holds {text!r}, must be text of 1 .. {MAX_STOP_BYTES} bytes of UTF-8")

    def _chain(self) -> None:
        chain = self._sequence("chain", "names of steps")
        unknown = [step for step in chain if not isinstance(step, str) or step not in STEPS]
        if unknown:
            raise InvalidArgument(f"chain holds {unknown[0]!r}, must be one of {', '.join(STEPS)}")
        if len(set(chain)) < len(chain):
            twice = next(step for step in chain if chain.count(step) > 1)
            raise InvalidArgument(f"chain holds {twice!r} twice, each step may be named once")

    def _bias(self) -> None:
        value = self.logit_bias
        try:
            pairs = dict(value)
        except (TypeError, ValueError):
            raise InvalidArgument(f"logit_bias is {value!r}, must map token ids to numbers") from None
        if len(pairs) > MAX_LOGIT_BIAS:
            raise InvalidArgument(f"logit_bias holds {len(pairs)} tokens, at most {MAX_LOGIT_BIAS} are allowed")
        for token, bias in pairs.items():
            _check_integer("logit_bias", token, 0, _INT_MAX)
            number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
            if not number or not (-_FLOAT_MAX <= bias <= _FLOAT_MAX or bias == -math.inf):
                raise InvalidArgument(f"logit_bias of token {token} is {bias!r}, must be a finite float32 or -inf")
        ordered = tuple((token, float(pairs[token])) for token in sorted(pairs))
        object.__setattr__(self, "logit_bias", ordered)

    # ---- Use -----------------------------------------------------------------------------------------------

    def resolved_seed(self) -> int:
        """The seed, or a new random one of 53 bits, which JSON numbers can represent."""
        return self.seed if self.seed is not None else int.from_bytes(os.urandom(7)) >> 3  # 53 bits

    def resolved(self, defaults: Mapping[str, float]) -> SamplingParams:
        """These settings with every one of MODEL_SETTINGS given.

        Args:
            defaults: of the model, by name, for what was not given; what they lack becomes neutral.
        """
        filled = {name: defaults.get(name, value) for name, value in _NEUTRAL.items() if name not in self.given}
        return replace(self, **filled) if filled else self  # type: ignore[arg-type]


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidArgument(f"{name} is {value!r}, must be an integer in {low} .. {high}")


# Settings with the same name in struct fb_sampling.
_STRUCT_FIELDS = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "penalty_window", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_window",
    "xtc_probability", "xtc_threshold",
)  # fmt: skip


_scratch = threading.local()


def _scratch_for(vocab_size: int) -> Any:
    """Scratch memory of the sampler: one buffer per thread, of the size that was needed last, so that ended answers
    that are still referenced have none."""
    if getattr(_scratch, "vocab_size", None) != vocab_size:
        _scratch.work, _scratch.vocab_size = _sampling.sample_work(vocab_size), vocab_size
    return _scratch.work


class Sampler:
    """Samples tokens with one set of settings. Its scratch memory, 28 bytes per vocabulary token, is its thread's.

    Attributes:
        params: the settings.
        seed: the seed in use; random when the settings have none.
        vocab_size: length of the logits it takes.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, breaker_ids: Sequence[int] = ()) -> None:
        """Prepares the settings for the native library.

        Args:
            params: the settings.
            vocab_size: tokens in the vocabulary, 1 or more.
            breaker_ids: tokens that end a repetition for DRY: those of `params.dry_breakers`.

        Raises:
            InvalidArgument: a token id of the settings or of breaker_ids is outside the vocabulary.
        """
        _check_integer("vocab_size", vocab_size, 1, _INT_MAX)
        for name, ids in (
            ("logit_bias", [token for token, _ in dict(params.logit_bias).items()]),
            ("banned_tokens", params.banned_tokens),
            ("breaker_ids", breaker_ids),
        ):
            for token in ids:
                _check_integer(name, token, 0, vocab_size - 1)
        self.params, self.vocab_size, self.seed = params, vocab_size, params.resolved_seed()
        bias = dict(params.logit_bias) | dict.fromkeys(params.banned_tokens, -math.inf)
        bias = dict(sorted(bias.items()))  # a device needs ascending ids
        self._bias_ids = np.fromiter(bias.keys(), np.int32, len(bias))
        self._bias_values = np.fromiter(bias.values(), np.float32, len(bias))
        self._breakers = np.asarray(breaker_ids, np.int32)
        # Bans must hold for every chain, so the bias runs even if the chain does not name it.
        chain = params.chain if "bias" in params.chain else ("bias", *params.chain)
        self._settings = _sampling.sampling_struct(
            chain=[STEPS[step] for step in chain],
            seed=self.seed,
            **{name: getattr(params, name) for name in _STRUCT_FIELDS},
        )

    @property
    def sampling(self) -> _program.Sampling:
        """Settings for the native library."""
        return _program.Sampling(self._settings, self._bias_ids, self._bias_values, self._breakers)

    def sample(
        self, logits: F32, history: npt.ArrayLike, position: int, banned: Sequence[int] = ()
    ) -> tuple[int, float]:
        """Samples one token.

        Args:
            logits: float32 [vocab_size], left as they are.
            history: int32 [n], the tokens so far, oldest first.
            position: of the sampled token in its sequence, 0 or more; with the seed it keys the random numbers.
            banned: ids banned in this call only, such as end tokens before `min_tokens`.

        Returns:
            The token's id, and its natural log-probability under the plain softmax of the logits.

        Raises:
            InvalidArgument: an argument has a wrong shape, type or range, or every token was banned.
            NonFinite: the logits hold NaN or +infinity, or nothing finite.
        """
        return _sampling.sample(*self._arguments(logits, history, position, banned))

    def probabilities(self, logits: F32, history: npt.ArrayLike, position: int, banned: Sequence[int] = ()) -> F32:
        """The distribution of `sample`: float32 [vocab_size], 0 for what the chain dropped.

        Arguments and errors as in `sample`.
        """
        return _sampling.sample_probabilities(*self._arguments(logits, history, position, banned))

    def _arguments(self, logits: F32, history: npt.ArrayLike, position: int, banned: Sequence[int]) -> tuple[Any, ...]:
        if logits.dtype != np.float32 or logits.shape != (self.vocab_size,):
            raise InvalidArgument(f"logits are {logits.dtype} {logits.shape}, must be float32 ({self.vocab_size},)")
        tokens = np.ascontiguousarray(history, np.int32)
        if tokens.ndim != 1:
            raise InvalidArgument(f"history has shape {tokens.shape}, must be one row of token ids")
        _check_integer("position", position, 0, _SEED_MAX)
        ids, values = self._bias_ids, self._bias_values
        if len(banned):
            extra = np.asarray(banned, np.int32)
            ids = np.concatenate([ids, extra])
            values = np.concatenate([values, np.full(extra.size, -np.inf, np.float32)])
        return (
            np.ascontiguousarray(logits),
            self._settings,
            position,
            tokens,
            ids,
            values,
            self._breakers,
            _scratch_for(self.vocab_size),
        )
