"""Several decode steps in one native call give the tokens, log-probabilities and pages of single steps."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from fabula import DamagedWeightWarning, InvalidArgument, Model, NonFinite, SamplingParams, _native
from fabula.engine import request as request_module
from fabula.engine import scheduler as scheduler_module
from fabula.engine.decoding import Decoding
from fabula.engine.runner import Runner
from fabula.kv.pages import Sequence
from fabula.kv.prefix import EVERYTHING, Window

N_STEPS = 12
SETTINGS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=1.2, seed=2, top_k=7, repetition_penalty=1.3, logit_bias={5: 2.0}, banned_tokens=(9,)),
    SamplingParams(temperature=0.9, seed=3, dry_multiplier=0.8, dry_breakers=("a",), xtc_probability=0.5),
]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    with Model.load(tiny_folder, threads=2) as loaded:
        yield loaded


def decoding(model: Model, ids: list[int], params: SamplingParams, room: int = N_STEPS) -> Decoding:
    return Decoding(model.tokenizer, model.config.vocab_size, np.array(ids, np.int32), params, room=room)


def one_by_one(runner: Runner, sequence: Sequence, answer: Decoding) -> list[tuple[int, float]]:
    pieces = []
    while not pieces or not pieces[-1].finish_reason:
        pieces.append(answer.accept(runner.step([(sequence, answer.history.ids[-1:])], [0])[0]))
    return [(piece.token_id, piece.logprob) for piece in pieces]


@pytest.mark.parametrize("window", [EVERYTHING, Window(16, 2)])
def test_native_steps_give_the_tokens_of_single_steps(model: Model, window: Window) -> None:
    runner = model._runner
    texts = [[3 + i, 7, 11, *range(20, 20 + 9 * i)] for i in range(len(SETTINGS))]
    wanted = []
    for ids, params in zip(texts, SETTINGS, strict=True):
        with runner.sequence(window) as sequence:
            runner.prefill(sequence, np.array(ids[:-1], np.int32))
            wanted.append(one_by_one(runner, sequence, decoding(model, ids, params)))
    sequences = [runner.sequence(window) for _ in texts]
    inputs = []
    for sequence, ids, params in zip(sequences, texts, SETTINGS, strict=True):
        runner.prefill(sequence, np.array(ids[:-1], np.int32))
        answer = decoding(model, ids, params)
        part = runner.prepare(sequence, answer.history.ids[-1:].copy(), N_STEPS - 1)
        inputs.append((sequence, answer.decode_sequence(part.share, N_STEPS)))
    sampled, seconds = runner.decode(inputs, N_STEPS, _native.Flag())
    for (tokens, logprobs), expected in zip(sampled, wanted, strict=True):
        assert list(zip(tokens.tolist(), logprobs.tolist(), strict=True)) == expected
    assert len(seconds) == max(len(expected) for expected in wanted) and (np.diff(seconds) > 0).all()
    for sequence, ids, expected in zip(sequences, texts, wanted, strict=True):
        assert sequence.n_tokens == len(ids) - 1 + len(expected)
        sequence.close()


def test_prefill_runs_with_decode_steps(model: Model) -> None:
    """A call's first step may compute many tokens of a sequence; with n_steps 0 it samples none."""
    runner, ids = model._runner, [3, 7, 11, *range(20, 60)]
    wanted = []
    for params in SETTINGS:
        with runner.sequence() as sequence:
            answer = decoding(model, ids, params)
            runner.prefill(sequence, np.array(ids[:-1], np.int32))
            wanted.append(one_by_one(runner, sequence, answer))
    sequences = [runner.sequence() for _ in (*SETTINGS, None)]
    inputs = []
    for i, (sequence, params) in enumerate(zip(sequences, [*SETTINGS, SETTINGS[0]], strict=True)):
        tokens, n_steps = np.array(ids[9 * i :], np.int32), N_STEPS if i < len(SETTINGS) else 0
        if i:
            runner.prefill(sequence, np.array(ids[: 9 * i], np.int32))
        part = runner.prepare(sequence, tokens, max(n_steps - 1, 0))
        inputs.append((sequence, decoding(model, ids, params).decode_sequence(part.share, n_steps)))
    sampled, seconds = runner.decode(inputs, N_STEPS, _native.Flag())
    for (tokens, logprobs), expected in zip(sampled, wanted, strict=False):
        assert list(zip(tokens.tolist(), logprobs.tolist(), strict=True)) == expected
    assert len(sampled[-1][0]) == 0 and sequences[-1].n_tokens == len(ids)
    assert len(seconds) == max(len(expected) for expected in wanted)
    for sequence, expected in zip(sequences, wanted, strict=False):
        assert sequence.n_tokens == len(ids) - 1 + len(expected)
    for sequence in sequences:
        sequence.close()


def test_a_flag_ends_the_call_after_a_step(model: Model) -> None:
    runner, flag = model._runner, _native.Flag()
    for is_set in (True, False):
        flag.set() if is_set else flag.clear()
        with runner.sequence() as sequence:
            answer = decoding(model, [5], SamplingParams(temperature=0.0, ignore_eos=True))
            part = runner.prepare(sequence, np.array([5], np.int32), N_STEPS - 1)
            sampled, seconds = runner.decode([(sequence, answer.decode_sequence(part.share, N_STEPS))], N_STEPS, flag)
            assert len(sampled[0][0]) == len(seconds) == (1 if is_set else N_STEPS)


