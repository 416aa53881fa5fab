"""Many clients chat with a server at once, turn after turn, each reading its stream; beside llama-cpp-python's server.

    python benchmarks/serve.py --clients 1,4,16,64 --seconds 120 --peer PYTHON

For each number of clients, Fabula and the peer take turns in being measured. `--peer` is a Python with
`llama-cpp-python[server]`; without it only Fabula is. A client of Fabula sends its new message to its session; a client
of the peer must send the whole conversation. Both ask for the same number of tokens, with the same messages.

`--overhead` measures what the server costs instead: tokens/s of one stream over HTTP, and from the SDK, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PORTS = {"fabula": 8471, "peer": 8472}
MESSAGES = (
    "Name a city by a river and say why one should go there.",
    "What can one eat there?",
    "And what can one see when it rains?",
    "Tell me about somebody who lives there.",
    "What does she do in the morning?",
    "Whom does she meet at noon?",
    "What do they talk about?",
    "How does the evening end?",
    "What does she dream of?",
    "And what happens the next day?",
)


@dataclass
class Heard:
    """What the clients of one measurement saw, in seconds."""

    n_tokens: int = 0
    n_answers: int = 0
    n_failed: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    by_turn: dict[int, list[float]] = field(default_factory=dict)
    memory_mb: list[int] = field(default_factory=list)  # resident, six times from begin to end


class Client:
    """One who chats: a conversation of ten turns, then another one."""

    def __init__(self, kind: str, number: int, n_tokens: int) -> None:
        self.kind, self.number, self.n_tokens = kind, number, n_tokens
        self.n_conversations = 0

    async def chat(self, heard: Heard, end: float) -> None:
        while time.perf_counter() < end:
            self.n_conversations += 1
            said: list[dict[str, str]] = []
            for turn, message in enumerate(MESSAGES, 1):
                if time.perf_counter() >= end:
                    return
                # Conversations differ from their first word on, or one would warm the cache for the others.
                text = message if turn > 1 else f"I am visitor {self.number}-{self.n_conversations}. {message}"
                said.append({"role": "user", "content": text})
                answer = await self.ask(heard, turn, said, end)
                if answer is None:
                    break
                said.append({"role": "assistant", "content": answer})

    async def ask(self, heard: Heard, turn: int, said: list[dict[str, str]], end: float) -> str | None:
        """One turn; None if it failed."""
        if self.kind == "fabula":
            id = f"c{self.number}-{self.n_conversations}-{os.getpid()}"
            path, body = "/chat", {"session_id": id, "message": said[-1]["content"], "max_len": self.n_tokens}
        else:
            path, body = "/v1/chat/completions", {"messages": said, "max_tokens": self.n_tokens}
        body |= {"stream": True, "temperature": 0.7, "seed": self.number}
        reader, writer = await asyncio.open_connection("127.0.0.1", PORTS[self.kind])
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n"
        begun = last = time.perf_counter()
        writer.write(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + data)
        texts: list[str] = []
        try:
            status = await reader.readline()
            if b"200" not in status:
                heard.n_failed += 1
                return None
            while line := await reader.readline():
                if not line.startswith(b"data: {"):
                    continue
                text = self.text_of(json.loads(line[6:]))
                if text is None:
                    continue
                now = time.perf_counter()
                if not texts:
                    heard.first.append(now - begun)
                    heard.by_turn.setdefault(turn, []).append(now - begun)
                else:
                    heard.between.append(now - last)
                last = now
                texts.append(text)
                if now < end:
                    heard.n_tokens += 1
        finally:
            writer.close()
        heard.n_answers += 1
        return "".join(texts)

    def text_of(self, event: dict[str, Any]) -> str | None:
        """The text of a token's event; None for any other event."""
        if self.kind == "fabula":
            return event["text"] if "token_id" in event else None
        choices = event.get("choices") or [{}]
        found: str | None = choices[0].get("delta", {}).get("content")
        return found


