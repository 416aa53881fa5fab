"""Base of the parsers of tool calls: a state machine over text that arrives in pieces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from fabula.sessions.call_events import Event

# Consumes held text and appends events; returns whether the next state can run on what is left.
State = Callable[[list[Event]], bool]


class CallParser(ABC):
    """A parser of calls in text that arrives in pieces, which may break anywhere.

    Args:
        start: the first state.
    """

    def __init__(self, start: State) -> None:
        self._held = ""  # text that no state has consumed yet
        self._state = start

    def feed(self, text: str) -> list[Event]:
        """Parses the next piece of text; returns the events that are certain."""
        self._held += text
        events: list[Event] = []
        while self._held and self._state(events):
            pass
        return events

    @abstractmethod
    def finish(self, *, is_whole: bool = True) -> list[Event]:
        """At the end of the text: the remaining events.

        Args:
            is_whole: whether the model ended it. If it was cut off, a partial tag at its end is not content.
        """
