"""Embeddings: against transformers, in any batch, with answers at the same time; nothing is left in the pool."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fabula import ContextOverflow, InvalidArgument, Model, SamplingParams
from fabula.engine.embedding import STEP_TOKENS, Embedder
from fabula.errors import EngineError
from test_families import CASES, load, make_checkpoint


# longrope turns by how long the text is in transformers, by the context it was loaded for here.
@pytest.mark.parametrize("case", [case for case in CASES if "longrope" not in case])
def test_against_transformers(case: str, tmp_path: Path) -> None:
    import torch

    theirs = make_checkpoint(tmp_path, *CASES[case])
    runner = load(tmp_path)
    try:
        rng = np.random.default_rng(3)
        texts = [rng.integers(0, runner.config.vocab_size, n).tolist() for n in (1, 7, 40, 3)]
        found = Embedder(runner).embed(texts, normalize=False)
        last = Embedder(runner).embed(texts, pooling="last")
        for i, ids in enumerate(texts):
            with torch.no_grad():
                states = theirs.model(torch.tensor([ids])).last_hidden_state[0].numpy()
            scale = np.abs(states).max()
            assert np.abs(found.vectors[i] - states.mean(axis=0)).max() < 1e-4 * scale
            unit = states[-1] / np.linalg.norm(states[-1])
            assert np.abs(last.vectors[i] - unit).max() < 1e-4
    finally:
        runner.close()


def test_alone_and_in_a_batch_are_the_same_bits(tiny_model: Model) -> None:
    texts = ["the whale", "a", "on and on " * 50, "the", "in the end " * 3]
    assert tiny_model.embed(texts).n_tokens[2] > STEP_TOKENS  # one that takes several steps
    for pooling in ("mean", "last", "first"):
        together = tiny_model.embed(texts, pooling=pooling)
        for i, text in enumerate(texts):
            alone = tiny_model.embed([text], pooling=pooling)
            assert (alone.vectors[0] == together.vectors[i]).all()
            assert alone.n_tokens == (together.n_tokens[i],)
    assert np.allclose(np.linalg.norm(together.vectors, axis=1), 1)


def test_pages_come_back(tiny_model: Model) -> None:
    before = tiny_model.kv_usage
    tiny_model.embed(["the whale " * 20] * 5)
    with pytest.raises(EngineError, match="stopped"):
        tiny_model.embed(["the whale " * 60], should_stop=iter([False, True]).__next__)
    with pytest.raises(ContextOverflow, match=r"texts\[1\]"):
        tiny_model.embed(["a", "the whale " * 400])
    assert tiny_model.kv_usage == before


@pytest.mark.parametrize("texts", [[], "text", ["a", ""], ["a", 3]])
def test_bad_texts(tiny_model: Model, texts: Any) -> None:
    with pytest.raises(InvalidArgument, match="texts"):
        tiny_model.embed(texts)


def test_bad_pooling(tiny_model: Model) -> None:
    with pytest.raises(InvalidArgument, match="pooling is 'max'"):
        tiny_model.embed(["a"], pooling="max")  # type: ignore[arg-type]


def test_answers_beside_it_are_unchanged(tiny_model: Model) -> None:
    params = SamplingParams(max_tokens=120, seed=5, ignore_eos=True)
    alone = list(tiny_model.generate("the whale", params))
    stop = threading.Event()

    def embed() -> None:
        while not stop.is_set():
            tiny_model.embed(["in the end " * 20, "a whale"])

    thread = threading.Thread(target=embed)
    thread.start()
    try:
        beside = list(tiny_model.generate("the whale", params))
    finally:
        stop.set()
        thread.join()
    assert [piece.token_id for piece in beside] == [piece.token_id for piece in alone]


def test_similar_texts_are_nearer(smollm2_gguf: Path) -> None:
    with Model.load(smollm2_gguf) as model:
        found = model.embed(
            ["A cat sat on the mat.", "A kitten lay on the rug.", "Interest rates rose by a quarter point."]
        )
    near, far = found.vectors[0] @ found.vectors[1], found.vectors[0] @ found.vectors[2]
    assert near > far
