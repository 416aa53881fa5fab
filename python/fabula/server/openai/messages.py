"""Converts messages of OpenAI's API to those that chat templates take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fabula.server.failures import refuse
from fabula.server.limits import Limits
from fabula.server.openai.schemas import Message

Json = dict[str, Any]
TEXT_TYPES = ("text", "input_text", "output_text")


def plain_messages(messages: Sequence[Message], limits: Limits) -> list[Json]:
    """The messages with text as content; the role "developer" becomes "system".

    Raises:
        ApiError: one holds something other than text, or is too long; names the field.
    """
    found = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        plain: Json = {"role": "system" if message.role == "developer" else message.role}
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise refuse(f"{where}.content", "is missing", "missing_field")
        plain["content"] = text_of("" if message.content is None else message.content, f"{where}.content")
        limits.check_text(plain["content"], f"{where}.content")
        for name in ("name", "tool_call_id", "tool_calls", "reasoning_content"):
            value = getattr(message, name)
            if value:
                plain[name] = value
        if "tool_calls" in plain and message.role != "assistant":
            raise refuse(f"{where}.tool_calls", "are the assistant's, not the " + message.role + "'s")
        found.append(plain)
    return found


def text_of(content: object, where: str) -> str:
    """The text of a content that is text, or a list of parts that are.

    Raises:
        ApiError: it holds something else; names the field.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refuse(where, "must be a string or a list of parts")
    texts = []
    for i, part in enumerate(content):
        place = f"{where}[{i}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXT_TYPES:
            raise refuse(f"{place}.type", f"is {str(kind)[:40]!r}: only text parts are supported", "unsupported")
        if not isinstance(part.get("text"), str):
            raise refuse(f"{place}.text", "must be a string")
        texts.append(part["text"])
    return "".join(texts)
