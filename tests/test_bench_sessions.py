"""`fabula bench sessions`, `serve` and `load`: every case in JSON and tables, with stand-ins for the other engine."""

from __future__ import annotations

import asyncio
import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benching import broken_python, call, killed_python, peer_python, picky_python, rows_of
from fabula.bench import clients as clients_module
from fabula.bench import serve as serve_module
from fabula.bench.clients import Recorded, chat_with
from fabula.bench.load import bench_load
from fabula.bench.peer_llama_cpp import LlamaStates
from fabula.bench.serve import Served, bench_serve, free_port, running
from fabula.bench.sessions import bench_sessions, in_turns
from fabula.errors import EngineError, InvalidArgument, Unsupported
from fabula.model import Model

# ---- Sessions ------------------------------------------------------------------------------------------------------

FEW = ["--depth", "1", "--depth", "3", "--length", "100", "--repeats", "10", "--threads", "1"]


def test_sessions_json(tiny_folder: Path) -> None:
    rows = rows_of(call("sessions", "--model", str(tiny_folder), *FEW, "--json"))
    cases = ["rollback and redo", "fork"]
    assert [row["case"].split(",")[0] for row in rows] == [*cases, *cases, *cases, "full copy"]
    assert [row["depth"] for row in rows] == [1, 1, 3, 3, 2, 2, 2]
    for row in rows:
        assert row["unit"] == "ms" and 0 < row["ours"] == row["p50_ms"] <= row["p99_ms"]
        assert row["ours_spread"][0] <= row["ours"] <= row["ours_spread"][1]
        assert row["peer"] is row["ratio"] is row["limit"] is None
        assert row["recomputed"] == 0 and row["bytes"] > 0
    assert rows[-1]["bytes"] > 10 * rows[-2]["bytes"]
    assert 100 <= rows[-1]["n_tokens"] < 110


