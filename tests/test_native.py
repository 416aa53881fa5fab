"""The native library through its Python face: operators against NumPy, the same bits on every
instruction set, and every status provoked: wrong arguments leave a clear sentence and nothing changed.
"""

from __future__ import annotations

import mmap
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabula import _native, ops
from fabula._native import KvLayer, PagePool, Weight, kv_layers, page_bytes
from fabula._program import BatchSequence, Heads, Op, Program, RopeTable, Shape
from fabula.bench import library
from fabula.errors import InvalidArgument, NonFinite, OutOfMemory, Unsupported
from fabula.formats.checkpoint import DType

ISAS: list[Any] = [isa for isa in get_args(_native.Isa) if isa != "auto" and _native.isa_available(isa)]
F32 = npt.NDArray[np.float32]
NATIVE = Path(__file__).resolve().parent.parent / "native"


def random(*shape: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def everywhere(call: Any) -> F32:
    """The result of call(isa=, threads=) on every instruction set and with 1, 2 and 3 threads: all the same bits."""
    results = [call(isa=isa, threads=threads) for isa in ISAS for threads in (1, 2, 3)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    return np.asarray(results[0])


# ---- Operators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 16), (2, 577), (40, 72)])
def test_rms_norm(shape: tuple[int, int]) -> None:
    x, weight = random(*shape), random(shape[1], seed=1)
    ours = everywhere(lambda **how: ops.rms_norm(x, weight, eps=1e-5, **how))
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-7)


def test_gather() -> None:
    table, ids = random(50, 33), np.array([0, 49, 7, 7])
    np.testing.assert_array_equal(everywhere(lambda **how: ops.gather(table, ids, **how)), table[ids])
    assert ops.gather(table, []).shape == (0, 33)


@pytest.mark.parametrize("causal", [True, False])
def test_masked_softmax(causal: bool) -> None:
    x = random(20, 37) * 10
    ours = everywhere(lambda **how: ops.masked_softmax(x, causal=causal, first_visible=5, **how))
    wide = x.astype(np.float64)
    if causal:
        wide[np.arange(37)[None] >= 5 + np.arange(20)[:, None]] = -np.inf
    exp = np.exp(wide - wide.max(axis=1, keepdims=True))
    np.testing.assert_allclose(ours, exp / exp.sum(axis=1, keepdims=True), rtol=3e-6, atol=1e-9)


def test_swiglu() -> None:
    gate, up = random(3, 5, 31) * 20, random(3, 5, 31, seed=1)
    ours = everywhere(lambda **how: ops.swiglu(gate, up, **how))
    wide = gate.astype(np.float64)
    np.testing.assert_allclose(ours, wide / (1 + np.exp(-wide)) * up, rtol=3e-6, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 90),
    cols=st.integers(1, 300),
    tokens=st.integers(1, 30),
    precision=st.sampled_from(["f32", "f16", "bf16", "bf16 x f32"]),
    extras=st.tuples(st.booleans(), st.booleans()),
)
def test_linear(rows: int, cols: int, tokens: int, precision: Any, extras: tuple[bool, bool]) -> None:
    matrix, x = random(rows, cols), random(tokens, cols, seed=1)
    bias = random(rows, seed=2) if extras[0] else None
    residual = random(tokens, rows, seed=3) if extras[1] else None
    if precision == "bf16 x f32":
        weight = ops.pack(matrix, precision="bf16", bf16_inputs="f32")
    else:
        weight = ops.pack(matrix, precision=precision)
    held = np.stack([weight.row(i) for i in range(rows)])
    ours = everywhere(lambda **how: ops.linear(x, weight, bias=bias, residual=residual, **how))
    taken = x
    if precision == "bf16":  # inputs are rounded to what the weights are
        inputs = ops.pack(x, precision=precision)
        taken = np.stack([inputs.row(i) for i in range(tokens)])
    expected = taken.astype(np.float64) @ held.T.astype(np.float64)
    size = np.abs(x).astype(np.float64) @ np.abs(held).T.astype(np.float64) + 1
    for term in (bias, residual):
        if term is not None:
            expected = expected + term
            size = size + np.abs(term)
    # Each of `cols` roundings loses at most half a unit of the running sum, which never exceeds the sum of absolute
    # terms.
    assert (np.abs(ours - expected) <= 1.2e-7 * (cols + 3) * size).all()
    one_by_one = np.concatenate(
        [
            ops.linear(x[i : i + 1], weight, bias=bias, residual=None if residual is None else residual[i : i + 1])
            for i in range(tokens)
        ]
    )
    np.testing.assert_array_equal(one_by_one, ours)


