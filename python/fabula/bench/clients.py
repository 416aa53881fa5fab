"""Clients that chat with a server, turn after turn, and record their streams."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from dataclasses import dataclass, field
from typing import Any

from fabula.bench.worker import memory_bytes

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
LOOKS = 6  # samples of the server's memory, from begin to end
_REST_S = 0.05  # after a failure, to avoid a tight loop
_numbers = itertools.count(1)  # of conversations, so that no measurement reuses a session


@dataclass(slots=True)
class Recorded:
    """Results of the clients of one measurement; times in seconds.

    Attributes:
        first: time to the first token of each reply. by_turn: the same by number of the turn.
        between: time between two tokens of a reply.
        memory: the server's resident bytes, `LOOKS` samples.
    """

    n_tokens: int = 0
    n_answers: int = 0
    n_failed: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    by_turn: dict[int, list[float]] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)


async def chat_with(
    kind: str, port: int, n_clients: int, seconds: float, n_tokens: int, pid: int | None = None
) -> Recorded:
    """Runs clients for some seconds. Replies that are unfinished then are read to their end, but not counted.

    Args:
        kind: "fabula", or another server with OpenAI's API.
        n_tokens: max tokens of a reply.
        pid: process whose memory is sampled.
    """
    recorded = Recorded()
    end = time.perf_counter() + seconds

    async def watch(pid: int) -> None:
        for i in range(LOOKS):
            await asyncio.sleep(seconds / (LOOKS - 1) if i else 0)
            recorded.memory.append(memory_bytes(pid) or 0)

    clients = [_Client(kind, port, number, n_tokens).chat(recorded, end) for number in range(n_clients)]
    await asyncio.gather(*clients, *([watch(pid)] if pid is not None else []))
    return recorded


class _Client:
    """A client with conversations of ten turns. Fabula gets only the new message, others the whole conversation."""

    def __init__(self, kind: str, port: int, number: int, n_tokens: int) -> None:
        self._kind, self._port, self._number, self._n_tokens = kind, port, number, n_tokens
        self._session = ""

    async def chat(self, recorded: Recorded, end: float) -> None:
        while time.perf_counter() < end:
            conversation = next(_numbers)
            self._session = f"bench-{os.getpid()}-{conversation}"
            said: list[dict[str, str]] = []
            for turn, message in enumerate(MESSAGES, 1):
                if time.perf_counter() >= end:
                    return
                # Conversations differ from the first words on, so that they share no cached prefix.
                text = message if turn > 1 else f"I am visitor {conversation}. {message}"
                said.append({"role": "user", "content": text})
                try:
                    answer = await self._ask(recorded, turn, said, end)
                except (OSError, ValueError, asyncio.IncompleteReadError):
                    answer = None
                if answer is None:
                    recorded.n_failed += 1
                    await asyncio.sleep(_REST_S)
                    break
                said.append({"role": "assistant", "content": answer})

    async def _ask(self, recorded: Recorded, turn: int, said: list[dict[str, str]], end: float) -> str | None:
        """One turn; returns the reply, None if it failed."""
        body: dict[str, Any] = {"stream": True, "temperature": 0.7, "seed": self._number}
        if self._kind == "fabula":
            path = "/chat"
            body |= {"session_id": self._session, "message": said[-1]["content"], "max_len": self._n_tokens}
        else:
            path = "/v1/chat/completions"
            body |= {"messages": said, "max_tokens": self._n_tokens}
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n"
        begun = last = time.perf_counter()
        texts: list[str] = []
        try:
            writer.write(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + data)
            if b" 200 " not in await reader.readline():
                return None
            while line := await reader.readline():
                event = json.loads(line[6:]) if line.startswith(b"data: {") else {}
                if "error" in event:
                    return None
                if (text := self._text_of(event)) is None:
                    continue
                now = time.perf_counter()
                if now < end:
                    recorded.n_tokens += 1
                if texts:
                    recorded.between.append(now - last)
                else:
                    recorded.first.append(now - begun)
                    recorded.by_turn.setdefault(turn, []).append(now - begun)
                last = now
                texts.append(text)
        finally:
            writer.close()
        recorded.n_answers += 1
        return "".join(texts)

    def _text_of(self, event: dict[str, Any]) -> str | None:
        """The text of a token's event; None for any other event."""
        if self._kind == "fabula":
            return event["text"] if "token_id" in event else None
        choices = event.get("choices") or [{}]
        found: str | None = choices[0].get("delta", {}).get("content")
        return found
