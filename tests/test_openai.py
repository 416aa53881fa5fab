"""OpenAI's API as its clients use it, against a server in a process of its own."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import tiny
import waiting

openai = pytest.importorskip("openai")

PROJECT = Path(__file__).resolve().parent.parent
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CITY = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "people": {"type": "integer", "maximum": 999}},
    "required": ["name", "people"],
    "additionalProperties": False,
}
NO_BLANKS = {"4": -100, "5": -100}  # of which a random model would write many between the parts of JSON


class Served:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *words: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = (folder / "log").open("w+")
        command = waiting.python("fabula", "serve", "--port", "0", "--data", folder / "data", *words)
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        waiting.heard[self._process.pid] = (folder / "log").read_text
        try:
            self.address = self._reached(folder / "log")
        except BaseException:
            self.close()
            raise

    def _reached(self, log: Path) -> str:
        """Its address, once its models are loaded."""
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        address = first.rpartition(" at ")[2].strip()
        assert address.startswith("http"), first + log.read_text()
        waiting.wait_until(
            lambda: httpx.get(address + "/health", timeout=None).status_code == 200,
            log.read_text,
            pause=lambda: time.sleep(0.05),
        )
        return address

    @property
    def client(self) -> Any:
        return openai.OpenAI(base_url=self.address + "/v1", api_key="none", max_retries=0, timeout=None)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of a tiny random model."""
    folder = tmp_path_factory.mktemp("small")
    model = tiny.write_model(folder / "tiny", config={"max_position_embeddings": 4096})
    served = Served(folder, "--model", f"tiny={model}", "--threads", 1)
    yield served
    served.close()


