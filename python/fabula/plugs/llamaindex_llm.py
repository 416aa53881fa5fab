"""An LLM for LlamaIndex that answers from a session, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.generic_utils import (
    chat_response_to_completion_response,
    stream_chat_response_to_completion_response,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from pydantic import PrivateAttr

from fabula.errors import InvalidArgument
from fabula.plugs.history import History, Message, Source, params_with
from fabula.sessions.reply import Reply
from fabula.sessions.session import Session
from fabula.sessions.turn_tree import TurnRef

_ROLES = {"user": "user", "assistant": "assistant", "chatbot": "assistant", "system": "system", "developer": "system"}
_NUM_OUTPUT = 256  # tokens that LlamaIndex keeps free for an answer without `max_tokens`; its own default


class FabulaLLM(CustomLLM):  # type: ignore[misc]
    """Answers messages as turns of a session.

    `chat` and `stream_chat` take the whole history, as those of every LLM: it is found in the session's tree, and
    nothing of it is computed again. `complete` answers a prompt as the first message of a conversation. Settings of a
    call, such as `temperature`, are those of `SamplingParams`.
    """

    _history: History = PrivateAttr()

    def __init__(self, session: Session, **settings: Any) -> None:
        super().__init__(**settings)
        self._history = History(session)

    @classmethod
    def class_name(cls) -> str:
        return "FabulaLLM"

    # ---- The tree ---------------------------------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """The session that its answers belong to."""
        return self._history.session

    @property
    def messages(self) -> list[ChatMessage]:
        """The history up to the session's head."""
        return [ChatMessage(role=MessageRole(one["role"]), content=one["content"]) for one in self.session.messages]

    def rollback(self, turn: TurnRef = -1) -> list[ChatMessage]:
        """Makes an earlier turn the head, by default the one before it; returns the history up to there."""
        self.session.rollback(turn)
        return self.messages

    def fork(self, turn: TurnRef | None = None) -> FabulaLLM:
        """An LLM with a new session that shares this one's past up to a turn (None: the head)."""
        return type(self)(self.session.fork(turn))

    def branch(self, messages: Sequence[ChatMessage], n: int, **settings: Any) -> list[ChatResponse]:
        """n answers to a history, generated at the same time. Continue with any of them."""
        replies = self._history.branches(_plain(messages), n, params_with(self.session, settings))
        return [self._response(reply, reply.text()) for reply in replies]

    # ---- LlamaIndex's methods ---------------------------------------------------------------------------------------

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(
            context_window=self.session._handle.engine.runner.context,
            num_output=self.session.params.max_tokens or _NUM_OUTPUT,
            is_chat_model=True,
            model_name=self.session.model or "fabula",
        )

    @llm_chat_callback()  # type: ignore[untyped-decorator]
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        with self._history.answered(_plain(messages), params_with(self.session, kwargs)) as source:
            return self._response(source, source.text())

    @llm_chat_callback()  # type: ignore[untyped-decorator]
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        plain, params = _plain(messages), params_with(self.session, kwargs)

        def pieces() -> ChatResponseGen:
            with self._history.answered(plain, params) as source:
                text = ""
                for piece in source:
                    text += piece.text
                    yield self._response(source, text, piece.text)

        return pieces()

    # `formatted` says that a prompt went through a template of LlamaIndex; sessions have their model's.

    @llm_completion_callback()  # type: ignore[untyped-decorator]
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:  # noqa: ARG002
        return chat_response_to_completion_response(self.chat([ChatMessage(content=prompt)], **kwargs))

    @llm_completion_callback()  # type: ignore[untyped-decorator]
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:  # noqa: ARG002
        found = self.stream_chat([ChatMessage(content=prompt)], **kwargs)
        return stream_chat_response_to_completion_response(found)

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return await asyncio.to_thread(self.chat, messages, **kwargs)

    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:  # noqa: ARG002
        return await asyncio.to_thread(self.complete, prompt, **kwargs)

    def _response(self, source: Source, text: str, delta: str | None = None) -> ChatResponse:
        """An answer so far, with token counts; without a turn if it was given beside the session."""
        generation = source.generation if isinstance(source, Reply) else source
        timings = generation.timings
        about: dict[str, Any] = {
            "finish_reason": generation.finish_reason,
            "prompt_tokens": timings.prompt_tokens,
            "cached_tokens": timings.reused_tokens,
            "completion_tokens": timings.generated_tokens,
        }
        if isinstance(source, Reply) and source.turn is not None:
            about |= {"session_id": self.session.id, "turn": source.turn.number, "turn_id": source.turn.id}
        message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
        return ChatResponse(message=message, delta=delta, additional_kwargs=about)


def _plain(messages: Sequence[ChatMessage]) -> list[Message]:
    """LlamaIndex' messages as a session takes them.

    Raises:
        InvalidArgument: a message holds something other than text, or is of a tool.
    """
    found: list[Message] = []
    for i, message in enumerate(messages):
        role = _ROLES.get(message.role.value)
        if role is None:
            raise InvalidArgument(f"messages[{i}] has the role {message.role.value!r}; there are {', '.join(_ROLES)}")
        if any(block.block_type != "text" for block in message.blocks):
            raise InvalidArgument(f"messages[{i}] holds something other than text; only text is supported")
        found.append({"role": role, "content": "".join(block.text for block in message.blocks)})
    return found
