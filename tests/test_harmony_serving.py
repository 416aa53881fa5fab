"""gpt-oss over HTTP: a tiny checkpoint of the family with harmony's control tokens answers a script, token by token.

The template is a small one, and the one that OpenAI publishes where llama.cpp's source tree, which has it, is at hand
(FABULA_TEST_LLAMA_SOURCE). Under a constraint every token of the script must be one that the grammar allows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from decoder_families import GPT_OSS, ODD, Case, make_model
from fabula.engine.decoding import Decoding
from fabula.text.stream import BYTE_OF_CHARACTER
from fabula.text.tokenizer import Tokenizer
from test_openai_inside import Inside, inside
from tool_templates import HARMONY

TOKENS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>", "<|pad|>")
N_BYTES = 256
ENDS = [N_BYTES + TOKENS.index(token) for token in ("<|return|>", "<|call|>")]
# In place of `thinking`, under which the published template looks for thoughts.
SMALL = HARMONY.replace(
    "{%- if m.tool_calls -%}",
    "{%- if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif -%}"
    "{%- if m.tool_calls -%}",
)
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": CITY}}
FLAT = {"type": "function", "name": "get_weather", "description": "d", "parameters": CITY}
ANTHROPIC = {"name": "get_weather", "description": "d", "input_schema": CITY}

THOUGHT = "<|channel|>analysis<|message|>They ask about Rome.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>It is 20 degrees.<|return|>"
PREAMBLE = "<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant"
ARGUMENTS = '{"city": "Rome"}'
CALL = f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>"
CALL_FIRST = f" to=functions.get_weather<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>"
USER = {"role": "user", "content": "How is Rome?"}


def templates() -> Iterator[Any]:
    yield pytest.param("small", id="small")
    yield pytest.param("published", id="published")


def template_of(name: str) -> str:
    if name == "small":
        return SMALL
    source = os.environ.get("FABULA_TEST_LLAMA_SOURCE")
    if source is None:
        pytest.skip("the published template is not at hand: FABULA_TEST_LLAMA_SOURCE names no source tree of llama.cpp")
    return (Path(source) / "models" / "templates" / "openai-gpt-oss-120b.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=templates())
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as released ones are: control tokens, two tokens that end an answer, a template of its own file."""
    template = template_of(request.param)
    folder = tmp_path_factory.mktemp("harmony") / "m"
    case = Case("GptOss", ODD | GPT_OSS | {
        "vocab_size": N_BYTES + len(TOKENS), "num_hidden_layers": 2, "eos_token_id": ENDS[0], "bos_token_id": None,
        "pad_token_id": N_BYTES + len(TOKENS) - 1, "max_position_embeddings": 8192,
    })  # fmt: skip
    make_model(case, folder)
    vocabulary = {character: i for i, character in enumerate(BYTE_OF_CHARACTER)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*TOKENS])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|return|>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    (folder / "chat_template.jinja").write_text(template)
    return folder


class Script:
    """What the model says, and the prompts it was given."""

    def __init__(self) -> None:
        self.text = ""
        self.prompts: list[str] = []

    def token(self, decoding: Decoding) -> int:
        tokenizer: Tokenizer = decoding._tokenizer
        n = decoding._n_sampled
        if n == 0:
            self.prompts.append(tokenizer.decode(decoding.history.ids.tolist(), skip_special=False))
        token = tokenizer.encode(self.text, add_bos=False, special=True)[n]
        guide = decoding._guide
        assert guide is None or decoding._is_unconstrained or guide.allowed[token], (self.text, n)
        return token


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    made = Script()
    monkeypatch.setattr(Decoding, "_forced", lambda decoding: made.token(decoding))
    monkeypatch.setattr(Decoding, "samples_natively", property(lambda _: False))
    return made


def run(tmp_path: Path, folder: Path, work: Callable[[Inside], Awaitable[None]]) -> None:
    inside(tmp_path / "data", folder, work)


