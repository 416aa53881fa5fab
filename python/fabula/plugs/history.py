"""Answers to whole histories from a session, for libraries that send every message each time.

The history is found in the session's tree, and the answer becomes the next turn there: what was computed for the past
is used as it is, and a history that differs from the path to the head becomes a branch.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fabula.engine.generation import Generation
from fabula.engine.sampling import SamplingParams
from fabula.errors import InvalidArgument
from fabula.sessions.reply import Reply
from fabula.sessions.session import Session
from fabula.sessions.turn import Turn

Message = dict[str, Any]
Source = Reply | Generation
_SETTINGS = {one.name for one in dataclasses.fields(SamplingParams)}


def params_with(session: Session, given: Mapping[str, Any], stop: Sequence[str] | None = None) -> SamplingParams:
    """The session's sampling parameters with those that a call changes; None leaves one as it is.

    Raises:
        InvalidArgument: there is no such setting, or its value is out of range.
    """
    changed = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(changed.keys() - _SETTINGS):
        raise InvalidArgument(f"{unknown[0]} is not a sampling setting; there are {', '.join(sorted(_SETTINGS))}")
    if stop:
        changed["stop"] = tuple(stop)
    return dataclasses.replace(session.params, **changed)


def text_of(content: object, where: str) -> str:
    """The text of a message's content: a string, or a list of strings and text parts.

    Raises:
        InvalidArgument: it holds something else, such as an image.
    """
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else [content]
    found = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise InvalidArgument(f"{where} holds something other than text; only text is supported")
        found.append(text)
    return "".join(found)


class History:
    """Answers histories from one session.

    Args:
        session: a chat.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._lock = threading.Lock()

    @contextmanager
    def answered(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[Source]:
        """Starts the answer to a history; leaving the block ends it.

        A history whose answers are not the session's own, such as one with examples, and any history while another
        answer is running, is answered beside the session: no turn is added.

        Args:
            messages: each with role and content.
            params: sampling parameters.

        Raises:
            InvalidArgument, TemplateError, ContextOverflow: as `Session.say`.
        """
        place = self._place(messages)
        if place is None or not self._lock.acquire(blocking=False):
            with self._beside(messages, params) as generation:
                yield generation
            return
        try:
            if self.session.is_busy:  # somebody else's reply, which a rollback would stop
                with self._beside(messages, params) as generation:
                    yield generation
                return
            self._go_to(place[0])
            with self.session.say(place[1], params) as reply:
                yield reply
        finally:
            self._lock.release()

    def branches(self, messages: Sequence[Message], n: int, params: SamplingParams) -> list[Reply]:
        """Starts n answers to a history at once, as siblings; the next history chooses one by its text.

        Raises:
            InvalidArgument: the history is not the session's; or as `Session.branch`.
            SessionBusy: another reply is running.
        """
        place = self._place(messages)
        if place is None:
            raise InvalidArgument("the answers in these messages are not the session's; branch from its own history")
        if not self.session.is_busy:
            self._go_to(place[0])
        return self.session.branch(n, place[1], params)

    def _place(self, messages: Sequence[Message]) -> tuple[Turn, list[Message]] | None:
        """The turn that a history leads to, and the messages after it; None if the tree has no such turn."""
        left = list(messages)
        if self.session.system is not None and left and left[0] == _system(self.session):
            del left[0]
        if not left or left[-1]["role"] == "assistant":
            raise InvalidArgument("messages must end with one that is not the assistant's")
        turn = self.session.turn(0)
        while True:
            end = next((i for i, message in enumerate(left) if message["role"] == "assistant"), None)
            if end is None:
                return turn, left
            said, answer, left = left[:end], left[end]["content"], left[end + 1 :]
            path = set(self.session.path)
            found = [one for one in self.session.children(turn) if one.text == answer and one.said.messages == said]
            if not found:
                return None
            turn = next((one for one in found if one in path), found[-1])

    def _go_to(self, turn: Turn) -> None:
        if self.session.head is not turn:
            self.session.rollback(turn)

    def _beside(self, messages: Sequence[Message], params: SamplingParams) -> Generation:
        session, model = self.session, self.session._handle.loaded
        if session.system is not None and (not messages or messages[0]["role"] != "system"):
            messages = [_system(session), *messages]
        ids = model.engine.tokenizer.encode_chat(model.template(), messages)
        return Generation(model.engine, ids, params, salt=session.tenant)


def _system(session: Session) -> Message:
    return {"role": "system", "content": session.system}
