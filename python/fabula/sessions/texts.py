"""A session's path as a text for people: Markdown, or plain text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fabula.sessions.turn import Turn

NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


def markdown(title: str, messages: Iterable[Mapping[str, Any]], path: Iterable[Turn]) -> str:
    """A document with the session's title, and a heading for each message of a chat; a story is its text alone.

    Args:
        title: of the session.
        messages: of the conversation, as `Session.messages`.
        path: its turns.
    """
    parts = [f"# {title}"] if title else []
    if _is_chat(path):
        for name, text in _said(messages):
            parts += [f"## {name}", text]
    else:
        parts.append(_story(path))
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(title: str, messages: Iterable[Mapping[str, Any]], path: Iterable[Turn]) -> str:
    """As `markdown`, with `Name: text` for each message of a chat."""
    parts = [title] if title else []
    if _is_chat(path):
        parts += [f"{name}: {text}" for name, text in _said(messages)]
    else:
        parts.append(_story(path))
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_chat(path: Iterable[Turn]) -> bool:
    return any(turn.chat for turn in path)


def _said(messages: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for message in messages:
        text = str(message.get("content") or "").strip()
        for call in message.get("tool_calls") or ():
            called = call.get("function", call)
            arguments = called.get("arguments")
            shown = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            text = f"{text}\n\n{called.get('name')}({shown})".strip()
        yield NAMES.get(str(message["role"]), str(message["role"])), text


def _story(path: Iterable[Turn]) -> str:
    """What the story's readers see: notes for the model are left out."""
    return "".join(("" if turn.frozen else turn.prompt) + turn.text for turn in path).strip()
