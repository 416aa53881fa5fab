"""Tolerance below /v1 over HTTP: what is ignored is named, who is meant is found, thoughts are separated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import tiny
from fabula.errors import InvalidArgument
from fabula.server.origins import check_origin, is_named_origin
from serving import Running

USER = [{"role": "user", "content": "hi"}]
THINKS = tiny.CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}",
)
NO_BLANKS = {"logit_bias": {"4": -100, "5": -100}, "parallel_tool_calls": False}  # a random model writes only those
CLOSED = {"max_tokens": 60, "seed": 3, "ignore_eos": True, "thinking_budget": 6}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of two models, the first of which thinks, and which is strict."""
    folder = tmp_path_factory.mktemp("thinker")
    model = tiny.write_model(folder / "thinker", template=THINKS)
    plain = tiny.write_model(folder / "plain")
    with Running(folder / "data", model, "--model", str(plain), "--strict", "--cors", "app://obsidian.md") as running:
        yield running


def chat(running: Running, **body: Any) -> httpx.Response:
    return running.client.post("/v1/chat/completions", json={"messages": USER, "max_tokens": 2, "seed": 1} | body)


def deltas_of(running: Running, **body: Any) -> list[dict[str, Any]]:
    """The deltas of a stream."""
    text = chat(running, stream=True, **body).text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line)["choices"][0]["delta"] for line in lines]


# ---- Fields, names and paths ----------------------------------------------------------------------------------------


def test_what_is_ignored_is_named(tiny_server: Running, thinker: Running) -> None:
    odd = {
        "foo": 1, "stream_options": {"include_usage": None, "bar": 2}, "a\nb": 1, "ping": None,
        "messages": [{"role": "user", "content": "hi", "mood": "good"}],
    }  # fmt: skip
    reply = chat(tiny_server, **odd)
    assert reply.status_code == 200, reply.text
    assert reply.headers["fabula-ignored"] == "messages[0].mood, foo, stream_options.bar, ?"
    streamed = chat(tiny_server, **odd, stream=True)
    assert streamed.headers["fabula-ignored"] == reply.headers["fabula-ignored"]
    assert "fabula-ignored" not in chat(tiny_server).headers
    refused = chat(thinker, foo=1)
    assert refused.status_code == 400
    assert (refused.json()["error"]["code"], refused.json()["error"]["param"]) == ("unknown_field", "foo")
    assert chat(thinker, temperature=None, top_k=-1, cache_prompt=True).status_code == 200, "known dialects pass"


def test_a_field_in_place_of_another(tiny_server: Running, thinker: Running) -> None:
    for running in (tiny_server, thinker):
        reply = running.client.post("/v1/chat/completions", json={"prompt": "hi"})
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (400, "missing_field", "messages")
        assert error["message"] == "messages is missing; prompt: no such field"
    reply = tiny_server.client.post("/chat", json={"prompt": "hi"})
    assert reply.status_code == 400 and reply.json()["error"]["message"] == "message is missing; prompt: no such field"


def test_any_name_means_the_only_model(tiny_server: Running, thinker: Running) -> None:
    (name,) = (one["id"] for one in tiny_server.get("/v1/models")["data"])
    for asked in ("", None, "gpt-4o", name.upper(), f"openai/{name}:latest"):
        assert chat(tiny_server, model=asked).json()["model"] == name
    assert chat(thinker, model="fabula/PLAIN").json()["model"] == "plain"
    for asked in ("gpt-4o", "think"):
        reply = chat(thinker, model=asked)
        assert reply.status_code == 404 and "thinker, plain" in reply.json()["error"]["message"]
        assert reply.json()["error"]["param"] == "model"


def test_models_are_described(tiny_server: Running) -> None:
    (found,) = tiny_server.get("/v1/models")["data"]
    assert (found["context_length"], found["family"], found["quantization"]) == (600, "llama", "f32")
    assert found["max_model_len"] == 600 and found["meta"]["n_vocab"] == tiny.VOCAB
    assert tiny_server.get("/v1/models/" + found["id"]) == found
    assert tiny_server.get("/v1/models/unknown", 404)["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/models", "/v1/models/", "/v1/v1/models", "/api/v1/models"])
