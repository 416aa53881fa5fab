"""The plugs that answer from a session in this process, as `try_clients.py` runs them: no server is asked."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fabula import Model, SamplingParams
from fabula.sessions.session import Session

QUESTION, MORE = "What is the capital of France?", "And Spain's?"


@contextmanager
def _session() -> Iterator[Session]:
    with Model.load() as model:
        yield model.session(system="Be brief.", sampling=SamplingParams(max_tokens=16))


def langchain_plug(*_: str) -> str:
    """`FabulaChat`: invoke, stream, branch, fork, rollback; the past is not computed again."""
    from langchain_core.messages import AIMessage, HumanMessage

    from fabula.plugs.langchain_chat import FabulaChat

    with _session() as session:
        chat = FabulaChat(session)
        past: list[Any] = [HumanMessage(QUESTION)]
        past += [chat.invoke(past), HumanMessage(MORE)]
        answer = chat.invoke(past)
        assert answer.usage_metadata is not None
        assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
        assert "".join(str(chunk.content) for chunk in chat.stream([*past, answer, HumanMessage("Why?")]))
        other = chat.fork()
        assert all(isinstance(one, AIMessage) for one in chat.branch(past, 2))
        assert len(chat.rollback(1)) < len(other.messages)
    return "FabulaChat: invoke, stream, branch, fork, rollback"


def llamaindex_plug(*_: str) -> str:
    """`FabulaLLM`: complete, chat, stream, fork, rollback; the past is not computed again."""
    from llama_index.core.llms import ChatMessage

    from fabula.plugs.llamaindex_llm import FabulaLLM

    with _session() as session:
        llm = FabulaLLM(session)
        assert llm.complete("A river:").text
        past = [ChatMessage(content=QUESTION)]
        past += [llm.chat(past).message, ChatMessage(content=MORE)]
        answer = llm.chat(past)
        assert answer.additional_kwargs["cached_tokens"] > 0
        pieces = [part.delta or "" for part in llm.stream_chat([*past, answer.message, ChatMessage(content="Why?")])]
        assert "".join(pieces)
        other = llm.fork()
        assert len(llm.rollback(1)) < len(other.messages)
    return "FabulaLLM: complete, chat, stream, fork, rollback"


def notebook(*_: str) -> str:
    """A session as IPython, and so Jupyter, shows it."""
    from IPython.core.formatters import HTMLFormatter

    with _session() as session:
        session.say(QUESTION).text()
        session.regenerate().text()
        shown = HTMLFormatter()(session)
        assert shown is not None and shown.count(html.escape(QUESTION)) == session.n_turns == 2
    return "a session as its tree"


PLUGS: dict[str, tuple[str, Callable[..., str]]] = {
    "FabulaChat": ("langchain-core", langchain_plug),
    "FabulaLLM": ("llama-index-core", llamaindex_plug),
    "IPython": ("ipython", notebook),
}
