"""Alternating updates (Baykal et al. 2023): several residual streams, of which each layer computes one.

    begin     stream i = projection_i x, scaled to the root mean square of x; stream 0 = x
    predict   stream_i += sum over j of coefficient[i][j] stream_j;  x = the active one
    a layer   x = layer(x)
    correct   stream_i += (1 + coefficient_i) (x - active stream)
    end       the mean of stream 0 and of back projection_i stream_i, scaled to the root mean square of stream 0

The coefficients are products with router(x) = tanh(W norm(x) / hidden_size). Streams lie side by side in one buffer.
Source: Gemma 3n in transformers 5.24.
"""

from __future__ import annotations

import numpy as np

from fabula.models.builder import F32, ProgramBuilder
from fabula.models.description import AltUp, ModelConfig, Norm
from fabula.models.shares import whole

_EPS = 1e-5  # least mean square of a stream that is scaled


class Streams:
    """The streams of a model.

    Args:
        b: collects operators.
        c: the model.
        altup: what its config says of streams.
        x: buffer of the residual stream that layers compute;  h: one as wide, overwritten.
    """

    def __init__(self, b: ProgramBuilder, c: ModelConfig, altup: AltUp, x: int, h: int) -> None:
        self.b, self.c, self.altup, self.x, self.h = b, c, altup, x, h
        n, s = altup.n, b.shares
        self.streams, self.predictions, self.gathered = (b.buffer(whole(n * c.hidden_size, s.n)) for _ in range(3))
        self.router, self.corrections = b.buffer(whole(n, s.n)), b.buffer(whole(n, s.n))
        self.coefficients = b.buffer(whole(n * n, s.n))

    def unit(self, i: int) -> F32:
        """Factors of stream i alone."""
        found: F32 = np.eye(self.altup.n, dtype=np.float32)[i]
        return found

    def _mix(self, x: int, out: int, factors: int | F32, residual: int = -1) -> None:
        self.b.mix(x, out, self.c.hidden_size, factors, residual=residual)

    def begin(self) -> None:
        b, hidden = self.b, self.b.shares.hidden
        parts = [b.buffer(hidden) for _ in range(1, self.altup.n)]
        for i, part in enumerate(parts):
            b.linear(self.x, part, [b.matrix(f"model.altup_projections.{i}.weight", hidden, hidden)])
        self._mix(self.x, self.streams, self.unit(0))
        for i, part in enumerate(parts):
            b.match_rms(part, part, self.x, eps=_EPS)
            self._mix(part, self.streams, self.unit(i + 1), self.streams)

    def _route(self, prefix: str) -> None:
        """router = tanh(W norm(x) / hidden_size)"""
        b, c = self.b, self.c
        weight = b.vector(prefix + "router_norm.weight", c.hidden_size) * np.float32(1 / c.hidden_size)
        b.norm(self.x, self.h, Norm("rms", c.rms_norm_eps), weight)
        axis = whole(self.altup.n, b.shares.n)
        weights = b.matrix(prefix + "modality_router.weight", axis, b.shares.hidden)
        b.linear(self.h, self.router, [weights], activation="tanh")

    def predict(self, prefix: str) -> None:
        """x = the active stream as a layer reads it."""
        b, n = self.b, self.altup.n
        self._mix(self.streams, self.x, self.unit(self.altup.active))
        self._route(prefix)
        rows, columns = whole(n * n, b.shares.n), whole(n, b.shares.n)
        b.linear(self.router, self.coefficients, [b.matrix(prefix + "prediction_coefs.weight", rows, columns)])
        self._mix(self.streams, self.predictions, self.coefficients, self.streams)
        self._mix(self.predictions, self.x, self.unit(self.altup.active))

    def correct(self, prefix: str) -> None:
        """Takes the layer's result x into all streams; then x = the active one, scaled."""
        b, n, active = self.b, self.altup.n, self.unit(self.altup.active)
        self._route(prefix)
        axis, ones = whole(n, b.shares.n), [np.ones(n, np.float32)] * b.shares.n
        weights = b.matrix(prefix + "correction_coefs.weight", axis, axis)
        b.linear(self.router, self.corrections, [weights], bias=ones)
        self._mix(self.predictions, self.x, -active, self.x)
        self._mix(self.x, self.streams, self.corrections, self.predictions)
        self._mix(self.streams, self.x, active)
        if self.altup.scaled:
            b.multiply_by(self.x, self.x, b.vector(prefix + "correct_output_scale", self.c.hidden_size))

    def add_to_others(self, y: int) -> None:
        """Adds to all streams but the first."""
        self._mix(y, self.streams, 1 - self.unit(0), self.streams)

    def end(self, out: int) -> None:
        """Gathers outputs and makes one stream of all."""
        b, hidden, n = self.b, self.b.shares.hidden, self.altup.n
        b.gather_outputs(self.streams, self.gathered)
        self._mix(self.gathered, out, self.unit(0))
        one, back = b.buffer(hidden), b.buffer(hidden)
        for i in range(1, n):
            self._mix(self.gathered, one, self.unit(i))
            b.linear(one, back, [b.matrix(f"model.altup_unembed_projections.{i - 1}.weight", hidden, hidden)])
            b.match_rms(back, back, self.gathered, eps=_EPS)
            b.add(out, out, back, scale=1 / n if i == n - 1 else 1.0)