def test_other_spellings_of_paths(tiny_server: Running, path: str) -> None:
    assert tiny_server.get(path)["object"] == "list"


def test_paths_that_do_not_exist(tiny_server: Running) -> None:
    assert tiny_server.get("/v1/health")["ready"]
    message = tiny_server.get("/v1/chat/completion", 404)["error"]["message"]
    assert message == "there is no such path; did you mean /v1/chat/completions?"
    assert tiny_server.get("/qqqqqqq", 404)["error"]["message"] == "there is no such path"


def test_old_functions_answer_in_their_own_form(tiny_server: Running) -> None:
    function = {"name": "get.it", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
    asked = {"functions": [function], "function_call": {"name": "get.it"}, "max_tokens": 200, **NO_BLANKS}
    (choice,) = chat(tiny_server, **asked).json()["choices"]
    assert choice["message"]["function_call"]["name"] == "get.it" and choice["finish_reason"] == "function_call"
    assert json.loads(choice["message"]["function_call"]["arguments"]) == {}
    deltas = [delta.get("function_call", {}) for delta in deltas_of(tiny_server, **asked)]
    assert "".join(delta.get("name", "") for delta in deltas) == "get.it"
    assert "".join(delta.get("arguments", "") for delta in deltas) == choice["message"]["function_call"]["arguments"]


# ---- Reasoning ------------------------------------------------------------------------------------------------------


def test_thoughts_are_separated(thinker: Running) -> None:
    (choice,) = chat(thinker, **CLOSED).json()["choices"]
    message = choice["message"]
    assert message["reasoning_content"] and message["content"] and "think>" not in message["content"]
    usage = chat(thinker, **CLOSED).json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 6
    deltas = deltas_of(thinker, **CLOSED)
    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == message[name]
    kinds = ["reasoning" if "reasoning_content" in delta else "content" for delta in deltas[1:-1]]
    assert kinds == sorted(kinds, reverse=True), "first the thought, then the answer"


def test_an_open_thought_is_no_content(thinker: Running) -> None:
    (choice,) = chat(thinker, max_tokens=20, seed=3, ignore_eos=True).json()["choices"]
    assert choice["message"]["reasoning_content"] and choice["message"]["content"] == ""
    (raw,) = chat(thinker, **CLOSED, reasoning_format="none").json()["choices"]
    assert "</think>" in raw["message"]["content"] and "reasoning_content" not in raw["message"]


@pytest.mark.parametrize(
    "off",
    [
        {"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}, {"reasoning": {"enabled": False}},
    ],
)  # fmt: skip
def test_thinking_is_turned_off(thinker: Running, off: dict[str, Any]) -> None:
    reply = chat(thinker, max_tokens=12, ignore_eos=True, **off).json()
    assert "reasoning_content" not in reply["choices"][0]["message"] and reply["choices"][0]["message"]["content"]
    assert reply["usage"]["prompt_tokens"] > chat(thinker).json()["usage"]["prompt_tokens"], "the template closed it"


def test_an_effort_is_a_budget(thinker: Running) -> None:
    reply = chat(thinker, max_tokens=300, ignore_eos=True, reasoning_effort="minimal").json()
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 128
    assert chat(thinker, reasoning_effort="some").json()["error"]["param"] == "reasoning_effort"


def test_a_schema_holds_for_the_answer(thinker: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema | {"additionalProperties": False}}}
    (choice,) = chat(thinker, max_tokens=100, thinking_budget=6, response_format=wanted).json()["choices"]
    assert choice["message"]["reasoning_content"] and set(json.loads(choice["message"]["content"])) == {"a"}


def test_calls_after_or_in_place_of_a_thought(thinker: Running) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {}, "additionalProperties": False}}}  # fmt: skip
    asked = {"tools": [tool], "max_tokens": 120, "thinking_budget": 6}
    (choice,) = chat(thinker, **asked, **NO_BLANKS, tool_choice="required").json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert choice["finish_reason"] == "tool_calls"
    (choice,) = chat(thinker, **asked, ignore_eos=True).json()["choices"]
    assert choice["message"]["reasoning_content"] and choice["message"]["content"]


