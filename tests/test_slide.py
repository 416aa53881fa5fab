"""Sinks and sliding windows: what a token sees is what the reference says, however its text came in."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest

import tiny
from fabula import _native
from fabula._native import PagePool, kv_layers
from fabula._program import BatchSequence
from fabula.engine.runner import Runner
from fabula.errors import InvalidArgument
from fabula.formats.checkpoint import DType
from fabula.formats.open import open_checkpoint
from fabula.kv.pages import HOLE
from fabula.kv.prefix import Window
from reference import llama

ISAS: list[Any] = [isa for isa in get_args(_native.Isa) if isa != "auto" and _native.isa_available(isa)]
IDS = np.random.default_rng(3).integers(0, tiny.VOCAB, 150).astype(np.int32)
F32 = npt.NDArray[np.float32]


def load(folder: Path, *, kv: DType = DType.F32, isa: Any = "auto", threads: int = 1) -> Runner:
    checkpoint = open_checkpoint(folder)
    try:
        return Runner(checkpoint, weights=DType.F32, kv=kv, n_threads=threads, isa=isa)
    finally:
        checkpoint.close()


def in_chunks(runner: Runner, window: Window, chunks: list[int], *, slide: bool = True) -> F32:
    """Every token's logits, computed in chunks of these lengths, the last one repeated."""
    with runner.sequence(window) as sequence:
        rows, start = [], 0
        while start < len(IDS):
            n = chunks.pop(0) if len(chunks) > 1 else chunks[0]
            tokens = IDS[start : start + n]
            rows.append(runner.step([(sequence, tokens)], np.arange(len(tokens))))
            start += len(tokens)
            if slide:
                sequence.slide(sequence.n_tokens)
        return np.concatenate(rows)


@pytest.mark.parametrize("window", [Window(40, 4), Window(33, 0), Window(64, 32), Window(5, 3), Window(1, 1)])
def test_slide_is_the_reference(window: Window, tiny_folder: Path) -> None:
    expected = llama.logits(tiny.CONFIG, tiny.random_tensors(), IDS.tolist(), window.size, window.n_sinks)
    whole = llama.logits(tiny.CONFIG, tiny.random_tensors(), IDS.tolist())
    ours = in_chunks(load(tiny_folder), window, [1])
    scale = np.abs(expected).max()
    assert np.abs(ours - expected).max() < 2e-5 * scale
    first = window.n_sinks + window.size
    assert np.abs(ours[:first] - whole[:first]).max() < 2e-5 * scale, "before it slides a window hides nothing"
    assert np.abs(ours[first + 8 :] - whole[first + 8 :]).max() > 1e-2 * scale, "and then it does"


@pytest.mark.parametrize("kv", [DType.F32, DType.F16])
@pytest.mark.parametrize("window", [Window(40, 4), Window(17, 32), Window(300, 2)])
def test_the_same_bits_in_every_chunking(kv: DType, window: Window, tiny_folder: Path) -> None:
    expected = in_chunks(load(tiny_folder, kv=kv, isa="reference"), window, [1])
    for isa in ISAS:
        for threads in (1, 3):
            runner = load(tiny_folder, kv=kv, isa=isa, threads=threads)
            for chunks in ([150], [7], [64, 1, 1, 50, 3, 31]):
                np.testing.assert_array_equal(in_chunks(runner, window, list(chunks)), expected)
            np.testing.assert_array_equal(in_chunks(runner, window, [32], slide=False), expected)
            assert runner.pool.n_free == runner.pool.n_pages


def test_long_texts_split_over_threads(tiny_folder: Path) -> None:
    """Several key blocks, so that the parts of one token, sinks among them, are computed by different threads."""
    ids = np.random.default_rng(5).integers(0, tiny.VOCAB, 1200).astype(np.int32)
    window = Window(560, 4)
    results = []
    for threads in (1, 2, 4):
        runner = load(tiny_folder, threads=threads)
        with runner.sequence(window) as sequence:
            for start in range(0, 1199, 109):
                runner.step([(sequence, ids[start : min(start + 109, 1199)])], [])
                sequence.slide(sequence.n_tokens)
            results.append(runner.step([(sequence, ids[1199:])], [0]))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_pages_behind_the_window_are_given_back(tiny_folder: Path) -> None:
    runner = load(tiny_folder)
    with runner.sequence(Window(40, 4)) as sequence:
        most = 0
        for i in range(400):
            runner.step([(sequence, IDS[i % 150 : i % 150 + 1])], [])
            sequence.slide(sequence.n_tokens)
            most = max(most, runner.pool.n_pages - runner.pool.n_free)
        assert most <= 1 + 3  # the sinks', and 40 positions
        assert sequence.pages[1] == HOLE and sequence.pages[0] >= 0
        assert sequence.usable(400) == 400 and sequence.usable(300) == 32
        with pytest.raises(InvalidArgument, match="window has moved on"):
            sequence.fork(200)
        with sequence.fork(20) as fork:
            assert fork.n_tokens == 20
        runner.pool.check([sequence.pages])


def test_bad_windows(tiny_folder: Path) -> None:
    runner = load(tiny_folder)
    pool = runner.pool
    pages = np.array(pool.take(3), np.int32)

    def run(pages: npt.NDArray[np.int32], n_past: int, window: int, n_sinks: int) -> None:
        share = BatchSequence(pages, n_past, IDS[:1], window, n_sinks)
        runner.program.run(pool.native, [share], [])

    for window, n_sinks in ((-1, 0), (0, 1), (10, -1), (10, 33)):
        with pytest.raises(InvalidArgument, match="window"):
            run(pages, 0, window, n_sinks)
    holed = np.array([pages[0], -1, pages[2]], np.int32)
    run(holed, 80, 10, 4)
    for n_past, window, n_sinks in ((80, 20, 4), (80, 0, 0), (40, 10, 4)):
        with pytest.raises(InvalidArgument, match="page -1"):
            run(holed, n_past, window, n_sinks)
    run(np.array([-1, -1, pages[2]], np.int32), 80, 10, 0)
    with pytest.raises(InvalidArgument, match="page -1"):
        run(np.array([-1, -1, pages[2]], np.int32), 80, 10, 1)
    pool.give_back(pages.tolist())


def test_page_bytes_as_the_library_counts_them() -> None:
    formats = (DType.F32, DType.F16, DType.BF16, DType.Q8_0)
    for dtype in (*formats, *product(formats, formats)):
        for shape in ((2, 3, 24), (1, 1, 16), (5, 2, 7)):
            assert _native.page_bytes(dtype, kv_layers(*shape)) == PagePool(dtype, 1, kv_layers(*shape)).page_bytes