async def events(client: Inside, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream."""
    headers = {"Host": "localhost"}
    answer = await client.app.test_client().post(path, json=body | {"stream": True}, headers=headers)
    lines = (await answer.get_data(as_text=True)).splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


# ---- /v1/chat/completions -------------------------------------------------------------------------------------------


async def chat(client: Inside, **body: Any) -> dict[str, Any]:
    """The message of a whole answer and its finish reason; its stream must say the same."""
    status, whole = await client.ask("POST", "/v1/chat/completions", messages=[USER], **body)
    assert status == 200, whole
    (choice,) = whole["choices"]
    found = {"content": "", "reasoning_content": "", "calls": [], "reason": None}
    order: list[str] = []
    for event in await events(client, "/v1/chat/completions", **{"messages": [USER]} | body):
        (part,) = event["choices"]
        found["reason"] = part["finish_reason"] or found["reason"]
        for kind in ("reasoning_content", "content"):
            if part["delta"].get(kind):
                found[kind] += part["delta"][kind]
                order.append(kind)
        for call in part["delta"].get("tool_calls", ()):
            if call["index"] == len(found["calls"]):
                found["calls"].append([call["function"]["name"], ""])
            found["calls"][call["index"]][1] += call["function"].get("arguments", "")
            order.append("call")
    message = choice["message"]
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", [])]
    assert found == {
        "content": message["content"] or "",
        "reasoning_content": message.get("reasoning_content", ""),
        "calls": calls,
        "reason": choice["finish_reason"],
    }
    wanted = ["reasoning_content", "content", "call"]
    assert list(dict.fromkeys(order)) == [kind for kind in wanted if kind in order]
    return found


def test_chat(tmp_path: Path, folder: Path, script: Script) -> None:
    async def work(client: Inside) -> None:
        script.text = THOUGHT + FINAL
        assert await chat(client) == {
            "content": "It is 20 degrees.", "reasoning_content": "They ask about Rome.", "calls": [], "reason": "stop",
        }  # fmt: skip
        assert script.prompts[0].endswith("<|start|>user<|message|>How is Rome?<|end|><|start|>assistant")
        script.text = FINAL
        assert (await chat(client))["content"] == "It is 20 degrees."
        for choice in ("auto", "required"):
            script.text = THOUGHT + PREAMBLE + CALL
            assert await chat(client, tools=[WEATHER], tool_choice=choice) == {
                "content": "One moment." , "reasoning_content": "They ask about Rome.",
                "calls": [["get_weather", ARGUMENTS]], "reason": "tool_calls",
            }  # fmt: skip
        assert "get_weather" in script.prompts[-1]
        script.text = THOUGHT + CALL_FIRST
        found = await chat(client, tools=[WEATHER])
        assert found["calls"] == [["get_weather", ARGUMENTS]] and found["content"] == ""

    run(tmp_path, folder, work)


def test_chat_that_is_cut_off(tmp_path: Path, folder: Path, script: Script) -> None:
    """At every place: no mark is content, and what came before is a start of what a whole answer has."""

    async def work(client: Inside) -> None:
        script.text = THOUGHT + PREAMBLE + CALL
        reasons = []
        for n in range(1, 80, 6):
            found = await chat(client, tools=[WEATHER], max_tokens=n)
            reasons.append(found["reason"])
            assert "They ask about Rome.".startswith(found["reasoning_content"])
            assert "One moment.".startswith(found["content"])
            for name, arguments in found["calls"]:
                assert name == "get_weather" and ARGUMENTS.startswith(arguments)
        assert set(reasons) == {"length"}

    run(tmp_path, folder, work)


def test_results_go_back(tmp_path: Path, folder: Path, script: Script) -> None:
    async def work(client: Inside) -> None:
        script.text = THOUGHT + PREAMBLE + CALL
        status, first = await client.ask("POST", "/v1/chat/completions", messages=[USER], tools=[WEATHER])
        assert status == 200
        message = first["choices"][0]["message"]
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}
        script.text = FINAL
        status, second = await client.ask(
            "POST", "/v1/chat/completions", messages=[USER, message, result], tools=[WEATHER]
        )
        assert status == 200 and second["choices"][0]["message"]["content"] == "It is 20 degrees."
        prompt = script.prompts[-1]
        assert "<|channel|>analysis<|message|>They ask about Rome.\n\nOne moment.<|end|>" in prompt
        called = prompt.index("<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>")
        assert prompt.index("sunny") > called and "<|call|>" in prompt[called:]

    run(tmp_path, folder, work)


# ---- /v1/responses and /v1/messages ---------------------------------------------------------------------------------


def test_responses(tmp_path: Path, folder: Path, script: Script) -> None:
    async def work(client: Inside) -> None:
        script.text = THOUGHT + FINAL
        whole = await client.respond(input="How is Rome?", max_output_tokens=300)
        thought, message = whole["output"]
        assert (thought["type"], thought["content"][0]["text"]) == ("reasoning", "They ask about Rome.")
        assert (message["type"], message["content"][0]["text"]) == ("message", "It is 20 degrees.")
        assert whole["status"] == "completed"
        found = await events(client, "/v1/responses", input="How is Rome?", max_output_tokens=300)
        for kind, words in (("reasoning_text", "They ask about Rome."), ("output_text", "It is 20 degrees.")):
            parts = [event["delta"] for event in found if event["type"] == f"response.{kind}.delta"]
            assert "".join(parts) == words
        asked = {"previous_response_id": whole["id"], "max_output_tokens": 300}
        after = await client.respond(input="And Oslo?", **asked)
        assert [item["type"] for item in after["output"]] == ["reasoning", "message"]
        assert script.prompts[-1] == script.prompts[0] + script.text.replace("<|return|>", "<|end|>") + (
            "<|start|>user<|message|>And Oslo?<|end|><|start|>assistant"
        )
        assert after["usage"]["input_tokens_details"]["cached_tokens"] > 0

        script.text = THOUGHT + CALL
        asked = {"input": "How is Rome?", "tools": [FLAT], "max_output_tokens": 300}
        whole = await client.respond(**asked)
        assert [item["type"] for item in whole["output"]] == ["reasoning", "function_call"]
        call = whole["output"][1]
        assert (call["name"], call["arguments"], call["status"]) == ("get_weather", ARGUMENTS, "completed")
        found = await events(client, "/v1/responses", **asked)
        parts = [event["delta"] for event in found if event["type"] == "response.function_call_arguments.delta"]
        assert "".join(parts) == ARGUMENTS

        script.text = FINAL
        output = [{"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}]
        after = await client.respond(input=output, previous_response_id=whole["id"], max_output_tokens=300)
        assert after["output"][-1]["content"][0]["text"] == "It is 20 degrees."
        assert ARGUMENTS in script.prompts[-1] and "sunny" in script.prompts[-1]

    run(tmp_path, folder, work)


def test_messages(tmp_path: Path, folder: Path, script: Script) -> None:
    async def work(client: Inside) -> None:
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 300, "messages": [USER]}
        thinking = {"type": "enabled", "budget_tokens": 1024}
        script.text = THOUGHT + FINAL
        status, whole = await client.ask("POST", "/v1/messages", **asked, thinking=thinking)
        assert status == 200, whole
        thought, answer = whole["content"]
        assert (thought["type"], thought["thinking"]) == ("thinking", "They ask about Rome.")
        assert (answer["type"], answer["text"], whole["stop_reason"]) == ("text", "It is 20 degrees.", "end_turn")
        deltas = [e["delta"] for e in await events(client, "/v1/messages", **asked, thinking=thinking) if "delta" in e]
        assert "".join(delta.get("thinking", "") for delta in deltas) == "They ask about Rome."
        assert "".join(delta.get("text", "") for delta in deltas) == "It is 20 degrees."

        script.text = THOUGHT + PREAMBLE + CALL
        status, whole = await client.ask("POST", "/v1/messages", **asked, tools=[ANTHROPIC])
        assert status == 200, whole
        blocks = [block for block in whole["content"] if block["type"] != "thinking"]
        assert [block["type"] for block in blocks] == ["text", "tool_use"]
        assert blocks[0]["text"] == "One moment." and blocks[1]["input"] == {"city": "Rome"}
        assert whole["stop_reason"] == "tool_use"
        deltas = [e["delta"] for e in await events(client, "/v1/messages", **asked, tools=[ANTHROPIC]) if "delta" in e]
        assert "".join(delta.get("partial_json", "") for delta in deltas) == ARGUMENTS

        script.text = FINAL
        result = {"type": "tool_result", "tool_use_id": blocks[1]["id"], "content": "sunny"}
        told = [USER, {"role": "assistant", "content": whole["content"]}, {"role": "user", "content": [result]}]
        status, whole = await client.ask("POST", "/v1/messages", **asked | {"messages": told}, tools=[ANTHROPIC])
        assert status == 200 and whole["content"][-1]["text"] == "It is 20 degrees."
        assert "sunny" in script.prompts[-1] and ARGUMENTS in script.prompts[-1]

    run(tmp_path, folder, work)


@pytest.mark.parametrize("end", ["<|return|>", "<|call|>"])
def test_ends(tmp_path: Path, folder: Path, script: Script, end: str) -> None:
    """Both tokens end an answer, and neither is text."""

    async def work(client: Inside) -> None:
        script.text = "<|channel|>final<|message|>Done." + end + "and more"
        assert (await chat(client))["content"] == "Done."

    run(tmp_path, folder, work)
