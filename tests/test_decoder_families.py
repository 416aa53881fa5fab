"""Every family against transformers: prefill, decode, a mixed batch, rollback, fork, a sliding window, greedy text.

Bound: |Δlogit| <= 1e-4 max|logit| in f32. Both sides compute in f32 but sum in another order; a few layers stay a
factor of ten below the bound. Decoded logits are those of the prefill, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from decoder_families import CASES, Case, make_model
from fabula.engine.runner import Runner
from fabula.formats.checkpoint import DType
from fabula.kv.prefix import Window
from fabula.models.opening import open_model
from hybrid_families import hybrid_settings

N = 150  # tokens of a text: several times each window
Logits = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


def text(seed: int, n: int) -> I32:
    return np.random.default_rng(seed).integers(3, 203, n).astype(np.int32)


def expected(model: Any, ids: I32) -> Logits:
    with torch.no_grad():
        logits = model(torch.tensor(ids[None].astype(np.int64)), use_cache=False).logits[0]
    return np.asarray(logits.float().numpy())


def assert_close(ours: Logits, theirs: Logits, bound: float = 1e-4) -> None:
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= bound, f"logits differ by {error:.2e} of the largest"


def load(folder: Any, **options: Any) -> Runner:
    checkpoint, _ = open_model(folder)
    try:
        settings: dict[str, Any] = {"weights": DType.F32, "kv": (DType.F32, DType.F32), "n_threads": 2}
        return Runner(checkpoint, **(settings | options))
    finally:
        checkpoint.close()


# Further settings of hybrids, whose recurrent form is a loop in transformers, and so slow.
FURTHER = {name for name in hybrid_settings({}, {}) if "-" in name}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.heavy if name in FURTHER else ()) for name in CASES]
)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Case, Any, Runner]]:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(case, folder)
    # longrope depends on the context's length; here it is fixed by the context a model is loaded for.
    runner = load(folder, context=N if "longrope" in str(case.settings) else None)
    yield case, model, runner
    runner.close()


def test_prefill_and_decode(made: tuple[Case, Any, Runner]) -> None:
    _, model, runner = made
    ids = text(1, N)
    theirs = expected(model, ids)
    (ours,) = runner.all_logits(ids)
    assert_close(ours, theirs)
    with runner.sequence() as sequence:
        assert (runner.prefill(sequence, ids[: N - 8]) == ours[N - 9]).all()
        for i in range(N - 8, N):
            (one,) = runner.step([(sequence, ids[i : i + 1])], [0])
            assert (one == ours[i]).all(), "a decoded token's logits must be those of the prefill, bit for bit"


def test_mixed_batch(made: tuple[Case, Any, Runner]) -> None:
    """A prompt, a decode and a chunk of three sequences in one step: the bits of each alone."""
    _, model, runner = made
    texts, past = [text(2 + n, n) for n in (40, 97, 120)], [0, 96, 70]
    sequences = [runner.sequence() for _ in texts]
    try:
        for sequence, ids, n in zip(sequences, texts, past, strict=True):
            if n:
                runner.prefill(sequence, ids[:n])
        parts = [(s, ids[n:]) for s, ids, n in zip(sequences, texts, past, strict=True)]
        logits = runner.step(parts, np.arange(40 + 1 + 50))
    finally:
        for sequence in sequences:
            sequence.close()
    start = 0
    for ids, n in zip(texts, past, strict=True):
        ours = logits[start : start + len(ids) - n]
        assert_close(ours, expected(model, ids)[n:])
        assert (ours == next(runner.all_logits(ids))[n:]).all()
        start += len(ids) - n
    assert runner.pool.n_free == runner.pool.n_pages


def test_rollback_and_fork(made: tuple[Case, Any, Runner]) -> None:
    """Going back and on again, and two branches of one text, give the bits of each text alone."""
    _, _, runner = made
    shared, one, other = text(3, 61), text(4, 20), text(5, 33)
    alone = {
        name: next(runner.all_logits(np.concatenate([shared, end])))[-1] for name, end in (("1", one), ("2", other))
    }
    with runner.sequence() as sequence:
        sequence.keep_states(len(shared))  # recurrent layers go back only to where their state was kept
        runner.prefill(sequence, np.concatenate([shared, one]))
        sequence.truncate(len(shared))
        assert (runner.prefill(sequence, other) == alone["2"]).all()
        sequence.truncate(len(shared))
        with sequence.fork() as branch:
            assert (runner.prefill(branch, one) == alone["1"]).all()
            assert (runner.prefill(sequence, other) == alone["2"]).all()
    assert runner.pool.n_free == runner.pool.n_pages


def test_slide(made: tuple[Case, Any, Runner]) -> None:
    """With a sliding window and sinks, decode gives the bits of prefill, and before the window ends the plain ones."""
    _, model, runner = made
    if runner.config.n_positions:
        pytest.skip("learned positions end with their table")
    ids = text(6, N)
    window = Window(48, 4)
    with runner.sequence(window) as sequence:
        chunked = np.concatenate(
            [runner.step([(sequence, ids[i : i + 31])], np.arange(len(ids[i : i + 31]))) for i in range(0, N, 31)]
        )
    assert_close(chunked[:48], expected(model, ids)[:48])
    with runner.sequence(window) as sequence:
        runner.prefill(sequence, ids[: N - 4])
        for i in range(N - 4, N):
            (one,) = runner.step([(sequence, ids[i : i + 1])], [0])
            assert (one == chunked[i]).all()
    assert np.isfinite(chunked).all()


def test_greedy_text(made: tuple[Case, Any, Runner]) -> None:
    """64 greedy tokens are those of transformers; at a tie within the bound either may come."""
    _, model, runner = made
    ids = text(7, 20)
    with runner.sequence() as sequence:
        logits = runner.prefill(sequence, ids)
        for _ in range(64):
            ids = np.append(ids, np.int32(logits.argmax()))
            (logits,) = runner.step([(sequence, ids[-1:])], [0])
    theirs = expected(model, ids)[19:-1]  # what each of the 64 follows
    gaps = theirs.max(axis=1) - theirs[np.arange(64), ids[20:]]
    assert (gaps <= 2e-4 * np.abs(theirs).max(axis=1)).all()
