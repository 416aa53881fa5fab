"""Measured cost of a model's steps, and the prefill budget of a step that also decodes."""

from __future__ import annotations

MIN_CHUNK = 4  # prompt tokens in a step while other requests decode
STRETCH = 2.4  # how much longer a decode step may take because of prefill


class StepCost:
    """Cost of one model's steps, fitted to measured times.

    A step is taken to last `base + token * n` seconds for n tokens, prefill or decode: the weights are read once, and
    each token is multiplied with them. Both numbers are least squares over the last steps, with decaying weights.
    """

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, n, n^2, t, n t

    def prefill_tokens(self, n_decoding: int, most: int) -> int:
        """Prefill budget in tokens of a step with `n_decoding` decoding requests; at most `most`."""
        if not n_decoding:
            return most
        base, token = self.cost()
        extra = int((STRETCH - 1) * (base / token + n_decoding)) if token > 0 else 0
        return min(max(MIN_CHUNK, extra), most)

    def cost(self) -> tuple[float, float]:
        """Seconds of a step without tokens, and of each token; (0, 0) before the first step."""
        w, n, nn, t, nt = self._sums
        if not w:
            return 0.0, 0.0
        n, nn, t, nt = n / w, nn / w, t / w, nt / w
        variance = nn - n * n
        # Steps of nearly equal sizes determine the slope badly: the less they differ, the closer the estimate is to a
        # token's share of the whole time, which is an upper bound.
        ridge = 4 + n * n / 16
        token = (nt - n * t + ridge * t / n) / (variance + ridge)
        token = min(max(token, 0.02 * t / n), t / n)
        return t - token * n, token

    def measured(self, n_tokens: int, seconds: float) -> None:
        """Adds a measured step of `n_tokens`."""
        new = (1.0, n_tokens, n_tokens * n_tokens, seconds, n_tokens * seconds)
        self._sums = [0.95 * old + one for old, one in zip(self._sums, new, strict=True)]
