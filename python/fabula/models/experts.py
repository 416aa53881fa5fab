"""A mixture of experts as operators.

    routes  = router(gate(x))                               the experts of a row, and their weights
    inner_r = activation(gate_e(x)) * up_e(x)               for each of them, e = routes_r
    y       = sum over r of weight_r * down_e(inner_r)      best expert first
    y      += (sigmoid(shared_expert_gate(x)) *) shared_expert(x)

A router may read another buffer than the experts, and a factor of each expert may be on its weights (Gemma 4).

The router's matrix is f32 in memory whatever the others are: its rounding decides which experts are chosen.
"""

from __future__ import annotations

from collections.abc import Callable

from fabula._native import Weight
from fabula.models.builder import ProgramBuilder
from fabula.models.description import Experts
from fabula.models.shares import whole

Scratch = Callable[..., int]  # a buffer by name and axes


def emit_experts(
    b: ProgramBuilder,
    scratch: Scratch,
    prefix: str,
    experts: Experts,
    x: int,
    out: int,
    *,
    residual: int = -1,
    scale: float = 1.0,
    asked: int = -1,
) -> None:
    """out = (residual +) scale * the mixture of `x`.

    Args:
        b: collects operators and tensors.
        scratch: gives buffers.
        prefix: of the tensors' names.
        residual: -1 or `out`.
        asked: what the router reads; -1: `x`.
    """
    router, n, hidden = experts.router, experts.router.n_experts, b.shares.hidden
    logits, routes = scratch("router", whole(n, 1)), scratch("routes", whole(2 * router.n_chosen, 1))
    inner = scratch("expert_inner", whole(router.n_chosen * experts.size, 1))
    bias = [b.vector(prefix + "gate.bias", n)] if router.biased else None
    shared = gate = -1
    if experts.shared:  # beside the router: products that read one buffer share a stage
        axis = whole(experts.shared, 1)
        shared = scratch("shared_inner", axis)
        names = (prefix + "shared_expert.gate_proj.weight", prefix + "shared_expert.up_proj.weight")
        b.linear_gated(x, shared, b.interleaved(names, axis, hidden), activation=experts.activation)
    if experts.shared_gated:
        gate = scratch("shared_gate", whole(1, 1))
        weights = b.plain_matrix(prefix + "shared_expert_gate.weight", whole(1, 1), hidden)
        b.linear(x, gate, [weights], activation="sigmoid")
    b.linear(
        x if asked < 0 else asked, logits, [b.plain_matrix(prefix + "gate.weight", whole(n, 1), hidden)], bias=bias
    )
    correction = b.vector(prefix + "gate.e_score_correction_bias", n) if router.corrected else None
    factors = b.vector(prefix + "gate.per_expert_scale", n) if router.scaled else None
    b.router(logits, routes, router, correction, factors)

    weights = b.experts(prefix + "experts.", ("gate_proj", "up_proj"), n, experts.size, hidden.size)
    biases = b.expert_gate_biases(prefix + "experts.", n, experts.size) if experts.bias else None
    b.expert_gates(x, inner, routes, weights, experts, bias=biases)
    if experts.shared:
        weights = b.matrix(prefix + "shared_expert.down_proj.weight", hidden, whole(experts.shared, 1))
        emit_shared(b, scratch, shared, gate, weights, out, residual, scale)
        residual = out
    weights = b.experts(prefix + "experts.", ("down_proj",), n, hidden.size, experts.size)
    biases = b.expert_biases(prefix + "experts.down_proj", n, hidden.size).reshape(-1) if experts.bias else None
    b.expert_sum(inner, out, routes, weights, experts, bias=biases, residual=residual, scale=scale)


def emit_shared(
    b: ProgramBuilder,
    scratch: Scratch,
    inner: int,
    gate: int,
    weights: list[Weight],
    out: int,
    residual: int,
    scale: float,
) -> None:
    """out = (residual +) scale * (gate *) (weights @ inner)."""
    hidden = b.shares.hidden
    if gate < 0 and residual < 0:
        b.linear(inner, out, [weights], scale=scale)
    elif gate < 0:
        b.linear_add(inner, out, weights, scale=scale)
    else:
        result = scratch("shared", hidden)
        b.linear(inner, result, [weights], scale=scale)
        b.mix(result, out, hidden.size, gate, residual=residual)
