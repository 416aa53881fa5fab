"""The router and the grouped product of mixtures of experts, each alone in a program, against numpy.

Every result has the same bits on every instruction set, in every batch, with any number of threads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fabula import _native, ops
from fabula._native import F32, KvLayer, PagePool, Weight
from fabula._program import BatchSequence, Heads, Op, Program, Shape
from fabula.errors import InvalidArgument, NonFinite
from fabula.formats.checkpoint import DType
from fabula.models import builder as kinds

ISAS = [cast(_native.Isa, isa) for isa in get_args(_native.Isa) if isa != "auto" and _native.isa_available(isa)]
E, K, WIDTH, INNER, N = 7, 3, 72, 40, 11
F64 = npt.NDArray[np.float64]


class Rows:
    """A program over rows that are given: buffers 0 .. n-1 are `inputs`, the result is one buffer's rows."""

    def __init__(self, inputs: list[F32], others: list[int], operators: list[Op], result: int) -> None:
        self.n = len(inputs[0])
        widths = [*(table.shape[1] for table in inputs), *others]
        embeds = [Op(kind=kinds.EMBED, out=i, weight=ops.pack(table)) for i, table in enumerate(inputs)]
        ends = [
            Op(kind=kinds.GATHER_OUTPUTS, input=result, out=len(widths)),
            Op(kind=kinds.LOGITS, input=len(widths), weight=ops.pack(np.eye(widths[result], dtype=np.float32))),
        ]
        self.operators, self.widths = [*embeds, *operators, *ends], [*widths, widths[result]]

    def run(self, rows: list[int] | None = None, isa: _native.Isa = "auto", n_threads: int = 1) -> F32:
        shape = Shape(n_layers=1, vocab_size=self.n, max_tokens=self.n, heads=(Heads(1, 1, 8, 8, -1),), ropes=())
        program = Program(shape, self.widths, self.operators, n_threads=n_threads, isa=isa)
        tokens = np.arange(self.n, dtype=np.int32) if rows is None else np.array(rows, np.int32)
        n_pages = -(-len(tokens) // 32)
        pool = PagePool(DType.F32, n_pages, [KvLayer(1, 8, 8)])
        batch = [BatchSequence(np.arange(n_pages, dtype=np.int32), 0, tokens)]
        return program.run(pool, batch, np.arange(len(tokens)))

    def everywhere(self) -> F32:
        first, *others = [self.run(isa=isa) for isa in ISAS]
        for other in others:
            np.testing.assert_array_equal(other, first)
        return first


def random(seed: int, *shape: int) -> F32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- The router -----------------------------------------------------------------------------------------------------


def softmax(x: F64) -> F64:
    weights = np.exp(x - x.max())
    return np.asarray(weights / weights.sum())


def routed(
    logits: F64,
    n: int,
    *,
    scores: str = "softmax",
    correction: F64 | float = 0.0,
    factors: F64 | None = None,
    renormalized: bool = False,
    scale: float = 1.0,
    groups: tuple[int, int] = (0, 0),
    by_best: bool = False,
) -> tuple[list[int], F64]:
    """A row's experts, best first, and their weights."""
    rated = {"softmax": softmax(logits), "sigmoid": 1 / (1 + np.exp(-logits)), "chosen": logits}[scores]
    ranking = rated + correction
    if groups[0]:
        parts = np.sort(ranking.reshape(groups[0], -1), axis=1)[:, ::-1]
        ratings = parts[:, 0] if by_best else parts[:, :2].sum(axis=1)
        kept = np.argsort(-ratings, kind="stable")[: groups[1]]
        allowed = np.isin(np.arange(len(ranking)) // parts.shape[1], kept)
        ranking = np.where(allowed, ranking, -np.inf)
    ids = np.argsort(-ranking, kind="stable")[:n]
    weights = softmax(logits[ids]) if scores == "chosen" else rated[ids]
    weights = scale * (weights / weights.sum() if renormalized else weights)
    return ids.tolist(), weights if factors is None else weights * factors[ids]


FLAGS = {"softmax": 0, "sigmoid": kinds.ROUTE_SIGMOID, "chosen": kinds.ROUTE_CHOSEN}


@pytest.mark.parametrize("scores", FLAGS)
@pytest.mark.parametrize("renormalized", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("groups", [(0, 0), (4, 2)])
@pytest.mark.parametrize("by_best", [False, True])
def test_router(scores: str, renormalized: bool, corrected: bool, groups: tuple[int, int], by_best: bool) -> None:
    logits, n = random(1, 9, 20), 5
    correction = random(2, 20) if corrected else None
    factors = random(3, 20) if by_best else None
    flags = FLAGS[scores] | kinds.ROUTE_NORM * renormalized | kinds.ROUTE_TOP * by_best
    op = Op(
        kind=kinds.ROUTER, input=0, out=1, n_chosen=n, n_groups=groups[0], n_top_groups=groups[1], vector=correction,
        vector2=factors, scale=1.5, flags=flags,
    )  # fmt: skip
    ours = Rows([logits], [2 * n], [op], 1).everywhere()
    for row, found in zip(logits.astype(np.float64), ours, strict=True):
        ids, weights = routed(
            row, n, scores=scores, correction=0.0 if correction is None else correction.astype(np.float64),
            factors=None if factors is None else factors.astype(np.float64),
            renormalized=renormalized, scale=1.5, groups=groups, by_best=by_best,
        )  # fmt: skip
        assert found[:n].tolist() == ids
        np.testing.assert_allclose(found[n:], weights, rtol=2e-6)


@pytest.mark.parametrize("scores", FLAGS)
def test_of_equal_experts_the_lower_index_goes_first(scores: str) -> None:
    logits = np.array([[0, 0, 0, 0, 0, 0, 0], [1, 2, 2, 0, 2, 1, 2], [-1, 3, 0, 0, 3, 0, 5]], np.float32)
    op = Op(kind=kinds.ROUTER, input=0, out=1, n_chosen=3, flags=FLAGS[scores])
    assert Rows([logits], [6], [op], 1).everywhere()[:, :3].tolist() == [[0, 1, 2], [1, 2, 4], [6, 1, 4]]


def test_sigmoids_that_round_to_one_rank_by_their_logits() -> None:
    logits = np.array([[20, 30, 40, 25, -5, 0, 1]], np.float32)
    op = Op(kind=kinds.ROUTER, input=0, out=1, n_chosen=3, flags=kinds.ROUTE_SIGMOID)
    (found,) = Rows([logits], [6], [op], 1).everywhere()
    assert found.tolist() == [2, 1, 3, 1, 1, 1]


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("shift", [-3, 0, 3])
def test_a_mixer(noise: float, shift: float) -> None:
    """SparseMixer as transformers has it, where nothing is trained; of equal experts the lower index goes first."""
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    logits = np.round(random(4, 50, E) + np.float32(shift), 1)
    theirs, chosen = sparsemixer(torch.tensor(logits), noise, training=False)
    op = Op(kind=kinds.ROUTER, input=0, out=1, n_chosen=2, limit=2 * noise, flags=kinds.ROUTE_MIXER)
    ours = Rows([logits], [4], [op], 1).everywhere()
    best = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    np.testing.assert_array_equal(ours[:, :2], best)
    same = (chosen.numpy() == best).all(axis=1)
    assert same.sum() > 30
    np.testing.assert_allclose(ours[same, 2:], theirs.numpy()[same], rtol=2e-6)
    assert noise == 0 or ours[:, 2:].min() < 0.9, "some have neighbors"


def test_a_logit_that_is_not_finite_reaches_the_result() -> None:
    """Experts stay in their range, and the weights are NaN, which the logits of the model then report."""
    logits = random(1, 4, E)
    logits[1, 3] = np.nan
    op = Op(kind=kinds.ROUTER, input=0, out=1, n_chosen=K)
    program = Rows([logits], [2 * K], [op], 1)
    with pytest.raises(NonFinite):
        program.run()
    np.testing.assert_array_equal(program.run([0, 2, 3])[:, :K] < E, True)


# ---- The grouped product --------------------------------------------------------------------------------------------


def pack(matrices: F32, dtype: DType, interleaved: bool = False) -> Weight:
    """Matrices [experts, rows, columns]; interleaved: gate and up, one below the other."""
    n, n_rows, n_cols = matrices.shape
    if not interleaved:
        weight = Weight(dtype, n_rows, n_cols, n)
        for e, matrix in enumerate(matrices):
            weight.pack_rows(matrix.view(np.uint8).reshape(-1), DType.F32, n_rows, expert=e)
        return weight
    half = n_rows // 2
    weight = Weight(dtype, 2 * (-(-half // 16) * 16), n_cols, n)
    for e, matrix in enumerate(matrices):
        for i, part in enumerate((matrix[:half], matrix[half:])):
            raw = np.ascontiguousarray(part).view(np.uint8).reshape(-1)
            weight.pack_rows(raw, DType.F32, half, first_row=16 * i, row_block=16, row_step=2, expert=e)
    return weight


def interleaved(gate: F32, up: F32) -> F32:
    """Biases [experts, rows] of gate and up as one vector."""
    n, length = gate.shape
    padded = [np.pad(x, ((0, 0), (0, -length % 16))).reshape(n, -1, 16) for x in (gate, up)]
    return np.stack(padded, axis=2).reshape(-1)


def held(weight: Weight) -> F64:
    rows = np.stack([weight.row(i) for i in range(weight.n_experts * weight.n_rows)])
    return rows.reshape(weight.n_experts, weight.n_rows, weight.n_cols).astype(np.float64)


def choices(n_rows: int, seed: int = 5) -> F32:
    """Logits with ties, with an expert that nobody chooses, and with one that everybody does."""
    logits = np.round(random(seed, n_rows, E), 1)
    logits[:, 2], logits[:, 5] = -9, 9
    return logits


DTYPES = [DType.F32, DType.F16, DType.BF16, DType.Q8_0, DType.Q4_0, DType.Q4_K, DType.Q6_K]


def mixture(
    dtype: DType, width: int, inner: int, *, biased: bool = False, weighs: bool = False
) -> tuple[Op, Op, Op, Op, tuple[Any, ...]]:
    """The operators of a mixture, and its weights."""
    router = Op(kind=kinds.ROUTER, input=1, out=2, n_chosen=K, flags=kinds.ROUTE_NORM)
    gate_up = pack(random(7, E, 2 * inner, width) / 8, dtype, interleaved=True)
    down = pack(random(8, E, width, inner) / 8, dtype)
    gate_bias, up_bias, down_bias = random(9, E, inner), random(10, E, inner), random(11, E, width)
    gates = Op(
        kind=kinds.EXPERTS, input=0, out=3, factors=2, weight=gate_up, n_chosen=K,
        activation=kinds.ACTIVATIONS["silu"], flags=kinds.EXPERTS_GATED | kinds.EXPERTS_WEIGH * weighs,
        vector=interleaved(gate_bias, up_bias) if biased else None,
    )  # fmt: skip
    total = Op(
        kind=kinds.EXPERTS, input=3, out=4, factors=2, weight=down, n_chosen=K, scale=0.7,
        flags=kinds.EXPERTS_SUM | kinds.EXPERTS_WEIGH * weighs, vector=down_bias.reshape(-1) if biased else None,
    )  # fmt: skip
    added = replace(total, out=0, residual=0)
    return router, gates, total, added, (gate_up, down, gate_bias, up_bias, down_bias)


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_mixture(biased: bool, weighs: bool) -> None:
    """Against numpy in f32, with odd widths: rows x [N, 72], 7 experts of width 40, 3 of them for each row."""
    x, logits = random(3, N, WIDTH), choices(N)
    router, gates, total, added, parts = mixture(DType.F32, WIDTH, INNER, biased=biased, weighs=weighs)
    gate_up, down, gate_bias, up_bias, down_bias = parts
    matrices = held(gate_up).reshape(E, -1, 2, 16, WIDTH).swapaxes(1, 2).reshape(E, 2, -1, WIDTH)[:, :, :INNER]
    wanted = np.zeros((N, WIDTH))
    for row in range(N):
        for e, weight in zip(*routed(logits[row].astype(np.float64), K, renormalized=True), strict=True):
            given = weight if weighs else 1.0
            gate = given * (matrices[e, 0] @ x[row]) + biased * gate_bias[e]
            up = given * (matrices[e, 1] @ x[row]) + biased * up_bias[e]
            result = held(down)[e] @ (gate / (1 + np.exp(-gate)) * up) + biased * down_bias[e]
            wanted[row] += result if weighs else weight * result
    widths = [2 * K, K * INNER, WIDTH]
    ours = Rows([x, logits], widths, [router, gates, total], 4).everywhere()
    assert np.abs(ours - 0.7 * wanted).max() <= 1e-5 * np.abs(wanted).max()
    ours = Rows([x, logits], widths, [router, gates, added], 0).everywhere()
    assert np.abs(ours - (x + 0.7 * wanted)).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_computes_what_a_matrix_of_its_own_does(dtype: DType) -> None:
    """In every kind of panels, bit for bit: one expert for each row is a product with its matrix."""
    width, inner = (256, 256) if dtype in (DType.Q4_K, DType.Q6_K) else (96, 64)
    x, matrices = random(3, N, width), random(4, E, inner, width)
    logits = choices(N)
    logits[:, 5] = random(6, N)
    router = Op(kind=kinds.ROUTER, input=1, out=2, n_chosen=1)
    op = Op(kind=kinds.EXPERTS, input=0, out=3, factors=2, weight=pack(matrices, dtype), n_chosen=1)
    ours = Rows([x, logits], [2, inner], [router, op], 3).everywhere()
    for row in range(N):
        e = int(np.argmax(logits[row]))
        alone = Op(kind=kinds.LINEAR, input=0, out=1, weight=pack(matrices[e : e + 1], dtype))
        np.testing.assert_array_equal(ours[row : row + 1], Rows([x], [inner], [alone], 1).run([row]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_depend_on_nothing_else(dtype: DType) -> None:
    """Not on other rows, on blocks of rows (600 rows are two), on tiles, or on threads."""
    width, inner, n = (256, 256, 600) if dtype in (DType.Q4_K, DType.Q6_K) else (96, 64, 600)
    x, logits = random(3, n, width), choices(n)
    router, gates, total, _, _ = mixture(dtype, width, inner)
    rows = Rows([x, logits], [2 * K, K * inner, width], [router, gates, total], 4)
    together = rows.run()
    for n_threads in (2, 3):
        np.testing.assert_array_equal(rows.run(n_threads=n_threads), together)
    for some in ([0], [599], [3, 4], [512, 7, 9], [1, 1, 1, 1], list(range(5)), list(range(40, 57)), list(range(130))):
        for n_threads in (1, 2):
            np.testing.assert_array_equal(rows.run(some, n_threads=n_threads), together[some])


def test_only_experts_that_are_chosen_are_read() -> None:
    """Those that nobody chose may hold NaN."""
    x, logits = random(3, N, WIDTH), choices(N)
    router, gates, total, _, parts = mixture(DType.F32, WIDTH, INNER)
    rows = Rows([x, logits], [2 * K, K * INNER, WIDTH], [router, gates, total], 4)
    before = rows.run()
    for weight, n_rows in ((parts[0], INNER), (parts[1], WIDTH)):
        damaged = np.full((n_rows, weight.n_cols), np.nan, np.float32)
        weight.pack_rows(damaged.view(np.uint8).reshape(-1), DType.F32, n_rows, expert=2)
    np.testing.assert_array_equal(rows.run(), before)
    alone = rows.run([0])
    unused = set(range(E)) - set(routed(logits[0].astype(np.float64), K)[0])
    for expert in unused:
        parts[1].pack_rows(np.full(WIDTH * INNER, np.nan, np.float32).view(np.uint8), DType.F32, WIDTH, expert=expert)
    np.testing.assert_array_equal(rows.run([0]), alone)


def test_experts_of_equal_logits_are_added_in_order_of_their_index() -> None:
    x = np.tile(random(3, 1, WIDTH), (6, 1))
    logits = np.zeros((6, E), np.float32)
    router, gates, total, _, _ = mixture(DType.F32, WIDTH, INNER)
    ours = Rows([x, logits], [2 * K, K * INNER, WIDTH], [router, gates, total], 4).run()
    np.testing.assert_array_equal(ours, np.tile(ours[:1], (6, 1)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"n_chosen": 8}, "8 experts of 7"),
        ({"n_chosen": 2}, "no 2 experts"),
        ({"factors": 1}, "holds no 3 experts"),
        ({"factors": 9}, "factors are buffer 9"),
        ({"residual": 0}, "only sums take a residual"),
        ({"vector": np.zeros(9, np.float32)}, "9 biases"),
        ({"flags": kinds.EXPERTS_GATED}, "activation 0 is not one of a gate"),
        ({"flags": kinds.EXPERTS_GATED | kinds.EXPERTS_SUM, "activation": 1}, "gated results are not summed"),
        ({"activation": 1}, "only gates have an activation"),
        ({"scale": 0.0}, "scale"),
    ],
)
def test_refused(change: dict[str, Any], text: str) -> None:
    weight = pack(random(1, E, INNER, WIDTH), DType.F32)
    about: dict[str, Any] = {"input": 0, "out": 3, "factors": 2, "weight": weight, "n_chosen": K}
    router = Op(kind=kinds.ROUTER, input=1, out=2, n_chosen=K)
    rows = Rows([random(1, N, WIDTH), choices(N)], [2 * K, K * INNER], [router, Op(kind=kinds.EXPERTS, **about)], 3)
    rows.run()
    rows.operators[3] = Op(kind=kinds.EXPERTS, **(about | change))
    with pytest.raises(InvalidArgument, match=text):
        rows.run()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"n_chosen": 0}, "0 experts of 7"),
        ({"n_chosen": 8}, "8 experts of 7"),
        ({"n_groups": 2, "n_top_groups": 1}, "groups"),
        ({"n_groups": 7, "n_top_groups": 2}, "do not give 3"),
        ({"vector": np.zeros(3, np.float32)}, "3 corrections"),
        ({"vector2": np.zeros(3, np.float32)}, "3 factors"),
        ({"flags": kinds.ROUTE_MIXER | kinds.ROUTE_NORM}, "a mixer has no other scores"),
        ({"flags": kinds.ROUTE_MIXER, "n_groups": 7, "n_top_groups": 7}, "a mixer has no other scores"),
        ({"flags": kinds.ROUTE_MIXER, "limit": -0.1}, "limit"),
        ({"flags": kinds.ROUTE_SIGMOID | kinds.ROUTE_CHOSEN}, "not both"),
        ({"eps": -1.0}, "eps"),
    ],
)
def test_refused_routers(change: dict[str, Any], text: str) -> None:
    about: dict[str, Any] = {"input": 0, "out": 1, "n_chosen": K}
    rows = Rows([choices(N)], [2 * K], [Op(kind=kinds.ROUTER, **about)], 1)
    rows.run()
    rows.operators[1] = Op(kind=kinds.ROUTER, **(about | change))
    with pytest.raises(InvalidArgument, match=text):
        rows.run()


def test_other_operators_take_one_matrix() -> None:
    op = Op(kind=kinds.LINEAR, input=0, out=1, weight=pack(random(1, E, INNER, WIDTH), DType.F32))
    with pytest.raises(InvalidArgument, match="a weight of 7 experts"):
        Rows([random(1, N, WIDTH)], [INNER], [op], 1).run()


@pytest.mark.parametrize("n", [0, 1025])
def test_numbers_of_experts(n: int) -> None:
    with pytest.raises(InvalidArgument, match="n_experts"):
        Weight(DType.F32, 16, 16, n)
    weight = Weight(DType.F32, 16, 16, 3)
    with pytest.raises(InvalidArgument, match="expert 3 of 3"):
        weight.pack_rows(np.zeros(1024, np.uint8), DType.F32, 16, expert=3)
    with pytest.raises(InvalidArgument, match=r"must be 0 \.\. 47"):
        weight.row(48)
