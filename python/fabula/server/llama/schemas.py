"""Bodies and replies of llama.cpp's routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from fabula.server.openai import dialects
from fabula.server.openai.schemas import Asked, Borrowed, EmbeddingBody, Message
from fabula.server.schemas import Strict


class LlamaCompletionBody(Asked):
    """A text to continue, in llama.cpp's form; `n_predict` limits the answer, which is not limited otherwise."""

    translate: ClassVar[Callable[[dict[str, Any]], None]] = dialects.completion

    prompt: Any = Field(description="A text, token ids, a list that mixes both, or a list of such prompts.")
    n_probs: int | None = Field(None, json_schema_extra={"minimum": 0, "maximum": 20})
    return_tokens: bool | None = None
    parse_special: bool | None = Field(None, description="As in /v1/completions. Default: true.")


class ExtraFile(Strict):
    """Another file, for context."""

    filename: str = ""
    text: str


class InfillBody(Asked):
    """A gap to fill."""

    translate: ClassVar[Callable[[dict[str, Any]], None]] = dialects.completion

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[ExtraFile] | None = None
    prompt: str | None = Field(None, description="Text that the answer continues.")
    n_probs: int | None = Field(None, json_schema_extra={"minimum": 0, "maximum": 20})
    return_tokens: bool | None = None


class TemplateBody(Borrowed):
    """A conversation to render."""

    translate: ClassVar[Callable[[dict[str, Any]], None]] = dialects.chat

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_budget: int | None = None


def _embedding(body: dict[str, Any]) -> None:
    if "content" in body:
        body.setdefault("input", body.pop("content"))


class LlamaEmbeddingBody(EmbeddingBody):
    """Texts to turn into vectors, in llama.cpp's form."""

    translate: ClassVar[Callable[[dict[str, Any]], None]] = _embedding

    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="Texts, or token ids of this model's tokenizer; `content` is another name."
    )
    embd_normalize: int | None = Field(None, description="Must be 2: vectors have the length 1.")


class RerankBody(Borrowed):
    """Documents to put into order."""

    translate: ClassVar[Callable[[dict[str, Any]], None]] = dialects.embedding

    query: str
    documents: list[str | dict[str, Any]] = Field(description='Texts, or {"text": "..."}.')
    model: str | None = None
    top_n: int | None = Field(None, json_schema_extra={"minimum": 1})
    return_documents: bool | None = None


class Loose(BaseModel):
    """A reply that may hold more than is described."""

    model_config = ConfigDict(extra="allow")


class TemplateReply(Loose):
    """A rendered conversation."""

    prompt: str


class PropsReply(Loose):
    """What the server is."""

    default_generation_settings: dict[str, Any]
    total_slots: int
    chat_template: str


class LlamaEmbeddingReply(BaseModel):
    """The vector of a text."""

    index: int
    embedding: list[list[float]]


class SlotReply(Loose):
    """An answer that runs, or one that may."""

    id: int
    n_ctx: int
    is_processing: bool


class RerankReply(Loose):
    """The documents, best first."""

    results: list[dict[str, Any]]
