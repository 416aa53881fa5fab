"""Parser of the harmony format (OpenAI, "OpenAI harmony response format")."""

from __future__ import annotations

import re

from fabula.sessions.call_events import Arguments, CallEnded, CallStarted, Content, Event, loaded
from fabula.sessions.call_parser import CallParser
from fabula.sessions.tool_forms import NAME
from fabula.text.reasoning import n_half

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")
_BEGINS = ("<|channel|>", "<|start|>", "to=")
_RECIPIENT = re.compile(rf"to=functions\.({NAME})(?=[\s<])")


class HarmonyParser(CallParser):
    """Parses an answer of several messages. A message to a function is a call; messages of the channel "analysis" are
    thoughts, not content."""

    def __init__(self) -> None:
        super().__init__(self._begin)
        self._index = -1
        self._is_call, self._is_thought = False, False
        self._arguments: list[str] = []
        self._raw = ""

    def finish(self, *, is_whole: bool = True) -> list[Event]:
        """As `CallParser.finish`."""
        events: list[Event] = []
        if self._state == self._header:
            match = _RECIPIENT.search(self._held)
            if match is not None:
                self._begin_call(match[1], self._held, events)
                self._end(events)
        elif self._state == self._message:
            n_held = 0 if is_whole else max(n_half(self._held, end) for end in _ENDS)
            self._emit(self._held[: len(self._held) - n_held], events)
            self._end(events)
        elif is_whole:
            self._emit(self._held, events)
        self._held = ""
        return events

    def _begin(self, _: list[Event]) -> bool:
        text = self._held.lstrip()
        if any(begin.startswith(text) and begin != text for begin in _BEGINS):
            return False
        self._state = self._header if text.startswith(_BEGINS) else self._message
        return True

    def _header(self, events: list[Event]) -> bool:
        place = self._held.find(_MESSAGE)
        if place < 0:
            return False
        header = self._held[: place + len(_MESSAGE)]
        self._held = self._held[len(header) :]
        recipient = _RECIPIENT.search(header)
        self._is_thought = "<|channel|>analysis" in header and recipient is None
        if recipient is not None:
            self._begin_call(recipient[1], header, events)
        self._state = self._message
        return True

    def _message(self, events: list[Event]) -> bool:
        found = [(place, end) for end in _ENDS if (place := self._held.find(end)) >= 0]
        if not found:
            n_held = max(n_half(self._held, end) for end in _ENDS)
            self._emit(self._held[: len(self._held) - n_held], events)
            self._held = self._held[len(self._held) - n_held :]
            return False
        place, end = min(found)
        self._emit(self._held[:place], events)
        self._held = self._held[place + len(end) if end in _ENDS[:3] else place :]
        self._end(events)
        self._is_thought, self._state = False, self._begin
        return True

    def _emit(self, text: str, events: list[Event]) -> None:
        if not text or self._is_thought:
            return
        self._raw += text
        if self._is_call:
            self._arguments.append(text)
        events.append(Arguments(self._index, text) if self._is_call else Content(text))

    def _begin_call(self, name: str, header: str, events: list[Event]) -> None:
        self._index += 1
        self._is_call, self._is_thought, self._arguments, self._raw = True, False, [], header
        events.append(CallStarted(self._index, name))

    def _end(self, events: list[Event]) -> None:
        if self._is_call:
            events.append(CallEnded(self._index, loaded("".join(self._arguments)) is not None, self._raw))
        self._is_call = False
