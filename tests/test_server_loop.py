"""Nothing blocks the event loop: locks that others hold, long replays and large replies. `inside` watches the loop."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fabula.engine.decoding import Piece
from fabula.server import logs, runs
from fabula.server.stream import MAX_LETTERS, MAX_PARTS, dumps, dumps_in_parts, is_large
from fabula.sessions.reply import Reply
from test_openai_inside import Inside, inside


@contextmanager
def held(lock: Any) -> Iterator[None]:
    """Another thread holds a lock."""
    has, ended = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            has.set()
            ended.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    has.wait()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_health_waits_for_no_lock(tiny_folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        state = client.app.extensions["fabula"]
        await client.ask("POST", "/chat", message="hi", session_id="a", max_len=3)
        session, model = state.workspace.open("a"), state.models["tiny"].model
        _, before = await client.get("/health")
        for lock in (session._lock, model._runner.pool.lock, state.workspace._lock, state._opening):
            with held(lock):
                walks = asyncio.create_task(client.ask("POST", "/rollback", session_id="a", turn=0))
                for _ in range(3):
                    status, found = await client.get("/health")
                    assert status == 200 and found["models"][0]["cache_limit_bytes"] > 0
                    assert found["models"][0]["cache_bytes"] == before["models"][0]["cache_bytes"]
            assert (await walks)[0] == 200

    inside(tmp_path, tiny_folder, work)


def test_health_tells_what_the_cache_holds_now(tiny_folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        model = client.app.extensions["fabula"].models["tiny"].model
        before = (await client.get("/health"))[1]["models"][0]["cache_bytes"]
        await client.ask("POST", "/chat", message="hi", session_id="a", max_len=3)
        while (await client.get("/health"))[1]["models"][0]["cache_bytes"] <= before:
            await asyncio.sleep(0.005)
        model.clear_cache()

    inside(tmp_path, tiny_folder, work)


def test_a_failed_reply_waits_for_its_session_elsewhere(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop continues while a failed reply waits for the session's lock."""
    from fabula.engine.generation import Generation
    from fabula.errors import NonFinite

    async def work(client: Inside) -> None:
        state = client.app.extensions["fabula"]
        await client.ask("POST", "/write", session_id="a", text="once")
        session = state.workspace.open("a")
        failing = asyncio.Event()
        end, waits = Reply._end, threading.Event()

        async def broken(_: Generation) -> Any:
            await failing.wait()
            raise NonFinite("a logit is NaN")

        def settle(self: Reply, **how: Any) -> None:
            waits.set()
            end(self, **how)

        monkeypatch.setattr(Generation, "__anext__", broken)
        monkeypatch.setattr(Reply, "_end", settle)
        asking = asyncio.create_task(client.ask("POST", "/story", session_id="a", max_len=3))
        while not state.runs.active():
            await asyncio.sleep(0.005)
        with held(session._lock):
            failing.set()
            while not waits.is_set():
                await asyncio.sleep(0.005)
            assert (await client.get("/health"))[0] == 200
        assert (await asking)[0] == 500

    inside(tmp_path, tiny_folder, work)


def test_logging_waits_for_no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads the log stands still: lines are queued, and beyond a limit dropped and counted."""
    monkeypatch.setattr(logs, "MAX_QUEUED", 5)
    monkeypatch.setattr(logs, "FLUSH_S", 0.01)
    entered, leave, written = threading.Event(), threading.Event(), io.StringIO()

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            entered.set()
            leave.wait()
            return written.write(text)

    handler = logs.QueuedHandler(Stream())
    handler.setFormatter(logs.TextLines())

    def log(word: str) -> None:
        handler.handle(logging.makeLogRecord({"msg": word, "levelname": "INFO", "msecs": 0.0}))

    log("first")
    entered.wait()
    for i in range(8):
        log(f"line{i}")
    handler.flush()  # gives up soon
    leave.set()
    monkeypatch.setattr(logs, "FLUSH_S", None)
    handler.flush()
    lines = written.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["first", "line0", "line1", "line2", "line3", "line4", "lines"]
    assert lines[-1].endswith("warning lines dropped n=3")
    log("last")
    handler.flush()
    assert written.getvalue().splitlines()[-1].endswith("info last")


def test_a_long_replay_comes_in_batches() -> None:
    async def work() -> None:
        run = runs.Run([], tenant="", model="tiny", describe=lambda _: {})
        piece = Piece(text="a", token_id=1, logprob=-1.0)
        run.events += [runs.Event("token", 0, piece) for _ in range(1000)]
        run.is_done = True
        others = 0

        async def other() -> None:
            nonlocal others
            while True:
                others += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        batches = [batch async for batch in run.follow()]
        task.cancel()
        assert [number for batch in batches for number, _ in batch] == list(range(1001))
        assert max(map(len, batches)) <= runs.MAX_BATCH and others >= len(batches) - 1

    asyncio.run(work())


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"a": [1, 2.5, None, True, "ü", {"b": [[], {}]}], "c": "\ud7ff\n"},
        [[[[[[[1]]]]]]],
        {"tuple": (1, 2)},
        {1: "an int as a name", "x": [1]},
    ],
)
def test_json_in_parts_is_the_same(value: Any) -> None:
    assert dumps_in_parts(value) == dumps(value)


def test_large_replies_are_told_from_small_ones() -> None:
    assert not is_large({"a": ["x"] * 100}) and not is_large("x" * MAX_LETTERS)
    assert is_large(["x"] * (MAX_PARTS + 2)) and is_large({"a": {"b": "x" * (MAX_LETTERS + 1)}})
    assert is_large({str(i): i for i in range(MAX_PARTS + 2)}) and is_large([[1] * 100 for _ in range(100)])


def test_large_replies_are_written_elsewhere(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fabula.server import app

    threads: list[str] = []

    def written(value: Any) -> str:
        threads.append(threading.current_thread().name)
        return dumps_in_parts(value)

    monkeypatch.setattr(app, "dumps_in_parts", written)

    async def work(client: Inside) -> None:
        for i in range(150):
            await client.ask("POST", "/write", session_id="a", text=f"{i} ")
        assert not threads, "small replies take no detour"
        status, found = await client.get("/sessions/a")
        assert status == 200 and len(found["path"]) == 150 and len(threads) == 1
        status, found = await client.get("/sessions/a/tree")
        assert status == 200 and len(found["turns"]) == 150 and len(threads) == 2
        assert all(name.startswith("fabula-server") for name in threads)

    inside(tmp_path, tiny_folder, work)
