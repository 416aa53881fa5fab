"""Conversations of `/v1/responses`, failures while answering, and separate callers: with an app in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from fabula.engine.generation import Generation
from fabula.errors import NonFinite
from fabula.server import Settings, create_app
from fabula.server.openai.items import Output
from fabula.sessions.session import Session
from fabula.workspace import Workspace
from ticking import watched

CALL = '{"name": "get_weather", "arguments": {"city": "Rome"}}'


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def inside(folder: Path, tiny_folder: Path, work: Callable[[Any], Awaitable[None]], **settings: Any) -> None:
    """Runs `work` with a client of an app in this process."""

    async def main() -> None:
        with Workspace(folder) as workspace:
            app = create_app(workspace, Settings(model=(f"tiny={tiny_folder}",), threads=1, **settings))
            async with watched(), app.test_app():
                client = Inside(app)
                while (await client.get("/health"))[0] != 200:
                    await asyncio.sleep(0.01)
                await work(client)

    asyncio.run(main())


class Inside:
    """A client of an app in this process; replies are (status, JSON)."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def ask(self, method: str, path: str, key: str = "", **body: Any) -> tuple[int, Any]:
        headers = {"Host": "localhost", "Authorization": f"Bearer {key}"}
        given = {"json": body} if body else {}
        answer = await self.app.test_client().open(path, method=method, headers=headers, **given)
        return answer.status_code, await answer.get_json()

    async def get(self, path: str, key: str = "") -> tuple[int, Any]:
        return await self.ask("GET", path, key)

    async def respond(self, key: str = "", **body: Any) -> Any:
        status, answer = await self.ask("POST", "/v1/responses", key, **{"max_output_tokens": 6} | body)
        assert status == 200, answer
        return answer


