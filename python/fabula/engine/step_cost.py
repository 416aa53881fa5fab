"""What a step of a model costs, and how many prompt tokens it may hold besides the decoding requests."""

from __future__ import annotations

MIN_CHUNK = 4  # prompt tokens in a step while other requests decode
STRETCH = 2.4  # how much longer a step may take for the sake of prefill


class StepCost:
    """What a step of one model costs, measured as it goes.

    A step is taken to last `base + token * n` seconds for n tokens, prefill or decode: the weights are read once, and
    each token is multiplied with them. Both numbers are least squares over the last steps, with decaying weights.
    """

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, n, n^2, t, n t

    def prefill_tokens(self, n_decoding: int, most: int) -> int:
        """Prompt tokens for the next step, beside `n_decoding` requests that decode; at most `most`."""
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
        # Steps of nearly one size say little about the slope: the less they differ, the nearer a token is taken to its
        # share of the time, which is the most it can cost.
        ridge = 4 + n * n / 16
        token = (nt - n * t + ridge * t / n) / (variance + ridge)
        token = min(max(token, 0.02 * t / n), t / n)
        return t - token * n, token

    def measured(self, n_tokens: int, seconds: float) -> None:
        """Learns from a step of `n_tokens` that took so long."""
        new = (1.0, n_tokens, n_tokens * n_tokens, seconds, n_tokens * seconds)
        self._sums = [0.95 * old + one for old, one in zip(self._sums, new, strict=True)]
