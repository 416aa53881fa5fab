"""A chat model for LangChain that answers from a session, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import Field, PrivateAttr

from fabula.errors import InvalidArgument
from fabula.plugs.history import History, Message, Source, params_with, text_of
from fabula.sessions.reply import Reply
from fabula.sessions.session import Session
from fabula.sessions.turn_tree import TurnRef

_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool"}
_TYPES = {"user": HumanMessage, "assistant": AIMessage, "system": SystemMessage}


class FabulaChat(BaseChatModel):  # type: ignore[misc]
    """Answers messages as turns of a session.

    `invoke`, `stream` and the like take the whole history, as those of every chat model: it is found in the session's
    tree, and nothing of it is computed again. Settings of a call, such as `temperature`, are those of `SamplingParams`.

    Tools are not supported: bind them to a `ChatOpenAI` that has a Fabula server's address.
    """

    session: Session = Field(exclude=True)
    _history: History = PrivateAttr()

    def __init__(self, session: Session, **settings: Any) -> None:
        super().__init__(session=session, **settings)
        self._history = History(session)

    # ---- The tree ---------------------------------------------------------------------------------------------------

    @property
    def messages(self) -> list[BaseMessage]:
        """The history up to the session's head."""
        return [
            ToolMessage(one["content"], tool_call_id=one.get("tool_call_id", ""))
            if one["role"] == "tool"
            else _TYPES[one["role"]](one["content"])
            for one in self.session.messages
        ]

    def rollback(self, turn: TurnRef = -1) -> list[BaseMessage]:
        """Makes an earlier turn the head, by default the one before it; returns the history up to there."""
        self.session.rollback(turn)
        return self.messages

    def fork(self, turn: TurnRef | None = None) -> FabulaChat:
        """A chat with a new session that shares this one's past up to a turn (None: the head)."""
        return type(self)(self.session.fork(turn))

    def branch(
        self, input: LanguageModelInput, n: int, *, stop: list[str] | None = None, **settings: Any
    ) -> list[AIMessage]:
        """n answers to a history, generated at the same time. Continue with any of them."""
        messages = _plain(self._convert_input(input).to_messages())
        replies = self._history.branches(messages, n, params_with(self.session, settings, stop))
        return [self._message(reply, reply.text()) for reply in replies]

    # ---- LangChain's methods ----------------------------------------------------------------------------------------

    @property
    def _llm_type(self) -> str:
        return "fabula"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model_name": self.session.model, "session_id": self.session.id}

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 (LangChain notifies it of the pieces)
        **kwargs: Any,
    ) -> ChatResult:
        with self._history.answered(_plain(messages), params_with(self.session, kwargs, stop)) as source:
            message = self._message(source, source.text())
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 (LangChain notifies it of the pieces)
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with self._history.answered(_plain(messages), params_with(self.session, kwargs, stop)) as source:
            for piece in source:
                if piece.text:
                    yield ChatGenerationChunk(message=AIMessageChunk(content=piece.text))
            about = self._about(source)
        yield ChatGenerationChunk(message=AIMessageChunk(content="", chunk_position="last", **about))

    def _message(self, source: Source, text: str) -> AIMessage:
        return AIMessage(content=text, **self._about(source))

    def _about(self, source: Source) -> dict[str, Any]:
        """Token counts and the place of an answer that has ended; without a turn if it was given beside the session."""
        generation = source.generation if isinstance(source, Reply) else source
        timings = generation.timings
        found: dict[str, Any] = {"model_name": self.session.model, "finish_reason": generation.finish_reason}
        if isinstance(source, Reply) and source.turn is not None:
            found |= {"session_id": self.session.id, "turn": source.turn.number, "turn_id": source.turn.id}
        usage = {
            "input_tokens": timings.prompt_tokens,
            "output_tokens": timings.generated_tokens,
            "total_tokens": timings.prompt_tokens + timings.generated_tokens,
            "input_token_details": {"cache_read": timings.reused_tokens},
        }
        return {"response_metadata": found, "usage_metadata": usage}


def _plain(messages: Sequence[BaseMessage]) -> list[Message]:
    """LangChain's messages as a session takes them.

    Raises:
        InvalidArgument: a message calls tools, holds something other than text, or has an unknown type.
    """
    found: list[Message] = []
    for i, message in enumerate(messages):
        role = _ROLES.get(message.type)
        if role is None:
            raise InvalidArgument(f"messages[{i}] is of type {message.type!r:.40}; there are {', '.join(_ROLES)}")
        if getattr(message, "tool_calls", None):
            raise InvalidArgument(f"messages[{i}] calls tools, which FabulaChat does not support")
        one: Message = {"role": role, "content": text_of(message.content, f"messages[{i}]")}
        if isinstance(message, ToolMessage):
            one["tool_call_id"] = message.tool_call_id
        found.append(one)
    return found
