"""Reasoning in text: marks of every form, wherever a stream breaks."""

from __future__ import annotations

import pytest

from fabula.text.reasoning import FORMS, Part, ReasoningParser, form_of, split_reasoning
from tool_templates import tokenizer_of

THINK = FORMS["think"]
TAGGED = [form for form in FORMS.values() if not form.is_harmony]
HARMONY = (
    "<|channel|>analysis<|message|>Rome? {}<|end|><|start|>assistant<|channel|>analysis<|message|>Sure.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>It is Rome."
)


def joined(parts: list[Part]) -> tuple[str, str]:
    return (
        "".join(text for kind, text in parts if kind == "reasoning"),
        "".join(text for kind, text in parts if kind == "text"),
    )


def at_every_break(text: str, name: str, *, is_open: bool = False, is_raw: bool = False) -> tuple[str, str]:
    """Thought and answer of a text, the same wherever it breaks once, and in single characters."""
    found = set()
    for pieces in [[text], list(text), *([text[:i], text[i:]] for i in range(len(text)))]:
        parser = ReasoningParser(FORMS[name], is_open=is_open, is_raw=is_raw)
        found.add(joined([part for piece in pieces for part in parser.feed(piece)] + parser.finish()))
    assert len(found) == 1, found
    return found.pop()


@pytest.mark.parametrize("form", TAGGED, ids=lambda form: form.name)
def test_a_thought_is_separated(form) -> None:  # type: ignore[no-untyped-def]
    name, start, end = form.name, form.start, form.end
    assert at_every_break(f"\n{start}\nTwo  and\n two.\n{end}\n\nFour. ", name) == ("Two  and\n two.", "Four. ")
    assert at_every_break(f"Two.{end}Four.", name, is_open=True) == ("Two.", "Four.")
    assert at_every_break(f"{start}Two.{end}Four.", name, is_open=True) == ("Two.", "Four."), "marked once more"
    assert at_every_break(f"{start}\n\n{end}\n\nFour.", name) == ("", "Four."), "nothing thought"
    assert at_every_break(f"{start}Two, {end[:-1]}", name) == (f"Two, {end[:-1]}", ""), "cut off"
    alone = "" if end in form.ends else end
    assert at_every_break(f"{start}{end}{end}", name) == ("", alone), "the mark alone is text"


