"""Tools over HTTP, with templates of different forms of calls: truncated, with a schema, refused."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from test_openai_inside import Inside, inside
from tool_templates import BODIES

BLANKS = {"4": -100, "5": -100}  # of which a random model would write many
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": CITY}}
FLAT = {"type": "function", "name": "get_weather", "description": "d", "parameters": CITY}
ANSWER = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 999, "minimum": 0}},
    "required": ["n"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER, "strict": True}}
ASKED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Rome?"}],
    "tools": [WEATHER],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "logit_bias": BLANKS,
    "seed": 2,
}


def template_of(name: str) -> str:
    """CHATML with calls in the form of that name."""
    calls = "{% if m.tool_calls %}{% set calls = m.tool_calls %}" + BODIES[name] + "{% endif %}"
    return (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content or '' }}" + calls + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.fixture(scope="module", params=["hermes", "qwen3-coder", "mistral-args", "llama3", "lfm2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = str(request.param)
    return tiny.write_model(tmp_path_factory.mktemp(name) / "m", template=template_of(name))


async def chat(client: Inside, **body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The choice of a whole answer, and the same made of the chunks of a stream."""
    status, whole = await client.ask("POST", "/v1/chat/completions", **ASKED | body)
    assert status == 200, whole
    answer = await client.app.test_client().post(
        "/v1/chat/completions", json=ASKED | body | {"stream": True}, headers={"Host": "localhost"}
    )
    content: str = ""
    calls: list[dict[str, Any]] = []
    reason = None
    for line in (await answer.get_data(as_text=True)).splitlines():
        if not line.startswith("data: {"):
            continue
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        delta, reason = choice["delta"], choice["finish_reason"] or reason
        content += delta.get("content") or ""
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(calls):
                calls.append({"name": part["function"]["name"], "arguments": ""})
            calls[part["index"]]["arguments"] += part["function"]["arguments"]
    return whole["choices"][0], {"content": content, "calls": calls, "reason": reason}


def check_the_same(whole: dict[str, Any], stream: dict[str, Any]) -> list[dict[str, Any]]:
    """Raises AssertionError where a whole answer and its stream differ; returns the calls."""
    calls = [call["function"] for call in whole["message"].get("tool_calls", [])]
    assert stream == {
        "content": whole["message"]["content"] or "", "calls": calls, "reason": whole["finish_reason"],
    }  # fmt: skip
    return calls


def run(tmp_path: Path, folder: Path, work: Callable[[Inside], Awaitable[None]]) -> None:
    inside(tmp_path / "data", folder, work)


def test_a_call_that_max_tokens_cuts_off(tmp_path: Path, folder: Path) -> None:
    async def work(client: Inside) -> None:
        whole, stream = await chat(client, max_tokens=300)
        (call,) = check_the_same(whole, stream)
        assert whole["finish_reason"] == "tool_calls" and set(json.loads(call["arguments"])) == {"city"}
        kinds = set()
        for n in range(1, 60, 3):
            whole, stream = await chat(client, max_tokens=n)
            calls = check_the_same(whole, stream)
            if whole["finish_reason"] == "tool_calls":
                break
            assert whole["finish_reason"] == "length"
            assert not whole["message"]["content"]  # no markup
            for one in calls:
                assert one["name"] == "get_weather"
                assert call["arguments"].startswith(one["arguments"])
            kinds.add(len(calls))
        assert kinds == {0, 1}

    run(tmp_path, folder, work)


