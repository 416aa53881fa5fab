"""Bodies of Ollama's API, and its replies for the OpenAPI description.

Unknown fields are ignored; the header `fabula-ignored` names them.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fabula.server.borrowed import Tolerant
from fabula.server.schemas import Strict

KEEP_ALIVE: Any = Field(None, description="Has no effect: models stay loaded.")
OPTIONS: Any = Field(
    None,
    description="Sampling settings by Ollama's names: num_predict, temperature, top_k, top_p, min_p, typical_p, "
    "repeat_penalty, repeat_last_n, presence_penalty, frequency_penalty, seed, stop. Others have no effect.",
)
FORMAT: Any = Field(None, description='"json", or a JSON schema for the answer.')
THINK: Any = Field(None, description='Whether the model thinks before it answers: a boolean, "low", "medium", "high".')
STREAM: Any = Field(None, description="Default: true, a line of JSON for each piece of the answer.")


class Named(Tolerant):
    """A model by its name."""

    model: str | None = Field(None, description="`name:latest` is `name`. With one model served, every name means it.")


class OptionsIn(Strict):
    """Sampling settings."""

    num_predict: int | None = Field(None, description="Tokens to generate at most; -1 and -2: what has room.")
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = Field(None, description="Negative: another one each time.")
    stop: list[str] | str | None = None


class ChatMessageIn(Strict):
    """A message of the conversation."""

    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = Field(None, description="Refused: the model reads text.")
    tool_calls: list[dict[str, Any]] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Answered(Named):
    """How an answer is generated and sent."""

    stream: bool | None = STREAM
    format: Any = FORMAT
    options: OptionsIn | None = OPTIONS
    think: bool | str | None = THINK
    logprobs: bool | None = Field(None, description="Whether the log-probability of each token is sent.")
    top_logprobs: int | None = Field(None, json_schema_extra={"minimum": 0, "maximum": 20})
    keep_alive: float | str | None = KEEP_ALIVE


class ChatIn(Answered):
    """A conversation to answer; without messages the reply comes when the model is loaded."""

    messages: list[ChatMessageIn] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateIn(Answered):
    """A prompt to answer; an empty one is replied to when the model is loaded."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = Field(None, description="Continue the prompt as it is, without a chat template.")
    context: list[int] | None = Field(None, description="Of the reply to continue from.")
    images: list[Any] | None = Field(None, description="Refused: the model reads text.")
    template: str | None = Field(None, description="Must be empty: the model's own chat template is used.")
    suffix: str | None = Field(None, description="Text after the gap to fill; for models with marks for it.")


class EmbedIn(Named):
    """Texts to turn into vectors."""

    input: str | list[str] | None = None
    truncate: bool | None = Field(None, description="Has no effect: a text longer than the context is an error.")
    dimensions: int | None = Field(None, description="Must be the size the model has.")
    options: dict[str, Any] | None = Field(None, description="Has no effect.")
    keep_alive: float | str | None = KEEP_ALIVE


class EmbeddingIn(Named):
    """A text to turn into a vector; an older form of `/api/embed`."""

    prompt: str | None = None
    options: dict[str, Any] | None = Field(None, description="Has no effect.")
    keep_alive: float | str | None = KEEP_ALIVE


class ModelIn(Named):
    """A model."""

    name: str | None = Field(None, description="An older name of `model`.")
    verbose: bool | None = Field(None, description="Has no effect.")


class PullIn(ModelIn):
    """A model to fetch."""

    stream: bool | None = Field(None, description="Default: true, a line of JSON for each step.")
    insecure: bool | None = Field(None, description="Has no effect.")


class CopyIn(Tolerant):
    """Another name for a model."""

    source: str
    destination: str = Field(json_schema_extra={"minLength": 1, "maxLength": 128})


# ---- Replies --------------------------------------------------------------------------------------------------------


class Loose(BaseModel):
    """A reply that may hold more than is described."""

    model_config = ConfigDict(extra="allow")


class VersionReply(Loose):
    """The version of Ollama's API that this server follows."""

    version: str


class TagReply(Loose):
    """A model."""

    name: str
    model: str
    size: int
    digest: str
    details: dict[str, Any]


class TagsReply(Loose):
    """The models of the server."""

    models: list[TagReply]


class ShowReply(Loose):
    """What is known of a model."""

    details: dict[str, Any]
    model_info: dict[str, Any]
    capabilities: list[str]
    template: str
    parameters: str
    modified_at: str


class AnswerIn(Loose):
    """The end of an answer. Durations are in nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: str | None = None


class ChatOut(AnswerIn):
    """An answer."""

    message: dict[str, Any]


class GenerateOut(AnswerIn):
    """An answer."""

    response: str


class EmbedOut(Loose):
    """Vectors of length 1, in the order of the texts."""

    model: str
    embeddings: list[list[float]]


class EmbeddingOut(Loose):
    """A vector of length 1."""

    embedding: list[float]


class StatusReply(Loose):
    """How far it is."""

    status: str