def test_sessions_beside_a_peer(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["sessions", "--model", str(tiny_folder), *FEW, "--peers", "--peer-python"]
    rows = rows_of(call(*arguments, str(peer_python(tmp_path)), "--json"))
    assert [row["peer"] for row in rows] == [None] * 4 + [pytest.approx(100.0)] * 3  # a millisecond a token
    for row in rows[4:]:
        assert (row["peer_name"], row["peer_bytes"]) == ("llama-cpp-python", 1000)
        assert row["ratio"] == pytest.approx(row["peer"] / row["ours"])
    result = call(*arguments, str(broken_python(tmp_path)))
    assert result.exit_code == 0 and "llama-cpp-python is not measured" in result.stderr
    assert "full copy, 10" in result.stdout and "peer's ms" not in result.stdout
    assert call("sessions", "--peer-python", "x").exit_code == 2


def test_sessions_that_the_context_does_not_hold(tiny_folder: Path) -> None:
    told: list[str] = []
    with Model.load(tiny_folder, threads=1, context=200) as model:
        rows = bench_sessions(model, depths=(1, 100), lengths=(500,), repeats=1, status=told.append)
        assert len(rows) == 2 and rows[0].case == "rollback and redo, depth 1"
        assert "length 500: not measured, the context holds 200 tokens" in told
        with pytest.raises(InvalidArgument, match="holds none of the depths"):
            bench_sessions(model, depths=(), lengths=(500,))
        with pytest.raises(InvalidArgument, match="depth is 0"):
            bench_sessions(model, depths=(0,))


def test_tasks_take_turns() -> None:
    calls: list[str] = []

    def task(name: str) -> Any:
        return lambda: calls.append(name) or 0.002

    times = in_turns({"a": (task("a"), 6), "b": (task("b"), 1)}, rounds=3)
    assert "".join(calls) == "aab" * 3
    assert times == {"a": [2.0] * 6, "b": [2.0] * 3}


def test_llama_cpp_saves_and_loads(smollm2_gguf: Path) -> None:
    python = os.environ.get("FABULA_PEER_PYTHON")
    if python is None:
        pytest.importorskip("llama_cpp")
    peer = LlamaStates(smollm2_gguf, threads=1, kv="f16", n_positions=64, python=python)
    try:
        assert peer.read(list(range(20))) > 10_000
        assert peer.save_and_load() > 0 and "save_state" in peer.settings
    finally:
        peer.close()


# ---- Load ----------------------------------------------------------------------------------------------------------


def test_load(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["load", "--model", str(tiny_folder), "--weights", "f16", "--rounds", "1", "--threads", "1"]
    rows = rows_of(call(*arguments, "--peers", "--peer-python", str(peer_python(tmp_path)), "--json"))
    assert [row["case"] for row in rows] == ["start to first token", "peak memory"][: len(rows)]
    for row in rows:
        assert (row["weights"], row["model"], row["peer_name"]) == ("f16", "tiny", "llama.cpp")
        assert row["ours"] > 0 and row["ratio"] == pytest.approx(row["peer"] / row["ours"])
    assert rows[0]["same_token"] is True and rows[0]["limit"] is None
    if len(rows) > 1:
        assert 0 < rows[1]["limit_share"] == rows[1]["limit"] / rows[1]["ours"] < 1
        assert rows[1]["over_weights"] == pytest.approx(rows[1]["ours"] - rows[1]["limit"])
    table = call(*arguments).stdout
    assert "start to first token" in table and "settings" not in table


def test_a_peer_that_is_killed_is_started_otherwise(tiny_folder: Path, tmp_path: Path) -> None:
    """llama.cpp with AMX: it ends by SIGILL where its weights are laid out for tiles that it did not configure."""
    there = ["--model", str(tiny_folder), "--threads", "1", "--peers", "--peer-python", str(picky_python(tmp_path))]
    rows = rows_of(call("load", *there, "--weights", "f16", "--rounds", "1", "--json"))
    assert rows[0]["same_token"] is True
    rows = rows_of(call("sessions", *there[:2], *there[4:], *FEW, "--json"))
    assert {row["peer_name"] for row in rows[4:]} == {"llama-cpp-python"}
    with pytest.raises(Unsupported, match="was ended by SIGKILL"):
        LlamaStates(tiny_folder, threads=1, kv="f16", n_positions=9, python=str(killed_python(tmp_path)))


def test_load_errors(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="rounds is 0"):
        bench_load(tiny_folder, threads=1, rounds=0)
    told: list[str] = []
    python = str(broken_python(tmp_path))
    rows = bench_load(tiny_folder, weights="f16", threads=1, rounds=1, peers=True, python=python, status=told.append)
    assert rows[0].ours and rows[0].peer is None
    assert any("llama.cpp is not measured" in line and "is llama_cpp installed" in line for line in told)
    with pytest.raises(EngineError):
        bench_load(tmp_path, threads=1)


# ---- Server --------------------------------------------------------------------------------------------------------

BRIEF = ["--clients", "2", "--seconds", "1", "--tokens", "4", "--threads", "1"]
MEASURES = ["tokens", "first token p50", "first token p99", "between tokens p50", "between tokens p99"]
MEASURES += ["memory at the end"]


@pytest.fixture
def own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes for clients by 10 ms whenever they look, and servers may start and end as slowly as they do."""
    monkeypatch.setattr(clients_module, "time", SimpleNamespace(perf_counter=itertools.count(0.0, 0.01).__next__))
    monkeypatch.setattr(serve_module, "_START_S", 1e6)
    monkeypatch.setattr(serve_module, "_END_S", 1e6)


@pytest.mark.heavy
@pytest.mark.usefixtures("own_time")
def test_serve_beside_a_peer(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["serve", "--model", str(tiny_folder), "--weights", "f16", *BRIEF]
    rows = rows_of(call(*arguments, "--peers", "--peer-python", str(peer_python(tmp_path)), "--json"))
    assert [row["measure"] for row in rows] == MEASURES
    assert rows[0]["case"] == "tokens, 2 clients" and rows[0]["unit"] == "tokens/s"
    assert rows[0]["ours"] > 0 and rows[0]["answers"] > 0 and rows[0]["peer_failed"] == 0
    assert rows[0]["ratio"] == pytest.approx(rows[0]["ours"] / rows[0]["peer"])
    for row in rows:
        assert row["clients"] == 2 and row["weights"] == "f16" and row["limit"] is None
        assert row["peer_name"] == "llama-cpp-python's server" and "2 threads" not in row["peer_settings"]
    assert rows[1]["ratio"] == pytest.approx(rows[1]["peer"] / rows[1]["ours"])
    result = call(*arguments, "--peers", "--peer-python", str(broken_python(tmp_path)))
    assert result.exit_code == 0 and "is not measured" in result.stderr and "it is not here" in result.stderr
    assert "first token p50, 2 clients" in result.stdout and "peer's" not in result.stdout


def test_serve_overhead(tiny_folder: Path) -> None:
    (row,) = rows_of(call("serve", "--model", str(tiny_folder), "--threads", "1", "--overhead", "2", "--json"))
    assert (row["unit"], row["peer_name"], row["rounds"]) == ("ms/token", "the SDK", 2)
    assert row["ratio"] == pytest.approx(row["peer"] / row["ours"]) and row["overhead"] > 0
    assert call("serve", "--overhead", "2", "--peers").exit_code == 2


def test_serve_errors(tmp_path: Path) -> None:
    served = Served(tmp_path / "absent.gguf", "auto", "f16", 1, 100, python=str(tmp_path / "absent"))
    with pytest.raises(EngineError, match=r"fabula serve ended with 1: .*absent"):
        list(bench_serve(served, "f16", clients=(1,), seconds=1))
    with pytest.raises(EngineError, match="cannot be run"), running(served, "peer"):
        pass
    with pytest.raises(InvalidArgument, match="clients must be"):
        list(bench_serve(served, "f16", clients=(0,), seconds=1))


@pytest.mark.usefixtures("own_time")
def test_clients_count_what_is_refused() -> None:
    async def refusing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
        writer.close()

    async def breaking_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\n\r\nevent: error\ndata: {"error": {"message": "no room"}}\n\n')
        writer.close()

    async def go() -> list[Recorded]:
        heard = [await chat_with("fabula", free_port(), 1, 0.2, 4)]
        for answer in (refusing, breaking_off):
            async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
                heard.append(await chat_with("peer", server.sockets[0].getsockname()[1], 2, 0.2, 4))
        return heard

    for heard in asyncio.run(go()):
        assert heard.n_failed > 0 and heard.n_answers == heard.n_tokens == 0
