"""Attention over pages: a sequence's bits do not depend on the batch, shared KV, or what its pages held before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from fabula import _native
from fabula.engine.runner import Runner
from fabula.formats.checkpoint import DType
from fabula.formats.open import open_checkpoint
from fabula.kv.prefix import EVERYTHING, Window

N_PROMPT = 1_100
KVS = [(DType.F16, DType.F16), (DType.F32, DType.BF16), (DType.Q8_0, DType.Q8_0)]


def load(folder: Path, kv: tuple[DType, DType], threads: int, isa: Any) -> Runner:
    checkpoint = open_checkpoint(folder)
    try:
        return Runner(checkpoint, weights=DType.F32, kv=kv, n_threads=threads, context=1_200, isa=isa)
    finally:
        checkpoint.close()


@pytest.mark.parametrize("kv", KVS)
@pytest.mark.parametrize("how", [(1, "auto"), (3, "auto"), (2, "avx2")])
def test_shared_blocks_give_the_bits_of_each_alone(tiny_folder: Path, kv: Any, how: tuple[int, Any]) -> None:
    if not _native.isa_available(how[1]):
        pytest.skip(f"this CPU lacks {how[1]}")
    runner = load(tiny_folder, kv, *how)
    rng = np.random.default_rng(5)
    ids = rng.integers(0, tiny.VOCAB, N_PROMPT).astype(np.int32)
    with runner.sequence() as prompt, runner.sequence(Window(300, 4)) as sliding, runner.sequence() as stranger:
        runner.prefill(prompt, ids)
        runner.prefill(sliding, ids)
        runner.prefill(stranger, ids[::-1].copy()[:700])
        # More than may share at once, at lengths on both sides of blocks and pages; two texts that have less in common.
        lengths = [N_PROMPT] * 14 + [1_024, 1_023, 1_025, 768, 512, 511, 256, 255, 1, 600, 300]
        sequences = [*(prompt.fork(n) for n in lengths), sliding.fork(), stranger.fork(), stranger.fork(690)]
        tokens = rng.integers(0, tiny.VOCAB, len(sequences)).astype(np.int32)
        alone = []
        for sequence, token in zip(sequences, tokens, strict=True):
            with sequence.fork() as copy:
                alone.append(runner.step([(copy, np.array([token]))], [0])[0])
        for _ in range(2):
            order = rng.permutation(len(sequences))
            copies = [sequences[i].fork() for i in order]
            together = runner.step(
                [(copy, tokens[i : i + 1]) for copy, i in zip(copies, order, strict=True)], np.arange(len(order))
            )
            for row, i in enumerate(order):
                np.testing.assert_array_equal(together[row], alone[i])
            for copy in copies:
                copy.close()
        # A prefill in the same batch changes nothing.
        copies = [sequences[i].fork() for i in range(6)]
        with runner.sequence(EVERYTHING) as reading:
            parts = [(copy, tokens[i : i + 1]) for i, copy in enumerate(copies)]
            together = runner.step([*parts, (reading, ids[:40])], np.arange(6))
        np.testing.assert_array_equal(together, np.stack(alone[:6]))
        for sequence in [*copies, *sequences]:
            sequence.close()
    runner.close()


@pytest.mark.parametrize("kv", [(DType.BF16, DType.BF16), *KVS])
def test_what_lies_in_unwritten_places_of_a_page_counts_for_nothing(tiny_folder: Path, kv: Any) -> None:
    """Pages full of NaN: prompts, steps and forks of odd and even lengths give the same bits as in clean ones."""
    rng = np.random.default_rng(6)
    ids = rng.integers(0, tiny.VOCAB, 80).astype(np.int32)
    results = []
    for poisoned in (False, True):
        runner = load(tiny_folder, kv, 2, "auto")
        if poisoned:
            noise = np.full(runner.pool.page_bytes, 0xFF, np.uint8)
            for page in range(runner.pool.n_pages):
                runner.pool.native.write(page, noise)
        found = []
        with runner.sequence() as text, runner.sequence(Window(20, 3)) as sliding:
            for n in (1, 2, 5, 8, 33, 64, 65, 80):
                for sequence in (text, sliding):
                    found.append(runner.prefill(sequence, ids[sequence.n_tokens : n]))
                with text.fork(n - 1) as other:
                    found.append(runner.prefill(other, ids[-1:]))
        results.append(np.stack(found))
        runner.close()
    assert np.isfinite(results[0]).all()
    np.testing.assert_array_equal(results[0], results[1])
