"""Clients that leave, read slowly or reconnect; a server that is stopped: nothing is lost, and no client is blocked."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import tiny
from fabula import Workspace
from fabula.server import Settings, create_app
from serving import Running, parse
from waiting import wait_until

LONG = {"message": "the whale", "ignore_eos": True}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose answers may be long enough to be interrupted."""
    return tiny.write_model(tmp_path_factory.mktemp("long") / "tiny", config={"max_position_embeddings": 20_000})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("faults"), tiny_folder, "--context", "20000") as running:
        yield running


def wait_idle(running: Running) -> None:
    """Returns when the engine has nothing to do."""
    wait_until(
        lambda: not sum(running.get("/health")["answers"].values()),
        "the engine is still busy",
        pause=lambda: time.sleep(0.05),
    )


def ended(running: Running) -> dict[str, float]:
    """How many answers ended, by how."""
    lines = running.client.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("fabula_answers_total{")]
    return {line.partition('kind="')[2].partition('"')[0]: float(line.split()[-1]) for line in found}


def leave(sock: socket.socket, hard: bool) -> None:
    """Closes a connection; `hard`: by a reset."""
    if hard:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    sock.close()


# ---- Clients that leave ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stage", ["headers", "begin", "prefill", "decode"])
def test_clients_that_leave(served: Running, stream: bool, stage: str) -> None:
    """Fifty in each stage, and nothing is made for them: no answer comes to its end, and nothing is left."""
    before, n = ended(served), 50 if stage != "prefill" else 16
    for i in range(n):
        if stage == "headers":
            sock = socket.create_connection(("127.0.0.1", served.port))
            sock.sendall(b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-"[: 5 + i % 50])
        else:
            text = "a b c " * 2500 if stage == "prefill" else "the whale"
            body = LONG | {"message": text, "session_id": f"gone-{i}", "max_len": 10_000, "stream": stream}
            body["n_logprobs"] = 20  # more than buffers hold: every client leaves in the middle
            sock = served.unread(**body)
            if stage == "decode" and stream:
                while b"event: token" not in sock.recv(65536):
                    pass
            elif stage != "begin":
                time.sleep(0.004)
        leave(sock, hard=bool(i % 2))
    wait_idle(served)
    after = ended(served)
    assert after.get("done", 0) == before.get("done", 0) and after.get("error", 0) == before.get("error", 0)

    def kept() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = served.client.get("/sessions", params={"limit": 1000}).json()["sessions"]
        return found

    def delete() -> None:
        for one in kept():  # those without a turn go by themselves, as they were begun for nothing
            if one["n_turns"]:
                served.post("/delete_session", session_id=one["session_id"])
        time.sleep(0.05)

    wait_until(lambda: not kept(), kept, pause=delete)


def test_clients_that_leave_at_the_end(served: Running) -> None:
    """In the last chunk: the answer has ended, whether they heard of it or not."""
    for i in range(40):
        sock = served.unread(**LONG, session_id="last", max_len=3, stream=True)
        while b"event: done" not in sock.recv(65536):
            pass
        leave(sock, hard=bool(i % 2))
    wait_idle(served)
    about = served.get("/sessions/last")
    assert about["n_turns"] == 40 and not about["busy"]
    assert all(turn["finish_reason"] == "length" for turn in about["path"])
    served.post("/delete_session", session_id="last")


def test_pages_come_back(served: Running) -> None:
    sock = served.unread(**LONG, session_id="pages", max_len=18_000, stream=True, n_logprobs=20)
    received = b""
    while b"event: token" not in received:  # a client that leaves before it leaves no session
        received += sock.recv(4096)
    sock.close()
    wait_idle(served)
    assert served.get("/sessions/pages")["path"][-1]["finish_reason"] == "cancelled"
    assert served.post("/delete_session", session_id="pages")["freed_bytes"] > 0


def test_two_at_once(served: Running) -> None:
    statuses: list[int] = []
    barrier = threading.Barrier(4)

    def chat() -> None:
        barrier.wait()
        body = LONG | {"session_id": "twice", "max_len": 300}
        statuses.append(httpx.post(f"{served.address}/chat", json=body, timeout=None).status_code)

    threads = [threading.Thread(target=chat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses.count(200) >= 1 and set(statuses) <= {200, 409}
    assert served.get("/sessions/twice")["n_turns"] == statuses.count(200)
    held = served.unread(**LONG, session_id="twice", max_len=18_000, stream=True, n_logprobs=20)
    held.recv(100)  # and no more: the answer pauses while it is not read
    assert served.post("/chat", 409, session_id="twice", message="too")["error"]["code"] == "session_busy"
    held.close()
    wait_idle(served)
    assert served.get("/sessions/twice")["n_turns"] == statuses.count(200) + 1


def test_delete_while_it_is_being_made(served: Running) -> None:
    with served.client.stream(
        "POST", "/chat", json=LONG | {"session_id": "doomed", "max_len": 18_000, "stream": True, "n_logprobs": 20}
    ) as reply:
        events = parse(reply.iter_lines())
        first = next(events)
        freed = httpx.post(f"{served.address}/delete_session", json={"session_id": "doomed"}, timeout=None)
        assert freed.status_code == 200
        last = list(events)[-1]
    assert first["#event"] == "start" and last["#event"] == "cancelled"
    assert served.get("/sessions/doomed", 404)


def test_turns_that_are_not_there(served: Running) -> None:
    served.post("/chat", session_id="turns", message="a", max_len=2)
    served.post("/chat", session_id="turns", message="b", max_len=2)
    for turn in (-3, 3, 2**40, "none"):
        assert "turn" in served.post("/rollback", 400, session_id="turns", target_turn=turn)["error"]["message"]
    for _ in range(2):  # it may be asked twice
        assert served.post("/rollback", session_id="turns", target_turn=0)["head"] == 0
    assert served.get("/sessions/turns")["n_turns"] == 2
    served.post("/delete_session", session_id="turns")
    assert served.post("/rollback", 404, session_id="turns", target_turn=0)


# ---- Readers --------------------------------------------------------------------------------------------------------


def test_a_slow_reader_holds_up_nobody(served: Running) -> None:
    at_first = samples(served)
    slow = served.unread(**LONG, session_id="slow", max_len=18_000, stream=True, n_logprobs=20)
    slow.recv(100)
    quick = served.events("/chat", **LONG, session_id="quick", max_len=200)
    assert len(quick) == 202
    n_quick = 0

    def at_rest() -> bool:
        """Buffers are full, and the slow one waits for its reader: another's tokens are all that are made."""
        nonlocal n_quick
        before = samples(served)
        served.post("/chat", **LONG, max_len=50)
        n_quick += 49
        return samples(served) - before == 49

    wait_until(at_rest, "nobody waits for the reader")
    assert served.get("/sessions/slow")["busy"] and samples(served) - at_first - n_quick < 18_000
    slow.close()
    wait_idle(served)


def samples(running: Running) -> float:
    """Tokens that were made so far."""
    lines = running.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("fabula_between_tokens_seconds_count"))


def test_joining_again_anywhere(served: Running) -> None:
    begun = served.post("/chat", 202, **LONG, session_id="again", max_len=60, background=True)
    path = f"/streams/{begun['stream_id']}"
    whole = list(parse(served.client.get(path).iter_lines()))
    assert len(whole) == 62
    for after in range(-1, 61, 7):
        assert list(parse(served.client.get(path, params={"after": after}).iter_lines())) == whole[after + 1 :]


def test_a_stream_longer_than_the_hosts_patience(tiny_folder: Path, tmp_path: Path) -> None:
    """Quart cuts responses after RESPONSE_TIMEOUT, a minute unless set; here it is shorter than the stream."""

    async def ask() -> tuple[str, float]:
        with Workspace(tmp_path) as workspace:
            app = create_app(workspace, Settings(model=(str(tiny_folder),), context=20_000))
            app.config["RESPONSE_TIMEOUT"] = 0.02  # as 3,000 tokens take longer on any machine
            async with app.test_app():
                client = app.test_client()
                while (await client.get("/health", headers={"Host": "localhost"})).status_code != 200:
                    await asyncio.sleep(0.01)
                body = LONG | {"max_len": 3000, "stream": True}
                begun = time.monotonic()
                async with client.request(
                    "/chat", method="POST", headers={"Host": "localhost", "Content-Type": "application/json"}
                ) as sent:
                    await sent.send(json.dumps(body).encode())
                    await sent.send_complete()
                    received = b""
                    while b"event: done" not in received:
                        received += await sent.receive()
                    return received.decode(), time.monotonic() - begun

    text, seconds = asyncio.run(ask())
    assert text.count("event: token") == 3000 and seconds > 0.02


# ---- Stopping -------------------------------------------------------------------------------------------------------


def streams(running: Running, n: int, max_len: int) -> tuple[list[threading.Thread], list[str]]:
    """n readers of streams, and the last event of each that ended."""
    last: list[str] = []
    begun = threading.Barrier(n + 1)

    def read(i: int) -> None:
        body = LONG | {"session_id": f"s{i}", "max_len": max_len, "stream": True}
        with httpx.stream("POST", f"{running.address}/chat", json=body, timeout=None) as response:
            name = ""
            for number, event in enumerate(parse(response.iter_lines())):
                name = event["#event"]
                if number == 1:
                    begun.wait()
            last.append(name)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    begun.wait()
    return threads, last


@pytest.mark.parametrize(("max_len", "ends"), [(40, {"done"}), (15_000, {"cancelled"})])
def test_a_gentle_stop(tiny_folder: Path, tmp_path: Path, max_len: int, ends: set[str]) -> None:
    grace_s = "100000" if "done" in ends else "0.5"
    running = Running(tmp_path, tiny_folder, "--grace-s", grace_s, "--context", "20000")
    threads, last = streams(running, 20, max_len)
    assert running.stop(signal.SIGTERM) == 0
    for thread in threads:
        thread.join()
    assert len(last) == 20 and set(last) == ends
    with Running(tmp_path, tiny_folder, "--context", "20000") as again:
        turn = again.get("/sessions/s0")["path"][0]
        assert turn["finish_reason"] in ("length", "cancelled") and turn["text"]


def test_a_stopping_server_begins_nothing_and_who_asks_twice_does_not_wait(tiny_folder: Path, tmp_path: Path) -> None:
    running = Running(tmp_path, tiny_folder, "--grace-s", "600", "--context", "20000")
    held = running.unread(**LONG, session_id="held", max_len=18_000, stream=True, n_logprobs=20)
    held.recv(100)  # and no more, so the answer does not end by itself
    running.process.send_signal(signal.SIGTERM)
    wait_until(
        lambda: httpx.get(f"{running.address}/health", timeout=None).json()["status"] == "stopping",
        pause=lambda: time.sleep(0.02),
    )
    refused = httpx.post(f"{running.address}/chat", json=LONG, timeout=None)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
    assert int(refused.headers["Retry-After"]) >= 1
    assert running.stop(signal.SIGTERM) == 0
    with held.makefile("rb") as rest:
        assert b"event: cancelled" in rest.read()
    held.close()


def test_one_server_for_a_folder(served: Running, tiny_folder: Path, tmp_path: Path) -> None:
    with Running(tmp_path, tiny_folder), pytest.raises(AssertionError, match=r"(?i)another process"):
        Running(tmp_path, tiny_folder)
    with pytest.raises(AssertionError, match="--port sets another port"):
        Running(tmp_path / "other", tiny_folder, "--port", str(served.port))
