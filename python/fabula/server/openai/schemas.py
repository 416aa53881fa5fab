"""Request bodies of OpenAI's API. A field that is null counts as absent, and one that a body lacks is ignored
(`tolerance.py`); fields of other dialects are translated first (`dialects.py`).

They also take the fields of `Sampling`, the settings of Fabula's own API under the same names: top_k, min_p,
repetition_penalty, constraint, and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from fabula.server.openai import dialects
from fabula.server.openai.tolerance import tolerant
from fabula.server.schemas import Sampling, Strict

MAX_CHOICES = 8  # of one prompt
MAX_INPUTS = 2048  # texts of one request for embeddings; the same as OpenAI's


class StreamOptions(Strict):
    """What a stream carries besides the answer."""

    include_usage: bool | None = Field(None, description="Whether a last chunk has the token counts.")
    include_obfuscation: bool | None = Field(None, description="Has no effect: nothing is padded.")


class Borrowed(Strict):
    """A body of an API that is not ours.

    Attributes:
        translate: turns dialects into fields of the body, in place.
    """

    translate: ClassVar[Callable[[dict[str, Any]], None]] = dialects.any_request

    @model_validator(mode="before")
    @classmethod
    def _tolerant(cls, given: Any) -> Any:
        return tolerant(cls, given, cls.translate)


class Tolerated(Borrowed):
    """Fields that OpenAI's clients send and that have no effect here."""

    user: str | None = Field(None, description="Has no effect: API keys identify callers.")
    metadata: dict[str, Any] | None = Field(None, description="Has no effect but for /v1/responses, which returns it.")
    service_tier: str | None = Field(None, description="Has no effect.")
    safety_identifier: str | None = Field(None, description="Has no effect.")
    prompt_cache_key: str | None = Field(None, description="Has no effect: shared prefixes are always reused.")
    prompt_cache_retention: str | None = Field(None, description="Has no effect.")


PARSE_MESSAGES: Any = Field(
    None,
    description="Whether control tokens written in messages are parsed as control tokens; otherwise they are plain "
    "text. Default: false.",
)


EFFORT: Any = Field(
    None,
    description="none, minimal, low, medium, high: for the chat template if it knows efforts; otherwise a limit of 0, "
    "128, 1,024 or 2,048 tokens of thought, or no limit.",
)
THINKS: Any = Field(None, description="Whether the model thinks first, where its chat template lets one choose.")
BUDGET: Any = Field(
    None,
    description="Tokens of thought at most; then the thought is closed and the model answers.",
    json_schema_extra={"minimum": 0},
)


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = Field(None, description='Text, or a list of parts, {"type": "text", "text": "..."}.')
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = Field(None, description="Of the assistant.")
    tool_call_id: str | None = Field(None, description="Of a tool's result.")
    reasoning_content: str | None = Field(None, description="Thoughts of an earlier answer; templates may drop them.")
    refusal: str | None = Field(None, description="Has no effect.")
    annotations: list[Any] | None = Field(None, description="Has no effect.")
    audio: None = None
    id: str | None = Field(None, description="Has no effect.")
    function_call: dict[str, Any] | None = Field(None, description="Older form of `tool_calls`, with one call.")


class JsonSchema(Strict):
    """A JSON schema for the answer."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Whether a keyword that cannot be enforced is an error.")


class ResponseFormat(Strict):
    """Format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Asked(Sampling, Tolerated):
    """Fields that chat and completions share."""

    model: str | None = Field(None, description="Default: the server's first.")
    n: int | None = Field(None, json_schema_extra={"minimum": 1, "maximum": MAX_CHOICES})
    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is generated.")
    stream_options: StreamOptions | None = None


