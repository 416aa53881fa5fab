"""Attention of one layer against plain numpy: every mask, soft cap, sink logits, ALiBi, temperature, and heads whose K
and V differ in width. In f32; prefill in chunks and decode give the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fabula import ops
from fabula._native import KvLayer, PagePool
from fabula._program import BatchSequence, Heads, Op, Program, Shape
from fabula.errors import InvalidArgument
from fabula.formats.checkpoint import DType
from fabula.models.config import alibi_slopes

N, VOCAB, HIDDEN = 70, 23, 24
EMBED, LINEAR, KV_WRITE, ATTENTION, GATHER, LOGITS = 1, 3, 7, 8, 9, 10
ALL, CHUNK, ALIBI_BF16 = 8, 16, 64
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    heads: Heads
    window: int = 0
    flags: int = 0
    cap: float = 0.0
    sinks: bool = False
    temperature: float = 0.0
    alibi: bool = False


PLAIN = Heads(6, 2, 12, 12, -1)
CASES = {
    "causal": Case(PLAIN),
    "one group": Case(Heads(3, 1, 40, 40, -1)),
    "k wider than v": Case(Heads(4, 2, 24, 10, -1)),
    "v wider than k": Case(Heads(4, 4, 8, 20, -1)),
    "window": Case(PLAIN, window=11),
    "window of a page": Case(PLAIN, window=32),
    "chunks": Case(PLAIN, window=13, flags=CHUNK),
    "chunks of a page": Case(PLAIN, window=32, flags=CHUNK),
    "all": Case(PLAIN, flags=ALL),
    "soft cap": Case(PLAIN, cap=0.7),
    "sink logits": Case(PLAIN, sinks=True),
    "sink logits in a window": Case(Heads(6, 3, 24, 24, -1), window=9, sinks=True, cap=2.0),
    "temperature": Case(PLAIN, temperature=0.4),
    "alibi": Case(PLAIN, alibi=True),
    "alibi in a window": Case(Heads(6, 3, 24, 24, -1), window=9, alibi=True, sinks=True),
    "alibi rounded": Case(PLAIN, alibi=True, flags=ALIBI_BF16),
}


class Layer:
    """The weights of one attention layer, and its program."""

    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(7)
        h = self.heads = case.heads
        self.case = case
        self.widths = [h.n_heads * h.k_dim, h.n_kv_heads * h.k_dim, h.n_kv_heads * h.v_dim]
        shapes = [(VOCAB, HIDDEN), (sum(self.widths), HIDDEN), (VOCAB, h.n_heads * h.v_dim)]
        self.embedding, self.qkv, self.out = (rng.standard_normal(s).astype(np.float32) * 0.4 for s in shapes)
        self.sinks = rng.standard_normal(h.n_heads).astype(np.float32)
        fields: dict[str, Any] = {"window": case.window, "flags": case.flags, "limit": case.cap, "scale": 0.3}
        if case.sinks:
            fields["vector"] = self.sinks
        self.slopes = np.array(alibi_slopes(h.n_heads, 8.0), np.float32)
        if case.alibi:
            fields["vector2"] = self.slopes
        if case.temperature:
            fields |= {"temperature": case.temperature, "temperature_offset": 1, "temperature_length": 8}
        operators = [
            Op(kind=EMBED, out=0, weight=ops.pack(self.embedding)),
            Op(kind=LINEAR, input=0, out=1, weight=ops.pack(self.qkv)),
            Op(kind=KV_WRITE, input=1),
            Op(kind=ATTENTION, input=1, out=2, **fields),
            Op(kind=GATHER, input=2, out=3),
            Op(kind=LOGITS, input=3, weight=ops.pack(self.out)),
        ]
        shape = Shape(n_layers=1, vocab_size=VOCAB, max_tokens=N, heads=(h,), ropes=())
        attended = h.n_heads * h.v_dim
        self.programs = [
            Program(shape, [HIDDEN, sum(self.widths), attended, attended], operators, n_threads=n) for n in (1, 3)
        ]

    def run(self, ids: npt.NDArray[np.int32], pieces: list[int], which: int = 0) -> F32:
        """Logits of all positions, computed in pieces."""
        h = self.heads
        pool = PagePool(DType.F32, 3, [KvLayer(h.n_kv_heads, h.k_dim, h.v_dim)])
        pages, found, past = np.array([2, 0, 1], np.int32), [], 0
        for n in pieces:
            part = BatchSequence(pages, past, ids[past : past + n])
            found.append(self.programs[which].run(pool, [part], np.arange(n)))
            past += n
        return np.concatenate(found)

    def biases(self, head: int, n: int) -> npt.NDArray[np.float64]:
        """What ALiBi adds to the score of each query and key, [n, n]."""
        slope, position = torch.tensor(self.slopes[head]), torch.arange(n)
        if self.case.flags & ALIBI_BF16:  # as transformers' Falcon
            each = 0.3 * np.asarray((slope.bfloat16() * position).double())
        else:
            each = np.asarray(slope.double() * position)
        return np.asarray(each[None, :] - each[:, None])

    def expected(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        h, case, n = self.heads, self.case, len(ids)
        row = (self.embedding[ids] @ self.qkv.T).astype(np.float64)
        q, k, v = np.split(row, np.cumsum(self.widths)[:-1], axis=1)
        q, k = q.reshape(n, h.n_heads, h.k_dim), k.reshape(n, h.n_kv_heads, h.k_dim)
        v = v.reshape(n, h.n_kv_heads, h.v_dim)
        position = np.arange(n)
        if case.temperature:
            q = q * (1 + case.temperature * np.log(1 + (position + 1) // 8))[:, None, None]
        distance = position[:, None] - position[None, :]
        seen = np.ones((n, n), bool) if case.flags & ALL else distance >= 0
        if case.flags & CHUNK:
            seen &= position[:, None] // case.window == position[None, :] // case.window
        elif case.window:
            seen &= distance < case.window
        attended = []
        for head in range(h.n_heads):
            kv = head // (h.n_heads // h.n_kv_heads)
            scores = 0.3 * q[:, head] @ k[:, kv].T
            if case.alibi:
                scores = scores + self.biases(head, n)
            if case.cap:
                scores = case.cap * np.tanh(scores / case.cap)
            weights = np.where(seen, np.exp(scores), 0.0)
            total = weights.sum(axis=1) + (np.exp(float(self.sinks[head])) if case.sinks else 0.0)
            attended.append(weights @ v[:, kv] / total[:, None])
        return np.asarray(np.concatenate(attended, axis=1) @ self.out.T.astype(np.float64))


@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_formula(name: str) -> None:
    layer = Layer(CASES[name])
    ids = np.random.default_rng(1).integers(0, VOCAB, N).astype(np.int32)
    whole = layer.run(ids, [N])
    wanted = layer.expected(ids)
    assert np.abs(whole - wanted).max() <= 2e-6 * np.abs(wanted).max() + 1e-6
    assert (layer.run(ids, [N], which=1) == whole).all(), "several threads"
    if layer.case.flags & ALL:
        return
    assert (layer.run(ids, [20, 33, *[1] * 17]) == whole).all(), "chunks, then token by token"
    assert (layer.run(ids, [1] * N, which=1) == whole).all(), "token by token"


def test_attention_to_all_needs_whole_sequences() -> None:
    layer = Layer(CASES["all"])
    with pytest.raises(InvalidArgument, match="must be whole in its step"):
        layer.run(np.zeros(40, np.int32), [20, 20])
