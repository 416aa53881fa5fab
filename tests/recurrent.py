"""Programs of one recurrent operator over given rows, and what it gives as plain loops in float64.

A token's row of each table is its input, so any sequence of tokens can be computed in any steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from fabula import _native, ops
from fabula._native import F32, KvLayer, PagePool, StatePool
from fabula._program import BatchSequence, Heads, Op, Program, Shape, conv_floats, head_floats
from fabula.formats.checkpoint import DType
from fabula.models import builder as kinds

ISAS = [cast(_native.Isa, isa) for isa in get_args(_native.Isa) if isa != "auto" and _native.isa_available(isa)]
F64 = npt.NDArray[np.float64]

N_ROWS = 97  # of the tables: the vocabulary
MOST_TOKENS, MOST_PAGES = 256, 8  # of a step; of a sequence


def random(seed: int, *shape: int) -> F32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tokens_of(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, N_ROWS, n).tolist()


@dataclass(frozen=True)
class Case:
    """An operator: its input tables [N_ROWS, width], which are buffers 0, 1, ...; it fills the next buffer.

    `expected` computes the result [n, width] of a sequence from the tables' rows of its tokens.
    """

    name: str
    tables: list[F32]
    op: Op
    width: int
    floats: int
    expected: Callable[[list[F64]], F64]

    def reference(self, tokens: Sequence[int]) -> F64:
        return self.expected([table[list(tokens)].astype(np.float64) for table in self.tables])


def program_of(
    case: Case, isa: _native.Isa = "auto", n_threads: int = 1, head: F32 | None = None, **changes: Any
) -> Program:
    """A program whose logits are `head` [n, width] times the operator's result, or that itself; `changes` are fields of
    the operator."""
    n = len(case.tables)
    embeds = [Op(kind=kinds.EMBED, out=i, weight=ops.pack(table)) for i, table in enumerate(case.tables)]
    ends = [
        Op(kind=kinds.GATHER_OUTPUTS, input=n, out=n + 1),
        Op(
            kind=kinds.LOGITS,
            input=n + 1,
            weight=ops.pack(np.eye(case.width, dtype=np.float32) if head is None else head),
        ),
    ]
    widths = [*(table.shape[1] for table in case.tables), case.width, case.width]
    shape = Shape(
        n_layers=1,
        vocab_size=N_ROWS,
        max_tokens=MOST_TOKENS,
        heads=(Heads(1, 1, 8, 8, -1),),
        ropes=(),
        n_state_layers=1,
    )
    operators = [*embeds, replace(case.op, **changes), *ends]
    return Program(shape, widths, operators, n_threads=n_threads, isa=isa)


@dataclass
class Text:
    """A sequence that is computed step by step, in place unless a step says otherwise."""

    tokens: list[int]
    slot: int
    n_done: int = 0
    rows: list[F32] = field(default_factory=list)

    def result(self) -> F32:
        return np.concatenate(self.rows)


class Machine:
    """A program, with pages and slots for a few sequences."""

    def __init__(
        self, case: Case, isa: _native.Isa = "auto", n_threads: int = 1, n_slots: int = 12, head: F32 | None = None
    ) -> None:
        self.program = program_of(case, isa, n_threads, head)
        self.pages = PagePool(DType.F32, 8 * MOST_PAGES, [KvLayer(1, 8, 8)])
        self.states = StatePool([case.floats], n_slots)

    def step(
        self, parts: Sequence[tuple[Text, int]], *, keeps: Sequence[tuple[tuple[int, int], ...]] = (), to: int = -1
    ) -> None:
        """Computes the next n tokens of each text; `to`: the slot that the first goes on in, -1 for its own."""
        batch, ends = [], []
        for i, (text, n) in enumerate(parts):
            pages = np.arange(MOST_PAGES, dtype=np.int32) + i * MOST_PAGES
            state_in = text.slot if text.n_done else -1
            if i == 0 and to >= 0:
                text.slot = to
            tokens = np.array(text.tokens[text.n_done : text.n_done + n], np.int32)
            kept = keeps[i] if keeps else ()
            batch.append(BatchSequence(pages, text.n_done, tokens, 0, 0, state_in, text.slot, kept))
            ends.append(n)
        rows = self.program.run(self.pages, batch, np.arange(sum(ends)), states=self.states)
        for (text, n), part in zip(parts, np.split(rows, np.cumsum(ends)[:-1]), strict=True):
            text.rows.append(part)
            text.n_done += n

    def run(self, tokens: list[int], steps: Sequence[int], slot: int = 0) -> F32:
        """The result of a sequence that is computed in steps of so many tokens."""
        text = Text(tokens, slot)
        for n in steps:
            self.step([(text, n)])
        assert text.n_done == len(tokens)
        return text.result()


# ---- Short convolution ----------------------------------------------------------------------------------------------


def silu(x: F64) -> F64:
    return np.asarray(x / (1 + np.exp(-x)))


def conv_case(
    name: str,
    width: int,
    n_taps: int,
    *,
    bias: bool = False,
    active: bool = False,
    gated: bool = False,
    column: int = 0,
) -> Case:
    weights, biases = random(2, n_taps, width), random(3, width) if bias else None
    n_read = (3 if gated else 1) * width

    def expected(inputs: list[F64]) -> F64:
        x = inputs[0][:, column : column + n_read]
        after = np.ones_like(x[:, :width])
        if gated:
            before, after, x = np.split(x, 3, axis=1)
            x = before * x
        padded = np.concatenate([np.zeros((n_taps - 1, width)), x])
        out = np.stack([(weights * padded[t : t + n_taps]).sum(axis=0) for t in range(len(x))])
        out = out + biases if biases is not None else out
        return (silu(out) if active else out) * after

    op = Op(
        kind=kinds.SHORT_CONV, input=0, out=1, width=width, vector=weights.reshape(-1), vector2=biases, column=column,
        activation=kinds.ACTIVATIONS["silu" if active else None], flags=kinds.CONV_GATED * gated,
    )  # fmt: skip
    table = random(1, N_ROWS, column + n_read + (5 if column else 0))
    return Case(name, [table], op, width, conv_floats(width, n_taps), expected)


CONVS = [
    conv_case("conv 3", 40, 3),
    conv_case("conv 4, bias, silu, columns", 150, 4, bias=True, active=True, column=7),
    conv_case("conv 3, gated", 130, 3, gated=True),
    conv_case("conv 2, gated, bias, columns", 17, 2, gated=True, bias=True, column=3),
    conv_case("conv 20", 600, 20, bias=True),
]


# ---- Matrices of heads ----------------------------------------------------------------------------------------------


def softplus(x: F64) -> F64:
    return np.asarray(np.logaddexp(0, x))


def delta_case(
    name: str, n_heads: int, n_groups: int, k_dim: int, v_dim: int, *, tiled: bool = False, negative: bool = False,
    column: int = 0,
) -> Case:  # fmt: skip
    decay, bias = -np.exp(random(5, n_heads)), random(6, n_heads)
    scale, eps = k_dim**-0.5, 1e-6

    def expected(inputs: list[F64]) -> F64:
        rows, gates = inputs
        q, k, v = np.split(rows, [n_groups * k_dim, 2 * n_groups * k_dim], axis=1)
        b, a = np.split(gates[:, column : column + 2 * n_heads], 2, axis=1)
        out = np.zeros((len(rows), n_heads, v_dim))
        for h in range(n_heads):
            group = h % n_groups if tiled else h // (n_heads // n_groups)
            state = np.zeros((k_dim, v_dim))
            for t in range(len(rows)):
                query, key = (x[t].reshape(n_groups, k_dim)[group] for x in (q, k))
                query, key = (x / np.sqrt((x * x).sum() + eps) for x in (query, key))
                state = state * np.exp(decay[h] * softplus(a[t, h] + bias[h]))
                beta = (2 if negative else 1) / (1 + np.exp(-b[t, h]))
                state = state + np.outer(key, (v[t].reshape(n_heads, v_dim)[h] - key @ state) * beta)
                out[t, h] = scale * query @ state
        return out.reshape(len(rows), -1)

    op = Op(
        kind=kinds.DELTA_RULE, input=0, out=2, factors=1, column=column, n_heads=n_heads, n_groups=n_groups,
        k_dim=k_dim, v_dim=v_dim, vector=decay, vector2=bias, scale=scale, eps=eps,
        flags=kinds.HEADS_TILED * tiled | kinds.DELTA_NEGATIVE * negative,
    )  # fmt: skip
    tables = [random(1, N_ROWS, 2 * n_groups * k_dim + n_heads * v_dim), random(4, N_ROWS, column + 2 * n_heads)]
    return Case(name, tables, op, n_heads * v_dim, head_floats(n_heads, k_dim, v_dim), expected)


DELTAS = [
    delta_case("delta 3 on 1", 3, 1, 24, 20),
    delta_case("delta 4 on 2, tiled", 4, 2, 40, 80, tiled=True, column=3),
    delta_case("delta 4 on 2", 4, 2, 17, 130),
    delta_case("delta 2, negative", 2, 2, 32, 64, negative=True),
]


def ssm_case(
    name: str, n_heads: int, n_groups: int, state_dim: int, head_dim: int, *, limits: tuple[float, float] = (0.0, 0.0),
    column: int = 0,
) -> Case:  # fmt: skip
    decay, skip, bias = -np.exp(random(5, n_heads)), random(6, n_heads), random(7, n_heads)

    def expected(inputs: list[F64]) -> F64:
        rows, gates = inputs
        x, b, c = np.split(rows, [n_heads * head_dim, n_heads * head_dim + n_groups * state_dim], axis=1)
        out = np.zeros((len(rows), n_heads, head_dim))
        for h in range(n_heads):
            group = h // (n_heads // n_groups)
            state = np.zeros((state_dim, head_dim))
            for t in range(len(rows)):
                head = x[t].reshape(n_heads, head_dim)[h]
                row, readout = (each[t].reshape(n_groups, state_dim)[group] for each in (b, c))
                dt = np.clip(softplus(gates[t, column + h] + bias[h]), limits[0], limits[1] or np.inf)
                state = state * np.exp(decay[h] * dt) + np.outer(dt * row, head)
                out[t, h] = readout @ state + skip[h] * head
        return out.reshape(len(rows), -1)

    op = Op(
        kind=kinds.SSM, input=0, out=2, factors=1, column=column, n_heads=n_heads, n_groups=n_groups, k_dim=state_dim,
        v_dim=head_dim, vector=np.concatenate([decay, skip]), vector2=bias, eps=limits[0], limit=limits[1],
    )  # fmt: skip
    tables = [random(1, N_ROWS, n_heads * head_dim + 2 * n_groups * state_dim), random(4, N_ROWS, column + n_heads)]
    return Case(name, tables, op, n_heads * head_dim, head_floats(n_heads, state_dim, head_dim), expected)


SSMS = [
    ssm_case("ssm 6 in 2 groups", 6, 2, 20, 24, column=5),
    ssm_case("ssm 3, limits", 3, 1, 16, 80, limits=(0.5, 1.0)),
    ssm_case("ssm 2 in 2 groups", 2, 2, 33, 7),
]

CASES = [*CONVS, *DELTAS, *SSMS]
