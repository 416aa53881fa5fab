"""The limit of thoughts: a budget is never exceeded, whoever samples, and what it closes goes on as an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fabula import Constraint, Model, SamplingParams
from fabula.engine.thinking import Thinking, Thought
from fabula.errors import InvalidArgument
from fabula.sessions.persistence import params_json, params_of
from fabula.text.reasoning import FORMS, split_reasoning
from tool_templates import tokenizer_of

CLOSE = "</think>"  # several tokens of the tiny vocabulary


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    with Model.load(tiny_folder, threads=1) as model:
        yield model


def answered(model: Model, thinking: Thinking, **settings: Any) -> tuple[str, str, int]:
    """Thought, answer and tokens of thought of an answer of 60 tokens."""
    params = SamplingParams(**{"thinking": thinking, "max_tokens": 60, "seed": 3, "ignore_eos": True} | settings)
    generation = model.generate("the cat", params)
    text = generation.text()
    thought = Thought(thinking, model.tokenizer)
    decoder = model.tokenizer.stream_decoder(continues=True)
    for token in generation.token_ids:
        thought.take(token, decoder.push(token))
    return *split_reasoning(text, FORMS[thinking.form], is_open=thinking.is_open), thought.n_used


@pytest.mark.parametrize("n_logprobs", [0, 1], ids=["native", "python"])
@pytest.mark.parametrize("budget", [0, 1, 7, 33])
def test_a_budget_holds(model: Model, budget: int, n_logprobs: int) -> None:
    thinking = Thinking("think", is_open=True, budget=budget)
    thought, answer, _ = answered(model, thinking, n_logprobs=n_logprobs)
    whole, nothing, n_whole = answered(model, Thinking("think", is_open=True), n_logprobs=n_logprobs)
    assert nothing == "" and n_whole == 60, "a random model does not close a thought by itself"
    assert answer and len(answer) >= 60 - budget - len(CLOSE)
    assert whole.startswith(thought.rstrip("\N{REPLACEMENT CHARACTER}")), "up to the budget nothing differs"


def test_tokens_are_counted(model: Model) -> None:
    generation = model.generate(
        "the cat",
        SamplingParams(thinking=Thinking("think", is_open=True, budget=7), max_tokens=40, seed=3, ignore_eos=True),
    )
    generation.text()
    closing = FORMS["think"].closing_ids(model.tokenizer)
    assert tuple(generation.token_ids[7 : 7 + len(closing)]) == closing
    free = model.generate("the cat", SamplingParams(max_tokens=7, seed=3, ignore_eos=True))
    free.text()
    assert generation.token_ids[:7] == free.token_ids


def test_a_thought_that_the_model_opens(model: Model) -> None:
    open_ids = model.tokenizer.encode("<think>", add_bos=False)
    bias = {"logit_bias": {open_ids[0]: 100.0}}
    thought, answer, _ = answered(model, Thinking("think", budget=5), **bias)
    assert thought == "" and answer == "<" * 60, "one mark alone opens nothing"


def test_state_is_a_function_of_the_ids() -> None:
    tokenizer = tokenizer_of(has_marks=False, more=("<think>", CLOSE))
    opens, closes = (tokenizer.special_tokens[mark] for mark in ("<think>", CLOSE))
    letter = tokenizer.encode("x", add_bos=False)[0]
    thought = Thought(Thinking("think", budget=2), tokenizer)
    assert thought.shown == (opens, closes) and thought.n_free == 3 and not thought.is_thinking
    thought.take(opens, "<think>")
    assert thought.is_thinking and thought.n_free == 2 and thought.forced is None
    thought.take(letter, "x")
    thought.take(letter, "x")
    assert thought.forced == closes and thought.n_free == 0
    thought.take(letter, "x")
    assert thought.forced == closes, "as after `begun` ids that were sampled under other settings"
    thought.take(closes, CLOSE)
    assert thought.forced is None and thought.n_free is None and not thought.is_thinking
    thought = Thought(Thinking("think", budget=2), tokenizer)
    thought.take(letter, "x")
    assert thought.n_free is None, "an answer without a thought"
    assert Thought(Thinking("think", is_open=True, budget=0), tokenizer).forced == closes


def test_channels_close_with_the_start_of_the_answer() -> None:
    tokenizer = tokenizer_of(has_marks=True)
    thought = Thought(Thinking("harmony", budget=1), tokenizer)
    text = "<|channel|>analysis<|message|>x"
    for token in tokenizer.encode(text, add_bos=False, special=True):
        thought.take(token, tokenizer.decode([token], skip_special=False))
    forced = []
    while (token := thought.forced) is not None:
        forced.append(token)
        thought.take(token, tokenizer.decode([token], skip_special=False))
    assert tokenizer.decode(forced, skip_special=False) == FORMS["harmony"].closing
    assert thought.n_used == 1 and thought.n_free is None


def test_stop_strings_do_not_end_a_thought(model: Model) -> None:
    free, _, _ = answered(model, Thinking("think", is_open=True))
    letter = free.strip()[3]
    thought, answer, _ = answered(model, Thinking("think", is_open=True, budget=20), stop=(letter,))
    assert letter in thought and letter not in answer


@pytest.mark.parametrize("constraint", [Constraint.regex("[0-9]{4}"), Constraint.json_schema({"const": "Rome"})])
def test_a_constraint_begins_after_an_open_thought(model: Model, constraint: Constraint) -> None:
    thought, answer, n = answered(
        model, Thinking("think", is_open=True, budget=9), constraint=constraint, ignore_eos=False
    )
    assert n == 9 and thought and (answer.isdigit() or json.loads(answer) == "Rome")
    thought, answer, _ = answered(model, Thinking("think", budget=9), constraint=constraint)
    assert thought == "" and (answer.isdigit() or json.loads(answer) == "Rome"), "nothing is open, it applies at once"


def test_a_constraint_that_forbids_the_mark_wins(model: Model) -> None:
    constraint = Constraint("tools", 'start: "<think>" /[a-z]{12}/')
    text = model.generate(
        "a", SamplingParams(thinking=Thinking("think", budget=3), constraint=constraint, seed=1, max_tokens=60)
    ).text()
    assert text.startswith("<think>") and text[7:].isalpha() and len(text) == 19


def test_a_continued_answer_is_the_same(model: Model) -> None:
    from fabula.engine.generation import Generation

    params = SamplingParams(
        thinking=Thinking("think", is_open=True, budget=6), max_tokens=40, seed=5, ignore_eos=True,
        constraint=Constraint.regex("[a-z]{9}"),
    )  # fmt: skip
    prompt = model.tokenizer.encode("the cat")
    whole = Generation(model._engine, prompt, params, continues=True)
    text = whole.text()
    for n in (3, 6, 9, 14, 17):
        rest = Generation(model._engine, prompt, params, continues=True, begun=whole.token_ids[:n])
        assert rest.begun_text + rest.text() == text, n


def test_settings_are_checked_and_stored() -> None:
    for wrong in ({"form": "x"}, {"form": "think", "budget": -1}, {"form": "think", "budget": True}):
        with pytest.raises(InvalidArgument, match="thinking"):
            Thinking(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="thinking is_open"):
        Thinking("think", is_open=1)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="thinking is"):
        SamplingParams(thinking="think")  # type: ignore[arg-type]
    params = SamplingParams(thinking=Thinking("think", True, 5), seed=1)
    assert params_of(json.loads(json.dumps(params_json(params)))) == params
