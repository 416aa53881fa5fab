"""An answer's text as parts: text and tool calls, in the events of `call_events`."""

from __future__ import annotations

from fabula.engine.generation import Generation
from fabula.sessions.tool_call_parser import Blanks, CallParser, Content, Event
from fabula.sessions.tools import Calling


class AnswerParser:
    """Parses the text of one answer, which arrives in pieces.

    Args:
        calling: how the answer calls tools; None if it does not.
    """

    def __init__(self, calling: Calling | None) -> None:
        self._calls: CallParser | None = calling.parser() if calling is not None else None
        self._blanks = Blanks()

    def feed(self, text: str) -> list[Event]:
        """The events that are certain with the next piece of text."""
        if not text:
            return []
        if self._calls is None:
            return [Content(text)]
        return list(self._blanks.filter(self._calls.feed(text)))

    def finish(self, *, ended_itself: bool) -> list[Event]:
        """The events that were held back until the end.

        Args:
            ended_itself: whether the model ended the answer: it was not truncated, nor cut at a stop string.
        """
        if self._calls is None:
            return []
        rest = self._calls.finish(is_whole=ended_itself)
        return [*self._blanks.filter(rest), *self._blanks.finish()]


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
