"""LangChain's and LlamaIndex' classes that answer from a session: whole histories, and the tree's methods."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fabula import Model, SamplingParams
from fabula.errors import InvalidArgument
from fabula.plugs.history import History, params_with, text_of

FEW = SamplingParams(max_tokens=4, seed=1, ignore_eos=True)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def prompts(session: Any) -> list[str]:
    return [turn.prompt for turn in session.path]


# ---- Histories ------------------------------------------------------------------------------------------------------


def answer(history: History, *messages: dict[str, Any]) -> tuple[dict[str, str], Any]:
    with history.answered(messages, FEW) as source:
        return {"role": "assistant", "content": source.text()}, source


def test_a_history_is_found_in_the_tree(tiny_model: Model) -> None:
    session = tiny_model.session(system="Be brief.", sampling=FEW)
    history = History(session)
    system = {"role": "system", "content": "Be brief."}
    one, _ = answer(history, system, user("one"))
    two, reply = answer(history, system, user("one"), one, user("two"))
    assert prompts(session) == ["one", "two"] and reply.turn.recomputed == 0 and reply.timings.reused_tokens > 10
    answer(history, user("one"), one, user("other"))
    assert prompts(session) == ["one", "other"] and len(session.turns) == 3
    answer(history, user("one"), one, user("two"), two, user("three"))
    assert prompts(session) == ["one", "two", "three"] and len(session.turns) == 4
    changed = {"role": "system", "content": "Be long."}
    answer(history, changed, user("one"))
    assert session.head.number == 1 and session.head.said.messages == [changed, user("one")]


def test_what_is_not_the_sessions_is_answered_beside_it(tiny_model: Model) -> None:
    session = tiny_model.session(sampling=FEW)
    history = History(session)
    example = {"role": "assistant", "content": "An example."}
    text, _ = answer(history, user("one"), example, user("two"))
    with tiny_model.chat([user("one"), example, user("two")], FEW) as same:
        assert same.text() == text["content"]
    with history.answered([user("one")], FEW) as running:
        next(running)
        answer(history, user("two"))
        assert not session.turns and running.timings.generated_tokens
        running.text()
    assert prompts(session) == ["one"]
    with session.say("by hand", FEW) as by_hand:
        next(by_hand)
        answer(history, user("three"))
        assert session.is_busy
    assert prompts(session) == ["one", "by hand"]
    with pytest.raises(InvalidArgument, match="not the session's"):
        history.branches([user("one"), example, user("two")], 2, FEW)
    with pytest.raises(InvalidArgument, match="must end with"):
        answer(history, user("one"), example)


def test_settings_and_contents(tiny_model: Model) -> None:
    session = tiny_model.session(sampling=FEW)
    found = params_with(session, {"temperature": 0.0, "top_k": None}, ["end"])
    assert (found.temperature, found.max_tokens, found.stop) == (0.0, 4, ("end",))
    with pytest.raises(InvalidArgument, match="heat is not a sampling setting"):
        params_with(session, {"heat": 1})
    assert text_of(["a", {"type": "text", "text": "b"}], "it") == "ab"
    for wrong in ([{"type": "image_url"}], [5], None):
        with pytest.raises(InvalidArgument, match="it holds something other than text"):
            text_of(wrong, "it")


# ---- LangChain ------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(tiny_model: Model) -> Any:
    pytest.importorskip("langchain_core", reason="langchain-core is not installed")
    from fabula.plugs.langchain_chat import FabulaChat

    return FabulaChat(tiny_model.session(system="Be brief.", sampling=FEW))


def test_langchain(chat: Any) -> None:
    from langchain_core.messages import AIMessage, HumanMessage

    first = chat.invoke("one")
    assert first.usage_metadata["output_tokens"] == 4 and first.response_metadata["turn"] == 1
    history = [HumanMessage("one"), first, HumanMessage("two")]
    chunks = list(chat.stream(history))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.response_metadata["turn"] == 2 and whole.usage_metadata["input_token_details"]["cache_read"] > 10
    assert [m.content for m in chat.messages] == ["Be brief.", "one", first.content, "two", whole.content]
    fork = chat.fork()
    assert [m.content for m in chat.rollback()] == ["Be brief.", "one", first.content]
    chat.invoke([*chat.messages, HumanMessage("three")])
    fork.invoke([*fork.messages, HumanMessage("four")])
    assert prompts(chat.session) == ["one", "three"] and prompts(fork.session) == ["one", "two", "four"]
    answers = chat.branch([HumanMessage("one"), first, HumanMessage("five")], 3, temperature=2.0)
    assert len({one.response_metadata["turn_id"] for one in answers}) == 3 and prompts(chat.session) == ["one"]
    chat.invoke([HumanMessage("one"), first, HumanMessage("five"), answers[1], HumanMessage("six")])
    assert chat.session.path[1].id == answers[1].response_metadata["turn_id"]
    assert chat.invoke("x", stop=[first.content[:1]], max_tokens=2).usage_metadata["output_tokens"] <= 2
    called = AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}])
    with pytest.raises(InvalidArgument, match=r"messages\[1\] calls tools"):
        chat.invoke([HumanMessage("one"), called, HumanMessage("two")])


def test_langchain_without_waiting(chat: Any) -> None:
    async def main() -> None:
        text = "".join([chunk.content async for chunk in chat.astream("one")])
        assert text == chat.session.head.text
        assert (await chat.ainvoke("two")).content == chat.session.head.text

    asyncio.run(main())
    texts = chat.batch(["a", "b", "c"])  # in threads; those that do not find the session free are answered beside it
    assert len(texts) == 3 and all(one.usage_metadata["output_tokens"] == 4 for one in texts)
    stream = chat.stream("dropped")
    next(stream)
    stream.close()
    assert not chat.session.is_busy and chat.session.head.finish_reason == "cancelled"
    assert chat.invoke("after").response_metadata["turn"] == 1


# ---- LlamaIndex -----------------------------------------------------------------------------------------------------


@pytest.fixture
def llm(tiny_model: Model) -> Any:
    pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")
    from fabula.plugs.llamaindex_llm import FabulaLLM

    return FabulaLLM(tiny_model.session(system="Be brief.", sampling=FEW))


def test_llamaindex(llm: Any, tiny_model: Model) -> None:
    from llama_index.core.base.llms.types import ChatMessage, ImageBlock

    def said(text: str) -> Any:
        return ChatMessage(role="user", content=text)

    assert llm.metadata.context_window == tiny_model.context and llm.metadata.num_output == 4
    first = llm.chat([said("one")])
    assert first.additional_kwargs["turn"] == 1 and first.additional_kwargs["completion_tokens"] == 4
    history = [said("one"), first.message, said("two")]
    chunks = list(llm.stream_chat(history))
    assert "".join(chunk.delta for chunk in chunks) == chunks[-1].message.content == llm.session.head.text
    assert chunks[-1].additional_kwargs["turn"] == 2 and chunks[-1].additional_kwargs["cached_tokens"] > 10
    fork = llm.fork()
    assert [m.content for m in llm.rollback()] == ["Be brief.", "one", first.message.content]
    llm.chat([*llm.messages, said("three")])
    fork.chat([*fork.messages, said("four")])
    assert prompts(llm.session) == ["one", "three"] and prompts(fork.session) == ["one", "two", "four"]
    answers = llm.branch([said("one"), first.message, said("five")], 2, temperature=2.0)
    llm.chat([said("one"), first.message, said("five"), answers[0].message, said("six")])
    assert llm.session.path[1].id == answers[0].additional_kwargs["turn_id"]
    assert llm.complete("seven").text == llm.session.head.text and prompts(llm.session) == ["seven"]
    assert "".join(one.delta for one in llm.stream_complete("eight")) == llm.session.head.text
    assert asyncio.run(llm.acomplete("nine")).text == llm.session.head.text
    assert asyncio.run(llm.achat([said("ten")])).message.content == llm.session.head.text
    with pytest.raises(InvalidArgument, match="other than text"):
        llm.chat([ChatMessage(role="user", blocks=[ImageBlock(url="http://localhost/x.png")])])
    with pytest.raises(InvalidArgument, match="has the role 'tool'"):
        llm.chat([ChatMessage(role="tool", content="x")])
