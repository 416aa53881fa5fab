"""The sampler in plain NumPy: float64 throughout, full sorts, brute force. Written from the definitions, not
from the C.

A dropped or banned token is one with logit -inf. Settings are any object with the fields of SamplingParams;
they are rounded to float32 first, as the library holds them. `Trace.margin` tells how near any decision came
to its limit, relative to the whole: where that is about 1e-15, two correct programs may differ, and a test
should look away.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
MAX_MATCH = 4096  # repetitions longer than this count as that long

# ---- Random numbers
# --------------------------------------------------------------------------------------------------


def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox 4x32-10 of Salmon et al., SC'11: ten rounds of two 32x32-bit products."""
    x, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(b >> 32) ^ x[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ x[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x[0], x[1], x[2], x[3]


def random_words(seed: int, position: int, stream: int) -> tuple[int, int, int, int]:
    """Key is the seed, counter is (position, stream, 0), low words first."""
    low = 0xFFFFFFFF
    return philox((position & low, position >> 32, stream, 0), (seed & low, seed >> 32))


def uniform(seed: int, position: int, stream: int) -> float:
    """A number in [0, 1) with 53 bits."""
    high, low, _, _ = random_words(seed, position, stream)
    return ((high << 32 | low) >> 11) / 2**53


# ---- Chain
# -----------------------------------------------------------------------------------------------------------


def f32(value: float) -> float:
    return float(np.float32(value))


def softmax(logits: F64) -> F64:
    weights = np.exp(logits - logits.max())
    return weights / math.fsum(weights)


def longest_repetitions(tokens: Sequence[int], breakers: frozenset[int]) -> dict[int, int]:
    """For each token that followed an earlier copy of the end of `tokens`: the length of the longest one."""
    best: dict[int, int] = {}
    for end in range(len(tokens) - 1):
        length = 0
        while (
            length <= end
            and length < MAX_MATCH
            and tokens[end - length] == tokens[len(tokens) - 1 - length]
            and tokens[end - length] not in breakers
        ):
            length += 1
        token = tokens[end + 1]
        if token not in breakers:
            best[token] = max(best.get(token, 0), length)
    return best


class Trace:
    """One run of the chain.

    Attributes:
        logits: float64 [vocab_size] as the chain left them, -inf for what it dropped.
        margin: least relative distance of any decision from its limit; infinity if none was taken.
    """

    def __init__(
        self,
        logits: npt.ArrayLike,
        params: Any,
        *,
        seed: int,
        position: int,
        history: Sequence[int] = (),
        breakers: Sequence[int] = (),
        banned: Sequence[int] = (),
    ) -> None:
        self.logits = np.asarray(logits, np.float64).copy()
        self.margin = math.inf
        self._params, self._seed, self._position = params, seed, position
        self._history, self._breakers = list(history), frozenset(breakers)
        self._bias = dict(params.logit_bias) | dict.fromkeys((*params.banned_tokens, *banned), -math.inf)
        self._greedy = params.temperature == 0
        chain = params.chain if "bias" in params.chain else ("bias", *params.chain)
        with np.errstate(under="ignore", over="ignore"):
            for step in chain:
                some_left = bool(np.isfinite(self.logits.max()))
                if some_left and (not self._greedy or step in ("bias", "penalties", "dry")):
                    getattr(self, step)()

    # ---- Steps that change logits ----

    def bias(self) -> None:
        for token, value in self._bias.items():
            self.logits[token] += f32(value)

    def _window(self, size: int) -> list[int]:
        return self._history if size < 0 else self._history[len(self._history) - min(size, len(self._history)) :]

    def penalties(self) -> None:
        repetition = f32(self._params.repetition_penalty)
        frequency, presence = f32(self._params.frequency_penalty), f32(self._params.presence_penalty)
        for token, count in Counter(self._window(self._params.penalty_window)).items():
            x = self.logits[token]
            x = x / repetition if x > 0 else x * repetition
            self.logits[token] = x - (count * frequency + presence)

    def dry(self) -> None:
        multiplier, base = f32(self._params.dry_multiplier), f32(self._params.dry_base)
        if multiplier == 0:
            return
        allowed = self._params.dry_allowed_length
        largest = float(np.finfo(np.float32).max)
        for token, length in longest_repetitions(self._window(self._params.dry_window), self._breakers).items():
            if length >= allowed:
                try:
                    loss = multiplier * base ** (length - allowed)
                except OverflowError:
                    loss = largest
                self.logits[token] -= min(loss, largest)

    def temperature(self) -> None:
        self.logits = self.logits * (1.0 / f32(self._params.temperature))

    # ---- Steps that drop tokens ----

    def _keep(self, ids: npt.NDArray[np.intp]) -> None:
        kept = np.full_like(self.logits, -np.inf)
        kept[ids] = self.logits[ids]
        self.logits = kept

    def _near(self, value: float, limit: float, whole: float) -> None:
        if math.isfinite(value) and math.isfinite(limit):
            self.margin = min(self.margin, abs(value - limit) / max(whole, 1e-300))

    def _keep_mass(self, keys: F64, mass: float) -> None:
        """Keeps the tokens with the lowest keys whose probabilities sum to `mass`."""
        p = softmax(self.logits)
        order = np.lexsort((np.arange(len(keys)), keys))
        order = order[np.isfinite(self.logits[order])]
        sums = np.cumsum(p[order])
        for total in sums[:-1]:
            self._near(total, mass, 1.0)
        n = min(int(np.searchsorted(sums, mass)) + 1, len(order))
        # Other logits whose keys are all but that of the last one kept: rounding decides which of them stay.
        last = order[n - 1]
        others = keys[order[self.logits[order] != self.logits[last]]]
        if len(others):
            self._near(float(np.abs(others - keys[last]).min()), 0.0, 1.0 + abs(keys[last]))
        self._keep(order[:n])

    def top_k(self) -> None:
        k = self._params.top_k
        if k:
            self._keep(np.lexsort((np.arange(len(self.logits)), -self.logits))[:k])

    def top_p(self) -> None:
        p = f32(self._params.top_p)
        if p < 1:
            self._keep_mass(-self.logits, p)

    def typical_p(self) -> None:
        p = f32(self._params.typical_p)
        if p < 1:
            probabilities = softmax(self.logits)
            shifted = self.logits - self.logits.max()
            surprise = math.log(np.exp(shifted).sum()) - shifted
            some = probabilities > 0
            entropy = math.fsum(probabilities[some] * surprise[some])
            self._keep_mass(np.abs(surprise - entropy), p)

    def min_p(self) -> None:
        p = softmax(self.logits)
        limit = f32(self._params.min_p) * p.max()
        if limit > 0:
            for value in p[p < p.max()]:
                self._near(value, limit, limit)
            self._keep(np.flatnonzero((p >= limit) | (p == p.max())))

    def xtc(self) -> None:
        threshold, coin = f32(self._params.xtc_threshold), uniform(self._seed, self._position, 1)
        if coin >= f32(self._params.xtc_probability) or not 0 < threshold <= 0.5:
            return
        p = softmax(self.logits)
        for value in p:
            self._near(value, threshold, threshold)
        top = np.flatnonzero(p >= threshold)
        if len(top) > 1:
            least = top[np.lexsort((-top, self.logits[top]))[0]]
            self._keep(np.flatnonzero((p < threshold) | (np.arange(len(p)) == least)))

    # ---- Results ----

    def probabilities(self) -> F64:
        if self._greedy:
            return np.asarray(np.arange(len(self.logits)) == np.argmax(self.logits), np.float64)
        with np.errstate(under="ignore"):
            return softmax(self.logits)

    def token(self) -> int:
        """The first id at which the running sum of probabilities exceeds the random number."""
        if self._greedy:
            return int(np.argmax(self.logits))
        sums = np.cumsum(self.probabilities())
        u = uniform(self._seed, self._position, 0)
        for total in sums[sums < sums[-1]]:
            self._near(total, u, 1.0)
        return min(int(np.searchsorted(sums, u, side="right")), int(np.flatnonzero(self.probabilities())[-1]))


def logprob(logits: npt.ArrayLike, token: int) -> float:
    """Natural log of the plain softmax at `token`."""
    x = np.asarray(logits, np.float64)
    with np.errstate(under="ignore"):
        return float(x[token] - x.max() - math.log(math.fsum(np.exp(x - x.max()))))
