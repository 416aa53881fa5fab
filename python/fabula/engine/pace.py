"""What a step of a model costs, and how much of it may go to prompts."""

from __future__ import annotations

MIN_CHUNK = 4  # prompt tokens in a step while others draw
STRETCH = 2.4  # how much longer a step may take for the sake of prompts


class Pace:
    """What a step of one model costs, measured as it goes, and how much prompt fits beside those that draw.

    A step is taken to last `base + token * n` seconds for n tokens, drawn or read: weights pass by once, and each token
    is multiplied with them. Both numbers are least squares over the last steps, the older ones weighing less.
    """

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, n, n^2, t, n t

    def chunk(self, n_drawing: int, most: int) -> int:
        """Prompt tokens for the next step."""
        if not n_drawing:
            return most
        base, token = self.cost()
        extra = int((STRETCH - 1) * (base / token + n_drawing)) if token > 0 else 0
        return min(max(MIN_CHUNK, extra), most)

    def cost(self) -> tuple[float, float]:
        """Seconds of a step without tokens, and of a token; (0, 0) before the first step."""
        w, n, nn, t, nt = self._sums
        if not w:
            return 0.0, 0.0
        n, nn, t, nt = n / w, nn / w, t / w, nt / w
        variance = nn - n * n
        # Steps of nearly one size say little of the slope but the noise: the less they differ, the nearer a token is
        # taken to its share of the time, which is the most it can cost.
        ridge = 4 + n * n / 16
        token = (nt - n * t + ridge * t / n) / (variance + ridge)
        token = min(max(token, 0.02 * t / n), t / n)
        return t - token * n, token

    def measured(self, n_tokens: int, seconds: float) -> None:
        """Learns from a step."""
        new = (1.0, n_tokens, n_tokens * n_tokens, seconds, n_tokens * seconds)
        self._sums = [0.95 * old + one for old, one in zip(self._sums, new, strict=True)]