def break_after_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every answer fail after its third token."""
    read = Generation._read

    def fail(self: Generation, item: Any) -> Any:
        if len(self.token_ids) == 3:
            self.cancel()
            raise NonFinite("layer 1 gives NaN")
        return read(self, item)

    monkeypatch.setattr(Generation, "_read", fail)


def test_two_go_on_from_one(tiny_folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        first = await client.respond(input="hi", seed=1)
        both = await asyncio.gather(
            *(client.respond(input="go on", seed=1, previous_response_id=first["id"]) for _ in range(4))
        )
        assert len({one["id"] for one in both}) == 4
        assert len({one["output"][0]["content"][0]["text"] for one in both}) == 1
        for one in both:
            assert one["usage"]["input_tokens_details"]["cached_tokens"] >= first["usage"]["total_tokens"] - 1
            assert (await client.get("/v1/responses/" + one["id"]))[1]["output"] == one["output"]
        for one in both:
            assert (await client.ask("DELETE", "/v1/responses/" + one["id"]))[1]["deleted"] is True
        assert (await client.get("/v1/responses/" + first["id"]))[0] == 200
        assert (await client.ask("DELETE", "/v1/responses/" + first["id"]))[0] == 200
        assert client.app.extensions["fabula"].workspace.n_sessions() == 0

    inside(tmp_path, tiny_folder, work)


def test_conversations_outlive_the_process(tiny_folder: Path, tmp_path: Path) -> None:
    made: list[Any] = []

    async def begin(client: Inside) -> None:
        made.append(await client.respond(input="hi", instructions="Be brief."))
        made.append(await client.respond(input="more", previous_response_id=made[0]["id"]))

    async def go_on(client: Inside) -> None:
        for one in made:
            status, found = await client.get("/v1/responses/" + one["id"])
            assert status == 200 and found["output"] == one["output"] and found["instructions"] == "Be brief."
            assert (await client.respond(input="on", previous_response_id=one["id"]))["output"]

    inside(tmp_path, tiny_folder, begin)
    inside(tmp_path, tiny_folder, go_on)


def test_the_oldest_conversation_makes_room(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fabula.server.openai.conversations.MAX_CONVERSATIONS", 3)

    async def work(client: Inside) -> None:
        made = [await client.respond(input="hi") for _ in range(3)]
        await client.respond(input="more", previous_response_id=made[0]["id"])
        await client.respond(input="hi")
        there = [(await client.get("/v1/responses/" + one["id"]))[0] for one in made]
        assert there == [200, 404, 200]

    inside(tmp_path, tiny_folder, work)


def test_keys_have_their_own(tiny_folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("anna:" + "a" * 32 + "\nbert:" + "b" * 32 + "\n")

    async def work(client: Inside) -> None:
        anna, bert = "a" * 32, "b" * 32
        assert (await client.get("/v1/models"))[1]["error"]["code"] == "invalid_api_key"
        one = await client.respond(anna, input="hi")
        assert (await client.get("/v1/responses/" + one["id"], anna))[0] == 200
        assert (await client.get("/v1/responses/" + one["id"], bert))[0] == 404
        status, answer = await client.ask("POST", "/v1/responses", bert, input="hi", previous_response_id=one["id"])
        assert (status, answer["error"]["code"]) == (400, "previous_response_not_found")
        for key, reused in ((anna, False), (anna, True), (bert, False)):
            chat = {"messages": user("the same words " * 20), "max_tokens": 2}
            _, answer = await client.ask("POST", "/v1/chat/completions", key, **chat)
            assert (answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0) is reused

    inside(tmp_path / "data", tiny_folder, work, keys=keys)


@pytest.mark.parametrize(
    ("path", "body", "kinds"),
    [
        ("chat/completions", {"messages": user("hi")}, ["chat.completion.chunk"]),
        ("completions", {"prompt": "hi", "max_tokens": 100}, ["text_completion"]),
        ("responses", {"input": "hi"}, ["response.created", "error", "response.failed"]),
    ],
)
def test_what_fails_in_the_middle_is_told(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, body: Any, kinds: list[str]
) -> None:
    break_after_three(monkeypatch)

    async def work(client: Inside) -> None:
        answer = await client.app.test_client().post(
            "/v1/" + path, json=body | {"stream": True, "ignore_eos": True}, headers={"Host": "localhost"}
        )
        lines = [line for line in (await answer.get_data(as_text=True)).split("\n") if line.startswith("data: {")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        found = [event.get("type", event.get("object")) for event in events]
        assert set(kinds) <= set(found)
        told = events[-2] if path == "responses" else events[-1]["error"]
        assert told["code"] == "model_damaged"
        status, answer = await client.ask("POST", "/v1/" + path, **body | {"ignore_eos": True})
        assert status == 500 and answer["error"]["code"] == "model_damaged"

    inside(tmp_path, tiny_folder, work)


@pytest.mark.parametrize(
    ("text", "kinds", "words"),
    [
        ("", ["message"], ""),
        ("\n ", ["message"], "\n "),
        ("\n<tool_call>" + CALL + "</tool_call>\n", ["function_call"], ""),
        ("a\n<tool_call>" + CALL + "</tool_call> <tool_call>" + CALL, ["message", *["function_call"] * 2], "a\n"),
        ("a <tool_call>no call", ["message"], "a <tool_call>no call"),
    ],
)  # fmt: skip
def test_items_are_the_same_whole_and_in_pieces(text: str, kinds: list[str], words: str) -> None:
    whole, pieces = Output("k", True), Output("k", True)
    _ = [*whole.feed(text), *whole.finish(is_whole=True)]
    events = [event for letter in text for event in pieces.feed(letter)] + list(pieces.finish(is_whole=True))
    assert whole.items == pieces.items and [item["type"] for item in whole.items] == kinds
    said = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert said == words
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == whole.items


def test_rollback_with_prune_is_one_step(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollback of another page between going back and pruning deleted the turns that were to stay."""

    def interrupted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(session: Session, *args: Any, **kwargs: Any) -> Any:
            found = method(session, *args, **kwargs)
            if not session._lock._is_owned():  # type: ignore[attr-defined]  # the lock is free: another page comes in
                monkeypatch.undo()
                session.rollback(0)
            return found

        return call

    async def work(client: Inside) -> None:
        for message in ("one", "two", "three"):
            assert (await client.ask("POST", "/chat", session_id="s", message=message, max_len=2))[0] == 200
        monkeypatch.setattr(Session, "rollback", interrupted(Session.rollback))
        monkeypatch.setattr(Session, "prune", interrupted(Session.prune))
        status, pruned = await client.ask("POST", "/rollback", session_id="s", target_turn=2, prune=True)
        assert status == 200 and pruned["head"] == 0 and pruned["freed_bytes"] > 0
        _, tree = await client.get("/sessions/s/tree")
        assert [turn["number"] for turn in tree["turns"]] == [1, 2], "only what lies after turn 2 is gone"

    inside(tmp_path, tiny_folder, work)
