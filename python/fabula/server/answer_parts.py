"""An answer's text as parts: thoughts, text and tool calls."""

from __future__ import annotations

from dataclasses import dataclass

from fabula.engine.generation import Generation
from fabula.engine.sampling import SamplingParams
from fabula.server.reasoning import parser_of
from fabula.sessions.call_events import Blanks, Content, Event
from fabula.sessions.tools import Calling


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """Text of a thought.

    Attributes:
        text: the next part of it.
    """

    text: str


class AnswerParser:
    """Parses one answer into thoughts, content and tool calls, as its text arrives.

    Args:
        params: of the answer; `thinking` says which marks it has.
        calling: how it calls tools; None if it does not.
    """

    def __init__(self, params: SamplingParams, calling: Calling | None) -> None:
        is_harmony = calling is not None and calling.form.arguments == "harmony"
        self._thoughts = parser_of(params, is_raw=is_harmony)
        if calling is not None and params.thinking is not None:
            calling.thought = ""
        self._calls = calling.parser() if calling is not None else None
        self._blanks = Blanks()

    def feed(self, text: str) -> list[Event | ReasoningText]:
        """Parses the next piece of text; returns the events that are certain."""
        return [event for kind, part in self._thoughts.feed(text) for event in self._take(kind, part)]

    def finish(self, *, is_whole: bool) -> list[Event | ReasoningText]:
        """At the end of the text: the remaining events; `is_whole` as for `CallParser.finish`."""
        events = [event for kind, part in self._thoughts.finish() for event in self._take(kind, part)]
        if self._calls is not None:
            events += [*self._blanks.filter(self._calls.finish(is_whole=is_whole)), *self._blanks.finish()]
        return events

    def _take(self, kind: str, text: str) -> list[Event | ReasoningText]:
        if kind == "reasoning":
            return [ReasoningText(text)]
        if self._calls is None:
            return [Content(text)]
        return [*self._blanks.filter(self._calls.feed(text))]


def stop_string_of(generation: Generation) -> str | None:
    """The stop string that ended an answer; None if none did."""
    stops = generation.params.stop
    if generation.finish_reason != "stop" or not stops:
        return None
    ids, text = generation.read_so_far()
    tokenizer = generation.engine.tokenizer
    known = [i for i in ids if i < tokenizer.vocab_size]
    for skip_special in (True, False):  # a stop string may name control tokens, which have no text otherwise
        decoder = tokenizer.stream_decoder(skip_special=skip_special, continues=True)
        whole = "".join([decoder.push(i) for i in known]) + decoder.flush()
        # The matcher takes the string that is complete first, of two the longer one.
        start = max(0, len(text) - 1)  # the first text may have lost a space
        found = [(at + len(stop), at, stop) for stop in stops if (at := whole.find(stop, start)) >= 0]
        if found:
            return min(found)[2]
    return None
