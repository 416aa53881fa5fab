"""Bodies of Anthropic's Messages API, and its replies for the OpenAPI description.

Bodies also take the fields of `Sampling`, the settings of Fabula's own API: seed, min_p, repetition_penalty, ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fabula.server.borrowed import Json, Tolerant
from fabula.server.schemas import Sampling, Strict


def _without_limits(body: Json) -> None:
    """-1 means no limit, as in other servers."""
    for name in ("max_tokens", "top_k"):
        if body.get(name) == -1:
            del body[name]


class MessageIn(Strict):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Any = Field(
        description="Text, or a list of blocks: text, thinking, tool_use, tool_result, document with text. Images are "
        "refused."
    )


class ThinkingIn(Strict):
    """Whether the model thinks before it answers."""

    type: str = Field(description='"disabled", or any other word: "enabled", "adaptive".')
    budget_tokens: int | None = Field(None, description="Tokens of thought at most.", json_schema_extra={"minimum": 1})
    display: str | None = Field(None, description='"omitted": thoughts are not sent, their blocks are empty.')


class ToolChoiceIn(Strict):
    """Which tools the answer calls."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = Field(None, description="Whether the answer has one call at most.")


class OutputFormatIn(Strict):
    """A JSON schema for the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfigIn(Strict):
    """Settings of the output."""

    format: OutputFormatIn | None = None
    effort: str | None = Field(None, description="For models whose template knows `reasoning_effort`.")


class PromptBody(Tolerant):
    """What the model reads. Unknown fields are ignored; the header `fabula-ignored` names them."""

    model: str | None = Field(None, description="With one model served, every name means it; the reply says which.")
    messages: list[MessageIn] = Field(min_length=1)
    system: Any = Field(None, description="Text, or a list of text blocks.")
    tools: list[dict[str, Any]] | None = Field(
        None,
        description="Functions with `name`, `description` and `input_schema`; tools that run on a server are ignored.",
    )
    tool_choice: ToolChoiceIn | None = None
    thinking: ThinkingIn | None = Field(None, description="Without it there are no thinking blocks.")
    cache_control: dict[str, Any] | None = Field(None, description="Has no effect: shared prefixes are always reused.")
    output_config: OutputConfigIn | None = None
    output_format: OutputFormatIn | None = Field(None, description="An older name of `output_config.format`.")
    parse_special: bool | None = Field(
        None, description="Whether control tokens written in messages are parsed as control tokens. Default: false."
    )


class MessagesBody(PromptBody, Sampling):
    """A conversation to answer."""

    translate: ClassVar[Callable[[Json], None]] = _without_limits

    max_tokens: int | None = Field(None, description="Default: what the context has room for.", ge=1)
    stop_sequences: list[str] | None = Field(None, description="Texts that end the answer; at most 16 of 256 bytes.")
    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is generated.")
    metadata: dict[str, Any] | None = Field(None, description="Has no effect.")
    service_tier: str | None = Field(None, description="Has no effect.")


class CountBody(PromptBody):
    """A conversation whose tokens to count."""


# ---- Replies --------------------------------------------------------------------------------------------------------


class MessageUsage(BaseModel):
    """Token counts. The prompt has `input_tokens` that were computed and `cache_read_input_tokens` that were not."""

    model_config = ConfigDict(extra="allow")
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageReply(BaseModel):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
    stop_sequence: str | None
    usage: MessageUsage


class CountReply(BaseModel):
    """A number of tokens."""

    input_tokens: int
