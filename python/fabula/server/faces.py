"""Which API of others a path belongs to, for what happens before its route runs: its body's type and its errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quart import Request

from fabula.server.anthropic.errors import error_json as anthropic_error
from fabula.server.failures import ApiError
from fabula.server.ollama.errors import error_json as ollama_error

MESSAGES, OLLAMA = "/v1/messages", "/api/"
# Headers that browsers send with what a page asks, and other clients do not.
_OF_PAGES = ("Origin", "Referer", "Sec-Fetch-Site", "Sec-Fetch-Mode", "Cookie")


def error_body(path: str, error: ApiError) -> Mapping[str, Any]:
    """The JSON of an error in the shape that clients of a path read."""
    if path == MESSAGES or path.startswith(f"{MESSAGES}/"):
        return anthropic_error(error)
    return ollama_error(error) if path.startswith(OLLAMA) else error.body()


def reads_any_type(request: Request) -> bool:
    """Whether a body counts as JSON whatever its Content-Type says: on Ollama's routes, whose documented calls of curl
    send none of their own. Not for pages, which could send such a body to this server without its consent."""
    return request.path.startswith(OLLAMA) and not any(name in request.headers for name in _OF_PAGES)