def test_thoughts_of_the_past_are_accepted(thinker: Running) -> None:
    (choice,) = chat(thinker, **CLOSED).json()["choices"]
    message = choice["message"] | {"function_call": None, "audio": None, "annotations": []}
    reply = chat(thinker, messages=[*USER, message, {"role": "user", "content": "and?"}])
    assert reply.status_code == 200, reply.text


def test_reasoning_items(thinker: Running) -> None:
    asked = {"input": "hi", "max_output_tokens": 60, "seed": 3, "ignore_eos": True, "thinking_budget": 6}
    whole = thinker.post("/v1/responses", **asked)
    thought, answer = whole["output"]
    assert (thought["type"], answer["type"]) == ("reasoning", "message")
    assert thought["content"][0]["type"] == "reasoning_text" and thought["content"][0]["text"]
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == 6
    read = thinker.get("/v1/responses/" + whole["id"])
    assert read["output"] == whole["output"] and read["usage"] == whole["usage"]
    events = thinker.events("/v1/responses", **asked)
    for kind, item in (("reasoning_text", thought), ("output_text", answer)):
        deltas = [event["delta"] for event in events if event["type"] == f"response.{kind}.delta"]
        assert "".join(deltas) == item["content"][0]["text"]
    again = thinker.post(
        "/v1/responses", input=[{"role": "user", "content": "hi"}, thought, answer, {"role": "user", "content": "on"}]
    )
    assert again["store"] is False and again["status"]
    off = thinker.post("/v1/responses", **asked | {"thinking_budget": None, "reasoning": {"effort": "none"}})
    assert [item["type"] for item in off["output"]] == ["message"]
    following = thinker.post("/v1/responses", **asked, previous_response_id=whole["id"])
    assert [item["type"] for item in following["output"]] == ["reasoning", "message"]


# ---- Origins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "origin", "is_allowed"),
    [
        ("app://obsidian.md", "app://obsidian.md", True),
        ("app://obsidian.md", "app://other.md", False),
        ("tauri://localhost", "tauri://localhost", True),
        ("vscode-webview://*", "vscode-webview://1f3a", True),
        ("chrome-extension://*", "chrome-extension://abcdef", True),
        ("chrome-extension://*", "https://chrome-extension", False),
        ("loopback", "http://localhost:3000", True),
        ("loopback", "http://127.0.0.1:5173", True),
        ("loopback", "http://[::1]:5173", True),
        ("loopback", "http://localhost.attacker.example", False),
        ("loopback", "http://10.0.0.1", False),
        ("null", "null", True),
        ("*", "https://anything.example", True),
        ("https://a.example/", "https://a.example", True),
        ("https://a.example", "https://a.example.attacker.example", False),
    ],
)
def test_origins(named: str, origin: str, is_allowed: bool) -> None:
    check_origin(named)
    assert is_named_origin(origin, (named,)) is is_allowed


@pytest.mark.parametrize("name", ["example.org", "https://a.example/path", "https://*.example", "loopback2", "app:"])
def test_names_of_origins_that_cannot_be(name: str) -> None:
    with pytest.raises(InvalidArgument, match="must be an origin"):
        check_origin(name)


def test_a_refused_page_can_read_why(thinker: Running) -> None:
    allowed = thinker.client.get("/v1/models", headers={"Origin": "app://obsidian.md"})
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "app://obsidian.md"
    assert "fabula-ignored" in allowed.headers["access-control-expose-headers"]
    refused = thinker.client.get("/v1/models", headers={"Origin": "app://other"})
    assert refused.status_code == 403 and "--cors app://other" in refused.json()["error"]["message"]
    assert refused.headers["access-control-allow-origin"] == "app://other", "for the reason alone"
    preflight = {"Origin": "app://other", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in thinker.client.options("/chat", headers=preflight).headers


def test_health_needs_no_host(thinker: Running) -> None:
    for path, status in (("/health", 200), ("/v1/health", 200), ("/v1/models", 403)):
        assert thinker.client.get(path, headers={"Host": "pod-7.cluster"}).status_code == status