def test_many_tokens_at_once_are_the_same_bits() -> None:
    """More tokens than a block, deeper than a slice: the paths that long prompts take."""
    weight, x = ops.pack(random(50, 700), precision="f16"), random(203, 700, seed=1)
    ours = ops.linear(x, weight, threads=2)
    np.testing.assert_array_equal(np.concatenate([ops.linear(row[None], weight) for row in x]), ours)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_precision_of_packed_rows(n: int) -> None:
    import torch

    matrix = random(19, 45) * 1000
    matrix[0, :6] = [0.0, -0.0, 65504.0, 1e-7, 6e-8, -3.14159]
    dtype, kind = [(DType.F32, torch.float32), (DType.F16, torch.float16), (DType.BF16, torch.bfloat16)][n]
    weight = Weight(dtype, 19, 45)
    weight.pack_rows(matrix.view(np.uint8).reshape(-1), DType.F32, 19)
    expected = torch.from_numpy(matrix).to(kind).float().numpy()
    np.testing.assert_array_equal(np.stack([weight.row(i) for i in range(19)]), expected)
    assert weight.n_non_finite == 0


def test_numbers_beyond_the_precision_are_counted() -> None:
    matrix = np.array([[1.0, 7e4, np.nan, -np.inf]], np.float32)
    weight = ops.pack(matrix, precision="f16")
    assert weight.n_non_finite == 3
    assert ops.pack(matrix, precision="bf16").n_non_finite == 2


BLOCK_FORMATS = [dtype for dtype in DType if _native.dtype_block(dtype)[0] > 1]


@settings(deadline=None, max_examples=80)
@given(
    dtype=st.sampled_from(BLOCK_FORMATS),
    rows=st.integers(1, 90),
    blocks=st.integers(1, 11),
    tokens=st.integers(1, 14),
    extras=st.tuples(st.booleans(), st.booleans()),
)
def test_linear_of_blocks(dtype: DType, rows: int, blocks: int, tokens: int, extras: tuple[bool, bool]) -> None:
    size = _native.dtype_block(dtype)[0]
    cols = size * (blocks if size == 32 else 1 + blocks % 3)
    matrix, x = random(rows, cols), random(tokens, cols, seed=1)
    x[:, ::32] *= 20  # blocks that one number dominates
    x[-1, :32] = 0.0
    bias = random(rows, seed=2) if extras[0] else None
    residual = random(tokens, rows, seed=3) if extras[1] else None
    weight = ops.pack(matrix, precision=cast(Any, dtype.name.lower()))
    held = _native.dequantize(dtype, _native.quantize(dtype, matrix), rows * cols).reshape(rows, cols)
    np.testing.assert_array_equal(np.stack([weight.row(i) for i in range(rows)]), held)
    ours = everywhere(lambda **how: ops.linear(x, weight, bias=bias, residual=residual, **how))

    # Each number of the input is off by half a step of its block at most.
    steps = np.abs(x).reshape(tokens, -1, 32).max(axis=2) / 127
    expected = x.astype(np.float64) @ held.T.astype(np.float64)
    allowed = 0.5001 * np.repeat(steps, 32, axis=1).astype(np.float64) @ np.abs(held).T + 1e-5 * (
        1 + np.abs(x).astype(np.float64) @ np.abs(held).T
    )
    for term in (bias, residual):
        if term is not None:
            expected = expected + term
    assert (np.abs(ours - expected) <= allowed).all()
    one_by_one = [
        ops.linear(x[i : i + 1], weight, bias=bias, residual=None if residual is None else residual[i : i + 1])
        for i in range(tokens)
    ]
    np.testing.assert_array_equal(np.concatenate(one_by_one), ours)