def test_a_response_that_is_cut_off(tmp_path: Path, folder: Path) -> None:
    async def work(client: Inside) -> None:
        asked = {
            "input": "Rome?", "tools": [FLAT], "tool_choice": "required", "parallel_tool_calls": False,
            "logit_bias": BLANKS, "seed": 2,
        }  # fmt: skip
        full = await client.respond(**asked | {"max_output_tokens": 300})
        (call,) = full["output"]
        assert call["type"] == "function_call" and call["status"] == "completed"
        cut = 0
        for n in range(5, 60, 6):
            answer = await client.respond(**asked | {"max_output_tokens": n})
            if answer["status"] == "completed":
                break
            (item,) = answer["output"]
            assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
            if item["type"] == "message":
                assert item["content"][0]["text"] == ""
            else:
                cut += 1
                assert item["name"] == "get_weather" and call["arguments"].startswith(item["arguments"])
                assert item["status"] == ("completed" if item["arguments"] == call["arguments"] else "incomplete")
            status, again = await client.get(f"/v1/responses/{answer['id']}")
            assert (status, again["output"]) == (200, answer["output"])
        assert cut

    run(tmp_path, folder, work)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_tools_beside_a_response_format(tmp_path: Path, folder: Path, seed: int) -> None:
    async def work(client: Inside) -> None:
        for choice in ("auto", "none", "required", {"type": "function", "function": {"name": "get_weather"}}):
            body: dict[str, Any] = {"tool_choice": choice, "response_format": FORMAT, "seed": seed, "max_tokens": 300}
            whole, stream = await chat(client, **body)
            calls = check_the_same(whole, stream)
            content = whole["message"]["content"]
            assert whole["finish_reason"] == ("tool_calls" if calls else "stop")
            if calls:
                assert choice != "none" and content is None and set(json.loads(calls[0]["arguments"])) == {"city"}
            else:
                assert choice in ("auto", "none") and set(json.loads(content)) == {"n"}
        answer = await client.respond(
            input="x", tools=[FLAT], parallel_tool_calls=False, max_output_tokens=300, logit_bias=BLANKS, seed=seed,
            text={"format": {"type": "json_schema", "name": "answer", "schema": ANSWER, "strict": True}},
        )  # fmt: skip
        (item,) = answer["output"]
        assert item["type"] == "function_call" or set(json.loads(item["content"][0]["text"])) == {"n"}

    run(tmp_path, folder, work)


def test_a_stop_string_that_cuts_a_call(tmp_path: Path, folder: Path) -> None:
    async def work(client: Inside) -> None:
        for stop in ("_weather", "city"):
            whole, stream = await chat(client, max_tokens=300, stop=[stop])
            calls = check_the_same(whole, stream)
            assert not whole["message"]["content"]
            is_whole = bool(calls) and calls[0]["arguments"].endswith("}")
            assert whole["finish_reason"] == ("tool_calls" if is_whole else "stop")

    run(tmp_path, folder, work)


def test_look_around_in_the_pattern_of_a_tool(tmp_path: Path, folder: Path) -> None:
    parameters = {"type": "object", "properties": {"s": {"type": "string", "pattern": "^(?=a).*$"}}}

    def tools(**more: Any) -> list[dict[str, Any]]:
        return [WEATHER, {"type": "function", "function": {"name": "t2", "parameters": parameters, **more}}]

    async def work(client: Inside) -> None:
        await chat(client, tools=tools(), tool_choice="auto", max_tokens=3)
        body = ASKED | {"tools": tools(strict=True), "max_tokens": 3}
        status, answer = await client.ask("POST", "/v1/chat/completions", **body)
        assert status == 400
        message = answer["error"]["message"]
        assert message.startswith("tools[1].function.parameters.properties.s.pattern") and "lark" not in message.lower()

    run(tmp_path, folder, work)


def test_results_go_back_to_the_model(tmp_path: Path, folder: Path) -> None:
    async def work(client: Inside) -> None:
        called = {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_0123456789abcdef_0_0", "type": "function",
             "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}},
        ]}  # fmt: skip
        result = {"role": "tool", "tool_call_id": "call_0123456789abcdef_0_0", "content": "sunny"}
        messages = [*ASKED["messages"], called, result]
        whole, stream = await chat(client, messages=messages, tool_choice="auto", max_tokens=5)
        check_the_same(whole, stream)

    run(tmp_path, folder, work)