def memory_mb(pid: int) -> float:
    """Resident memory of a process, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1e3
    return 0.0


def start(kind: str, words: list[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = "/health" if kind == "fabula" else "/v1/models"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORTS[kind]}{path}", timeout=5)
            return process
        except OSError:
            if process.poll() is not None:
                raise SystemExit(f"{kind} ended with {process.returncode}: {' '.join(words)}") from None
            time.sleep(0.1)
    raise SystemExit(f"{kind} did not come up")


async def measure(kind: str, n_clients: int, seconds: float, n_tokens: int, pid: int = 0) -> Heard:
    heard = Heard()
    end = time.perf_counter() + seconds
    clients = [Client(kind, number, n_tokens) for number in range(n_clients)]

    async def watch() -> None:
        for _ in range(6):
            heard.memory_mb.append(round(memory_mb(pid)))
            await asyncio.sleep(seconds / 5.2)

    await asyncio.gather(*(client.chat(heard, end) for client in clients), *([watch()] if pid else []))
    return heard


def report(kind: str, n_clients: int, seconds: float, heard: Heard) -> dict[str, Any]:
    def ms(values: list[float], share: float) -> float:
        return 1e3 * sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")

    turns = {turn: 1e3 * statistics.median(values) for turn, values in sorted(heard.by_turn.items())}
    found = {
        "server": kind, "clients": n_clients, "tokens_per_s": heard.n_tokens / seconds, "answers": heard.n_answers,
        "failed": heard.n_failed, "first_p50_ms": ms(heard.first, 0.5), "first_p99_ms": ms(heard.first, 0.99),
        "between_p50_ms": ms(heard.between, 0.5), "between_p99_ms": ms(heard.between, 0.99),
        "first_by_turn_ms": {turn: round(value, 1) for turn, value in turns.items()},
        "memory_mb": heard.memory_mb,
    }  # fmt: skip
    shown = {name: round(value, 1) if isinstance(value, float) else value for name, value in found.items()}
    print(json.dumps(shown), flush=True)
    return found


def overhead(model: str, rounds: int) -> None:
    """Tokens/s of one stream: from the SDK, and over HTTP."""
    from fabula import Model, SamplingParams

    words = [sys.executable, "-m", "fabula", "serve", "--port", str(PORTS["fabula"]), "--model", model]
    ratios = []
    with tempfile.TemporaryDirectory() as folder, Model.load(model) as loaded:
        process = start("fabula", [*words, "--data", folder])
        try:
            for number in range(rounds):
                body = {"message": MESSAGES[0], "max_len": 256, "ignore_eos": True, "seed": number, "stream": True}
                request = urllib.request.Request(
                    f"http://127.0.0.1:{PORTS['fabula']}/chat",
                    json.dumps(body).encode(),
                    {"Content-Type": "application/json"},
                )
                times = []
                with urllib.request.urlopen(request) as response:
                    times = [time.perf_counter() for line in response if line.startswith(b"event: token")]
                params = SamplingParams(max_tokens=256, ignore_eos=True, seed=number)
                own = [time.perf_counter() for _ in loaded.session().say(MESSAGES[0], params)]
                served_s, own_s = (times[-1] - times[0]) / 255, (own[-1] - own[0]) / 255
                ratios.append(served_s / own_s)
                print(f"{1e3 * own_s:.3f} ms/token from the SDK, {1e3 * served_s:.3f} over HTTP: {ratios[-1]:.3f}")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    print(f"median of {rounds}: {statistics.median(ratios):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a .gguf file; default: SmolLM2 from Fabula's cache")
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most")
    parser.add_argument("--peer", default="", help="a Python with llama-cpp-python[server]")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--overhead", type=int, default=0, metavar="ROUNDS")
    given = parser.parse_args()
    cache = Path(os.environ.get("FABULA_CACHE", Path.home() / ".cache" / "fabula")) / "models"
    model = given.model or str(next(iter(sorted(cache.glob("smollm2-135m-instruct/*.gguf"))), ""))
    if given.overhead:
        overhead(model, given.overhead)
        return
    with tempfile.TemporaryDirectory() as folder:
        words = {"fabula": [sys.executable, "-m", "fabula", "serve", "--port", str(PORTS["fabula"]), "--model", model,
                            "--data", folder, "--max-sessions", "1000000"]}  # fmt: skip
        if given.peer:
            words["peer"] = [given.peer, "-m", "llama_cpp.server", "--model", model, "--port", str(PORTS["peer"]),
                             "--n_ctx", "8192", "--n_threads", str(given.threads), "--n_threads_batch",
                             str(given.threads), "--chat_format", "chatml", "--flash_attn", "true",
                             "--interrupt_requests", "false"]  # fmt: skip
        rates: dict[str, dict[int, float]] = {}
        for n_clients in map(int, given.clients.split(",")):
            for kind, command in words.items():
                process = start(kind, command)
                try:
                    asyncio.run(measure(kind, min(n_clients, 4), 3, 16))
                    heard = asyncio.run(measure(kind, n_clients, given.seconds, given.tokens, process.pid))
                    found = report(kind, n_clients, given.seconds, heard)
                    rates.setdefault(kind, {})[n_clients] = found["tokens_per_s"]
                finally:
                    process.send_signal(signal.SIGTERM)
                    process.wait(60)
        for n_clients, rate in rates.get("peer", {}).items():
            if rate:
                print(f"{n_clients} clients: {rates['fabula'][n_clients] / rate:.2f} x the peer")


if __name__ == "__main__":
    main()