def test_damage_reaches_the_results_of_blocks() -> None:
    x = random(3, 64)
    x[1, 40] = np.nan
    x[2, 3] = np.inf
    result = ops.linear(x, ops.pack(random(20, 64), precision="q8_0"))
    assert np.isfinite(result[0]).all() and np.isnan(result[1:]).all()
    matrix = random(20, 64)
    matrix[7, 1] = np.nan
    weight = ops.pack(matrix, precision="q8_0")
    assert weight.n_non_finite > 0 and np.isnan(weight.row(7)).any()
    assert np.flatnonzero(np.isnan(ops.linear(x[:1], weight)[0])).tolist() == [7]


@pytest.mark.parametrize("dtype", BLOCK_FORMATS)
def test_stacked_rows_of_blocks(dtype: DType) -> None:
    """Matrices that share a panel, and two that are interleaved by panels, with a gap after them."""
    size = _native.dtype_block(dtype)[0]
    raw = [_native.quantize(dtype, random(n, 2 * size, seed=n)) for n in (5, 30, 21)]
    rows = [_native.dequantize(dtype, part, part.size // _native.dtype_block(dtype)[1] * size) for part in raw]
    wanted = np.concatenate(rows).reshape(-1, 2 * size)
    weight = Weight(dtype, 56, 2 * size)
    for part, n, first in zip(raw, (5, 30, 21), (0, 5, 35), strict=True):
        weight.pack_rows(part, dtype, n, first_row=first, n_threads=2)
    np.testing.assert_array_equal(np.stack([weight.row(i) for i in range(56)]), wanted)
    woven = Weight(dtype, 64, 2 * size)
    for i in range(2):
        woven.pack_rows(raw[2], dtype, 21, first_row=16 * i, row_block=16, row_step=2)
    gate, up = [*range(16), *range(32, 37)], [*range(16, 32), *range(48, 53)]
    for places in (gate, up):
        np.testing.assert_array_equal(np.stack([woven.row(i) for i in places]), wanted[35:])
    assert not woven.row(40).any()


def test_rope() -> None:
    x, positions = random(6, 3, 40), np.array([0, 1, 2, 500, 8191, 100_000])
    inv_freq = (10000.0 ** -(np.arange(10) / 10)).astype(np.float32)
    ours = everywhere(lambda **how: ops.rope(x, positions, inv_freq, scale=1.2, **how))
    angles = (positions[:, None].astype(np.float32) * inv_freq).astype(np.float64)[:, None]
    first, second = x[..., :10].astype(np.float64), x[..., 10:20].astype(np.float64)
    expected = x.astype(np.float64)
    expected[..., :10] = 1.2 * (first * np.cos(angles) - second * np.sin(angles))
    expected[..., 10:20] = 1.2 * (second * np.cos(angles) + first * np.sin(angles))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours[..., 20:], x[..., 20:])


@pytest.mark.parametrize(
    ("n_tokens", "heads", "kv_heads", "dim", "window"),
    [
        (1, 1, 1, 2, 0),
        (31, 4, 4, 16, 0),
        (33, 6, 2, 20, 0),
        (300, 4, 1, 72, 0),
        (280, 9, 3, 64, 50),
        (600, 2, 2, 10, 257),
    ],
)
def test_self_attention(n_tokens: int, heads: int, kv_heads: int, dim: int, window: int) -> None:
    q, k, v = (random(n_tokens, n, dim, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    ours = everywhere(lambda **how: ops.self_attention(q, k, v, window=window, **how))
    keys, values = (np.repeat(a, heads // kv_heads, axis=1).astype(np.float64) for a in (k, v))
    scores = np.einsum("thd,shd->hts", q.astype(np.float64), keys) * dim**-0.5
    distance = np.arange(n_tokens)[:, None] - np.arange(n_tokens)[None]
    scores[:, (distance < 0) | ((window > 0) & (distance >= window))] = -np.inf
    exp = np.exp(scores - scores.max(axis=2, keepdims=True))
    expected = np.einsum("hts,shd->thd", exp / exp.sum(axis=2, keepdims=True), values)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-6)
    for kv, atol in (
        ("f16", 4e-3),
        ("bf16", 3e-2),
        ("q8", 2e-2),
        ("q8:f32", 2e-2),
        ("f16:q8", 2e-2),
        ("f32:bf16", 2e-2),
    ):
        held = everywhere(lambda kv=kv, **how: ops.self_attention(q, k, v, window=window, kv=kv, **how))
        np.testing.assert_allclose(held, expected, rtol=2e-2, atol=atol)


def test_bytes_of_k_and_v_have_a_scale_for_each_head() -> None:
    """One position a thousand times as large as the others does not make them coarse; a damaged one is seen."""
    q, k, v = (random(40, 1, 16, seed=i) for i in range(3))
    k[7] *= 1e-3
    v[7] *= 1000
    exact, held = (ops.self_attention(q, k, v, kv=kv) for kv in ("f32", "q8"))
    np.testing.assert_allclose(held[:7], exact[:7], atol=2e-2)
    v[9] = 0
    np.testing.assert_array_equal(ops.self_attention(q, k, v, kv="q8")[:9], held[:9])
    v[20, 0, 3] = np.inf
    held = ops.self_attention(q, k, v, kv="q8")
    assert np.isnan(held[20:]).all()


# ---- Wrong arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ops.rms_norm(random(2, 3), random(4)), "weight has shape"),
        (lambda: ops.rms_norm(random(2, 3), random(3), eps=-1.0), "eps"),
        (lambda: ops.rms_norm(random(2, 3), random(3), threads=0), "n_threads is 0"),
        (lambda: ops.rms_norm(random(2, 0), random(0)), "none of them 0"),
        (lambda: ops.rms_norm(random(2, 3), random(3), isa="mmx"), "isa is 'mmx'"),
        (lambda: ops.gather(random(2, 3), [2]), r"ids\[0\] is 2, the table has 2 rows"),
        (lambda: ops.gather(random(2, 3), [-1]), "ids must be in"),
        (lambda: ops.gather(random(2, 3), [0.5]), "integers"),
        (lambda: ops.masked_softmax(random(2, 3), first_visible=0), "first_visible is 0"),
        (lambda: ops.swiglu(random(2), random(3)), "up has shape"),
        (lambda: ops.linear(random(2, 3), ops.pack(random(4, 5))), "x has shape"),
        (lambda: ops.linear(random(2, 5), ops.pack(random(4, 5)), bias=random(3)), "bias has shape"),
        (lambda: ops.pack(random(2, 3), precision="int3"), "precision is 'int3'"),
        (lambda: ops.rope(random(2, 1, 4), [0, 1], random(3)), "rotary_dim is 6"),
        (lambda: ops.rope(random(2, 1, 4), [0], random(2)), "positions has shape"),
        (lambda: ops.self_attention(random(2, 3, 4), random(2, 2, 4), random(2, 2, 4)), "must divide n_heads 3"),
        (lambda: ops.self_attention(random(2, 2, 4), random(2, 2, 4), random(2, 2, 4), scale=0.0), "scale"),
        (lambda: ops.self_attention(random(2, 2, 4), random(2, 2, 4), random(2, 2, 4), window=-1), "window"),
        (lambda: Weight(DType.Q4_0, 1, 33), "whole blocks of 32"),
        (lambda: Weight(cast(Any, 99), 1, 32), "dtype is 99"),
        (lambda: Weight(DType.F32, 0, 32), "n_rows is 0"),
        (lambda: Weight(DType.F32, 2, 2).row(2), "row is 2"),
        (lambda: Weight(DType.F32, 2, 2).pack_rows(np.zeros(8, np.uint8), DType.F32, 2), "16 are needed|src has 8"),
        (lambda: Weight(DType.F32, 2, 2).pack_rows(np.zeros(24, np.uint8), DType.F32, 3), "the last row would be 2"),
        (lambda: Weight(DType.F32, 2, 33).pack_rows(np.zeros(36, np.uint8), DType.Q4_0, 1), "whole blocks of 32"),
        (lambda: Weight(DType.F32, 2, 2).pack_rows(np.zeros(8, np.uint8), 99, 1), "src_dtype 99"),
        (lambda: PagePool(DType.Q4_0, 1, kv_layers(1, 1, 8)), "f32, f16, bf16 or q8_0"),
        (lambda: PagePool((DType.F16, DType.Q4_K), 1, kv_layers(1, 1, 8)), "not in dtypes 1 and 8"),
        (lambda: ops.self_attention(random(1, 1, 2), random(1, 1, 2), random(1, 1, 2), kv="q8:"), "kv is 'q8:'"),
        (lambda: PagePool(DType.F16, 0, kv_layers(1, 1, 8)), "n_pages is 0"),
        (lambda: PagePool(DType.F16, 1, kv_layers(1, 1, 2000)), "k_dim is 2000"),
        (lambda: PagePool(DType.F16, 2, kv_layers(1, 1, 8)).copy(0, 2), "src is page 2"),
        (lambda: PagePool(DType.F16, 2, kv_layers(1, 1, 8)).write(0, np.zeros(3, np.uint8)), "src has 3 bytes"),
        (lambda: library.measure_read(10, 3, 1), "n_bytes is 10"),
        (lambda: library.measure_fma(1, 1), "n_repeats is 1"),
    ],
)
def test_wrong_arguments(call: Any, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        call()


def test_missing_instruction_set() -> None:
    missing: list[Any] = [isa for isa in get_args(_native.Isa) if not _native.isa_available(isa)]
    assert missing  # no machine has all
    for isa in missing:
        with pytest.raises(Unsupported, match="lacks instruction set"):
            ops.rms_norm(random(2, 3), random(3), isa=isa)
    assert _native.isa_best() in ISAS


def test_memory_that_cannot_be_had() -> None:
    with pytest.raises(OutOfMemory):
        Weight(DType.F32, 1 << 30, 1 << 30)
    with pytest.raises(OutOfMemory):
        PagePool(DType.F32, 2**31 - 1, kv_layers(1 << 20, 1 << 20, 1024))


def test_errors_belong_to_their_thread() -> None:
    seen: list[str] = []

    def fail() -> None:
        try:
            Weight(DType.F32, 1, 1).row(5)
        except InvalidArgument as error:
            seen.append(str(error))

    with pytest.raises(InvalidArgument, match="n_rows is -3"):
        Weight(DType.F32, -3, 1)
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert seen == ["row is 5, must be 0 .. 0"]
    assert _native.ffi.string(_native.lib.fb_last_error()) == b"n_rows is -3, must be 1 .. 2^30"


# ---- Pages -------------------------------------------------------------------------------------------------


def test_pages_copy_read_write_zero() -> None:
    pool = PagePool(DType.F16, 3, kv_layers(2, 2, 24))
    # K: 32 x 24, V: 32 x 32 (padded to panels), per layer and head, two bytes each.
    assert pool.page_bytes == 2 * 2 * (32 * 24 + 32 * 32) * 2
    raw = np.random.default_rng(0).integers(0, 256, pool.page_bytes).astype(np.uint8)
    assert not pool.read(2).any()
    pool.write(0, raw)
    pool.copy(2, 0)
    np.testing.assert_array_equal(pool.read(2), raw)
    pool.zero(0)
    assert not pool.read(0).any()
    np.testing.assert_array_equal(pool.read(2), raw)
    pool.close()
    pool.close()


def test_layers_of_a_page_are_discarded() -> None:
    """The system takes back what is whole pages of its own: here 4 KiB and more, in a pool of several MiB."""
    layers = [KvLayer(2, 32, 32), KvLayer(4, 64, 64), KvLayer(4, 64, 64), KvLayer(1, 32, 32)]
    pool = PagePool(DType.F32, 40, layers)
    raw = np.random.default_rng(0).integers(1, 256, pool.page_bytes).astype(np.uint8)
    for page in (16, 17, 18):
        pool.write(page, raw)
    pool.discard(17, 1, 2)
    start, end = page_bytes(DType.F32, layers[:1]), page_bytes(DType.F32, layers[:3])
    left = pool.read(17)
    np.testing.assert_array_equal(left[:start], raw[:start])
    np.testing.assert_array_equal(left[end:], raw[end:])
    if sys.platform == "linux":
        assert np.count_nonzero(left[start:end]) < 2 * mmap.PAGESIZE
    for page in (16, 18):
        np.testing.assert_array_equal(pool.read(page), raw)
    pool.write(17, raw)
    np.testing.assert_array_equal(pool.read(17), raw)
    for bad in ((40, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 0, 0), (0, 1, 4), (0, 3, 2**31 - 1)):
        with pytest.raises(InvalidArgument):
            pool.discard(*bad)
    pool.discard(0, 0, 4)
    pool.close()


# ---- Programs ----------------------------------------------------------------------------------------------

ROPE = RopeTable(np.array([1.0, 0.1, 0.01, 0.001], np.float32))
SHAPE = Shape(n_layers=1, vocab_size=20, max_tokens=64, heads=[Heads(2, 1, 8, 8)], ropes=[ROPE])


def small_ops(spoil: F32 | None = None) -> list[Op]:
    embedding = ops.pack(random(20, 16) if spoil is None else spoil)
    return [
        Op(kind=1, weight=embedding, out=0),
        Op(kind=2, input=0, out=1, vector=np.ones(16, np.float32), eps=1e-6),
        Op(kind=3, input=1, out=2, weight=ops.pack(random(32, 16, seed=1))),
        Op(kind=6, input=2),
        Op(kind=7, input=2),
        Op(kind=8, input=2, out=3, scale=0.35),
        Op(kind=3, input=3, out=0, weight=ops.pack(random(16, 16, seed=2)), residual=0),
        Op(kind=4, input=0, out=4, weight=ops.pack(random(64, 16, seed=3)), activation=1),
        Op(kind=3, input=4, out=0, weight=ops.pack(random(16, 27, seed=4)), residual=0),
        Op(kind=9, input=0, out=5),
        Op(kind=10, input=5, weight=embedding),
    ]


WIDTHS = [16, 16, 32, 16, 27, 16]


def program(operators: list[Op] | None = None, *, widths: list[int] | None = None, n_threads: int = 2) -> Program:
    return Program(SHAPE, widths or WIDTHS, operators or small_ops(), n_threads=n_threads)


def changed(index: int, **fields: Any) -> list[Op]:
    from dataclasses import replace

    operators = small_ops()
    operators[index] = replace(operators[index], **fields)
    return operators


@pytest.mark.parametrize(
    ("operators", "text"),
    [
        (lambda: small_ops()[1:], "a program begins with embed"),
        (lambda: small_ops()[:-1], "one logits op, at its end"),
        (lambda: changed(1, kind=99), "kind 99 is unknown"),
        (lambda: changed(1, input=6), "in is buffer 6 of 6"),
        (lambda: changed(1, input=3), "before all of it was written"),
        (lambda: changed(1, vector=np.ones(5, np.float32)), "5 weights for a width of 16"),
        (lambda: changed(1, eps=-1.0), "eps"),
        (lambda: changed(2, weight=ops.pack(random(32, 17))), "17 columns"),
        (lambda: changed(2, weight=None), "its weight is null"),
        (lambda: changed(2, vector=np.ones(3, np.float32)), "a bias of 3"),
        (lambda: changed(2, out=1), "cannot write the buffer it reads"),
        (lambda: changed(2, out=9), "out is buffer 9"),
        (lambda: changed(4, input=0), "buffer 0 holds q heads only"),
        (lambda: changed(3, out=1), "works in place"),
        (lambda: changed(4, layer=1), "layer 1 of 1"),
        (lambda: changed(5, scale=0.0), "scale of attention"),
        (lambda: changed(5, scale=float("nan")), "must be finite and not 0"),
        (lambda: changed(5, window=-2), "window is -2"),
        (lambda: changed(6, residual=2), "cannot be its residual"),
        (lambda: changed(1, residual=0), "a norm with a residual destroys buffer 0"),
        (lambda: changed(6, kind=16, weight=None), "buffer 0 cannot be second input and result"),
        (lambda: changed(6, kind=15, weight=None, residual=-1), "has no second input"),
        (lambda: changed(6, activation=99), "activation 99 is unknown"),
        (lambda: changed(6, activation=6), "clamp needs a limit"),
        (lambda: changed(6, scale=0.0), "must be finite and not 0"),
        (lambda: changed(5, heads=3), "its heads are geometry 3 of 1"),
        (lambda: changed(5, vector=np.ones(3, np.float32)), "3 sinks for 2 heads"),
        (lambda: changed(5, vector2=np.ones(3, np.float32)), "3 slopes for 2 heads"),
        (lambda: changed(5, flags=64), "0 slopes for 2 heads"),
        (lambda: changed(3, kind=5, vector=np.ones(8), vector2=np.ones(8), flags=32), "an RMS norm has no biases"),
        (lambda: changed(3, kind=5, vector=np.ones(8), vector2=np.ones(8), flags=33), "8 weights for 2 q heads"),
        (lambda: changed(7, out=5), "interleaved rows"),
        (lambda: changed(9, kind=2, vector=np.ones(16, np.float32)), "needs gather_outputs"),
        (lambda: changed(0, weight=ops.pack(random(19, 16))), "19 rows for a vocabulary of 20"),
    ],
)
def test_wrong_programs(operators: Any, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        program(operators())


def sequence(pages: list[int], n_past: int, tokens: list[int]) -> BatchSequence:
    return BatchSequence(np.array(pages, np.int32), n_past, np.array(tokens, np.int32))


@pytest.mark.parametrize(
    ("sequences", "outputs", "text"),
    [
        ([], [], "n_tokens is 0"),
        ([sequence([0], 0, [20])], [0], "token 0 is id 20"),
        ([sequence([0], 0, [-1])], [0], "token 0 is id -1"),
        ([sequence([9], 0, [1])], [0], "page 9 of a pool of 9"),
        ([sequence([0], 32, [1])], [0], "1 pages for 33 positions"),
        ([sequence([0], -1, [1])], [0], "n_past"),
        ([sequence([0, 1, 2], 0, [1] * 65)], [0], "n_tokens is 65"),
        ([sequence([0], 0, [1, 2])], [2], "rows must ascend"),
        ([sequence([0], 0, [1, 2])], [1, 0], "rows must ascend"),
        ([sequence([0], 0, [1, 2])], [0, 0], "rows must ascend"),
        ([sequence([0], 0, [1, 2])], [0, 1, 1], "n_outputs is 3"),
        ([sequence([4], 0, [1]), sequence([4], 0, [2])], [0], "both write page 4"),
        ([sequence([4], 0, [1]), sequence([1], 0, [])], [0], "n_tokens 0 must be 1"),
    ],
)
def test_wrong_batches_change_nothing(sequences: list[BatchSequence], outputs: list[int], text: str) -> None:
    pool = PagePool(DType.F32, 9, kv_layers(1, 1, 8))
    marks = np.full(pool.page_bytes, 7, np.uint8)
    for page in range(9):
        pool.write(page, marks)
    with pytest.raises(InvalidArgument, match=text):
        program().run(pool, sequences, outputs)
    for page in range(9):
        np.testing.assert_array_equal(pool.read(page), marks)


def test_a_pool_of_another_shape() -> None:
    with pytest.raises(InvalidArgument, match="the page pool has 2 layers"):
        program().run(PagePool(DType.F32, 4, kv_layers(2, 1, 8)), [sequence([0], 0, [1])], [0])


def test_damaged_weights_fail_the_step() -> None:
    table = random(20, 16)
    table[5, 3] = np.nan
    pool = PagePool(DType.F32, 2, kv_layers(1, 1, 8))
    damaged = program(small_ops(table))
    with pytest.raises(NonFinite):
        damaged.run(pool, [sequence([0], 0, [5])], [0])


def test_many_threads_give_the_bits_of_one() -> None:
    """Wide enough for every thread to take part: two prompts, then a mixed batch, on every instruction set."""
    shape = Shape(n_layers=1, vocab_size=500, max_tokens=300, heads=[Heads(8, 2, 40, 40)], ropes=[ROPE])
    embedding = ops.pack(random(500, 72), precision="f16")
    operators = [
        Op(kind=1, weight=embedding, out=0),
        Op(kind=2, input=0, out=1, vector=np.ones(72, np.float32), eps=1e-6),
        Op(kind=3, input=1, out=2, weight=ops.pack(random(480, 72, seed=1))),
        Op(kind=6, input=2),
        Op(kind=7, input=2),
        Op(kind=8, input=2, out=3, scale=0.35),
        Op(kind=3, input=3, out=0, weight=ops.pack(random(72, 320, seed=2)), residual=0),
        Op(kind=4, input=0, out=4, weight=ops.pack(random(384, 72, seed=3)), activation=1),
        Op(kind=3, input=4, out=0, weight=ops.pack(random(72, 187, seed=4)), residual=0),
        Op(kind=9, input=0, out=5),
        Op(kind=10, input=5, weight=embedding),
    ]
    tokens = np.random.default_rng(0).integers(0, 500, 290).tolist()
    results = []
    for isa in ISAS:
        for n_threads in (1,) if isa == "reference" else (1, 2, 3, 7, *([20, 64] if isa == ISAS[-1] else [])):
            pool = PagePool(DType.F16, 16, kv_layers(1, 2, 40))
            made = Program(shape, [72, 72, 480, 320, 187, 72], operators, n_threads=n_threads, isa=isa)
            first, second = [5, 1, 7, 3, 9, 2, 11], [0, 4, 6, 8, 10, 12, 13]
            batch = [sequence(first, 0, tokens[:150]), sequence(second, 0, tokens[150:])]
            prompt = made.run(pool, batch, np.arange(0, 290, 7))
            batch = [sequence(first, 150, tokens[:60]), sequence(second, 140, tokens[60:61])]
            results.append(np.concatenate([prompt, made.run(pool, batch, [3, 59, 60])]))
    assert results
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_stale_pages_are_never_read() -> None:
    """Pages full of NaN, as a poisoned allocator would leave them: positions not written must not matter."""
    clean, poisoned = (PagePool(DType.F32, 4, kv_layers(1, 1, 8)) for _ in range(2))
    for page in range(4):
        poisoned.write(page, np.full(poisoned.page_bytes, 0xFF, np.uint8))
    tokens = [1 + i % 19 for i in range(37)]
    results = []
    for pool in (clean, poisoned):
        runner = program()
        first = runner.run(pool, [sequence([2, 0], 0, tokens)], np.arange(37))
        then = runner.run(pool, [sequence([2, 0], 37, [3])], [0])
        results.append(np.concatenate([first, then]))
    np.testing.assert_array_equal(results[0], results[1])


def test_logits_are_made_only_where_asked() -> None:
    pool = PagePool(DType.F32, 2, kv_layers(1, 1, 8))
    tokens = [3, 1, 4, 1, 5]
    every = program().run(pool, [sequence([0], 0, tokens)], np.arange(5))
    assert program().run(pool, [sequence([1], 0, tokens)], []).shape == (0, 20)
    some = program().run(pool, [sequence([1], 0, tokens)], [1, 4])
    np.testing.assert_array_equal(some, every[[1, 4]])


def test_struct_sizes_and_abi() -> None:
    lib = _native.lib
    assert lib.fb_abi_version() == lib.FB_ABI_VERSION
    assert lib.fb_sizeof(b"no such struct") == 0


@pytest.mark.skipif(not NATIVE.is_dir() or shutil.which("nm") is None, reason="needs a checkout and binutils")
def test_libraries_export_what_their_headers_declare() -> None:
    """And the serving library what the measuring one calls of it, under a mark of its own; nothing is in both."""

    def exported(name: str) -> set[str]:
        path = Path(_native.__file__).with_name(name)
        out = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        return {line.split()[-1] for line in out.splitlines()}

    def declared(header: str) -> set[str]:
        text = re.sub(r"/\*.*?\*/", "", (NATIVE / header).read_text(encoding="utf-8"), flags=re.S)
        return set(re.findall(r"\b(fb_\w+)\(", text))

    shared = set[str]()
    for path in (NATIVE / "src").rglob("*.h"):
        shared |= set(re.findall(r"^FB_EXPORTED [^(]*\b(fb_\w+)\(", path.read_text(encoding="utf-8"), flags=re.M))
    assert len(shared) > 3
    ours = {name for name in exported("libfabula.so") if name.startswith("fb_")}
    assert ours == declared("include/fabula.h") | shared
    theirs = {name for name in exported("libfabula_bench.so") if name.startswith("fb_")}
    assert theirs == declared("bench/fabula_bench.h")