class ChatCompletionBody(Asked):
    """A conversation to answer."""

    translate: ClassVar[Callable[[dict[str, Any]], None]] = dialects.chat

    parse_special: bool | None = PARSE_MESSAGES
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, json_schema_extra={"minimum": 1})
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, json_schema_extra={"minimum": 0, "maximum": 20})
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = Field(None, description='"none", "auto", "required" or "any", or a function by its name.')
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = Field(
        None, description="Older form of `tools`; the answer then has `function_call`."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")
    continue_final_message: bool | None = Field(
        None,
        description="If the last message is the assistant's, the model continues it and answers with the new text. "
        "false: it starts a turn of its own. true: an error if there is nothing to continue.",
    )
    add_generation_prompt: bool | None = Field(
        None,
        description="true: the model starts a turn of its own, also after one of the assistant's. false: the prompt "
        "ends with the last message.",
    )
    store: bool | None = Field(None, description="Has no effect: nothing is stored.")
    reasoning_effort: str | None = EFFORT
    enable_thinking: bool | None = THINKS
    thinking_budget: int | None = BUDGET
    reasoning: dict[str, Any] | None = Field(None, description="`effort`, `max_tokens`, `enabled`, as above.")
    reasoning_format: str | None = Field(None, description='"none": thoughts stay in the content, with their marks.')
    verbosity: str | None = Field(None, description="Has no effect.")
    prediction: dict[str, Any] | None = Field(None, description="Has no effect.")
    modalities: list[Literal["text"]] | None = None


class CompletionBody(Asked):
    """A text to continue."""

    translate: ClassVar[Callable[[dict[str, Any]], None]] = dialects.completion

    prompt: str | list[str] | list[int] | list[list[int]] = Field(description="Texts, or token ids.")
    best_of: int | None = Field(None, description="Must be n.")
    echo: bool | None = Field(
        None, description="Whether the answer begins with the prompt; with `logprobs` also those of its tokens."
    )
    logprobs: int | None = Field(None, json_schema_extra={"minimum": 0, "maximum": 20})
    parse_special: bool | None = Field(
        None,
        description="Whether control tokens written in the prompt are parsed as control tokens; false: as text. "
        "Default: true.",
    )
    suffix: str | None = Field(None, description="Text after the gap to fill, for models that were trained for it.")


class EmbeddingBody(Tolerated):
    """Texts to turn into vectors."""

    translate: ClassVar[Callable[[dict[str, Any]], None]] = dialects.embedding

    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="Texts, or token ids of this model's tokenizer."
    )
    model: str | None = Field(None, description="Default: the server's first.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: of float32, little-endian. Default: float."
    )
    dimensions: int | None = Field(None, description="Must be the size the model has.")
    pooling: Literal["mean", "last", "first"] | None = Field(None, description="Default: mean.")
    parse_special: bool | None = Field(
        None,
        description="Whether control tokens written in the texts are parsed as control tokens; false: as text. "
        "Default: true.",
    )


class TextFormat(Strict):
    """Format of a response's text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextSettings(Strict):
    """Settings of a response's text."""

    format: TextFormat | None = None
    verbosity: str | None = Field(None, description="Has no effect.")


class ResponseBody(Sampling, Tolerated):
    """Input of a response."""

    translate: ClassVar[Callable[[dict[str, Any]], None]] = dialects.response

    input: str | list[dict[str, Any]] = Field(description="The user's text, or a list of items.")
    model: str | None = Field(None, description="Default: that of the previous response, or the server's first.")
    parse_special: bool | None = PARSE_MESSAGES
    previous_response_id: str | None = Field(
        None, description="The response to continue from: the last or any earlier one. Its past is not recomputed."
    )
    instructions: str | None = Field(
        None,
        description="System message. It holds for later responses; another one later becomes a system message there.",
    )
    max_output_tokens: int | None = Field(None, json_schema_extra={"minimum": 1})
    stream: bool | None = Field(None, description="Send the response as server-sent events while it is generated.")
    stream_options: StreamOptions | None = None
    store: bool | None = Field(None, description="false: the response is deleted when it has been sent.")
    text: TextSettings | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = Field(None, description='"none", "auto", "required", or a function by its name.')
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None,
        description="auto: the oldest turns are dropped when the context is full. Fixed by the first response.",
    )
    background: Literal[False] | None = None
    include: list[str] | None = Field(None, description="Has no effect.")
    reasoning: dict[str, Any] | None = Field(None, description="`effort`, as `reasoning_effort`.")
    reasoning_effort: str | None = EFFORT
    enable_thinking: bool | None = THINKS
    thinking_budget: int | None = BUDGET
    conversation: Any = Field(None, description="Not supported: use previous_response_id.")
