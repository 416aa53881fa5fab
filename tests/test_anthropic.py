"""Anthropic's Messages API: its own SDK against a server, and the bytes of its events with an app in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from fabula.server.anthropic.prompt import prompt_of
from fabula.server.anthropic.schemas import CountBody
from fabula.server.failures import ApiError
from fabula.server.limits import Limits
from fabula.server.settings import Settings
from serving import Running
from test_openai_inside import Inside, break_after_three, inside

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "get_weather", "description": "The weather of a city", "input_schema": CITY}
NO_BLANKS = {"4": -100, "5": -100}  # of which a random model would write many between the parts of JSON
CALL: dict[str, Any] = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rome"}}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if len(content) == 1 and isinstance(content[0], str) else [*content]}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("anthropic") / "tiny", config={"max_position_embeddings": 4096})


# ---- The prompt -----------------------------------------------------------------------------------------------------


def prompt(*messages: dict[str, Any], **more: Any) -> Any:
    body = CountBody.model_validate({"messages": list(messages)} | more)
    return prompt_of(body, Limits(Settings(), None))  # type: ignore[arg-type]  # no session is counted


def test_blocks_become_messages() -> None:
    thought = {"type": "thinking", "thinking": "A tool.", "signature": "s"}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [text("Sunny"), text(", 25°C")]}
    found = prompt(
        user(text("What is"), text(" the weather?")),
        {"role": "assistant", "content": [thought, text("Let me see."), CALL]},
        user(text("Here it is."), result),
        system=[text("x-anthropic-billing-header: cc_version=2.1; cch=a5145;"), text("Be brief."), text("Be kind.")],
    )  # fmt: skip
    call = {"id": "t1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    assert found.messages == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "A tool.", "tool_calls": [call]},
        {"role": "tool", "content": "Sunny, 25°C", "tool_call_id": "t1", "name": "get_weather"},
        {"role": "user", "content": "Here it is."},
    ]


@pytest.mark.parametrize(
    ("system", "left"),
    [
        ("x-anthropic-billing-header: cc_version=2.1.1; cc_entrypoint=cli; cch=a5;You are kind.", "You are kind."),
        ("x-anthropic-billing-header: cc_version=2; cch=1;\nYou are kind.", "You are kind."),
        ("Never write x-anthropic-billing-header: a=b;", "Never write x-anthropic-billing-header: a=b;"),
        ("", None),
        ([], None),
    ],
)  # fmt: skip
def test_bookkeeping_is_left_out(system: Any, left: str | None) -> None:
    found = prompt(user("hi"), system=system).messages
    assert [one["content"] for one in found if one["role"] == "system"] == ([left] if left else [])


def test_turns_of_one_role_are_one_turn() -> None:
    found = prompt(user("a"), user("b"), {"role": "assistant", "content": "c"}, {"role": "assistant", "content": "d"})
    assert [one["content"] for one in found.messages] == ["a\n\nb", "cd"]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"content": "City not found", "is_error": True}, "Error: City not found"),
        ({"content": "<tool_use_error>no</tool_use_error>", "is_error": True}, "<tool_use_error>no</tool_use_error>"),
        ({}, ""),
        ({"content": []}, ""),
    ],
)
def test_results_of_tools(result: dict[str, Any], words: str) -> None:
    found = prompt(user({"type": "tool_result", "tool_use_id": "t9"} | result))
    assert found.messages == [{"role": "tool", "content": words, "tool_call_id": "t9"}]


def test_documents_are_text() -> None:
    plain = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "A whale."}}
    parts = {"type": "document", "source": {"type": "content", "content": [text("One. "), text("Two. ")]}}
    found = {"type": "search_result", "source": "s", "title": "Sea", "content": [text("deep")]}
    assert prompt(user(parts, plain, found)).messages[0]["content"] == "One. Two. A whale.Sea\ndeep"


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"type": "image", "source": {"type": "base64", "data": ""}}, "'image': image input is not supported"),
        ({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image"}]}, "[0].content[0].type is 'image'"),
        ({"type": "document", "source": {"type": "base64"}}, "only documents with text"),
        ({"type": "riddle"}, "messages[0].content[0].type is 'riddle'"),
        ({"type": "text"}, "messages[0].content[0].text must be a string"),
        ({"text": "a"}, "messages[0].content[0].type is missing"),
        ({"type": "tool_result"}, "messages[0].content[0].tool_use_id must be a string"),
        (3, "messages[0].content[0].type is missing"),
    ],
)
def test_what_is_not_text_is_refused_by_name(block: Any, words: str) -> None:
    with pytest.raises(ApiError) as found:
        prompt({"role": "user", "content": [block]})
    assert found.value.status == 400 and words in found.value.message


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, (1, None, True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, (1, "auto", False)),
        ({"type": "any"}, (1, "required", True)),
        ({"type": "tool", "name": "get_weather"}, (1, {"type": "function", "function": {"name": "get_weather"}}, True)),
        ({"type": "none"}, (0, "none", True)),
    ],
)
def test_tools_and_their_choice(choice: Any, expected: Any) -> None:
    found = prompt(user("hi"), tools=[WEATHER], tool_choice=choice)
    assert (len(found.tools), found.choice, found.parallel) == expected


# ---- Answers --------------------------------------------------------------------------------------------------------


async def stream(client: Inside, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, whose names are those of their data."""
    answer = await client.app.test_client().post(
        "/v1/messages", json=body | {"stream": True}, headers={"Host": "localhost"}
    )
    found = []
    for part in (await answer.get_data(as_text=True)).split("\n\n")[:-1]:
        name, _, data = part.partition("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def gathered(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that events describe; raises AssertionError for one out of order."""
    events = [event for event in events if event["type"] != "ping"]
    start, *middle, delta, stop = events
    assert (start["type"], delta["type"], stop["type"]) == ("message_start", "message_delta", "message_stop")
    message, is_open = start["message"], False
    assert message["content"] == [] and message["stop_reason"] is None and message["usage"]["input_tokens"] > 0
    for event in middle:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(message["content"])
            message["content"].append(event["content_block"] | {"#": ""})
            is_open = True
            continue
        assert is_open and event["index"] == len(message["content"]) - 1
        block = message["content"][-1]
        if event["type"] == "content_block_stop":
            is_open, written = False, block.pop("#")
            block |= {"input": json.loads(written or "{}")} if block["type"] == "tool_use" else {block["type"]: written}
        else:
            (name,) = event["delta"].keys() - {"type"}
            block["#"] += event["delta"][name]
    assert not is_open
    return message | delta["delta"] | {"usage": delta["usage"]}


def check(message: dict[str, Any], whole: dict[str, Any]) -> None:
    """Raises AssertionError where a stream and a whole answer differ."""
    for one in (message, whole):
        del one["id"], one["usage"]
        for i, block in enumerate(one["content"]):
            if block["type"] == "tool_use":
                assert block.pop("id").startswith("toolu_") and block["name"] == WEATHER["name"], i
    assert message == whole


def test_a_stream_is_the_whole_answer_in_pieces(folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        asked: dict[str, Any] = {"model": "any", "messages": [user("hi")], "max_tokens": 9, "seed": 3}
        status, whole = await client.ask("POST", "/v1/messages", **asked)
        assert status == 200 and whole["id"].startswith("msg_") and whole["model"] == "tiny"
        assert whole["stop_reason"] == "max_tokens" and whole["usage"]["output_tokens"] == 9
        events = await stream(client, **asked)
        assert [event["type"] for event in events[:3]] == ["message_start", "ping", "content_block_start"]
        check(gathered(events), whole)
        forced = asked | {
            "tools": [WEATHER],
            "tool_choice": {"type": "any"},
            "logit_bias": NO_BLANKS,
            "max_tokens": 200,
        }
        status, whole = await client.ask("POST", "/v1/messages", **forced)
        assert whole["stop_reason"] == "tool_use" and set(whole["content"][0]["input"]) == {"city"}
        check(gathered(await stream(client, **forced)), whole)
        short = forced | {"max_tokens": 20}
        status, whole = await client.ask("POST", "/v1/messages", **short)
        assert status == 200 and whole["stop_reason"] == "max_tokens"

    inside(tmp_path, folder, work)


def test_why_an_answer_ended(folder: Path, tmp_path: Path) -> None:
    async def ended(client: Inside, **body: Any) -> tuple[str, Any, str]:
        status, whole = await client.ask("POST", "/v1/messages", **{"messages": [user("hi")], "seed": 3} | body)
        assert status == 200, whole
        return whole["stop_reason"], whole["stop_sequence"], whole["content"][0]["text"]

    async def work(client: Inside) -> None:
        reason, _, words = await ended(client, max_tokens=12)
        assert reason == "max_tokens" and len(words) > 6
        stop = words[3:5]
        assert await ended(client, max_tokens=12, stop_sequences=["~never~", stop]) == (
            "stop_sequence",
            stop,
            words[:3],
        )
        assert (await ended(client, max_tokens=3, constraint={"regex": "a"}))[0] == "end_turn"
        assert (await ended(client, ignore_eos=True))[0] == "model_context_window_exceeded"
        schema = {"type": "json_schema", "schema": CITY}
        for asked in ({"output_config": {"format": schema}}, {"output_format": schema}):
            reason, _, words = await ended(client, logit_bias=NO_BLANKS, **asked)
            assert reason == "end_turn" and set(json.loads(words)) == {"city"}

    inside(tmp_path, folder, work)


THINKING = tiny.CHATML.replace("assistant\n", "assistant\n{{ '<think>\n' if enable_thinking else '<think></think>' }}")


def test_thoughts_are_blocks_of_their_own(tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        asked: dict[str, Any] = {"messages": [user("hi")], "max_tokens": 30, "seed": 3, "ignore_eos": True}
        for thinking in ({"type": "enabled", "budget_tokens": 6}, {"type": "adaptive", "budget_tokens": 6}):
            status, whole = await client.ask("POST", "/v1/messages", **asked, thinking=thinking)
            assert status == 200 and [block["type"] for block in whole["content"]] == ["thinking", "text"]
            thought, answer = whole["content"]
            assert 0 < len(thought["thinking"]) <= 12 and thought["signature"] and "think>" not in answer["text"]
            events = await stream(client, **asked, thinking=thinking)
            kinds = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
            assert list(dict.fromkeys(kinds)) == ["thinking_delta", "signature_delta", "text_delta"]
            streamed = [event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta"]
            assert "".join(streamed) == answer["text"]
        hidden = {"type": "enabled", "budget_tokens": 6, "display": "omitted"}
        _, whole = await client.ask("POST", "/v1/messages", **asked, thinking=hidden)
        assert [block.get("thinking", "") for block in whole["content"]] == ["", ""]
        for thinking in (None, {"type": "disabled"}):
            _, whole = await client.ask("POST", "/v1/messages", **asked, thinking=thinking)
            assert [block["type"] for block in whole["content"]] == ["text"]

    folder = tiny.write_model(tmp_path / "m", template=THINKING)
    inside(tmp_path / "w", folder, work)


def test_an_answer_that_continues(folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        asked: dict[str, Any] = {"max_tokens": 6, "seed": 3}
        _, whole = await client.ask("POST", "/v1/messages", messages=[user("hi")], **asked)
        begun = {"role": "assistant", "content": "Once"}
        _, more = await client.ask("POST", "/v1/messages/count_tokens", messages=[user("hi"), begun])
        _, less = await client.ask("POST", "/v1/messages/count_tokens", messages=[user("hi")])
        assert more["input_tokens"] == less["input_tokens"] + 4 == whole["usage"]["input_tokens"] + 4

    inside(tmp_path, folder, work)


# ---- What Claude Code sends -----------------------------------------------------------------------------------------


def claude_code(hash_: str, *messages: dict[str, Any]) -> dict[str, Any]:
    """A request as Claude Code makes it: blocks, cache marks, many tools, fields of betas."""
    cached = {"cache_control": {"type": "ephemeral"}}
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | CITY
    return {
        "model": "claude-sonnet-4-5-20250929",
        "system": [
            text(f"x-anthropic-billing-header: cc_version=2.1.117.48f; cc_entrypoint=cli; cch={hash_};"),
            text("You are Claude Code.") | cached,
            text("You help with code. " * 8) | cached,
        ],
        "messages": list(messages),
        "tools": [
            {**WEATHER, "input_schema": schema, "eager_input_streaming": True} | cached,
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        ],
        "metadata": {"user_id": '{"device_id":"d","session_id":"s"}'},
        "max_tokens": 8,
        "temperature": 1,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "seed": 1,
    }


def test_claude_code_finds_its_past_in_the_cache(folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        said = user(text("<system-reminder>\nToday.\n</system-reminder>"), text("Weather?") | {"cache_control": None})
        first = gathered(await stream(client, **claude_code("a5145", said)))
        history = [{"role": "assistant", "content": [CALL]}]
        result = {"type": "tool_result", "tool_use_id": "t1", "content": "Sunny", "is_error": False}
        second = gathered(await stream(client, **claude_code("eb6c6", said, *history, user(result, text("And?")))))
        known = first["usage"]["input_tokens"] + first["usage"]["cache_read_input_tokens"]
        assert second["usage"]["cache_read_input_tokens"] > known - 40 > 0
        assert second["usage"]["input_tokens"] < 200
        answer = await client.app.test_client().post(
            "/v1/messages?beta=true", json=claude_code("1", said), headers={"Host": "localhost"}
        )
        assert answer.status_code == 200 and answer.headers["request-id"]
        assert answer.headers["fabula-ignored"] == "context_management, tools[1]"
        status, found = await client.ask("POST", "/v1/messages/count_tokens", **claude_code("2", said))
        assert status == 200 and found == {"input_tokens": known}

    inside(tmp_path, folder, work)


# ---- Errors and keys ------------------------------------------------------------------------------------------------


WRONG: list[tuple[dict[str, Any], int, str, str]] = [
    ({"messages": None}, 400, "invalid_request_error", "messages"),
    ({"messages": []}, 400, "invalid_request_error", "messages"),
    ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
    ({"max_tokens": 1.5}, 400, "invalid_request_error", "max_tokens"),
    ({"top_p": 3}, 400, "invalid_request_error", "top_p"),
    ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "needs tools"),
    ({"tools": [{"name": "a"}]}, 400, "invalid_request_error", "tools[0].input_schema"),
    ({"messages": [{"role": "robot", "content": "a"}]}, 400, "invalid_request_error", "role"),
    ({"messages": [user("a" * 5000)]}, 400, "invalid_request_error", "prompt is too long: 5017 tokens > 4096 maximum"),
    ({"messages": [user("a" * 1_000_001)]}, 413, "request_too_large", "1000000"),
]


def test_errors_have_anthropics_shape(folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        for body, status, kind, words in WRONG:
            found, error = await client.ask("POST", "/v1/messages", **{"messages": [user("a")]} | body)
            assert (found, error["type"], error["error"]["type"]) == (status, "error", kind), error
            assert words in error["error"]["message"] and error["request_id"]
        found, error = await client.get("/v1/messages/none")
        assert (found, error["error"]["type"]) == (404, "not_found_error")

    inside(tmp_path, folder, work)


def test_a_failure_in_the_middle_ends_the_stream(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_after_three(monkeypatch)

    async def work(client: Inside) -> None:
        asked: dict[str, Any] = {"messages": [user("hi")], "ignore_eos": True, "seed": 1}
        *_, last = await stream(client, **asked)
        assert last["type"] == "error" and last["error"]["type"] == "api_error" and last["error"]["message"]
        status, error = await client.ask("POST", "/v1/messages", **asked)
        assert status == 500 and error["error"] == last["error"]

    inside(tmp_path, folder, work)


def test_keys_in_their_own_header(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("anna:" + "a" * 32 + "\n")

    async def work(client: Inside) -> None:
        async def ask(headers: dict[str, str]) -> tuple[int, Any]:
            asked = {"messages": [user("hi")]}
            answer = await client.app.test_client().post(
                "/v1/messages/count_tokens", json=asked, headers={"Host": "localhost"} | headers
            )
            return answer.status_code, await answer.get_json()

        assert (await ask({"x-api-key": "a" * 32}))[0] == 200
        assert (await ask({"x-api-key": "other", "Authorization": "Bearer " + "a" * 32}))[0] == 200
        for wrong in ({}, {"x-api-key": "b" * 32}, {"x-api-key": "a" * 32, "Authorization": "Bearer b"}):
            status, error = await ask(wrong)
            assert (status, error["error"]["type"]) == (401, "authentication_error")

    inside(tmp_path / "w", folder, work, keys=tmp_path / "keys")


# ---- The SDK --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    pytest.importorskip("anthropic", reason="the anthropic package is not installed")
    with Running(tmp_path_factory.mktemp("sdk"), f"tiny={folder}", "--threads", "1") as running:
        yield running


@pytest.fixture
def client(served: Running) -> Iterator[Any]:
    import anthropic

    with anthropic.Anthropic(base_url=served.address, api_key="none", max_retries=0) as found:
        yield found


def test_sdk_answers_and_streams(client: Any) -> None:
    asked: dict[str, Any] = {
        "model": "claude-opus-4-1",
        "max_tokens": 7,
        "messages": [user("hi")],
        "extra_body": {"seed": 5},
    }
    message = client.messages.create(**asked)
    assert message.type == "message" and message.role == "assistant" and message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 7 and message.content[0].type == "text" and message._request_id
    with client.messages.stream(**asked) as events:
        words = "".join(events.text_stream)
        final = events.get_final_message()
    assert words == final.content[0].text == message.content[0].text
    usage = final.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == message.usage.input_tokens
    counted = client.messages.count_tokens(model="claude-opus-4-1", messages=[user("hi")])
    assert counted.input_tokens == message.usage.input_tokens


def test_sdk_lists_the_models(client: Any) -> None:
    (model,) = client.models.list()
    assert (model.id, model.display_name, model.type, model.max_input_tokens) == ("tiny", "tiny", "model", 4096)
    assert client.models.retrieve("tiny").created_at == model.created_at


def test_sdk_uses_tools(client: Any) -> None:
    asked: dict[str, Any] = {
        "model": "claude", "max_tokens": 300, "tools": [WEATHER], "extra_body": {"logit_bias": NO_BLANKS, "seed": 4},
        "tool_choice": {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
    }  # fmt: skip
    question = user("Weather in Rome?")
    message = client.messages.create(messages=[question], **asked)
    assert message.stop_reason == "tool_use"
    (call,) = message.content
    assert call.type == "tool_use" and call.name == "get_weather" and set(call.input) == {"city"}
    with client.messages.stream(messages=[question], **asked) as events:
        final = events.get_final_message()
    assert final.content[0].input == call.input and final.stop_reason == "tool_use"
    result = user({"type": "tool_result", "tool_use_id": call.id, "content": [text("Sunny")]})
    more = client.messages.create(
        messages=[question, {"role": "assistant", "content": message.content}, result], model="claude", max_tokens=4
    )
    assert more.content and more.usage.cache_read_input_tokens >= 0


def test_sdk_reads_errors(client: Any) -> None:
    import anthropic

    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    with pytest.raises(anthropic.BadRequestError, match="image input is not supported") as found:
        client.messages.create(model="claude", max_tokens=4, messages=[user(image)])
    assert found.value.request_id and found.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(model="claude", max_tokens=4, messages=[user("a" * 6000)], stream=True)