def test_bad_arguments(model: Model) -> None:
    runner = model._runner
    with runner.sequence() as sequence:
        answer = decoding(model, [5], SamplingParams(temperature=0.0))
        part = runner.prepare(sequence, np.array([5], np.int32))
        given = answer.decode_sequence(part.share, 4)
        far = replace(given, share=replace(part.share, n_past=_native.PAGE_POSITIONS - 2))
        for bad, words in (
            (far, "pages"),
            (replace(given, n_steps=-1), "n_steps"),
            (replace(given, n_history=0), "n_history"),
        ):
            with pytest.raises(InvalidArgument, match=words):
                runner.decode([(sequence, bad)], 4, _native.Flag())
        with pytest.raises(InvalidArgument, match="n_requests"):
            runner.decode([], 4, _native.Flag())
        assert sequence.n_tokens == 0


def answers(model: Model, seed: int) -> list[tuple[list[Any], str | None, str]]:
    """Requests of many kinds at once: pieces and end of each, and the text of a request that follows it."""
    rng = random.Random(seed)
    begun = []
    for _ in range(6):
        prompt = [rng.randrange(3, tiny.VOCAB) for _ in range(rng.randrange(1, 60))]
        params = replace(rng.choice(SETTINGS), max_tokens=rng.randrange(1, 40), min_tokens=rng.choice([0, 0, 5]))
        params = replace(params, stop=rng.choice([(), ("e",), ("th", "a ")]), ignore_eos=rng.random() < 0.5)
        begun.append(model.generate(prompt, params))
    found = []
    for generation in begun:
        pieces = list(generation)
        after = model.generate(
            [*generation.prompt_ids, *generation.token_ids], SamplingParams(temperature=0.0, max_tokens=5)
        )
        found.append((pieces, generation.finish_reason, after.text()))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_answers_do_not_depend_on_the_steps_of_a_call(model: Model, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(scheduler_module, "EMIT_S", 10.0)
    results = []
    for most in (1, 3, 32):
        monkeypatch.setattr(scheduler_module, "MAX_STEPS", most)
        model.clear_cache()
        results.append(answers(model, seed))
    assert results[0] == results[1] == results[2]


def test_calls_run_many_steps_within_the_read_ahead(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "EMIT_S", 10.0)
    counts: list[int] = []
    decode = model._runner.decode

    def watched(inputs: Any, n_steps: int, stop: Any) -> Any:
        result = decode(inputs, n_steps, stop)
        counts.append(len(result[1]))
        return result

    monkeypatch.setattr(model._runner, "decode", watched)
    with model.generate([5], SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=100)) as generation:
        assert len(list(generation)) == 100
    assert sum(counts) >= 90 and max(counts) > 4
    assert max(counts) <= request_module.READ_AHEAD


def test_bans_hold_and_a_step_without_any_token_has_its_usual_error(model: Model) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    everything = tuple(range(tiny.VOCAB))
    with model.generate([5], replace(params, banned_tokens=everything[:-1])) as generation:
        assert [piece.token_id for piece in generation] == [tiny.VOCAB - 1] * 20
    with (
        model.generate([5], replace(params, banned_tokens=everything)) as generation,
        pytest.raises(InvalidArgument, match="banned"),
    ):
        next(generation)


def test_logits_that_break_in_the_middle(model: Model, tmp_path: Path) -> None:
    """The embedding of a sampled token is damaged: the tokens up to it stay, then the error comes."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=12)
    with model.generate([5], params) as generation:
        expected = [piece.token_id for piece in generation]
    n_good = next(i for i in range(4, 12) if expected[i] not in [5, *expected[:i]])
    tensors = tiny.random_tensors()
    tensors["model.embed_tokens.weight"][expected[n_good]] = np.nan
    tiny.write_model(tmp_path, tensors=tensors)
    with pytest.warns(DamagedWeightWarning):
        damaged = Model.load(tmp_path, threads=2)
    with damaged, damaged.generate([5], params) as generation:
        found = [next(generation).token_id for _ in range(n_good + 1)]
        assert found == expected[: n_good + 1]
        with pytest.raises(NonFinite):
            next(generation)


def test_texts_continue_in_the_page_where_the_last_answer_ended(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions reserved for tokens that were not sampled do not count as written: nothing is copied."""
    monkeypatch.setattr(scheduler_module, "EMIT_S", 10.0)
    copies: list[tuple[int, int]] = []
    copy = model._runner.pool.native.copy
    monkeypatch.setattr(model._runner.pool.native, "copy", lambda *pages: copies.append(pages) or copy(*pages))
    model.clear_cache()
    session = model.session()
    params = SamplingParams(temperature=1.0, ignore_eos=True, banned_tokens=(0, 1, 2, 3))
    for i in range(10):
        session.tell(7, prompt="the cat" if i == 0 else "", params=replace(params, seed=i)).text()
    assert session.head.n_ids > 2 * _native.PAGE_POSITIONS and not copies
    session.rollback(3)
    session.tell(7, prompt="", params=replace(params, seed=99)).text()
    assert len(copies) == 1  # of the page that another branch continues
    session.delete()
