"""Events of an answer that may call tools: text and calls, streamed or collected."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function.

    Attributes:
        name: of the function.
        arguments: a JSON object; only its first part if the call is not complete.
        is_whole: whether the call is complete and its arguments are JSON.
    """

    name: str
    arguments: str
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class Content:
    """Text outside of calls.

    Attributes:
        text: the next part of it that cannot be markup.
    """

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call has started and its name is known.

    Attributes:
        index: of the call in the answer, from 0.
        name: of the function.
    """

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of a call's arguments.

    Attributes:
        index: of the call.
        text: JSON, to append to the previous events' text.
    """

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A call has ended.

    Attributes:
        index: of the call.
        is_valid: whether it is complete and its arguments are JSON; otherwise it was cut off or is malformed.
        raw: all of its text, tags included.
    """

    index: int
    is_valid: bool
    raw: str


Event = Content | CallStarted | Arguments | CallEnded


def gathered(events: Iterable[Event]) -> tuple[str, list[ToolCall]]:
    """Collects the content and the calls of an answer from its events."""
    content: list[str] = []
    calls: list[ToolCall] = []
    name, arguments = "", ""
    for event in events:
        if isinstance(event, Content):
            content.append(event.text)
        elif isinstance(event, CallStarted):
            name, arguments = event.name, ""
        elif isinstance(event, Arguments):
            arguments += event.text
        else:
            calls.append(ToolCall(name, arguments, event.is_valid))
    return "".join(content), calls


class Blanks:
    """Drops white space that only separates calls: before the first call, if there is no other text, and at the end of
    an answer with calls. White space is held back until more text comes."""

    def __init__(self) -> None:
        self._held, self._has_text, self._has_calls = "", False, False

    def filter(self, events: Iterable[Event]) -> Iterator[Event]:
        """The events without such white space."""
        for event in events:
            if not isinstance(event, Content):
                self._held = self._held if self._has_text else ""
                self._has_calls = True
                yield event
                continue
            text = self._held + event.text
            certain = text.rstrip()
            self._held = text[len(certain) :]
            if certain:
                self._has_text = True
                yield Content(certain)

    def finish(self) -> list[Event]:
        """At the end of the answer: the events that were held back."""
        return [Content(self._held)] if self._held and not self._has_calls else []


def loaded(text: str) -> dict[str, Any] | None:
    """Parses a JSON object; None for any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
