"""Replies of the routes below /v1, for the OpenAPI description. The objects are those of OpenAI's API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Loose(BaseModel):
    """A reply that may hold more than is described."""

    model_config = ConfigDict(extra="allow")


class UsageTold(Loose):
    """Token counts. `prompt_tokens_details.cached_tokens` counts prompt tokens taken from the KV cache."""

    prompt_tokens: int
    total_tokens: int


class ModelReply(Loose):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsReply(Loose):
    """The models of the server."""

    object: Literal["list"]
    data: list[ModelReply]


class ChatCompletionReply(Loose):
    """Answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[dict[str, Any]]
    usage: UsageTold


class CompletionReply(Loose):
    """Continuations of texts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[dict[str, Any]]
    usage: UsageTold


class EmbeddingsReply(Loose):
    """Vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    model: str
    usage: UsageTold


class ResponseReply(Loose):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: float
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    previous_response_id: str | None


class InputItemsReply(Loose):
    """Input of a response."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokensReply(Loose):
    """Tokens of a prompt."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class DeletedReply(Loose):
    """A response that was deleted."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]
