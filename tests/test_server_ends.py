"""Answers that the server ends before their end: every API says so in its own words, whole and streamed.

An answer as long as it was asked to be has the finish reason "length". One that the server's stop, its time limit or
the deletion of its session ended is an error there, since those APIs have no finish reason for it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from fabula.server.failures import ended_early, stopped
from test_openai_inside import Inside, inside

HI = [{"role": "user", "content": "hi"}]
# Ollama has no ignore_eos.
LONG: dict[str, Any] = {"model": "tiny", "options": {"num_predict": 15_000}}
LONG |= {"format": {"type": "string", "minLength": 10_000}}
# path, body with an answer that ends by itself only after thousands of tokens
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI, "max_tokens": 15_000, "ignore_eos": True},
    "/v1/completions": {"prompt": "hi", "max_tokens": 15_000, "ignore_eos": True},
    "/v1/responses": {"input": "hi", "max_output_tokens": 15_000, "ignore_eos": True},
    "/v1/messages": {"messages": HI, "max_tokens": 15_000, "ignore_eos": True},
    "/api/chat": LONG | {"messages": HI},
    "/api/generate": LONG | {"prompt": "hi"},
    "/completion": {"prompt": "hi", "n_predict": 15_000, "ignore_eos": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for long answers."""
    return tiny.write_model(tmp_path_factory.mktemp("ends") / "tiny", config={"max_position_embeddings": 20_000})


async def asked(client: Inside, path: str, *, stream: bool) -> tuple[int, Any, str]:
    """Status, headers and text of a reply to a long answer."""
    headers = {"Host": "localhost"}
    body = ROUTES[path] | {"stream": stream}
    reply = await client.app.test_client().post(path, json=body, headers=headers)
    return reply.status_code, reply.headers, await reply.get_data(as_text=True)


async def while_running(client: Inside, asking: Awaitable[Any], end: Callable[[Any], Awaitable[None]]) -> Any:
    """Ends the run of a request as soon as it has made a token."""
    task = asyncio.ensure_future(asking)
    runs = client.app.extensions["fabula"].runs
    while not any(len(run.events) > 2 for run in runs.active()):
        assert not task.done(), task.result()
        await asyncio.sleep(0.001)
    for run in runs.active():
        await end(run)
    return await task


def error_of(path: str, text: str) -> tuple[str, str]:
    """The message of an error, and its kind where the API has kinds."""
    body = json.loads(text)
    if path.startswith("/api/"):
        return body["error"], ""
    error = body["error"]
    return error["message"], error["type"] if path == "/v1/messages" else error["code"]


def last_of(path: str, text: str) -> tuple[str, str]:
    """The same of the error in a stream."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith(("data: {", "{"))]
    events = [json.loads(line) for line in lines]
    assert not any(f'"{word}"' in line for word in ("length", "max_tokens", "done_reason") for line in lines)
    assert not any('"incomplete_details":{' in line for line in lines)
    if path == "/v1/responses":
        error, failed = events[-2:]
        assert error["type"] == "error" and failed["type"] == "response.failed"
        response = failed["response"]
        assert response["status"] == "failed" and response["error"]["message"] == error["message"]
        said = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
        assert response["output"][0]["content"][0]["text"] == said
        assert response["output"][0]["status"] == "incomplete" and response["usage"]["output_tokens"] > 0
        return error["message"], error["code"]
    return error_of(path, next(line for line in lines[::-1] if '"error"' in line))


WORDS = {
    "stopped": (503, "server was stopped", "overloaded_error"),
    "cancelled": (409, "session deleted", "invalid_request_error"),
    "timeout": (504, "answer_s", "timeout_error"),
}


def check(path: str, kind: str, status: int, headers: Any, text: str, *, stream: bool) -> None:
    expected, words, of_anthropic = WORDS[kind]
    message, code = last_of(path, text) if stream else error_of(path, text)
    assert status == (200 if stream else expected) and words in message
    if not path.startswith("/api/"):
        assert code == (of_anthropic if path == "/v1/messages" else kind)
    if not stream:
        assert ("Retry-After" in headers) is (kind == "stopped")
        assert headers.get("x-should-retry") == (None if kind == "stopped" else "false")


async def run_out_of_time(run: Any) -> None:
    """The deadline of its answers is now; the engine looks at it before each step."""
    for source in run.sources:
        generation = getattr(source, "generation", source)
        generation._request.deadline = 0.0
        generation.engine.scheduler.wake()


ENDS: dict[str, Callable[[Any], Awaitable[None]]] = {
    "stopped": lambda run: run.stop(stopped()),
    "cancelled": lambda run: run.stop(),
    "timeout": run_out_of_time,
}


@pytest.mark.parametrize("path", ROUTES)
def test_ended_by_the_server(path: str, folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        for stream in (False, True):
            for kind, end in ENDS.items():
                found = await while_running(client, asked(client, path, stream=stream), end)
                check(path, kind, *found, stream=stream)

    inside(tmp_path, folder, work)


def test_a_deleted_session_and_a_stored_response(folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        conversation = (await client.ask("POST", "/v1/conversations", metadata={}))[1]["id"]

        async def delete(_: Any) -> None:
            assert (await client.ask("DELETE", f"/v1/conversations/{conversation}"))[0] == 200

        asking = client.ask("POST", "/v1/responses", **ROUTES["/v1/responses"], conversation=conversation)
        status, reply = await while_running(client, asking, delete)
        assert status == 409 and reply["error"]["code"] == "cancelled"

        asking_stream = asked(client, "/v1/responses", stream=True)
        text = (await while_running(client, asking_stream, lambda run: run.stop()))[2]
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        id = events[-1]["response"]["id"]
        status, stored = await client.get(f"/v1/responses/{id}")
        assert status == 200 and stored["status"] == "failed" and stored["incomplete_details"] is None
        assert "stopped" in stored["error"]["message"] and stored["output"] == events[-1]["response"]["output"]

    inside(tmp_path, folder, work)


def test_an_answer_as_long_as_asked_is_no_error() -> None:
    assert ended_early("stop") is ended_early("length") is None


def test_own_routes_keep_their_reasons(folder: Path, tmp_path: Path) -> None:
    """Fabula's own API has words for it: nothing is an error there."""

    async def work(client: Inside) -> None:
        asking = client.ask("POST", "/chat", message="hi", max_len=15_000, ignore_eos=True)
        status, reply = await while_running(client, asking, lambda run: run.stop(stopped()))
        assert status == 200 and reply["finish_reason"] == "cancelled"

    inside(tmp_path, folder, work)
