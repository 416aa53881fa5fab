"""Errors in the shape of Anthropic's API: {"type": "error", "error": {"type": ..., "message": ...}}."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel
from quart import g, has_request_context

from fabula.server.failures import ApiError

# By status; others are "invalid_request_error" below 500 and "api_error" above. Source: Anthropic, "Errors".
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicError(BaseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorReply(BaseModel):
    """An error in Anthropic's shape."""

    type: Literal["error"]
    error: AnthropicError
    request_id: str


def error_json(error: ApiError) -> dict[str, Any]:
    """The body of an error."""
    kind = _TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    request_id = g.get("request_id", "") if has_request_context() else ""
    return {"type": "error", "error": {"type": kind, "message": _message(error)}, "request_id": request_id}


def _message(error: ApiError) -> str:
    """The message; an overflow in Anthropic's words, by which clients know that they must shorten the conversation."""
    if error.code == "context_length_exceeded" and {"n_tokens", "context"} <= error.details.keys():
        return f"prompt is too long: {error.details['n_tokens']} tokens > {error.details['context']} maximum"
    return error.message