# What a model of the form writes after a thought, as its template renders it, and without one.
ANSWERS = {
    "solar": ("<|begin|>assistant<|content|>Rome.<|end|>", "<|content|>Rome.<|end|>"),
    "kimi-k3": (
        "<|open|>response<|sep|>Rome.<|close|>response<|sep|><|close|>message<|sep|>",
        "Rome.<|close|>response<|sep|><|close|>message<|sep|>",  # the prompt has the first mark
    ),
    "apriel": ("\nRome.\n[END FINAL RESPONSE]", "Rome."),
    "granite": ("<response>\nRome.\n</response>", "<response>Rome.</response>"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_marks_around_the_answer_are_removed(name: str) -> None:
    form, (after, alone) = FORMS[name], ANSWERS[name]
    assert at_every_break(f"{form.start}Two.{form.end}{after}", name) == ("Two.", "Rome.")
    assert at_every_break(f"Two.{form.end}{after}", name, is_open=True) == ("Two.", "Rome.")
    assert at_every_break(alone, name) == ("", "Rome.")


def test_marks_that_are_text_stay_without_a_thought() -> None:
    for text in ("<b></response>", "a </response>", " <respond>", "[END FINAL RESPONSE]", " \n"):
        assert at_every_break(text, "granite") == at_every_break(text, "apriel") == ("", text)


def test_calls_after_a_thought_keep_their_marks() -> None:
    text = "<|think|>A call.<|end|><|begin|>assistant<|tool_calls|><|tool_call:begin|>"
    assert at_every_break(text, "solar") == ("A call.", "<|tool_calls|><|tool_call:begin|>")


@pytest.mark.parametrize("text", ["", "  ", "\n Hi", "<thin", "<thing> is", "So <think>no</think> yes"])
def test_a_text_without_a_thought_stays(text: str) -> None:
    assert at_every_break(text, "think") == ("", text)
    assert joined([*(parser := ReasoningParser(None)).feed(text), *parser.finish()]) == ("", text)


@pytest.mark.parametrize("text", ["", "  ", "Two.", "Two.\n</thin"])
def test_an_open_thought_that_never_ends(text: str) -> None:
    assert at_every_break(text, "think", is_open=True) == (text.strip(), "")


def test_channels() -> None:
    assert at_every_break(HARMONY.format("Or <b>?"), "harmony") == ("Rome? Or <b>?\n\nSure.", "It is Rome.")
    assert at_every_break("It is Rome.", "harmony") == ("", "It is Rome.")
    assert at_every_break("<|channel|>analysis<|message|>Rome? ", "harmony") == ("Rome?", "")
    preamble = "<|channel|>commentary<|message|>I look it up.<|end|><|start|>assistant<|channel|>final<|message|>Rome."
    assert at_every_break(preamble, "harmony") == ("", "I look it up.Rome.")


def test_calls_keep_their_marks() -> None:
    call = "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}"
    text = "<|channel|>analysis<|message|>A call.<|end|>" + call
    assert at_every_break(text, "harmony", is_raw=True) == ("A call.", call)


def test_a_stream_holds_back_only_what_is_open() -> None:
    parser = ReasoningParser(THINK)
    assert parser.may_think and not parser.is_thinking
    assert parser.feed("<think>One <") == [("reasoning", "One")] and parser.is_thinking
    assert parser.feed("b> two") == [("reasoning", " <b> two")]
    assert parser.feed("</think>\n") == [] and not parser.may_think
    assert parser.feed("Three\n") == [("text", "Three\n")] and parser.finish() == []
    parser = ReasoningParser(THINK, is_open=True)
    assert parser.is_thinking and parser.feed("Hm") == [("reasoning", "Hm")]
    parser = ReasoningParser(FORMS["harmony"])
    assert parser.may_think and not parser.is_thinking
    parser.feed("<|channel|>analysis<|message|>x")
    assert parser.is_thinking
    parser.feed("<|end|><|start|>assistant<|channel|>final<|message|>y")
    assert not parser.may_think


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ m.content.split('</think>')[-1] }}", "think"),
        ("{% if x %}<seed:think>{{ m.t }}</seed:think>{% endif %}", "seed"),
        ("[THINK]{{ m.t }}[/THINK]", "mistral"),
        ("<|START_THINKING|>{{ m.t }}<|END_THINKING|>", "command"),
        ("<|channel>thought\n{{ m.t }}<channel|>", "gemma"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "harmony"),
        ("{{- '<|begin|>assistant<|think|>' + m.reasoning + '<|end|>' }}", "solar"),
        ("{%- macro open_tag(tag) %}{{- '<|open|>' + tag }}{% endmacro %}{{ open_tag('think') }}", "kimi-k3"),
        ("{%- set s = ':opensource' %}{%- set begin = '<think{}>'.format(s) %}", "hy3"),
        ("in the following format: [BEGIN FINAL RESPONSE] ... [END FINAL RESPONSE].", "apriel"),
        ("thoughts between <think></think> and your response between <response></response>", "granite"),
        ("<|im_start|>{{ m.content }}<|im_end|>", None),
    ],
)
def test_marks_are_found_in_the_template(template: str, name: str | None) -> None:
    found = form_of(["", template], tokenizer_of(has_marks=False))
    assert (found.name if found else None) == name


def test_marks_are_found_in_the_vocabulary() -> None:
    tokenizer = tokenizer_of(has_marks=False, more=("<think>", "</think>"))
    found = form_of(["<|im_start|>"], tokenizer)
    assert found is THINK and found.shown(tokenizer) == (
        tokenizer.special_tokens["<think>"],
        tokenizer.special_tokens["</think>"],
    )
    assert found.closing_ids(tokenizer) == (tokenizer.special_tokens["</think>"],)
    plain = tokenizer_of(has_marks=False)
    assert THINK.shown(plain) == () and len(THINK.closing_ids(plain)) == len("</think>")


def test_whether_a_prompt_leaves_a_thought_open() -> None:
    assert THINK.is_open("<|im_start|>assistant\n<think>\n") and not THINK.is_open("assistant\n<think>\n\n</think>\n\n")
    assert not THINK.is_open("user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n")
    assert THINK.is_open_in("<think>\nTwo and") and not THINK.is_open_in("<think>Two</think> So")
    assert not FORMS["harmony"].is_open("<|channel|>analysis<|message|>")


def test_a_whole_text() -> None:
    assert split_reasoning("<think>Two</think>Four", THINK) == ("Two", "Four")
    assert split_reasoning("Two</think>Four", THINK, is_open=True) == ("Two", "Four")
    assert split_reasoning("<think>Two</think>Four", None) == ("", "<think>Two</think>Four")
