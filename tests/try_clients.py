"""Runs the quick start of each installed client against a server, and prints a row of docs/clients.md for it.

    fabula serve &
    python tests/try_clients.py [--address http://127.0.0.1:8000] [NAME ...]

The programs are those of the clients' own first pages, with the base URL changed and short answers asked for. "runs"
means that the client was content with every reply; what a small model answers is not judged.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import sys
import traceback
import urllib.request
import warnings
from collections.abc import Callable
from typing import Any

import app_clients
import face_clients
import plug_clients

Check = Callable[[str, str], str]
CHECKS: dict[str, tuple[str, Check]] = {}
QUESTION = "What is the capital of France?"


def client(package: str) -> Callable[[Check], Check]:
    """Registers a check under the name of its package."""

    def register(check: Check) -> Check:
        CHECKS[package] = (package, check)
        return check

    return register


@client("openai")
def openai_client(base: str, model: str) -> str:
    """The chat, a stream, tools, a parsed answer, a response, embeddings."""
    import openai
    from pydantic import BaseModel

    class City(BaseModel):
        name: str

    with openai.OpenAI(base_url=base, api_key="none") as api:
        said: Any = [{"role": "user", "content": QUESTION}]
        assert api.chat.completions.create(model=model, messages=said, max_tokens=20).choices[0].message.content
        stream = api.chat.completions.create(model=model, messages=said, max_tokens=20, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        parsed = api.chat.completions.parse(model=model, messages=said, response_format=City, max_tokens=40)
        assert parsed.choices[0].message.parsed is not None
        tool: Any = {"type": "function", "function": {"name": "look.up", "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}  # fmt: skip
        called = api.chat.completions.create(
            model=model, messages=said, tools=[tool], tool_choice="required", max_tokens=60, temperature=0
        )
        assert called.choices[0].message.tool_calls
        first = api.responses.create(model=model, input=QUESTION, max_output_tokens=20)
        assert api.responses.create(
            model=model, input="And Spain's?", previous_response_id=first.id, max_output_tokens=20
        ).output_text
        assert len(api.embeddings.create(model=model, input=["a", "b"]).data) == 2
    return "chat, stream, parse, tools, responses, embeddings"


@client("litellm")
def litellm(base: str, model: str) -> str:
    """`completion`, whole and streamed, with a reasoning effort."""
    import litellm as lite

    said = [{"role": "user", "content": QUESTION}]
    settings: Any = {"model": "openai/" + model, "api_base": base, "api_key": "none", "max_tokens": 20}
    assert lite.completion(messages=said, **settings).choices[0].message.content
    assert "".join(
        chunk.choices[0].delta.content or "" for chunk in lite.completion(messages=said, stream=True, **settings)
    )
    assert lite.embedding(model="openai/" + model, input=["a"], api_base=base, api_key="none").data
    return "completion, stream, embedding"


@client("langchain-openai")
def langchain(base: str, model: str) -> str:
    """`ChatOpenAI`: invoke, stream, structured output, tools, responses; `OpenAIEmbeddings`."""
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings
    from pydantic import BaseModel

    class City(BaseModel):
        """A city."""

        name: str

    @tool
    def population(city: str) -> int:
        """The population of a city."""
        return len(city)

    settings: Any = {"base_url": base, "api_key": "none", "model": model}
    chat = ChatOpenAI(max_tokens=40, temperature=0, **settings)
    assert chat.invoke(QUESTION).content
    assert "".join(str(chunk.content) for chunk in chat.stream(QUESTION))
    assert isinstance(chat.with_structured_output(City, method="json_schema").invoke(QUESTION), City)
    assert chat.bind_tools([population], tool_choice="any").invoke("Paris?").tool_calls
    assert ChatOpenAI(use_responses_api=True, max_tokens=16, **settings).invoke("Hello!").text
    assert OpenAIEmbeddings(check_embedding_ctx_length=False, **settings).embed_query("a cat")
    return 'invoke, stream, structured output, tools ("any"), responses, embeddings'


@client("langgraph")
def langgraph(base: str, model: str) -> str:
    """A graph of one node with a memory."""
    from langchain_openai import ChatOpenAI
    from langgraph.checkpoint.memory import InMemorySaver
    from langgraph.graph import START, MessagesState, StateGraph

    chat = ChatOpenAI(base_url=base, api_key="none", model=model, max_tokens=20)  # type: ignore[arg-type]
    graph = StateGraph(MessagesState)
    graph.add_node("chat", lambda state: {"messages": [chat.invoke(state["messages"])]})
    graph.add_edge(START, "chat")
    made = graph.compile(checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "1"}}
    made.invoke({"messages": [("user", QUESTION)]}, config)
    assert len(made.invoke({"messages": [("user", "And Spain's?")]}, config)["messages"]) == 4
    return "a graph with a checkpointer"


@client("llama-index-llms-openai-like")
def llama_index(base: str, model: str) -> str:
    """`OpenAILike`: complete, chat, stream."""
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(model=model, api_base=base, api_key="none", is_chat_model=True, max_tokens=20)
    assert llm.complete(QUESTION).text
    assert llm.chat([ChatMessage(role="user", content=QUESTION)]).message.content
    assert "".join(chunk.delta or "" for chunk in llm.stream_complete(QUESTION))
    return "complete, chat, stream"


@client("instructor")
def instructor(base: str, model: str) -> str:
    """A response model, in the modes of tools and of schemas."""
    import instructor as library
    import openai
    from pydantic import BaseModel

    class City(BaseModel):
        name: str

    for mode in (library.Mode.TOOLS, library.Mode.JSON_SCHEMA):
        api = library.from_openai(openai.OpenAI(base_url=base, api_key="none"), mode=mode)
        said: Any = [{"role": "user", "content": QUESTION}]
        found = api.chat.completions.create(
            model=model, response_model=City, messages=said, max_tokens=200, temperature=0, max_retries=2
        )
        assert isinstance(found, City)
    return "tools, JSON schema"


@client("pydantic-ai-slim")
def pydantic_ai(base: str, model: str) -> str:
    """An agent with an output type."""
    from pydantic import BaseModel
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class City(BaseModel):
        name: str

    made = OpenAIChatModel(model, provider=OpenAIProvider(base_url=base, api_key="none"))
    settings: Any = {"max_tokens": 60, "temperature": 0}
    assert Agent(made, model_settings=settings).run_sync(QUESTION).output
    assert isinstance(
        Agent(made, output_type=NativeOutput(City), model_settings=settings).run_sync(QUESTION).output, City
    )
    assert isinstance(Agent(made, output_type=City, model_settings=settings).run_sync(QUESTION).output, City)
    return "an agent; output types by schema and by tool"


@client("openai-agents")
def openai_agents(base: str, model: str) -> str:
    """An agent with tools and an output type, over chat completions and over responses."""
    import openai
    from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
    from agents import set_tracing_disabled as disable
    from pydantic import BaseModel

    class City(BaseModel):
        name: str

    @function_tool
    def population(city: str) -> int:
        """The population of a city."""
        return len(city)

    disable(True)
    api = openai.AsyncOpenAI(base_url=base, api_key="none")
    settings = ModelSettings(max_tokens=60, temperature=0)
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        made = kind(model=model, openai_client=api)
        agent = Agent(name="A", instructions="Be brief.", model=made, tools=[population], model_settings=settings)
        assert asyncio.run(Runner.run(agent, QUESTION)).final_output is not None
        typed = Agent(name="B", model=made, output_type=City, model_settings=settings)
        assert isinstance(asyncio.run(Runner.run(typed, QUESTION)).final_output, City)
    return "chat and responses: tools, output_type"


@client("smolagents")
def smolagents(base: str, model: str) -> str:
    """`OpenAIServerModel`: the model alone, as agents that write code need one that can."""
    from smolagents import OpenAIServerModel

    made = OpenAIServerModel(model_id=model, api_base=base, api_key="none", max_tokens=20)
    assert made([{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]).content  # type: ignore[list-item]
    return "OpenAIServerModel"


@client("llm")
def llm(base: str, model: str) -> str:
    """A model of its OpenAI plugin."""
    from llm.default_plugins.openai_models import Chat

    made = Chat(model_id="fabula", model_name=model, api_base=base)
    made.needs_key = None
    assert made.prompt(QUESTION, max_tokens=20, temperature=0, stream=False).text()
    assert "".join(made.prompt(QUESTION, max_tokens=20, stream=True))
    return "prompt, stream"


@client("dspy")
def dspy(base: str, model: str) -> str:
    """`Predict` with a signature. dspy asks models that it does not know for no schema, so a small one may miss the
    form: that is the model's failure, and told apart."""
    import dspy as library
    from dspy.utils.exceptions import AdapterParseError

    lm = library.LM("openai/" + model, api_base=base, api_key="none", max_tokens=100, temperature=0, cache=False)
    assert lm(QUESTION)
    try:
        with library.context(lm=lm):
            assert library.Predict("question -> answer")(question=QUESTION).answer
    except AdapterParseError:
        return "LM; Predict is answered, but so small a model misses its form"
    return "LM, Predict"


CHECKS |= face_clients.CHECKS | app_clients.CHECKS


def version_of(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    """Runs the checks that are named, or all; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    base = given.address + "/v1"
    os.environ |= {"OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    warnings.simplefilter("ignore")
    with urllib.request.urlopen(base + "/models") as reply:
        model = json.load(reply)["data"][0]["id"]
    n_failed = 0
    programs = app_clients.PROGRAMS
    for name, (package, check) in (CHECKS | programs | plug_clients.PLUGS).items():
        if given.names and name not in given.names:
            continue
        version = app_clients.version_of(package) if name in programs else version_of(package)
        if version is None:
            print(f"| {name} | not installed | | |", flush=True)
            continue
        try:
            print(f"| {name} | {version} | {check(base, model)} | runs |", flush=True)
        except Exception as error:
            n_failed += 1
            traceback.print_exc()
            print(f"| {name} | {version} | | {type(error).__name__}: {str(error)[:200]} |", flush=True)
    return n_failed


if __name__ == "__main__":
    sys.exit(main())
