"""Measured cost of a model's steps, and the prefill budget of a step that also decodes."""

from __future__ import annotations

MIN_CHUNK = 4  # prompt tokens in a step while other requests decode
STRETCH = 2.4  # how much longer a decode step may take because of prefill
ROW_SHARE = 0.25  # of a step's time, that each more row is taken to cost until it is measured; 0.1 to 0.5 were
FORGET_STEPS = 512  # a size that was not measured for so long is measured again when it may pay


class StepCost:
    """Cost of one model's steps, fitted to measured times.

    A step is taken to last `base + token * n` seconds for n tokens, prefill or decode: the weights are read once, and
    each token is multiplied with them. Both numbers are least squares over the last steps, with decaying weights.

    A few rows, whose logits are all computed, are no such line: kernels multiply tokens in tiles. So the time of a
    decode step of n rows is kept for each n.
    """

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, n, n^2, t, n t
        self._rows: dict[int, tuple[float, int]] = {}  # mean seconds of a step of n rows, and the step that was last
        self._n_steps = 0

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

    def measured_rows(self, n_rows: int, seconds: float, n_steps: int = 1) -> None:
        """Adds decode steps of `n_rows` rows, each of so many seconds, sampling included."""
        self._n_steps += n_steps
        mean = self._rows[n_rows][0] if n_rows in self._rows else seconds
        new = mean + 0.25 * (min(seconds, 3 * mean) - mean)  # a thread that was descheduled says little
        self._rows[n_rows] = new, self._n_steps
        if len(self._rows) > 1:
            least, oldest = min(self._rows), self._n_steps - FORGET_STEPS
            self._rows = {n: one for n, one in self._rows.items() if one[1] >= oldest or n == least}

    def row_and_base(self) -> tuple[float, float]:
        """Seconds of a second row of a decode step, and of the first; (0, 0) before the first step."""
        first = self.seconds(1)
        return max(0.0, self.seconds(2) - first), first

    def seconds(self, n_rows: int) -> float:
        """Seconds of a decode step of so many rows: measured, between two that were, or guessed from fewer rows; 0
        before the first."""
        rows = self._rows
        if not rows or n_rows in rows:
            return rows[n_rows][0] if rows else 0.0
        below, above = (
            max((n for n in rows if n < n_rows), default=0),
            min((n for n in rows if n > n_rows), default=0),
        )
        if not below:
            return rows[above][0]
        if not above:
            return rows[below][0] + ROW_SHARE * rows[min(rows)][0] * (n_rows - below)
        share = (n_rows - below) / (above - below)
        return (1 - share) * rows[below][0] + share * rows[above][0]
