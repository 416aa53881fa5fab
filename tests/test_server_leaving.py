"""A client that leaves while its answer starts leaves no session and no run, on any route."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fabula.engine.generation import Generation
from fabula.engine.scheduler import Load
from fabula.model import Model
from fabula.sessions.session import Session
from test_openai_inside import Inside, inside, user

CHAT = {"max_len": 4, "seed": 1}
OLD = {"session_id": "old", "max_len": 4}

FIRST, SECOND = "the first response", "the second response"

# path and body of a request
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/chat", {"message": "hi", **CHAT}),
    "chat, named": ("/chat", {"message": "hi", "session_id": "new", **CHAT}),
    "chat, again": ("/chat", {"message": "more", **OLD}),
    "chat, streamed": ("/chat", {"message": "hi", "stream": True, **CHAT}),
    "chat, background": ("/chat", {"message": "hi", "background": True, **CHAT}),
    "story": ("/story", {"prompt": "the whale", **CHAT}),
    "regenerate": ("/regenerate", OLD),
    "edit": ("/edit", {"turn": 1, "message": "other", **OLD}),
    "continue": ("/continue", OLD),
    "replay": ("/replay", {"turn": 1, **OLD}),
    "fork_at": ("/fork_at", {"turn": 1, "position": 0, "token_id": 7, **OLD}),
    "branch": ("/branch", {"n": 2, "message": "which", **OLD}),
    "chat completions": ("/v1/chat/completions", {"messages": user("hi"), "n": 2, "max_tokens": 4}),
    "completions": ("/v1/completions", {"prompt": ["the", "whale"], "max_tokens": 4}),
    "messages, streamed": ("/v1/messages", {"messages": user("hi"), "max_tokens": 4, "stream": True}),
    "ollama's chat": ("/api/chat", {"messages": user("hi"), "options": {"num_predict": 4}}),
    "ollama's generate": ("/api/generate", {"prompt": "hi", "stream": False, "options": {"num_predict": 4}}),
    "responses": ("/v1/responses", {"input": "hi", "max_output_tokens": 4}),
    "responses, streamed": ("/v1/responses", {"input": "hi", "stream": True}),
    "responses, not stored": ("/v1/responses", {"input": "hi", "store": False}),
    "responses, next": ("/v1/responses", {"input": "hi", "previous_response_id": SECOND}),
    "responses, fork": ("/v1/responses", {"input": "hi", "previous_response_id": FIRST}),
    "responses, fork not stored": ("/v1/responses", {"input": "hi", "previous_response_id": FIRST, "store": False}),
}


class Gate:
    """Holds every call of a function after its work was done, before it returns.

    Attributes:
        reached: set when a call is held.
        opened: lets the calls return.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self._function = function

    def install(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        def held(*args: Any, **kwargs: Any) -> Any:
            found = self._function(*args, **kwargs)
            self.reached.set()
            self.opened.wait()
            return found

        monkeypatch.setattr(owner, name, held)


def what_is_there(state: Any) -> dict[str, Any]:
    """What a request could leave: sessions with their turns, and runs."""
    sessions = {one.record.id: one.n_turns for one in state.workspace.sessions("")}
    heads = {id: state.workspace.open(id).head.id for id in sessions}
    return {"sessions": sessions, "heads": heads, "runs": len(state.runs.active()), "reserved": reserved(state)}


def reserved(state: Any) -> int:
    return sum(state.limits._beginning.values())


async def ask(client: Inside, path: str, body: dict[str, Any]) -> Any:
    """A connection that has sent a request and waits for its response."""
    headers = {"Host": "localhost", "Content-Type": "application/json"}
    connection = client.app.test_client().request(path, method="POST", headers=headers)
    await connection.__aenter__()
    await connection.send(json.dumps(body).encode())
    await connection.send_complete()
    return connection


async def leave(connection: Any) -> None:
    """The client disconnects; returns when the server has cancelled the request."""
    await connection.disconnect()
    with suppress(asyncio.CancelledError):
        await connection._task


async def settled(state: Any, model: Model) -> None:
    """Waits until what follows the client's leaving is done, and the engine is idle."""
    while state._later or reserved(state) or state.runs.active() or model._engine.scheduler.load != Load(0, 0):
        await asyncio.sleep(0.005)


def used_pages(model: Model) -> int:
    gc.collect()
    model.clear_cache()
    return model._runner.pool.n_pages - model._runner.pool.n_free


@pytest.mark.parametrize("route", ROUTES)
def test_a_client_that_leaves_while_its_answer_starts(
    route: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(client: Inside) -> None:
        state = client.app.extensions["fabula"]
        model = state.models["tiny"].model
        await client.ask("POST", "/chat", message="one", session_id="old", max_len=4, seed=1)
        first = await client.respond(input="hi", seed=1)
        second = await client.respond(input="go on", seed=1, previous_response_id=first["id"])
        await settled(state, model)
        before, pages = what_is_there(state), used_pages(model)
        gate = Gate(Generation.__init__)
        gate.install(monkeypatch, Generation, "__init__")
        path, body = ROUTES[route]
        ids = {FIRST: first["id"], SECOND: second["id"]}
        body = {name: ids.get(value, value) if isinstance(value, str) else value for name, value in body.items()}
        asking = await ask(client, path, body)
        while not gate.reached.is_set():
            await asyncio.sleep(0.005)
        assert reserved(state) >= 1
        await leave(asking)
        assert reserved(state) >= 1, "a start that goes on counts against the limit"
        gate.opened.set()
        monkeypatch.undo()
        await settled(state, model)
        assert what_is_there(state) == before and used_pages(model) == pages
        status, found = await client.ask("POST", path, **body)  # and it works for clients that stay
        assert status in (200, 202), found

    inside(tmp_path, tiny_folder, work)


def test_a_client_that_leaves_while_texts_are_embedded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(client: Inside) -> None:
        state = client.app.extensions["fabula"]
        model = state.models["tiny"].model
        gate = Gate(Model.embed)
        gate.install(monkeypatch, Model, "embed")
        asking = await ask(client, "/v1/embeddings", {"input": "hi"})
        while not gate.reached.is_set():
            await asyncio.sleep(0.005)
        await leave(asking)
        assert reserved(state) == 1
        gate.opened.set()
        await settled(state, model)
        assert reserved(state) == 0

    inside(tmp_path, tiny_folder, work)


@pytest.mark.parametrize("path, body", [("/chat", {"message": "hi"}), ("/v1/responses", {"input": "hi"})])
def test_a_client_that_leaves_before_the_first_token(
    path: str, body: dict[str, Any], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run exists and has read nothing."""

    async def work(client: Inside) -> None:
        state = client.app.extensions["fabula"]
        release = asyncio.Event()
        read = Generation.__anext__

        async def held(self: Generation) -> Any:
            await release.wait()
            await asyncio.to_thread(self.cancel)  # as the engine does where the prompt is not read yet
            return await read(self)

        monkeypatch.setattr(Generation, "__anext__", held)
        asking = await ask(client, path, body)
        while not state.runs.active():
            await asyncio.sleep(0.005)
        (run,) = state.runs.active()
        await leave(asking)
        while not run.is_left:
            await asyncio.sleep(0.005)
        release.set()
        await settled(state, state.models["tiny"].model)
        assert what_is_there(state) == {"sessions": {}, "heads": {}, "runs": 0, "reserved": 0}

    inside(tmp_path, tiny_folder, work)


def test_a_start_that_fails_after_its_client_left(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(client: Inside) -> None:
        state = client.app.extensions["fabula"]
        reached, opened = threading.Event(), threading.Event()

        def fail(*_: Any, **__: Any) -> Any:
            reached.set()
            opened.wait()
            raise RuntimeError("it is broken")

        monkeypatch.setattr(Session, "say", fail)
        for path, body in (("/chat", {"message": "hi"}), ("/v1/responses", {"input": "hi"})):
            reached.clear()
            opened.clear()
            asking = await ask(client, path, body)
            while not reached.is_set():
                await asyncio.sleep(0.005)
            await leave(asking)
            opened.set()
            await settled(state, state.models["tiny"].model)
        assert what_is_there(state) == {"sessions": {}, "heads": {}, "runs": 0, "reserved": 0}

    inside(tmp_path, tiny_folder, work)
