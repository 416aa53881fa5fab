"""Operators that work row by row, each alone in a program, against numpy in float64."""

from __future__ import annotations

from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt
import pytest

from fabula import _native, ops
from fabula._native import F32, KvLayer, PagePool
from fabula._program import BatchSequence, Heads, Op, Program, Shape
from fabula.errors import InvalidArgument
from fabula.formats.checkpoint import DType
from fabula.models import builder as kinds

N, VOCAB = 9, 23
EMBED, LINEAR, GATHER, LOGITS = kinds.EMBED, kinds.LINEAR, kinds.GATHER_OUTPUTS, kinds.LOGITS
ISAS = [cast(_native.Isa, isa) for isa in get_args(_native.Isa) if isa != "auto" and _native.isa_available(isa)]


class Rows:
    """A program that ends with the rows of one buffer as logits.

    Buffers 0 .. n-1 are embeddings of each token, of the given widths; the operators under test write the others.
    """

    def __init__(self, inputs: list[int], others: list[int], operators: list[Op], result: int) -> None:
        rng = np.random.default_rng(3)
        widths = [*inputs, *others]
        self.tables = [rng.standard_normal((VOCAB, n)).astype(np.float32) for n in inputs]
        embeds = [Op(kind=EMBED, out=i, weight=ops.pack(table)) for i, table in enumerate(self.tables)]
        width = widths[result]
        ends = [
            Op(kind=GATHER, input=result, out=len(widths)),
            Op(kind=LOGITS, input=len(widths), weight=ops.pack(np.eye(width, dtype=np.float32))),
        ]
        self.operators, self.widths = [*embeds, *operators, *ends], [*widths, width]

    def program(self, isa: _native.Isa = "auto") -> Program:
        shape = Shape(n_layers=1, vocab_size=VOCAB, max_tokens=N, heads=(Heads(1, 1, 8, 8, -1),), ropes=())
        return Program(shape, self.widths, self.operators, n_threads=1, isa=isa)

    def run(self) -> F32:
        """The rows of tokens 0 .. N-1: the same bits on every instruction set."""
        pool = PagePool(DType.F32, 1, [KvLayer(1, 8, 8)])
        batch = [BatchSequence(np.zeros(1, np.int32), 0, np.arange(N, dtype=np.int32))]
        first, *others = [self.program(isa).run(pool, batch, np.arange(N)) for isa in ISAS]
        for other in others:
            np.testing.assert_array_equal(other, first)
        return first

    def inputs(self) -> list[npt.NDArray[np.float64]]:
        return [table[:N].astype(np.float64) for table in self.tables]


def assert_near(ours: F32, wanted: npt.NDArray[np.float64]) -> None:
    assert np.abs(ours - wanted).max() <= 2e-6 * np.abs(wanted).max()


W = 21  # width of a stream: no multiple of a register


