"""`Model.generate` on a tiny random model: how it ends, what it samples, what it releases.

The reference is `Model.logits`, which has tests of its own against transformers.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from fabula.engine import scheduler as scheduler_module
from fabula.engine.generation import Generation, Piece
from fabula.engine.sampling import SamplingParams
from fabula.engine.scheduler import Load
from fabula.errors import ContextOverflow, InvalidArgument
from fabula.model import Model
from waiting import wait_until

PROMPT = "the winter was long"
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
EOS = 1


@pytest.fixture
def model(tiny_model: Model) -> Model:
    return tiny_model


def free(model: Model) -> bool:
    """Whether no request holds a page: what is used is only remembered."""
    usage = model.kv_usage
    return usage.n_used == usage.n_cached


def settled(model: Model) -> None:
    """Waits until the engine has released abandoned requests."""
    wait_until(lambda: model._engine.scheduler.load == Load(0, 0), "requests do not come to rest")


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"seed": 11, "max_tokens": 40, "ignore_eos": True} | changes))


def run(model: Model, settings: SamplingParams, prompt: Any = PROMPT) -> tuple[Generation, list[Piece]]:
    generation = model.generate(prompt, settings)
    return generation, list(generation)


def joined(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


# ---- Ends


@pytest.mark.parametrize("n", [1, 2, 7])
def test_max_tokens(n: int, model: Model) -> None:
    generation, pieces = run(model, params(max_tokens=n))
    assert generation.finish_reason == pieces[-1].finish_reason == "length"
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (n - 1)
    assert [piece.token_id for piece in pieces] == generation.token_ids
    assert len(pieces) == n
    assert list(generation) == []


def test_end_token(model: Model) -> None:
    generation, pieces = run(model, params(logit_bias={EOS: 6.0}, ignore_eos=False, max_tokens=300))
    assert generation.finish_reason == pieces[-1].finish_reason == "stop"
    assert generation.token_ids[-1] == EOS
    assert EOS not in generation.token_ids[:-1]
    assert joined(pieces) == model.tokenizer.decode(generation.token_ids[:-1])


def test_ignore_eos(model: Model) -> None:
    generation, pieces = run(model, params(logit_bias={EOS: 6.0}))
    assert EOS in generation.token_ids[:-1]
    assert len(pieces) == 40
    assert generation.finish_reason == "length"


def test_stop_tokens(model: Model) -> None:
    plain, _ = run(model, GREEDY)
    stop = plain.token_ids[9]
    generation, pieces = run(model, params(temperature=0, stop_tokens=(stop,)))
    assert generation.finish_reason == "stop"
    assert generation.token_ids == plain.token_ids[: plain.token_ids.index(stop) + 1]
    assert joined(pieces) == model.tokenizer.decode(generation.token_ids[:-1])
    with pytest.raises(InvalidArgument, match="outside the vocabulary"):
        model.generate(PROMPT, params(stop_tokens=(tiny.VOCAB,)))


@pytest.mark.parametrize("n", [1, 5, 39, 40])
def test_min_tokens_holds_end_tokens_back(n: int, model: Model) -> None:
    settings = params(logit_bias={EOS: 50.0}, ignore_eos=False, min_tokens=n, max_tokens=40)
    generation, _ = run(model, settings)
    assert EOS not in generation.token_ids[:n]
    assert generation.token_ids[n:] == ([EOS] if n < 40 else [])
    assert generation.finish_reason == ("stop" if n < 40 else "length")


def ascii_model_text(model: Model) -> tuple[list[int], list[str], dict[int, float]]:
    """A greedy text that is ASCII only: ids, their texts, and the bias that makes it so."""
    bans = {i: -np.inf for i in range(model.config.vocab_size) if not model.tokenizer.token_bytes(i).isascii()}
    generation, pieces = run(model, params(temperature=0, logit_bias=bans))
    return generation.token_ids, [piece.text for piece in pieces], bans


@pytest.mark.parametrize("first", range(3, 30, 4))
def test_stop_string_across_tokens(first: int, model: Model) -> None:
    ids, texts, bans = ascii_model_text(model)
    whole = "".join(texts)
    stop = texts[first][-1:] + "".join(texts[first + 1 : first + 3]) + texts[first + 3][:1]
    generation, pieces = run(model, params(temperature=0, logit_bias=bans, stop=("never\nthere", stop)))
    assert generation.finish_reason == pieces[-1].finish_reason == "stop"
    assert joined(pieces) == whole[: whole.index(stop)]
    assert generation.token_ids == ids[: len(generation.token_ids)]
    assert stop in "".join(texts[: len(pieces)])
    assert stop not in "".join(texts[: len(pieces) - 1])


def test_held_back_text_comes_out_at_the_end(model: Model) -> None:
    _, texts, bans = ascii_model_text(model)
    whole = "".join(texts)
    _, pieces = run(model, params(temperature=0, logit_bias=bans, stop=(whole[-3:] + "\nnever",)))
    assert joined(pieces) == whole


def test_context_full(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, threads=1, context=40) as small:
        for n_prompt in (1, 33, 39, 40):
            settings = params(max_tokens=None)
            generation, pieces = run(small, settings, [5] * n_prompt)
            assert generation.finish_reason == pieces[-1].finish_reason == "length"
            assert len(pieces) == max(1, 40 - n_prompt)
            assert free(small)


def test_prompt_longer_than_the_context(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, threads=1, context=32) as small:
        for call in (small.logits, small.generate):
            with pytest.raises(ContextOverflow, match=r"33.*32") as caught:
                call([5] * 33)
            assert (caught.value.n_tokens, caught.value.context) == (33, 32)
        assert free(small)


# ---- What is drawn


def test_banned_tokens_are_never_drawn(model: Model) -> None:
    generation, _ = run(model, params(max_tokens=200))
    often = tuple(sorted(set(generation.token_ids), key=generation.token_ids.count)[-20:])
    for settings in (params(max_tokens=200, banned_tokens=often), params(temperature=0, banned_tokens=often)):
        assert not set(run(model, settings)[0].token_ids) & set(often)


def test_greedy_is_what_logits_say(model: Model) -> None:
    generation, _ = run(model, GREEDY)
    again, _ = run(model, GREEDY)
    assert again.token_ids == generation.token_ids
    logits = model.logits(generation.prompt_ids + generation.token_ids)[len(generation.prompt_ids) - 1 : -1]
    assert logits.argmax(axis=1).tolist() == generation.token_ids


def test_long_prompts_go_in_chunks(model: Model) -> None:
    ids = np.random.default_rng(0).integers(4, tiny.VOCAB, 580).tolist()
    generation, _ = run(model, params(temperature=0, max_tokens=12), ids)
    logits = model.logits(ids + generation.token_ids)[579:-1]
    assert logits.argmax(axis=1).tolist() == generation.token_ids


def test_seeds(model: Model) -> None:
    first, _ = run(model, params(seed=5))
    again, _ = run(model, params(seed=5))
    other, _ = run(model, params(seed=6))
    assert first.token_ids == again.token_ids != other.token_ids
    assert first.seed == 5
    unseeded, _ = run(model, params(seed=None))
    reproduced, _ = run(model, params(seed=unseeded.seed))
    assert reproduced.token_ids == unseeded.token_ids


@pytest.mark.parametrize("n", [0, 1, 5, 20])
def test_logprobs(n: int, model: Model) -> None:
    generation, pieces = run(model, params(n_logprobs=n, temperature=0.8, top_k=30))
    logits = model.logits(generation.prompt_ids + generation.token_ids).astype(np.float64)
    for i, piece in enumerate(pieces):
        row = logits[len(generation.prompt_ids) - 1 + i]
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert piece.logprob == pytest.approx(expected[piece.token_id], abs=1e-4)
        best = np.argsort(-expected, kind="stable")[:n]
        assert [token for token, _ in piece.top_logprobs] == best.tolist()
        assert [value for _, value in piece.top_logprobs] == pytest.approx(expected[best].tolist(), abs=1e-4)


def test_pieces_join_to_the_decoded_ids(model: Model) -> None:
    for seed in range(20):  # bytes in any order: most of them are no UTF-8
        generation, pieces = run(model, params(seed=seed, temperature=2.0))
        assert joined(pieces) == model.tokenizer.decode(generation.token_ids)


def test_characters_of_several_tokens(model: Model) -> None:
    ids = [model.tokenizer.id_of(piece) for piece in ("ð", "Ł", "ĺ", "Ģ")]
    others = {i: -np.inf for i in range(tiny.VOCAB) if i not in ids}
    generation, pieces = run(model, params(logit_bias=others, max_tokens=200))
    assert joined(pieces) == model.tokenizer.decode(generation.token_ids)
    assert any(len(character.encode()) == 4 for character in joined(pieces))


def test_ids_that_only_pad_the_vocabulary(tmp_path: Path) -> None:
    """A model may have more ids than its tokenizer; such a token has no text and no KeyError."""
    config = dict(tiny.CONFIG) | {"vocab_size": tiny.VOCAB + 10}
    tiny.write_model(tmp_path / "padded", config=config, tensors=tiny.random_tensors(config))
    with Model.load(tmp_path / "padded", threads=1) as padded:
        bias = {tiny.VOCAB + 3: 5.0, 5: 5.0}
        generation, pieces = run(padded, params(logit_bias=bias))
        assert tiny.VOCAB + 3 in generation.token_ids
        known = [i for i in generation.token_ids if i < tiny.VOCAB]
        assert joined(pieces) == padded.tokenizer.decode(known)


# ---- Pages


@pytest.mark.parametrize("n", [0, 1, 3])
def test_cancel_gives_pages_back(n: int, model: Model) -> None:
    generation = model.generate(PROMPT, params())
    for _ in range(n):
        next(generation)
    assert n == 0 or not free(model)
    generation.cancel()
    generation.cancel()
    assert free(model)
    assert generation.finish_reason == "cancelled"
    assert len(generation.token_ids) == n
    assert list(generation) == []


def test_leaving_a_with_block(model: Model) -> None:
    with model.generate(PROMPT, params()) as generation:
        next(generation)
        assert not free(model)
    assert free(model)
    assert generation.finish_reason == "cancelled"
    with model.generate(PROMPT, params(max_tokens=2)) as generation:
        generation.text()
    assert generation.finish_reason == "length"


def test_abandoned_generation(model: Model) -> None:
    generation = model.generate(PROMPT, params())
    next(generation)
    assert not free(model)
    del generation
    gc.collect()
    settled(model)
    assert free(model)


@pytest.mark.parametrize("n_good", [0, 3])
def test_an_exception_inside_a_step_cancels(n_good: int, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "MAX_STEPS", 1)
    run_step, n_steps = model._runner.run, 0

    def run_some(*arguments: Any) -> Any:
        nonlocal n_steps
        n_steps += 1
        if n_steps > n_good:
            raise RuntimeError("a step failed")
        return run_step(*arguments)

    monkeypatch.setattr(model._runner, "run", run_some)
    generation = model.generate(PROMPT, params())
    assert len([next(generation) for _ in range(n_good)]) == n_good
    with pytest.raises(RuntimeError, match="a step failed"):
        next(generation)
    assert generation.finish_reason == "cancelled"
    assert free(model)
    assert list(generation) == []


def test_banning_everything_fails_and_cancels(model: Model) -> None:
    generation = model.generate(PROMPT, params(banned_tokens=tuple(range(tiny.VOCAB))))
    with pytest.raises(InvalidArgument, match="banned"):
        next(generation)
    assert generation.finish_reason == "cancelled"


def test_more_than_fit_at_once(tiny_folder: Path) -> None:
    """The pool has pages for four texts of full length; with more, some are evicted and recomputed."""
    alone = []
    for _ in range(2):
        with Model.load(tiny_folder, threads=1, context=96) as small:
            n = 9 if alone else 1
            running = [small.generate([5, 6], params(max_tokens=94)) for _ in range(n)]
            for generation in running:
                next(generation)
            texts = [generation.text() for generation in running]
            assert free(small)
            alone = alone or texts
            assert set(texts) == set(alone)
            if n > 1:
                assert any(generation._request.n_preempted for generation in running)


def test_interleaved_generations(model: Model) -> None:
    wanted = [(PROMPT, params(seed=1)), ("in the sand", params(seed=2)), ("a", GREEDY)]
    alone = [run(model, settings, prompt)[0].token_ids for prompt, settings in wanted]
    running = [model.generate(prompt, settings) for prompt, settings in wanted]
    for _ in range(40):
        for generation in running:
            next(generation)
    assert [generation.token_ids for generation in running] == alone


def test_closed_model(tiny_folder: Path) -> None:
    model = Model.load(tiny_folder, threads=1)
    generation = model.generate([5, 6], GREEDY)
    next(generation)
    model.close()
    model.close()
    for call in (generation.text, lambda: model.logits([5, 6])):
        with pytest.raises(InvalidArgument, match="closed"):
            call()


# ---- Times


def test_timings(model: Model) -> None:
    generation = model.generate(PROMPT, params(max_tokens=5))
    before = generation.timings
    assert (before.prompt_tokens, before.generated_tokens) == (len(generation.prompt_ids), 0)
    assert (before.prompt_ms, before.first_token_ms, before.total_ms, before.tokens_per_s) == (0, 0, 0, 0)
    next(generation)
    assert generation.timings.tokens_per_s == 0
    generation.text()
    after = generation.timings
    assert after.generated_tokens == 5
    assert 0 <= after.prompt_ms <= after.first_token_ms <= after.total_ms
    assert after.tokens_per_s >= 0
    assert after.prompt_tokens_per_s >= 0
