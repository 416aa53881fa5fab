"""Converts messages of Ollama's API to those of this server."""

from __future__ import annotations

from collections.abc import Sequence

from fabula.server.borrowed import Json
from fabula.server.failures import refuse
from fabula.server.limits import Limits
from fabula.server.ollama.schemas import ChatMessageIn

ROLES = ("system", "user", "assistant", "tool")
NO_IMAGES = "holds images: image input is not supported; the model reads text"


def messages_of(given: Sequence[ChatMessageIn], limits: Limits) -> list[Json]:
    """The messages as in OpenAI's API. Ollama's calls of tools have no ids: results belong to them by name and order.

    Raises:
        ApiError: a message is malformed, too long, or holds images; names the field.
    """
    limits.check_messages(len(given), "messages")
    found: list[Json] = []
    waiting: list[tuple[str, str]] = []  # calls without a result: name and id
    n_calls = 0
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        if message.role not in ROLES:
            raise refuse(f"{where}.role", f"is {message.role[:40]!r}, must be one of {', '.join(ROLES)}")
        if message.images:
            raise refuse(f"{where}.images", NO_IMAGES, "unsupported")
        plain: Json = {"role": message.role, "content": message.content or ""}
        limits.check_text(plain["content"], f"{where}.content")
        if message.thinking and message.role == "assistant":
            plain["reasoning_content"] = message.thinking
        if message.role == "tool":
            plain |= _answered(message, waiting)
        elif message.role == "assistant" and message.tool_calls:
            plain["tool_calls"] = []
            for call in message.tool_calls:
                id = call.get("id")
                id = id if isinstance(id, str) and id else f"call_{n_calls}"
                n_calls += 1
                function = call.get("function")
                name = function.get("name") if isinstance(function, dict) else None
                waiting.append((name if isinstance(name, str) else "", id))
                plain["tool_calls"].append({"id": id, "type": "function", "function": function})
        found.append(plain)
    return found


def _answered(message: ChatMessageIn, waiting: list[tuple[str, str]]) -> Json:
    """The id and the name of the call that a result belongs to: the first one of its name, or the first."""
    name, id = message.tool_name, message.tool_call_id
    place = next(
        (i for i, call in enumerate(waiting) if id == call[1] or (not id and name in (None, "", call[0]))), None
    )
    if place is not None:
        known_name, known_id = waiting.pop(place)
        name, id = name or known_name, id or known_id
    about: Json = {"tool_call_id": id} if id else {}
    return about | ({"name": name} if name else {})
