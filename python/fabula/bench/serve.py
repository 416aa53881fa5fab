"""Throughput and latency of a server with many clients, compared with llama-cpp-python's, and the overhead of HTTP.

For each number of clients, each server is started on a free port, Fabula's with a temporary data folder. Fabula and the
peer run in turns. Clients and server share the CPU.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fabula.bench.clients import MESSAGES, Recorded, chat_with
from fabula.bench.row import Row
from fabula.bench.status import Status, silent
from fabula.engine.sampling import SamplingParams
from fabula.errors import EngineError, InvalidArgument
from fabula.model import Model

CLIENTS = (1, 4, 16, 64)
SECONDS = 120.0
ANSWER_TOKENS = 48
PEER = "llama-cpp-python's server"
_STREAM_TOKENS = 256
_START_S, _END_S = 60.0, 60.0
_PEER_CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class Served:
    """A model and the options of `fabula serve`.

    Attributes:
        path: the model. peer_path: a GGUF file of the same weights for the peer.
        python: interpreter with llama_cpp.server; None for no peer.
    """

    path: Path
    weights: str
    kv: str
    threads: int
    context: int
    python: str | None = None
    peer_path: Path | None = None
    device: str = "cpu"

    @property
    def peer_settings(self) -> str:
        return f"{self.threads} threads, flash attention on, context {self.peer_context}, interrupts off"

    @property
    def peer_context(self) -> int:
        return min(self.context, _PEER_CONTEXT)

    def words(self, kind: str, port: int, folder: str) -> list[str]:
        """The command line of a server."""
        if kind == "fabula":
            return [
                *(sys.executable, "-m", "fabula", "serve", "--port", str(port), "--data", folder),
                *("--model", str(self.path), "--weights", self.weights, "--kv", self.kv, "--device", self.device),
                *("--threads", str(self.threads), "--max-sessions", "1000000", "--max-streams", "10000"),
            ]
        return [
            *(self.python or sys.executable, "-m", "llama_cpp.server", "--port", str(port)),
            *("--model", str(self.peer_path), "--n_ctx", str(self.peer_context)),
            *("--n_threads", str(self.threads), "--n_threads_batch", str(self.threads)),
            *("--chat_format", "chatml", "--flash_attn", "true", "--interrupt_requests", "false"),
        ]


def bench_serve(
    served: Served,
    label: str,
    *,
    clients: Sequence[int] = CLIENTS,
    seconds: float = SECONDS,
    n_tokens: int = ANSWER_TOKENS,
    status: Status = silent,
) -> Iterator[Row]:
    """Measures Fabula's server, and the peer if there is one; yields rows after each number of clients.

    Args:
        label: precision of the weights, for the rows.
        clients: numbers of concurrent clients to measure.
        seconds: duration of each measurement.
        n_tokens: max tokens of a reply.

    Raises:
        InvalidArgument: a number is out of its range.
        EngineError: Fabula's server does not start. A peer that does not start is reported and left out.
    """
    if not clients or not all(1 <= n <= 10_000 for n in clients) or not 0 < seconds <= 86_400 or n_tokens < 1:
        raise InvalidArgument("clients must be 1 .. 10000, seconds above 0, at most a day, tokens at least 1")
    kinds = ["fabula"]
    if served.python:
        try:
            with running(served, "peer"):
                kinds.append("peer")
        except EngineError as error:
            status(f"{PEER} is not measured: {error}")
    for i, n_clients in enumerate(clients):
        recorded = {}
        for kind in kinds[i % len(kinds) :] + kinds[: i % len(kinds)]:  # rotate the order
            with running(served, kind) as (port, pid):
                status(f"{_clients(n_clients)}, {seconds:g} s: {'fabula' if kind == 'fabula' else PEER}")
                asyncio.run(chat_with(kind, port, min(n_clients, 4), min(3.0, seconds), 16))
                recorded[kind] = asyncio.run(chat_with(kind, port, n_clients, seconds, n_tokens, pid))
        yield from _rows(served, label, n_clients, seconds, recorded)


def bench_overhead(
    served: Served, model: Model, rounds: int, *, n_tokens: int = _STREAM_TOKENS, status: Status = silent
) -> list[Row]:
    """Milliseconds per token of one stream, over HTTP and from the SDK, in turns.

    Args:
        model: the same model, loaded here.
        n_tokens: of the stream, at least 2.
    """
    if rounds < 1 or n_tokens < 2:
        raise InvalidArgument("rounds must be at least 1, tokens at least 2")
    http, sdk = [], []
    with running(served, "fabula") as (port, _):
        for number in range(rounds):
            status(f"round {number + 1} of {rounds}")
            body = {"message": MESSAGES[0], "max_len": n_tokens, "ignore_eos": True, "seed": number, "stream": True}
            with _post(port, "/chat", body) as response:
                times = [time.perf_counter() for line in response if line.startswith(b"event: token")]
            http.append(_ms_per_token(times))
            params = SamplingParams(max_tokens=n_tokens, ignore_eos=True, seed=number)
            with model.session().say(MESSAGES[0], params) as reply:
                sdk.append(_ms_per_token([time.perf_counter() for _ in reply]))
    more = {
        "rounds": rounds,
        "ours_spread": [min(http), max(http)],
        "peer_spread": [min(sdk), max(sdk)],
        "overhead": statistics.median(a / b for a, b in zip(http, sdk, strict=True)),
    }
    return [
        Row(
            case="one stream over HTTP",
            unit="ms/token",
            ours=statistics.median(http),
            peer=statistics.median(sdk),
            peer_name="the SDK",
            peer_settings=f"{model.threads} threads, without HTTP",
            model=model.path.name,
            weights=model.weights,
            kv=model.kv,
            threads=model.threads,
            more=more,
        )
    ]


@contextmanager
def running(served: Served, kind: str) -> Iterator[tuple[int, int]]:
    """Starts a server: gives its port and process, then ends it and removes its folder.

    Raises:
        EngineError: it ended, or does not answer within a minute; has the end of its output.
    """
    name = "fabula serve" if kind == "fabula" else PEER
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fabula-bench-"))
        port, log = free_port(), Path(folder) / "log"
        with log.open("wb") as out:
            words = served.words(kind, port, str(Path(folder) / "data"))
            try:
                process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            except OSError as error:
                raise EngineError(f"{name}: {words[0]} cannot be run: {error.strerror or error}") from None
        stack.callback(_end, process)
        _wait(name, process, f"http://127.0.0.1:{port}{'/health' if kind == 'fabula' else '/v1/models'}", log)
        yield port, process.pid


def free_port() -> int:
    """A free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(name: str, process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.1)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last_line = f": {lines[-1]}" if lines else ""
    how = "did not come up" if process.poll() is None else f"ended with {process.returncode}"
    raise EngineError(f"{name} {how}{last_line}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _post(port: int, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request)


def _ms_per_token(times: Sequence[float]) -> float:
    if len(times) < 2:
        raise EngineError(f"a stream of {len(times)} tokens has no time between them; is the context too short?")
    return 1e3 * (times[-1] - times[0]) / (len(times) - 1)


def _rows(served: Served, label: str, n_clients: int, seconds: float, recorded: dict[str, Recorded]) -> Iterator[Row]:
    """The rows for one number of clients."""
    found = {kind: _measures(one, seconds) for kind, one in recorded.items()}
    peer, theirs = found.get("peer"), recorded.get("peer")
    for measure, (value, unit) in found["fabula"].items():
        more: dict[str, Any] = {"measure": measure, "clients": n_clients, "seconds": seconds}
        if measure == "tokens":
            more |= _counts("", recorded["fabula"]) | (_counts("peer_", theirs) if theirs else {})
        if measure == "memory at the end":
            more["ours_by_time"] = [round(n / 1e6) for n in recorded["fabula"].memory]
            more["peer_by_time"] = [round(n / 1e6) for n in theirs.memory] if theirs else None
        yield Row(
            case=f"{measure}, {_clients(n_clients)}",
            model=served.path.name,
            weights=label,
            kv=served.kv,
            threads=served.threads,
            unit=unit,
            ours=value,
            peer=peer[measure][0] if peer else None,
            peer_name=PEER if peer else None,
            peer_settings=served.peer_settings if peer else None,
            more=more,
        )


def _clients(n: int) -> str:
    return f"{n} client{'s' if n > 1 else ''}"


def _measures(recorded: Recorded, seconds: float) -> dict[str, tuple[float | None, str]]:
    return {
        "tokens": (recorded.n_tokens / seconds, "tokens/s"),
        "first token p50": (_ms(recorded.first, 0.5), "ms"),
        "first token p99": (_ms(recorded.first, 0.99), "ms"),
        "between tokens p50": (_ms(recorded.between, 0.5), "ms"),
        "between tokens p99": (_ms(recorded.between, 0.99), "ms"),
        "memory at the end": (recorded.memory[-1] / 1e6 if recorded.memory and recorded.memory[-1] else None, "MB"),
    }


def _counts(prefix: str, recorded: Recorded) -> dict[str, Any]:
    by_turn = {str(turn): round(1e3 * statistics.median(v), 1) for turn, v in sorted(recorded.by_turn.items())}
    return {
        f"{prefix}answers": recorded.n_answers,
        f"{prefix}failed": recorded.n_failed,
        f"{prefix}first_by_turn_ms": by_turn,
    }


def _ms(values: Sequence[float], share: float) -> float | None:
    return 1e3 * sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None
