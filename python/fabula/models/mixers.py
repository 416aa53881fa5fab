"""Recurrent layers as operators.

    ShortConv   b, c, u = in_proj(x);  c * conv(b * u)
    DeltaRule   qkv, z, b, a = in_proj(x);  norm(rule(silu(conv(qkv)), b, a)) * silu(z)
    Mamba2      z, xbc, dt = in_proj(x);  norm(ssm(silu(conv(xbc)), dt) * silu(z))

Each of `conv`, `rule` and `ssm` is an operator with a state; out_proj follows in models/decoder.py. Projections of one
layer are columns of one buffer, which the operators read in place.

Source: modeling files of transformers 5.24; the recurrent forms there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fabula.models.builder import ProgramBuilder
from fabula.models.description import DeltaRule, Mamba2, Mixer, ShortConv
from fabula.models.shares import whole

Scratch = Callable[..., int]  # a buffer by name and axes


class States:
    """Numbers the layers of the state pool, in the order of `ModelConfig.state_layers`."""

    def __init__(self) -> None:
        self._n = 0

    def next(self) -> int:
        self._n += 1
        return self._n - 1


def emit_mixer(b: ProgramBuilder, scratch: Scratch, states: States, prefix: str, mixer: Mixer, x: int) -> int:
    """A recurrent layer up to its output projection.

    Args:
        b: collects operators and tensors.
        scratch: gives buffers.
        states: numbers its states.
        prefix: of the layer's tensors.
        mixer: the layer.
        x: the buffer that it reads.

    Returns:
        The buffer [mixer.inner] that the output projection reads.
    """
    prefix += mixer.part
    if isinstance(mixer, ShortConv):
        return _short_conv(b, scratch, states, prefix, mixer, x)
    if isinstance(mixer, DeltaRule):
        return _delta_rule(b, scratch, states, prefix, mixer, x)
    return _mamba2(b, scratch, states, prefix, mixer, x)


def _short_conv(b: ProgramBuilder, scratch: Scratch, states: States, prefix: str, m: ShortConv, x: int) -> int:
    n = b.shares.n
    rows = whole(3 * m.width, n)
    bcu, out = scratch("bcu", rows), scratch("mixed", whole(m.width, n))
    bias = b.joined([prefix + "in_proj.bias"], [rows]) if m.bias else None
    b.linear(x, bcu, [b.matrix(prefix + "in_proj.weight", rows, b.shares.hidden)], bias=bias)
    conv_bias = b.vector(prefix + "conv.bias", m.width) if m.bias else None
    weights = b.taps(prefix + "conv.weight", m.width, m.n_taps)
    b.short_conv(bcu, out, states.next(), weights, bias=conv_bias, gated=True)
    return out


def _delta_rule(b: ProgramBuilder, scratch: Scratch, states: States, prefix: str, m: DeltaRule, x: int) -> int:
    """The factors of decays are stored as logarithms in safetensors files: see models/views.py."""
    n = b.shares.n
    qkv, z, gates = whole(m.conv_width, n), whole(m.inner, n), whole(m.n_v_heads, n)
    projected, mixed = scratch("projected", qkv, z, gates, gates), scratch("convolved", qkv)
    result, out = scratch("recurrent", z), scratch("mixed", z)
    names = [f"{prefix}in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")]
    b.linear(x, projected, b.stacked(names, [qkv, z, gates, gates], b.shares.hidden))
    weights = b.taps(prefix + "conv1d.weight", m.conv_width, m.n_taps)
    b.short_conv(projected, mixed, states.next(), weights, activation=m.activation)
    b.delta_rule(
        mixed,
        result,
        states.next(),
        projected,
        n_heads=m.n_v_heads,
        n_groups=m.n_k_heads,
        k_dim=m.k_dim,
        v_dim=m.v_dim,
        decay=b.vector(prefix + "decay", m.n_v_heads),
        bias=b.vector(prefix + "dt_bias", m.n_v_heads),
        scale=m.k_dim**-0.5,
        column=m.conv_width + m.inner,
        tiled=m.tiled,
        negative=m.negative,
    )
    weight = b.vector(prefix + "norm.weight", m.v_dim)
    b.gated_norm(result, out, projected, weight, eps=m.norm.eps, n_groups=m.n_v_heads, column=m.conv_width)
    return out


def _mamba2(b: ProgramBuilder, scratch: Scratch, states: States, prefix: str, m: Mamba2, x: int) -> int:
    n = b.shares.n
    rows, xbc, inner = whole(m.inner + m.conv_width + m.n_heads, n), whole(m.conv_width, n), whole(m.inner, n)
    projected, mixed = scratch("projected", rows), scratch("convolved", xbc)
    result, out = scratch("recurrent", inner), scratch("mixed", inner)
    if m.in_scale != 1.0:
        scaled = scratch("mixer_input", b.shares.hidden)
        b.scale(x, scaled, m.in_scale)
        x = scaled
    bias = b.joined([prefix + "in_proj.bias"], [rows]) if m.bias else None
    b.linear(x, projected, [b.matrix(prefix + "in_proj.weight", rows, b.shares.hidden)], bias=bias)
    if set(m.scales) != {1.0}:
        b.multiply_by(projected, projected, np.repeat(np.array(m.scales, np.float32), m.part_widths))
    conv_bias = b.vector(prefix + "conv1d.bias", m.conv_width) if m.conv_bias else None
    weights = b.taps(prefix + "conv1d.weight", m.conv_width, m.n_taps)
    b.short_conv(projected, mixed, states.next(), weights, bias=conv_bias, column=m.inner, activation=m.activation)
    b.ssm(
        mixed,
        result,
        states.next(),
        projected,
        n_heads=m.n_heads,
        n_groups=m.n_groups,
        head_dim=m.head_dim,
        state_dim=m.state_dim,
        decay=b.vector(prefix + "decay", m.n_heads),
        skip=b.vector(prefix + "D", m.n_heads),
        bias=b.vector(prefix + "dt_bias", m.n_heads),
        limits=(m.dt_low, m.dt_limit),
        column=m.inner + m.conv_width,
    )
    if m.norm is None:
        b.gated_norm(result, out, projected, None)
        return out
    weight = b.vector(prefix + "norm.weight", m.inner)
    groups = m.n_norm_groups
    b.gated_norm(result, out, projected, weight, eps=m.norm.eps, n_groups=groups, gate_first=m.gate_first)
    return out