@pytest.mark.parametrize("n_in", [1, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_mix(n_in: int, residual: bool, constant: bool) -> None:
    n_out = 4
    factors = np.random.default_rng(1).standard_normal((n_out, n_in)).astype(np.float32)
    about: dict[str, Any] = {"vector": factors.reshape(-1)} if constant else {"factors": 1}
    op = Op(kind=kinds.MIX, input=0, out=3, width=W, residual=2 if residual else -1, **about)
    rows = Rows([n_in * W, n_out * n_in, n_out * W], [n_out * W], [op], 3)
    x, computed, before = rows.inputs()
    each = np.broadcast_to(factors, (N, n_out, n_in)) if constant else computed.reshape(N, n_out, n_in)
    wanted = np.einsum("tij,tjw->tiw", each, x.reshape(N, n_in, W)).reshape(N, -1)
    assert_near(rows.run(), wanted + before if residual else wanted)


def test_rows_of_a_stage_do_not_overlap() -> None:
    """Buffers that are done with before another one is written, in the same stage: rows run one after the other."""
    doubled = Op(kind=kinds.SCALE, input=0, out=4, scale=2.0)
    copied = Op(kind=kinds.SCALE, input=4, out=5, scale=1.0)
    rows = Rows([W, 5, 80, 300], [W, W], [doubled, copied], 5)
    np.testing.assert_array_equal(rows.run(), 2 * rows.tables[0][:N])


def test_mix_adds_to_its_own_buffer_and_takes_constant_streams_unchanged() -> None:
    taken = Op(kind=kinds.MIX, input=0, out=2, width=W, vector=np.array([0, 0, 1, 0], np.float32))
    added = Op(kind=kinds.MIX, input=1, out=0, width=W, residual=0, vector=np.array([0, 1, 1, 0], np.float32))
    rows = Rows([4 * W, W], [W], [taken, added], 2)
    np.testing.assert_array_equal(rows.run(), rows.tables[0][:N, 2 * W : 3 * W])
    rows = Rows([4 * W, W], [], [added], 0)
    streams, x = (table[:N] for table in rows.tables)
    wanted = streams.reshape(N, 4, W).copy()
    wanted[:, 1:3] += x[:, None]
    np.testing.assert_array_equal(rows.run(), wanted.reshape(N, -1))


@pytest.mark.parametrize("in_place", [False, True])
def test_match_rms(in_place: bool) -> None:
    """The second input is a part of a wider buffer; a row that is almost 0 is not blown up."""
    op = Op(kind=kinds.MATCH_RMS, input=0, out=0 if in_place else 2, residual=1, column=5, eps=1e-2)
    rows = Rows([W, 40], [W], [op], op.out)
    rows.tables[0][4] *= 1e-3
    rows.operators[0] = Op(kind=EMBED, out=0, weight=ops.pack(rows.tables[0]))
    x, other = rows.inputs()

    def rms(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.asarray((rows**2).mean(axis=1, keepdims=True))

    wanted = x * np.sqrt(rms(other[:, 5 : 5 + W]) / np.maximum(rms(x), 1e-2))
    assert_near(rows.run(), wanted)


@pytest.mark.parametrize("cutoff", [1.6448536, 0.0, -0.7])
@pytest.mark.parametrize("in_place", [False, True])
def test_sparsify(cutoff: float, in_place: bool) -> None:
    op = Op(kind=kinds.SPARSIFY, input=0, out=0 if in_place else 1, scale=cutoff, activation=kinds.ACTIVATIONS["silu"])
    rows = Rows([100], [100], [op], op.out)
    (x,) = rows.inputs()
    above = np.maximum(x - x.mean(axis=1, keepdims=True) - cutoff * x.std(axis=1, keepdims=True), 0)
    assert_near(rows.run(), above / (1 + np.exp(-above)))


def test_second_inputs_may_be_constant() -> None:
    vector = np.random.default_rng(2).standard_normal(W).astype(np.float32)
    for kind, wanted in ((kinds.MULTIPLY, np.multiply), (kinds.ADD, np.add)):
        rows = Rows([W], [], [Op(kind=kind, input=0, out=0, vector=vector)], 0)
        assert_near(rows.run(), wanted(*rows.inputs(), vector.astype(np.float64)))


def test_a_later_table_may_have_fewer_rows() -> None:
    table = np.random.default_rng(4).standard_normal((5, W)).astype(np.float32)
    rows = Rows([W], [W], [Op(kind=EMBED, out=1, weight=ops.pack(table), scale=2.0)], 1)
    np.testing.assert_array_equal(rows.run(), 2 * table[[i if i < 5 else 0 for i in range(N)]])


@pytest.mark.parametrize(
    ("op", "text"),
    [
        (Op(kind=kinds.MIX, input=0, out=2, width=W), "factors are buffer -1 of 4"),
        (Op(kind=kinds.MIX, input=0, out=2, width=W, factors=3), "buffer 3 cannot be its factors"),
        (Op(kind=kinds.MIX, input=0, out=2, width=W, factors=2), "buffer 2 cannot be its factors"),
        (Op(kind=kinds.MIX, input=0, out=2, width=W + 1, factors=1), "streams of 22 do not fill buffers of 42 and 42"),
        (Op(kind=kinds.MIX, input=0, out=2, factors=1), "streams of 0 do not fill"),
        (Op(kind=kinds.MIX, input=0, out=2, width=W, vector=np.ones(3, np.float32)), "3 factors for 2 streams made of"),
        (Op(kind=kinds.MIX, input=0, out=0, width=W, factors=1), "cannot write the buffer it reads"),
        (Op(kind=kinds.MATCH_RMS, input=0, out=2), "has no second input"),
        (Op(kind=kinds.MATCH_RMS, input=0, out=2, residual=1), "cannot be its residual"),
        (Op(kind=kinds.MATCH_RMS, input=0, out=2, residual=0, eps=-1.0), "eps must be finite"),
        (Op(kind=kinds.SPARSIFY, input=0, out=2, activation=6), "activation 6 is not one of a gate"),
        (Op(kind=kinds.SPARSIFY, input=1, out=2), "the result is 4 wide, buffer 2 is 42"),
        (Op(kind=kinds.MULTIPLY, input=0, out=2, vector=np.ones(3, np.float32)), "has no second input"),
    ],
)
def test_wrong_operators(op: Op, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        Rows([2 * W, 4], [2 * W], [op], 2).program()
