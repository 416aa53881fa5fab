"""Ollama's API: its Python client against a server, and lines and errors with an app in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from fabula.server.failures import ApiError
from fabula.server.limits import Limits
from fabula.server.ollama.options import params_of
from fabula.server.ollama.prompt import messages_of
from fabula.server.ollama.schemas import Answered, ChatMessageIn
from fabula.server.ollama.writer import Parts, joined
from fabula.server.settings import Settings
from fabula.sessions.tool_call_parser import parser_of
from fabula.sessions.tool_forms import HERMES
from serving import Running, lasting_port
from test_openai_inside import Inside, break_after_three, inside

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "d", "parameters": CITY}
WEATHER = {"type": "function", "function": FUNCTION}
HI = [{"role": "user", "content": "hi"}]
DURATIONS = ("total_duration", "prompt_eval_duration", "eval_duration")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("ollama") / "tiny", config={"max_position_embeddings": 4096})


# ---- Settings and messages ------------------------------------------------------------------------------------------


def settings(**options: Any) -> Any:
    return params_of(Answered.model_validate({"options": options}))


def test_options_by_their_names() -> None:
    found = settings(
        num_predict=7.0, temperature=0, top_k=40, top_p=0.9, min_p=0.1, typical_p=0.8, repeat_penalty=1.2,
        repeat_last_n=-1, presence_penalty=1, frequency_penalty=0.5, seed=42, stop=["a", "b"],
    )  # fmt: skip
    assert (found.max_tokens, found.temperature, found.top_k, found.top_p, found.min_p) == (7, 0, 40, 0.9, 0.1)
    assert (found.typical_p, found.repetition_penalty, found.penalty_window) == (0.8, 1.2, -1)
    assert (found.presence_penalty, found.frequency_penalty, found.seed, found.stop) == (1, 0.5, 42, ("a", "b"))


def test_options_that_mean_no_limit() -> None:
    for unlimited in (-1, -2):
        assert settings(num_predict=unlimited).max_tokens is None
    assert settings(seed=-1).seed is None and settings(top_k=-1).top_k == 0
    assert 0 < settings(top_p=0).top_p < 1e-3 and settings(stop="end").stop == ("end",) and settings().stop == ()


@pytest.mark.parametrize("options", [{"num_predict": 0}, {"top_p": 2}, {"repeat_penalty": -1}, {"stop": [""]}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"max_tokens|top_p|repetition_penalty|stop"):
        settings(**options)


def converted(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    limits = Limits(Settings(), None)  # type: ignore[arg-type]  # no session is counted
    return messages_of([ChatMessageIn.model_validate(message) for message in messages], limits)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}}


def test_results_belong_to_calls_by_name_and_order() -> None:
    found = converted(
        *HI,
        {"role": "assistant", "content": "", "thinking": "Two.", "tool_calls": [call("a", n=1), call("b"), call("a")]},
        {"role": "tool", "content": "of b", "tool_name": "b"},
        {"role": "tool", "content": "of the first a", "tool_name": "a"},
        {"role": "tool", "content": "of the second"},
    )
    assert found[1]["reasoning_content"] == "Two." and found[1]["tool_calls"][0]["function"]["arguments"] == {"n": 1}
    ids = [one["id"] for one in found[1]["tool_calls"]]
    assert [one["tool_call_id"] for one in found[2:]] == [ids[1], ids[0], ids[2]]
    assert [one["name"] for one in found[2:]] == ["b", "a", "a"]
    assert converted({"role": "tool", "content": "alone"}) == [{"role": "tool", "content": "alone"}]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": "a", "images": ["aGk="]}, "messages[0].images holds images: image input is not"),
        ({"role": "robot", "content": "a"}, "messages[0].role is 'robot'"),
    ],
)
def test_messages_that_are_refused(message: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiError) as found:
        converted(message)
    assert words in found.value.message and found.value.status == 400


def test_calls_are_whole_pieces() -> None:
    def pieces(text: str, *, is_whole: bool = True) -> list[dict[str, Any]]:
        parser = parser_of(HERMES, {"get_weather": CITY})
        events = [event for letter in text for event in parser.feed(letter)]
        return list(Parts("k").take([*events, *parser.finish(is_whole=is_whole)]))

    written = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>'
    calls = [one["tool_calls"][0] for one in pieces(written + "\n" + written)]
    assert [one["function"] for one in calls] == [
        {"index": i, "name": "get_weather", "arguments": {"city": "Rome"}} for i in range(2)
    ]
    assert len({one["id"] for one in calls}) == 2
    assert joined(pieces("Let me see. " + written))["content"] == "Let me see. "
    assert joined(pieces(written[:-20], is_whole=False)) == {"content": written[:-20]}, "cut off: no call, but its text"


# ---- Answers --------------------------------------------------------------------------------------------------------


async def lines(client: Inside, path: str, **body: Any) -> list[dict[str, Any]]:
    answer = await client.app.test_client().post(path, json=body, headers={"Host": "localhost"})
    assert answer.content_type == "application/x-ndjson" and answer.status_code == 200
    return [json.loads(line) for line in (await answer.get_data(as_text=True)).splitlines()]


def check_end(last: dict[str, Any], reason: str, n: int) -> None:
    assert last["done"] is True and last["done_reason"] == reason and last["eval_count"] == n
    assert last["prompt_eval_count"] > 0 and all(last[name] > 0 for name in DURATIONS)


def test_lines_are_the_whole_answer_in_pieces(folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        asked: dict[str, Any] = {"model": "any", "options": {"num_predict": 6, "seed": 2}}
        _, whole = await client.ask("POST", "/api/chat", **asked, messages=HI, stream=False)
        *pieces, last = await lines(client, "/api/chat", **asked, messages=HI)
        assert whole["model"] == last["model"] == "tiny" and whole["message"]["role"] == "assistant"
        assert "".join(one["message"]["content"] for one in pieces) == whole["message"]["content"]
        assert not any(one["done"] for one in pieces) and last["message"]["content"] == ""
        check_end(whole, "length", 6)
        check_end(last, "length", 6)
        status, other = await client.ask("POST", "/api/generate", **asked, prompt="hi", stream=False)
        assert (status, other["response"]) == (200, whole["message"]["content"])
        *pieces, last = await lines(client, "/api/generate", **asked, prompt="hi")
        assert "".join(one["response"] for one in pieces) == other["response"]
        assert last["context"] == other["context"] and len(last["context"]) == last["prompt_eval_count"] + 6
        told = await lines(client, "/api/chat", **asked, messages=HI, logprobs=True, top_logprobs=2)
        entries = [entry for one in told for entry in one.get("logprobs", [])]
        assert len(entries) == 6 and all(len(entry["top_logprobs"]) == 2 for entry in entries)

    inside(tmp_path, folder, work)


def test_formats_and_raw_prompts(folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        asked: dict[str, Any] = {"stream": False, "options": {"seed": 1, "num_predict": 300}}
        _, found = await client.ask("POST", "/api/chat", messages=HI, format=CITY, **asked)
        assert set(json.loads(found["message"]["content"])) == {"city"} and found["done_reason"] == "stop"
        _, found = await client.ask("POST", "/api/generate", prompt="Once", raw=True, **asked)
        assert found["prompt_eval_count"] == 4 and "context" not in found
        more = asked | {"options": {"num_predict": 3}}
        _, first = await client.ask("POST", "/api/generate", prompt="hi", **more)
        _, second = await client.ask("POST", "/api/generate", prompt="and", context=first["context"], **more)
        assert second["context"][: len(first["context"])] == first["context"]
        assert second["prompt_eval_count"] > len(first["context"]) + 3

    inside(tmp_path, folder, work)


def test_thoughts(tmp_path: Path) -> None:
    begins = tiny.CHATML.replace(
        "assistant\n", "assistant\n{{ '<think></think>' if enable_thinking is false else '' }}"
    )

    async def work(client: Inside) -> None:
        asked: dict[str, Any] = {"messages": HI, "options": {"num_predict": 12, "seed": 2}}
        _, whole = await client.ask("POST", "/api/chat", **asked, think=False, stream=False)
        assert "thinking" not in whole["message"] and whole["message"]["content"]
        assert "thinking" in (await client.ask("POST", "/api/show", model="tiny"))[1]["capabilities"]
        status, error = await client.ask("POST", "/api/chat", **asked, think="hard")
        assert status == 400 and "think is 'hard'" in error["error"]

    inside(tmp_path / "w", tiny.write_model(tmp_path / "m", template=begins), work)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("/api/chat", {"messages": HI, "format": "xml"}, "format is 'xml'"),
    ("/api/chat", {"messages": HI, "options": {"num_predict": 1.5}}, "options.num_predict"),
    ("/api/chat", {"messages": "hi"}, "messages"),
    ("/api/chat", {"messages": HI, "tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name"),
    ("/api/chat", {"messages": [{"role": "user", "content": "a" * 5000}]}, "tokens do not fit"),
    ("/api/generate", {"prompt": "a", "images": ["aGk="]}, "images holds images: image input is not supported"),
    ("/api/generate", {"prompt": "a", "template": "{{ .Prompt }}"}, "template is not supported"),
    ("/api/generate", {"prompt": "a", "suffix": "b"}, "suffix needs a model with marks for gaps"),
    ("/api/generate", {"prompt": "a", "raw": True, "system": "b"}, "raw excludes"),
    ("/api/generate", {"prompt": "a", "context": [10**9]}, "token id"),
    ("/api/embed", {"input": ["a", ""]}, "input[1] is empty"),
    ("/api/embed", {"input": "a", "dimensions": 5}, "dimensions is 5"),
    ("/api/copy", {"source": "tiny", "destination": "a b"}, "destination"),
    ("/api/copy", {"source": "tiny", "destination": "tiny"}, "the name of a model"),
    ("/api/pull", {}, "model is missing"),
]


def test_errors_have_ollamas_shape(folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        for path, body, words in WRONG:
            status, found = await client.ask("POST", path, **{"stream": False} | body)
            assert status == 400 and found.keys() == {"error"} and words in found["error"], (path, body, found)
        for path, method in (("/api/push", "POST"), ("/api/create", "POST"), ("/api/chat", "GET")):
            status, found = await client.ask(method, path, model="tiny")
            assert status in (404, 405) and found.keys() == {"error"}

    inside(tmp_path, folder, work)


def test_a_failure_in_the_middle_ends_the_stream(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_after_three(monkeypatch)

    async def work(client: Inside) -> None:
        asked: dict[str, Any] = {"messages": HI, "format": {"type": "array", "minItems": 9}}
        *pieces, last = await lines(client, "/api/chat", **asked)
        assert pieces and last.keys() == {"error"} and last["error"]
        status, error = await client.ask("POST", "/api/chat", **asked, stream=False)
        assert status == 500 and error == last

    inside(tmp_path, folder, work)


def test_what_is_ignored_is_named(folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        odd = {"num_predict": 2, "num_ctx": 8192, "mirostat": 2, "num_gpu": -1, "a\nb": 1}
        body = {"messages": [HI[0] | {"mood": 1}], "options": odd, "keep_alive": "5m", "stream": False, "shift": True}
        answer = await client.app.test_client().post("/api/chat", json=body, headers={"Host": "localhost"})
        names = set(answer.headers["fabula-ignored"].split(", "))
        options = {"options.num_ctx", "options.mirostat", "options.num_gpu", "?"}
        assert answer.status_code == 200 and names == {"shift", "messages[0].mood"} | options

    inside(tmp_path, folder, work)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 200),
        ({"Content-Type": "text/plain", "Origin": "http://localhost"}, 415),
        ({"Content-Type": "text/plain", "Sec-Fetch-Site": "cross-site"}, 415),
        ({"Content-Type": "text/plain", "Origin": "http://evil.example"}, 403),
    ],
)
def test_bodies_of_curl_and_of_pages(folder: Path, tmp_path: Path, headers: dict[str, str], status: int) -> None:
    async def work(client: Inside) -> None:
        body = json.dumps({"model": "tiny", "prompt": "hi", "options": {"num_predict": 1}})
        answer = await client.app.test_client().post(
            "/api/generate", data=body, headers={"Host": "localhost"} | headers
        )
        assert answer.status_code == status

    inside(tmp_path, folder, work)


def test_names_belong_to_a_key(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("anna:" + "a" * 32 + "\nbert:" + "b" * 32 + "\n")

    async def work(client: Inside) -> None:
        anna, bert = "a" * 32, "b" * 32
        assert (await client.ask("POST", "/api/copy", anna, source="tiny:latest", destination="gpt-4"))[0] == 200
        assert (await client.ask("POST", "/api/chat", anna, model="gpt-4"))[1]["model"] == "tiny"
        assert (await client.ask("DELETE", "/api/delete", bert, model="gpt-4"))[0] == 404
        assert (await client.ask("DELETE", "/api/delete", anna, model="gpt-4:latest"))[0] == 200
        assert (await client.ask("DELETE", "/api/delete", anna, model="gpt-4"))[0] == 404
        status, found = await client.ask("DELETE", "/api/delete", anna, model="tiny")
        assert status == 400 and "started with it" in found["error"]
        assert (await client.get("/api/tags"))[1].keys() == {"error"}

    inside(tmp_path / "w", folder, work, keys=tmp_path / "keys")


def test_a_model_that_pull_adds(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny.write_model(tmp_path / "other")
    monkeypatch.setattr("fabula.server.ollama.manage.can_be_fetched", lambda name: name == "owner/other")
    monkeypatch.setattr("fabula.model.locate", lambda name, **_: other if name == "owner/other" else folder)

    async def work(client: Inside) -> None:
        assert (await client.ask("POST", "/api/pull", model="owner/none"))[0] == 404
        steps = await lines(client, "/api/pull", model="hf.co/owner/other")
        assert steps[0] == {"status": "pulling manifest"} and steps[-1] == {"status": "success"}
        names = [one["name"] for one in (await client.get("/api/tags"))[1]["models"]]
        assert names == ["tiny:latest", "owner/other:latest"]
        status, found = await client.ask("POST", "/api/chat", model="owner/other", messages=HI, stream=False)
        assert (status, found["model"]) == (200, "owner/other")
        assert (await client.ask("POST", "/api/chat", model="nobody", messages=HI))[0] == 404
        assert (await client.ask("DELETE", "/api/delete", model="owner/other"))[0] == 200
        assert len((await client.get("/api/ps"))[1]["models"]) == 1

    inside(tmp_path / "w", folder, work, pull=True)


# ---- The client -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    pytest.importorskip("ollama", reason="the ollama package is not installed")
    data, port = tmp_path_factory.mktemp("client"), lasting_port()
    with Running(data, f"tiny={folder}", "--threads", "1", "--ollama-port", str(port)) as running:
        running.ollama = f"http://127.0.0.1:{port}"  # type: ignore[attr-defined]
        yield running


@pytest.fixture
def client(served: Running) -> Iterator[Any]:
    import ollama

    found = ollama.Client(host=served.ollama)  # type: ignore[attr-defined]
    with found._client:
        yield found


def test_client_sees_the_models(client: Any, served: Running) -> None:
    (model,) = client.list().models
    assert model.model == "tiny:latest" and model.size > 0 and len(model.digest) == 64 and model.modified_at
    assert model.details.format == "safetensors" and model.details.family == "llama"
    shown = client.show("tiny")
    assert shown.capabilities == ["completion", "tools"] and "im_start" in shown.template and shown.modified_at
    assert shown.modelinfo["general.architecture"] == "llama" and shown.modelinfo["llama.context_length"] == 4096
    (loaded,) = client.ps().models
    assert loaded.size > 0 and loaded.context_length == 4096 and loaded.expires_at.year > 2100
    assert [step.status for step in client.pull("tiny", stream=True)] == ["pulling manifest", "success"]
    assert client.pull("tiny").status == client.copy("tiny", "other").status == "success"
    assert client.delete("other").status == "success"
    version = served.get("/api/version")["version"]
    assert tuple(int(part) for part in version.split(".")) >= (0, 6, 4)  # clients ask for a lowest one


def test_client_chats(client: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny", "options": {"num_predict": 5, "seed": 2}, "keep_alive": "10m"}
    whole = client.chat(messages=HI, **asked)
    pieces = list(client.chat(messages=HI, stream=True, **asked))
    assert "".join(piece.message.content for piece in pieces) == whole.message.content
    assert whole.done and whole.done_reason == "length" and whole.eval_count == 5 and whole.total_duration > 0
    text = client.generate(prompt="hi", **asked)
    assert text.response == whole.message.content and text.context
    assert "".join(one.response for one in client.generate(prompt="hi", stream=True, **asked)) == text.response
    assert client.generate(model="tiny").done_reason == "load"


def test_client_uses_tools(client: Any) -> None:
    import ollama

    def get_weather(city: str) -> str:
        """The weather.

        Args:
            city: where
        """
        return f"Sunny in {city}"

    done = client.chat(model="tiny", messages=HI, tools=[get_weather], options={"num_predict": 4, "seed": 1})
    assert done.message.role == "assistant"
    history = [
        *HI,
        ollama.Message(role="assistant", tool_calls=[call("get_weather", city="Rome")]),
        {"role": "tool", "tool_name": "get_weather", "content": get_weather("Rome")},
    ]
    assert client.chat(model="tiny", messages=history, options={"num_predict": 3}).eval_count == 3
    with pytest.raises(ollama.ResponseError, match="image input is not supported") as found:
        client.chat(model="tiny", messages=[HI[0] | {"images": [b"\x89PNG"]}])
    assert found.value.status_code == 400


def test_client_embeds(client: Any) -> None:
    found = client.embed(model="tiny", input=["a whale", "the sea"])
    assert len(found.embeddings) == 2 and found.prompt_eval_count > 2
    assert sum(value * value for value in found.embeddings[0]) == pytest.approx(1, abs=1e-5)
    older = client.embeddings(model="tiny", prompt="a whale")
    assert list(older.embedding) == pytest.approx(found.embeddings[0])
    assert client.embed(model="tiny", input=[]).embeddings == []
