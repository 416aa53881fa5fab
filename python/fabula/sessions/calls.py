"""Reading tool calls out of an answer, whole or as it streams; the form is that of `sessions/tools.py`.

What is no call is content: tags that are never closed, JSON that is none, text between calls. Content never holds half
a tag that may still become one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*,\s*"arguments"\s*:\s*(?=\{)')
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_HEAD = 256  # characters in which a call must say its name for its arguments to be streamed
_SIGNS = re.compile(r'[{}"\\]')


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function.

    Attributes:
        name: of the function.
        arguments: a JSON object, as the model wrote it.
    """

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Content:
    """Text outside of calls.

    Attributes:
        text: what is certain of it.
    """

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call says its name.

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
        text: of the JSON, to be put behind what came before.
    """

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """Nothing more of a call will come.

    Attributes:
        index: of the call.
        is_valid: whether it is whole and its arguments are JSON; else it was cut off, or is no call after all.
        raw: everything the model wrote of it, tags included.
    """

    index: int
    is_valid: bool
    raw: str


Event = Content | CallBegun | Arguments | CallEnded


class ToolCallReader:
    """Finds calls in text that arrives in pieces, which may break anywhere.

    Example:
        >>> reader = ToolCallReader()
        >>> reader.feed("Let me see.<tool")
        [Content(text='Let me see.')]
    """

    def __init__(self) -> None:
        self._held = ""
        self._state = self._text
        self._index = 0
        self._sought = 0  # characters of the held text in which there is no closing tag
        self._raw: list[str] = []  # of the call that is being read
        self._arguments: list[str] = []
        self._depth, self._in_string, self._escaped = 0, False, False
        self._after_call = False  # blanks here only set calls apart

    def feed(self, text: str) -> list[Event]:
        """Takes the next piece of text; what is certain with it."""
        self._held += text
        events: list[Event] = []
        while self._held and self._state(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """At the end of the text: what was still held back."""
        events: list[Event] = []
        held, self._held = self._held, ""
        if self._state == self._text:
            self._say(held, events)
        elif self._state in (self._head, self._whole):
            self._take_whole(held, "", events)
        else:
            self._raw.append(held)
            self._end(events)
        return events

    # ---- States: each takes what it can of the held text, and says whether to go on ---------------------------------

    def _text(self, events: list[Event]) -> bool:
        start = self._held.find(OPEN)
        if start >= 0:
            self._say(self._held[:start], events)
            self._held = self._held[start + len(OPEN) :]
            self._raw, self._arguments, self._state = [OPEN], [], self._head
            return True
        n_held = next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)
        self._say(self._held[: len(self._held) - n_held], events)
        self._held = self._held[len(self._held) - n_held :]
        return False

    def _head(self, events: list[Event]) -> bool:
        """Behind the tag, up to the arguments."""
        match = _HEAD.match(self._held)
        if match is not None:
            events.append(CallBegun(self._index, match[1]))
            self._raw.append(match[0])
            self._held = self._held[match.end() :]
            self._depth, self._in_string, self._escaped, self._state = 0, False, False, self._body
            return True
        if CLOSE in self._held or len(self._held) > MAX_HEAD:
            self._state = self._whole
            return True
        return False

    def _body(self, events: list[Event]) -> bool:
        """Inside the arguments, up to the brace that closes them."""
        end = self._end_of_object()
        text = self._held[:end]
        self._held = self._held[end:]
        self._raw.append(text)
        self._arguments.append(text)
        events.append(Arguments(self._index, text))
        if self._depth == 0:
            self._state = self._tail
        return bool(self._held)

    def _end_of_object(self) -> int:
        """How much of the held text belongs to the object that is open; keeps the state of its JSON."""
        if self._escaped:
            self._escaped = False
            start = 1
        else:
            start = 0
        while (match := _SIGNS.search(self._held, start)) is not None:
            sign, start = match[0], match.end()
            if sign == "\\":
                if start == len(self._held):
                    self._escaped = True
                start += 1
            elif sign == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if sign == "{" else -1
                if self._depth == 0:
                    return start
        return len(self._held)

    def _tail(self, events: list[Event]) -> bool:
        """Behind the arguments, up to the closing tag. A missing one is let pass, other keys are passed over."""
        rest = self._held.lstrip()
        if rest.startswith("}"):
            rest = rest[1:].lstrip()
            if CLOSE.startswith(rest) and rest != CLOSE:
                return False
            end = len(self._held) - len(rest) + (len(CLOSE) if rest.startswith(CLOSE) else 0)
        else:
            place = self._close()
            if place < 0:
                return False
            end = place + len(CLOSE)
        self._raw.append(self._held[:end])
        self._held = self._held[end:]
        self._end(events)
        return bool(self._held)

    def _whole(self, events: list[Event]) -> bool:
        """A call that is no stream: other order of keys, or none at all."""
        end = self._close()
        if end < 0:
            return False
        inner, self._held = self._held[:end], self._held[end + len(CLOSE) :]
        self._take_whole(inner, CLOSE, events)
        return bool(self._held)

    def _close(self) -> int:
        """Where the closing tag begins in the held text, -1 if it is not there yet."""
        place = self._held.find(CLOSE, self._sought)
        self._sought = 0 if place >= 0 else max(0, len(self._held) - len(CLOSE))
        return place

    # ---- Events -----------------------------------------------------------------------------------------------------

    def _say(self, text: str, events: list[Event]) -> None:
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        if text:
            events.append(Content(text))

    def _take_whole(self, inner: str, close: str, events: list[Event]) -> None:
        """A call at once, or its text as content."""
        self._state = self._text
        call = _call_of(inner)
        if call is None:
            self._say(OPEN + inner + close, events)
            return
        raw = OPEN + inner + close
        events += [
            CallBegun(self._index, call.name), Arguments(self._index, call.arguments),
            CallEnded(self._index, True, raw),
        ]  # fmt: skip
        self._index += 1
        self._after_call = True

    def _end(self, events: list[Event]) -> None:
        valid = self._depth == 0 and _loaded("".join(self._arguments)) is not None
        events.append(CallEnded(self._index, valid, "".join(self._raw)))
        self._index += 1
        self._state, self._after_call = self._text, True


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """An answer's content and its calls, in order; what is no valid call is content."""
    reader = ToolCallReader()
    content: list[str] = []
    calls: list[ToolCall] = []
    name, arguments = "", ""
    for event in [*reader.feed(text), *reader.finish()]:
        if isinstance(event, Content):
            content.append(event.text)
        elif isinstance(event, CallBegun):
            name, arguments = event.name, ""
        elif isinstance(event, Arguments):
            arguments += event.text
        elif event.is_valid:
            calls.append(ToolCall(name, arguments))
        else:
            content.append(event.raw)
    joined = "".join(content)
    return (joined.strip() if calls else joined), calls


def _call_of(inner: str) -> ToolCall | None:
    """The call that JSON between the tags says; arguments may be missing, or be JSON in a text."""
    value = _loaded(inner)
    if value is None or not isinstance(value.get("name"), str) or not _NAME.fullmatch(value["name"]):
        return None
    arguments = value.get("arguments", {})
    arguments = _loaded(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _loaded(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
