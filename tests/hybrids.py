"""Tiny hybrids: Llama with a short convolution over its embeddings, so that every token depends on those before it in a
way that only a recurrent state remembers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fabula._program import Op
from fabula.engine import runner
from fabula.lean_dataclasses import replace
from fabula.models.builder import SHORT_CONV
from fabula.models.description import ModelConfig

N_TAPS = 4


def make_hybrid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Llama that is loaded from now on has the convolution."""
    lay_out = runner.lay_out

    def with_convolution(builder: Any, config: ModelConfig, *more: Any) -> Any:
        found = lay_out(builder, config, *more)
        (ops,), (widths,) = builder.ops, builder.widths
        embed, n = ops[0], config.hidden_size
        taps = np.random.default_rng(0).normal(0, 0.7, (N_TAPS, n)).astype(np.float32)
        ops[:1] = [
            replace(embed, out=len(widths)),
            Op(kind=SHORT_CONV, input=len(widths), out=embed.out, width=n, vector=taps.reshape(-1)),
        ]
        widths.append(widths[embed.out])
        return found

    monkeypatch.setattr(runner, "lay_out", with_convolution)
    monkeypatch.setattr(ModelConfig, "state_layers", property(lambda c: ((N_TAPS - 1) * c.hidden_size,)))
