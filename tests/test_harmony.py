"""Answers in the harmony format as gpt-oss writes them, cut anywhere."""

from __future__ import annotations

import pytest

from fabula.sessions.call_events import Arguments, CallEnded, CallStarted, Content, Event
from fabula.sessions.harmony import HarmonyParser

ARGUMENTS = '{"city": "Rome <b>", "n": 1}'
THOUGHT = "<|channel|>analysis<|message|>I look it up.<|end|><|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant"
CALLS = {
    "constrained": f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>",
    "constrained-first": " to=functions.get_weather<|channel|>commentary <|constrain|>json"
    f"<|message|>{ARGUMENTS}<|call|>",
    "plain": f"<|channel|>commentary to=functions.get_weather json<|message|>{ARGUMENTS}<|call|>",
    "in-analysis": f"<|channel|>analysis to=functions.get_weather code<|message|>{ARGUMENTS}<|call|>",
    "without-end": f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{ARGUMENTS}",
}


def parsed(pieces: list[str]) -> tuple[str, list[str], str, list[bool]]:
    """Content, names of calls, arguments, and which calls are valid."""
    parser = HarmonyParser()
    events: list[Event] = [event for piece in pieces for event in parser.feed(piece)]
    events += parser.finish()
    return (
        "".join(event.text for event in events if isinstance(event, Content)),
        [event.name for event in events if isinstance(event, CallStarted)],
        "".join(event.text for event in events if isinstance(event, Arguments)),
        [event.is_valid for event in events if isinstance(event, CallEnded)],
    )


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("before", ["", THOUGHT, THOUGHT + PREAMBLE])
def test_a_call_at_every_cut(call: str, before: str) -> None:
    text = before + CALLS[call]
    wanted = ("One moment." if PREAMBLE in before else "", ["get_weather"], ARGUMENTS, [True])
    assert parsed([text]) == wanted
    assert parsed(list(text)) == wanted
    for cut in range(1, len(text)):
        assert parsed([text[:cut], text[cut:]]) == wanted, text[:cut]


def test_the_final_channel_is_the_answer() -> None:
    text = THOUGHT + "<|channel|>final<|message|>It is <|to=functions.x> 20.<|return|>"
    for cut in range(len(text)):
        assert parsed([text[:cut], text[cut:]]) == ("It is <|to=functions.x> 20.", [], "", [])


def test_a_recipient_that_is_no_function_is_no_call() -> None:
    text = "<|channel|>commentary to=python code<|message|>1 + 1<|call|>"
    assert parsed(list(text))[1] == []
