"""Quick starts of the clients of Anthropic's and Ollama's APIs, for try_clients.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Check = Callable[[str, str], str]
QUESTION = "What is the capital of France?"
SAID: Any = [{"role": "user", "content": QUESTION}]


def address(base: str) -> str:
    """A server's address without /v1, which clients of both APIs write without it."""
    return base.removesuffix("/v1")


def anthropic_client(base: str, _: str) -> str:
    """A message, a stream, tools, a parsed answer, a count, the models."""
    import anthropic
    from pydantic import BaseModel

    class City(BaseModel):
        name: str

    tool: Any = {"name": "look_up", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
    with anthropic.Anthropic(base_url=address(base), api_key="none") as api:
        asked: Any = {"model": "claude-sonnet-4-5", "messages": SAID}
        assert api.messages.create(**asked, max_tokens=20).content
        with api.messages.stream(**asked, max_tokens=20) as stream:
            assert "".join(stream.text_stream) and stream.get_final_message().usage.output_tokens
        called = api.messages.create(**asked, max_tokens=200, tools=[tool], tool_choice={"type": "any"})
        assert called.content[0].type == "tool_use"
        assert api.messages.parse(**asked, max_tokens=200, output_format=City).parsed_output is not None
        assert api.messages.count_tokens(**asked).input_tokens and list(api.models.list())
    return "messages, stream, tools, parse, count_tokens, models"


def langchain_anthropic(base: str, _: str) -> str:
    """`ChatAnthropic`: invoke, stream, structured output by tool and by schema."""
    from langchain_anthropic import ChatAnthropic
    from pydantic import BaseModel

    class City(BaseModel):
        """A city."""

        name: str

    settings: Any = {"model": "claude-sonnet-4-5", "base_url": address(base), "api_key": "none"}
    chat = ChatAnthropic(max_tokens=100, **settings)
    assert chat.invoke(QUESTION).content and list(chat.stream(QUESTION))
    assert isinstance(chat.with_structured_output(City).invoke(QUESTION), City)
    assert isinstance(chat.with_structured_output(City, method="json_schema").invoke(QUESTION), City)
    return "invoke, stream, structured output"


def ollama_client(base: str, model: str) -> str:
    """Every call of the client that a server of models answers."""
    import ollama

    def population(city: str) -> int:
        """The population of a city."""
        return len(city)

    api = ollama.Client(host=address(base))
    options = {"num_predict": 20}
    assert api.list().models and api.show(model).capabilities and api.ps().models
    assert api.chat(model=model, messages=SAID, options=options).message.content
    assert "".join(part.message.content or "" for part in api.chat(model, SAID, options=options, stream=True))
    assert api.chat(model=model, messages=SAID, tools=[population], options=options).done
    assert api.generate(model=model, prompt=QUESTION, options=options).response
    assert api.embed(model=model, input=["a", "b"]).embeddings
    assert [step.status for step in api.pull(model, stream=True)][-1] == "success"
    return "chat, stream, tools, generate, embed, list, show, ps, pull"


def langchain_ollama(base: str, model: str) -> str:
    """`ChatOllama`: invoke, stream, structured output; `OllamaEmbeddings`."""
    from langchain_ollama import ChatOllama, OllamaEmbeddings
    from pydantic import BaseModel

    class City(BaseModel):
        """A city."""

        name: str

    settings: Any = {"model": model, "base_url": address(base)}
    chat = ChatOllama(num_predict=60, temperature=0, validate_model_on_init=True, **settings)
    assert chat.invoke(QUESTION).content and list(chat.stream(QUESTION))
    assert isinstance(chat.with_structured_output(City).invoke(QUESTION), City)
    assert OllamaEmbeddings(**settings).embed_query("a cat")
    return "invoke, stream, structured output, embeddings"


def llm_ollama(base: str, model: str) -> str:
    """A model of the plugin, whole and streamed."""
    import os

    os.environ["OLLAMA_HOST"] = address(base)
    import llm

    made = llm.get_model(f"ollama/{model}")
    assert made.prompt(QUESTION, stream=False, num_predict=20).text()
    assert "".join(made.prompt(QUESTION, stream=True, num_predict=20))
    return "prompt, stream"


CHECKS: dict[str, tuple[str, Check]] = {
    "anthropic": ("anthropic", anthropic_client),
    "langchain-anthropic": ("langchain-anthropic", langchain_anthropic),
    "ollama": ("ollama", ollama_client),
    "langchain-ollama": ("langchain-ollama", langchain_ollama),
    "llm-ollama": ("llm-ollama", llm_ollama),
}
