"""Errors in the shape of Ollama's API: {"error": "..."}."""

from __future__ import annotations

from pydantic import BaseModel

from fabula.server.failures import ApiError


class OllamaErrorReply(BaseModel):
    """An error in Ollama's shape."""

    error: str


def error_json(error: ApiError) -> dict[str, str]:
    """The body of an error."""
    return {"error": error.message}
