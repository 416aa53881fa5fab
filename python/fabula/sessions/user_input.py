"""User input of a turn: text or messages, and the options its prompt is rendered with."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fabula.errors import InvalidArgument
from fabula.text.template import MAX_DEPTH, RESERVED

Message = Mapping[str, Any]
Messages = str | Sequence[Message]

ROLES = ("user", "tool", "system", "developer")
_TEXTS = ("name", "tool_call_id")  # keys of a message that must be strings; other keys are for the template


@dataclass(frozen=True, slots=True)
class UserInput:
    """User input of a turn.

    Attributes:
        text: for people to read: the user's last message, or all messages if none is the user's.
        given: the messages; None for a single one of the user that holds `text` and nothing else.
        options: for the chat template, such as `tools`.
        parse_special: whether control tokens written in it are control tokens; otherwise they are text.
    """

    text: str
    given: tuple[dict[str, Any], ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    parse_special: bool = False

    @classmethod
    def of(
        cls, messages: Messages, options: Mapping[str, Any] | None = None, *, parse_special: bool = False
    ) -> UserInput:
        """Checks a caller's input.

        Args:
            messages: the user's text, or messages with a role of `ROLES` and text as content. The first may have the
                role assistant: the previous answer, with the `tool_calls` that the template is to render.
            options: for the chat template; plain JSON data.
            parse_special: whether control tokens written in it are control tokens.

        Raises:
            InvalidArgument: it is malformed; names the message and key.
        """
        if not isinstance(parse_special, bool):
            raise InvalidArgument(f"parse_special is {parse_special!r:.80}, must be True or False")
        checked = _options(options)
        if isinstance(messages, str):
            return cls(messages, None, checked, parse_special)
        if not isinstance(messages, Sequence) or isinstance(messages, bytes | bytearray):
            raise InvalidArgument(f"messages must be a string or a list of messages, not {type(messages).__name__}")
        given = tuple(_message(message, i) for i, message in enumerate(messages))
        new = [message for message in given if message["role"] != "assistant"]
        if not new:
            raise InvalidArgument("messages must hold at least one new message, not only the assistant's")
        if len(given) == 1 and given[0].keys() == {"role", "content"} and given[0]["role"] == "user":
            return cls(given[0]["content"], None, checked, parse_special)
        users = [message["content"] for message in new if message["role"] == "user"]
        text = users[-1] if users else "\n".join(message["content"] for message in new)
        return cls(text, given, checked, parse_special)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The input as messages; a copy that the caller may change."""
        if self.given is None:
            return [{"role": "user", "content": self.text}]
        return copy.deepcopy(list(self.given))

    @property
    def own_options(self) -> dict[str, Any]:
        """The options; a copy that the caller may change."""
        return copy.deepcopy(dict(self.options))

    @property
    def repeats_answer(self) -> bool:
        """Whether the first message repeats the previous answer, with the calls that the template renders."""
        return self.given is not None and self.given[0]["role"] == "assistant"

    @property
    def answers_call(self) -> bool:
        """Whether it needs the previous turn: it repeats its answer or has the result of a call."""
        return self.given is not None and self.given[0]["role"] in ("assistant", "tool")

    def with_options(self, options: Mapping[str, Any] | None) -> UserInput:
        """The same with other options; None keeps them.

        Raises:
            InvalidArgument: as `of`.
        """
        return self if options is None else replace(self, options=_options(options))

    def inheriting(self, other: UserInput, *, options: bool, parse_special: bool) -> UserInput:
        """The same with another input's `options`, `parse_special`, or both."""
        return replace(
            self,
            options=other.options if options else self.options,
            parse_special=other.parse_special if parse_special else self.parse_special,
        )

    # ---- As JSON ----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any] | None:
        """As JSON, without `text`; None if there is nothing but text."""
        found: dict[str, Any] = {}
        if self.given is not None:
            found["messages"] = self.messages
        if self.options:
            found["options"] = self.own_options
        if self.parse_special:
            found["parse_special"] = True
        return found or None

    @classmethod
    def from_json(cls, text: str, value: Mapping[str, Any] | None) -> UserInput:
        """From JSON and the text.

        Raises:
            InvalidArgument: it is malformed.
        """
        if value is None:
            return cls(text)
        if not isinstance(value, Mapping) or not value.keys() <= {"messages", "options", "parse_special"}:
            raise InvalidArgument("said must hold messages, options and parse_special, and nothing else")
        parse_special = value.get("parse_special", False)
        found = cls.of(value.get("messages", text), value.get("options"), parse_special=parse_special)
        if found.text != text:
            raise InvalidArgument("the prompt is not the text of the messages")
        return found


# ---- Checks ---------------------------------------------------------------------------------------------------------


def _message(value: object, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"{where} must be an object with role and content")
    role, content = value.get("role"), value.get("content")
    repeats_answer = role == "assistant" and index == 0
    if role not in ROLES and not repeats_answer:
        raise InvalidArgument(f"{where}.role is {str(role)[:40]!r}, must be one of {', '.join(ROLES)}")
    if not isinstance(content, str) and not (repeats_answer and content is None):
        raise InvalidArgument(f"{where}.content must be a string")
    for name in _TEXTS:
        if name in value and not isinstance(value[name], str):
            raise InvalidArgument(f"{where}.{name} must be a string")
    calls = value.get("tool_calls")
    if repeats_answer and not (isinstance(calls, list) and calls and all(isinstance(call, Mapping) for call in calls)):
        raise InvalidArgument(f"{where}.tool_calls must be a list of calls; leave out an answer without calls")
    return _plain(value, where)


def _options(value: Mapping[str, Any] | None) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InvalidArgument("template_options must be an object")
    for name in value:
        if name in RESERVED:
            raise InvalidArgument(f"template option {name!r} is set by Fabula itself")
    return _plain(value, "template_options")


def _plain(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A copy of plain JSON data, so that what is stored is what was rendered."""
    try:
        text = json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
        text.encode()
        plain: dict[str, Any] = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{what} is not plain JSON data: {error}") from None
    if _is_deeper(plain, MAX_DEPTH):
        raise InvalidArgument(f"{what} is nested more than {MAX_DEPTH} deep")
    return plain


def _is_deeper(value: object, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in items)