@pytest.fixture(scope="session")
def real(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of SmolLM2."""
    served = Served(tmp_path_factory.mktemp("real"), "--model", f"smollm2={smollm2_gguf}", "--weights", "f16")
    yield served
    served.close()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# ---- Chat -----------------------------------------------------------------------------------------------------------


def test_a_chat_answers(real: Served) -> None:
    with real.client as client:
        done = client.chat.completions.create(
            model="smollm2", messages=user("What is the capital of France?"), temperature=0, max_tokens=20
        )
        assert "Paris" in done.choices[0].message.content
        assert done.object == "chat.completion" and done.id.startswith("chatcmpl-") and done.model == "smollm2"
        assert done.choices[0].finish_reason in ("stop", "length") and done.system_fingerprint.startswith("fp_")
        assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
        again = client.chat.completions.create(
            model="smollm2", messages=user("What is the capital of France?"), temperature=0, max_tokens=20
        )
        assert again.choices[0].message.content == done.choices[0].message.content
        assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_a_chat_streams_the_same(real: Served) -> None:
    asked: dict[str, Any] = {"model": "smollm2", "messages": user("Count to five."), "temperature": 0, "max_tokens": 24}
    with real.client as client:
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_bytes_of_a_stream(small: Served) -> None:
    asked = {"messages": user("hi"), "max_tokens": 5, "stream": True, "seed": 1, "n": 2}
    with httpx.stream("POST", small.address + "/v1/chat/completions", json=asked, timeout=None) as response:
        text = response.read().decode()
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
    assert {choice["index"] for choice in choices} == {0, 1}
    assert [choice["delta"].get("role") for choice in choices[:2]] == ["assistant", "assistant"]
    assert all(choice["delta"].get("content") or choice["finish_reason"] for choice in choices[2:])


def test_several_answers_have_their_own_seeds(small: Served) -> None:
    with small.client as client:
        many = client.chat.completions.create(model="tiny", messages=user("hi"), n=3, seed=5, max_tokens=12)
        second = client.chat.completions.create(model="tiny", messages=user("hi"), seed=6, max_tokens=12)
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    assert many.choices[1].message.content == second.choices[0].message.content
    assert many.usage.prompt_tokens == second.usage.prompt_tokens


def test_probabilities(small: Served) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": user("é"), "max_tokens": 6, "seed": 3, "logprobs": True, "top_logprobs": 4,
    }  # fmt: skip
    with small.client as client:
        done = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True))
    tokens = done.choices[0].logprobs.content
    assert len(tokens) == done.usage.completion_tokens - (done.choices[0].finish_reason == "stop")
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 4
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    told = b"".join(bytes(token.bytes) for token in tokens if not token.token.startswith("<"))
    assert told.decode("utf-8", "replace").startswith(done.choices[0].message.content[:2])
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [token.token for token in tokens]


def test_schemas(small: Served) -> None:
    schema = {"name": "city", "schema": CITY, "strict": True}
    with small.client as client:
        done = client.chat.completions.create(
            model="tiny",
            messages=user("Rome"),
            response_format={"type": "json_schema", "json_schema": schema},
            max_tokens=400,
            seed=1,
        )
        assert set(json.loads(done.choices[0].message.content)) == {"name", "people"}
        done = client.chat.completions.create(
            model="tiny", messages=user("Rome"), max_tokens=40, extra_body={"constraint": {"regex": "[0-9]{4}"}}
        )
        assert done.choices[0].message.content.isdigit() and done.choices[0].finish_reason == "stop"


def test_parts_and_roles(small: Served) -> None:
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]
    settings: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    with small.client as client:
        first = client.chat.completions.create(
            messages=[{"role": "developer", "content": "Be kind"}, {"role": "user", "content": parts}], **settings
        )
        second = client.chat.completions.create(
            messages=[{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hello you"}], **settings
        )
    assert first.choices[0].message.content == second.choices[0].message.content


def test_unset_fields_may_be_null(small: Served) -> None:
    nothing = dict.fromkeys(("temperature", "top_p", "n", "stop", "stream", "tools", "logprobs", "user", "seed"))
    body = nothing | {"messages": user("hi"), "max_tokens": 2}
    answer = httpx.post(small.address + "/v1/chat/completions", json=body, timeout=None)
    assert answer.status_code == 200, answer.text


# ---- Tools ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call(small: Served, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": user("Rome?"), "tools": [WEATHER], "tool_choice": "required",
        "parallel_tool_calls": False, "max_tokens": 300, "seed": 2, "logit_bias": NO_BLANKS,
    }  # fmt: skip
    with small.client as client:
        if stream:
            with client.chat.completions.stream(**asked) as events:
                done = events.get_final_completion()
        else:
            done = client.chat.completions.create(**asked)
        (choice,) = done.choices
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and call.function.name == "get_weather"
        assert set(json.loads(call.function.arguments)) == {"city"}
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        asked["messages"] += [choice.message.model_dump(exclude={"parsed"}, exclude_none=True), result]
        asked["messages"][1]["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": "{}"}}
        ]
        asked |= {"tool_choice": "auto", "max_tokens": 8}
        after = client.chat.completions.create(**asked)
    assert after.choices[0].finish_reason in ("stop", "length")


def test_tools_may_be_left_alone(real: Served) -> None:
    with real.client as client:
        done = client.chat.completions.create(
            model="smollm2", messages=user("Hello!"), tools=[WEATHER], temperature=0, max_tokens=30
        )
        named = client.chat.completions.create(
            model="smollm2",
            messages=user("What is the weather in Rome?"),
            tools=[WEATHER],
            tool_choice={"type": "function", "function": {"name": "get_weather"}},
            temperature=0,
            max_tokens=60,
        )
    assert done.choices[0].message.content or done.choices[0].message.tool_calls
    assert json.loads(named.choices[0].message.tool_calls[0].function.arguments)["city"]


# ---- Completions, models, embeddings --------------------------------------------------------------------------------


def test_completions(small: Served) -> None:
    with small.client as client:
        done = client.completions.create(
            model="tiny", prompt=["the cat", "in the"], n=2, max_tokens=5, seed=4, logprobs=2, stop="\x07"
        )
        assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
        logprobs = done.choices[0].logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) <= 5
        assert all(len(likeliest) == 2 for likeliest in logprobs.top_logprobs)
        assert logprobs.text_offset[0] == 0
        echo = client.completions.create(model="tiny", prompt="the cat", max_tokens=5, seed=4, echo=True)
        assert echo.choices[0].text == "the cat" + done.choices[0].text
        chunks = client.completions.create(model="tiny", prompt="the cat", max_tokens=5, seed=4, stream=True, echo=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == echo.choices[0].text
        assert client.completions.create(model="tiny", prompt=[5, 6, 7], seed=4).usage.prompt_tokens == 3
        most = client.completions.create(model="tiny", prompt="a", seed=4, extra_body={"ignore_eos": True})
        assert most.usage.completion_tokens == 16 and most.choices[0].finish_reason == "length"


def test_models(small: Served) -> None:
    with small.client as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").object == "model"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-5")


def test_embeddings(small: Served) -> None:
    with small.client as client:  # which asks for base64
        found = client.embeddings.create(model="tiny", input=["the cat", "in the end"])
        plain = client.embeddings.create(model="tiny", input="the cat", encoding_format="float")
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            client.embeddings.create(model="tiny", input="x", dimensions=7)
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length"):
            client.embeddings.create(model="tiny", input=[[1, 2], [99999]])
        ids = httpx.post(small.address + "/tokenize", json={"text": "the cat"}, timeout=None).json()["tokens"]
        by_ids = client.embeddings.create(model="tiny", input=ids, encoding_format="float")
        assert by_ids.data[0].embedding == plain.data[0].embedding
    vectors = np.array([one.embedding for one in found.data])
    assert vectors.shape == (2, tiny.CONFIG["hidden_size"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(plain.data[0].embedding, vectors[0], atol=1e-6)
    assert found.usage.prompt_tokens == found.usage.total_tokens > 2
    raw = httpx.post(
        small.address + "/v1/embeddings", json={"input": "the cat", "encoding_format": "base64"}, timeout=None
    ).json()
    np.testing.assert_allclose(
        np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4"), vectors[0], atol=1e-6
    )


# ---- Responses ------------------------------------------------------------------------------------------------------


def test_responses_go_on_from_any(real: Served) -> None:
    asked: dict[str, Any] = {"model": "smollm2", "temperature": 0, "max_output_tokens": 16}
    with real.client as client:
        first = client.responses.create(input="My name is Anna. Say hello.", instructions="Be brief.", **asked)
        second = client.responses.create(input="What is my name?", previous_response_id=first.id, **asked)
        counted = client.responses.input_tokens.count(
            model="smollm2", input="What is my name?", previous_response_id=first.id
        )
        assert counted.input_tokens == second.usage.input_tokens
        (asked_item,) = client.responses.input_items.list(second.id).data
        assert asked_item.content[0].text == "What is my name?" and asked_item.role == "user"
        third = client.responses.create(input="Where is Rome?", previous_response_id=second.id, **asked)
        again = client.responses.create(input="What is my name?", previous_response_id=first.id, **asked)
        assert first.output_text and first.id.startswith("resp_") and first.object == "response"
        assert again.output_text == second.output_text and again.id != second.id
        past = first.usage.total_tokens - 1  # the last token of an answer was never read
        for response in (second, again):
            assert response.usage.input_tokens_details.cached_tokens >= past
        assert third.usage.input_tokens_details.cached_tokens >= second.usage.total_tokens - 1
        read = client.responses.retrieve(second.id)
        assert read.output_text == second.output_text and read.previous_response_id == first.id
        assert read.status == second.status and read.usage.total_tokens == second.usage.total_tokens
        client.responses.delete(third.id)
        client.responses.delete(first.id)
        for gone in (first, third):
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(gone.id)
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            client.responses.create(input="x", previous_response_id=first.id, **asked)
        assert client.responses.create(input="And mine?", previous_response_id=second.id, **asked).output_text


def test_a_response_streams(small: Served) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "hi", "max_output_tokens": 8}
    asked["extra_body"] = {"seed": 2, "constraint": {"regex": "[a-z]{5}"}}
    with small.client as client:
        whole = client.responses.create(**asked)
        events = list(client.responses.create(**asked, stream=True))
        with client.responses.stream(**asked) as stream:
            for _ in stream:
                pass
            final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text == final.output_text


def test_conversations(small: Served) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_output_tokens": 6, "extra_body": {"seed": 1}}
    with small.client as client:
        made = client.conversations.create(metadata={"topic": "rivers"})
        assert made.id.startswith("conv_") and made.metadata == {"topic": "rivers"}
        first = client.responses.create(input="hi", conversation=made.id, instructions="Be brief.", **asked)
        second = client.responses.create(input="more", conversation={"id": made.id}, **asked)
        assert second.conversation.id == made.id
        assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
        items = list(client.conversations.items.list(made.id, order="asc"))
        roles = [item.role for item in items]
        assert roles == ["system", "user", "assistant", "user", "assistant"]
        assert items[1].content[0].text == "hi" and items[-1].content[0].text == second.output_text
        assert [item.id for item in client.conversations.items.list(made.id, limit=2)] == [i.id for i in items[::-1]]
        assert client.conversations.retrieve(made.id).id == made.id
        assert client.conversations.delete(made.id).deleted
        for gone in (made.id, "conv_1"):
            with pytest.raises(openai.NotFoundError):
                client.conversations.retrieve(gone)


def test_conversations_that_begin_with_items(small: Served) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_output_tokens": 6, "extra_body": {"seed": 1}}
    given: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": "who?"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "the whale"}]},
        {"type": "message", "role": "user", "content": "where?"},
    ]
    with small.client as client:
        made = client.conversations.create(items=given)
        response = client.responses.create(input="when?", conversation=made.id, **asked)
        texts = ["Be brief.", "who?", "the whale", "where?", "when?", response.output_text]
        items = list(client.conversations.items.list(made.id, order="asc"))
        assert [item.content[0].text for item in items] == texts
        assert [item.role for item in items] == ["system", "user", "assistant", "user", "user", "assistant"]
        messages = [*given, {"role": "user", "content": "when?"}]
        once = client.responses.create(input=messages, store=False, **asked)
        assert (once.output_text, once.usage.input_tokens) == (response.output_text, response.usage.input_tokens)
        added = client.conversations.items.create(
            made.id, items=[{"role": "user", "content": "why?", "type": "message"}]
        )
        assert [item.content[0].text for item in added.data] == ["why?"]
        assert next(iter(client.conversations.items.list(made.id))).id == added.data[0].id
        assert client.responses.create(input="tell", conversation=made.id, **asked).output_text
        only = client.conversations.create(items=given[1:2])
        assert client.responses.create(input="on", conversation=only.id, **asked).output_text
        for wrong, field in (
            ([{"type": "message", "role": "assistant", "content": "x"}], "items[0]"),
            ([given[1], {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}], "items[1].type"),
            ([given[1], {"role": "nobody", "content": "x"}], "items[1].role"),
            ([given[1]] * 21, "items"),
        ):
            for call in (
                lambda wrong=wrong: client.conversations.create(items=wrong),
                lambda wrong=wrong: client.conversations.items.create(made.id, items=wrong),
            ):
                with pytest.raises(openai.BadRequestError) as caught:
                    call()
                assert caught.value.param == field


def test_responses_call_tools(small: Served) -> None:
    tool = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
    asked: dict[str, Any] = {"model": "tiny", "tools": [tool], "max_output_tokens": 300}
    asked["extra_body"] = {"seed": 1, "logit_bias": NO_BLANKS}
    with small.client as client:
        called = client.responses.create(input="Rome?", tool_choice="required", parallel_tool_calls=False, **asked)
        (call,) = called.output
        assert call.type == "function_call" and set(json.loads(call.arguments)) == {"city"}
        assert client.responses.retrieve(called.id).output == called.output
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        asked["max_output_tokens"] = 8
        after = client.responses.create(input=[result], previous_response_id=called.id, tool_choice="auto", **asked)
        assert after.usage.input_tokens_details.cached_tokens >= called.usage.total_tokens - 1
        events = list(
            client.responses.create(
                input="Rome?", tool_choice="required", parallel_tool_calls=False, stream=True,
                **asked | {"max_output_tokens": 300},
            )
        )  # fmt: skip
        assert events[-1].response.output[0].arguments == call.arguments
        streamed = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert "".join(streamed) == call.arguments
        history = [
            {"role": "user", "content": "Rome?"},
            {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": '{"city": "Rome"}'},
            {"type": "function_call_output", "call_id": "a", "output": "sunny"},
        ]
        assert client.responses.create(input=history, **asked).store is False


def test_responses_with_a_schema_or_forgotten(small: Served) -> None:
    wanted = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
    with small.client as client:
        first = client.responses.create(model="tiny", input="Rome", text=wanted, max_output_tokens=400)
        assert set(json.loads(first.output_text)) == {"name", "people"}
        assert client.responses.retrieve(first.id).text.format.type == "json_schema"
        for before in (None, first.id):
            passing = client.responses.create(
                model="tiny", input="hi", max_output_tokens=4, store=False, previous_response_id=before
            )
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(passing.id)
        other = client.responses.create(
            model="tiny", input="hi", instructions="Rhyme.", previous_response_id=first.id, max_output_tokens=4
        )
        assert other.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    listed = httpx.get(small.address + "/sessions", timeout=None).json()["sessions"]
    assert listed == []


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("chat/completions", {"messages": []}, "invalid_value", "messages"),
        ("chat/completions", {}, "missing_field", "messages"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "missing_field", "messages[0].content"),
        ("chat/completions", {"messages": user("x"), "n": 9}, "invalid_value", "n"),
        ("chat/completions", {"messages": user("x"), "temperature": -1}, "invalid_value", "temperature"),
        ("chat/completions", {"messages": user("x"), "top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ("chat/completions", {"messages": user("x"), "max_tokens": 0}, "invalid_value", "max_tokens"),
        ("chat/completions", {"messages": user("x"), "tool_choice": "required"}, "invalid_value", "tool_choice"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "unsupported",
            "messages[0].content[0].type",
        ),
        (
            "chat/completions",
            {"messages": user("x"), "tools": [WEATHER], "constraint": {"lark": 'start: "x"'}},
            "invalid_value",
            None,
        ),
        ("chat/completions", {"messages": user("x" * 9000)}, "context_length_exceeded", None),
        ("completions", {"prompt": "x", "suffix": "y"}, "unsupported", "suffix"),
        ("completions", {"prompt": "x", "best_of": 3}, "unsupported", "best_of"),
        ("completions", {"prompt": ""}, "invalid_value", "prompt"),
        ("completions", {"prompt": [99999]}, "invalid_value", None),
        ("responses", {"input": []}, "invalid_value", "input"),
        (
            "responses",
            {"input": "x", "previous_response_id": "resp_1"},
            "previous_response_not_found",
            "previous_response_id",
        ),
        ("responses", {"input": [{"type": "item_reference", "id": "x"}]}, "unsupported", "input[0].type"),
        ("responses", {"input": "x", "background": True}, "invalid_value", "background"),
        ("responses", {"input": "x", "conversation": "c", "previous_response_id": "r"}, "invalid_value",
         "conversation"),
        ("responses", {"input": "x", "tools": [{"type": "web_search"}]}, "unsupported", "tools[0].type"),
        ("responses", {"input": "x" * 9000}, "context_length_exceeded", None),
        ("embeddings", {"input": []}, "invalid_value", "input"),
        ("embeddings", {"input": ["a", ""]}, "invalid_value", "input[1]"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    small: Served, path: str, body: dict[str, Any], code: str, param: str | None
) -> None:
    answer = httpx.post(f"{small.address}/v1/{path}", json=body, timeout=None)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert error["type"] == "invalid_request_error" and error["message"]


def test_errors_are_the_clients_own(small: Served) -> None:
    with small.client as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="tiny", messages=user("x"), frequency_penalty="x")
        assert bad.value.param == "frequency_penalty"
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve("resp_" + "0" * 24 + "_" + "0" * 32)


# ---- Other programs -------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_langchain(real: Served) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports; what it does with the server is not warned about
        langchain = pytest.importorskip("langchain_openai")
    settings: dict[str, Any] = {
        "base_url": real.address + "/v1",
        "api_key": "none",
        "model": "smollm2",
        "max_retries": 0,
    }
    chat = langchain.ChatOpenAI(temperature=0, max_tokens=40, **settings)
    answer = chat.invoke("What is the capital of France?")
    assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream("What is the capital of France?")) == answer.content
    city = chat.with_structured_output(CITY | {"title": "city", "description": "A city"}, method="json_schema")
    assert set(city.invoke("Rome has 300 people.")) == {"name", "people"}
    called = chat.bind_tools([WEATHER], tool_choice="get_weather").invoke("What is the weather in Rome?")
    assert called.tool_calls[0]["name"] == "get_weather" and called.tool_calls[0]["args"]["city"]
    again = langchain.ChatOpenAI(use_responses_api=True, max_tokens=16, **settings).invoke("Hello!")
    assert again.text
    embeddings = langchain.OpenAIEmbeddings(check_embedding_ctx_length=False, **settings)
    assert len(embeddings.embed_query("a cat")) == 576


def test_llm(real: Served, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    model = {"model_id": "fabula", "model_name": "smollm2", "api_base": real.address + "/v1", "api_key_name": "fabula"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))  # JSON is YAML
    (tmp_path / "keys.json").write_text('{"fabula": "none"}')
    for words in ([], ["--no-stream"]):
        done = waiting.run_program(
            [sys.executable, "-m", "llm", "-m", "fabula", "-o", "temperature", "0", "-o", "max_tokens", "20", *words,
             "What is the capital of France?"],
            env=os.environ | {"LLM_USER_PATH": str(tmp_path)}, input="",
        )  # fmt: skip
        assert done.returncode == 0 and "Paris" in done.stdout, done.stderr


def test_the_example(small: Served) -> None:
    command = [sys.executable, str(PROJECT / "examples" / "client_openai.py"), "--address"]
    done = waiting.run_program([*command, small.address])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("A stream:") and done.stdout.count("tokens reused]") == 2
    assert "[0 of" not in done.stdout
    done = waiting.run_program([*command, "http://127.0.0.1:9"])
    assert done.returncode == 1 and done.stderr.startswith("error: ")


def test_who_leaves_ends_the_answer(small: Served) -> None:
    asked = {"messages": user("hi"), "max_tokens": 3000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", small.address + "/v1/chat/completions", json=asked, timeout=None) as response:
        next(response.iter_text())
    waiting.wait_until(
        lambda: not httpx.get(small.address + "/health", timeout=None).json()["answers"]["running"],
        "the engine is still busy",
        pause=lambda: time.sleep(0.02),
    )


def test_the_description_names_the_routes(small: Served) -> None:
    found = httpx.get(small.address + "/openapi.json", timeout=None).json()
    assert {path for path in found["paths"] if path.startswith("/v1/") and "messages" not in path} == {
        "/v1/models", "/v1/models/{id}", "/v1/chat/completions", "/v1/completions", "/v1/embeddings",
        "/v1/responses", "/v1/responses/{id}", "/v1/responses/{id}/input_items", "/v1/responses/input_tokens",
        "/v1/conversations", "/v1/conversations/{id}", "/v1/conversations/{id}/items",
    }  # fmt: skip
    chat = found["paths"]["/v1/chat/completions"]["post"]
    assert "text/event-stream" in chat["responses"]["200"]["content"] and chat["tags"] == ["OpenAI"]
    assert "schema" in found["components"]["schemas"]["JsonSchema"]["properties"]
