"""Content blocks of a message, built from the parts of an answer as they become certain."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator

from fabula.server.borrowed import Json
from fabula.server.reasoning import ReasoningText
from fabula.sessions.call_events import Arguments, CallEnded, CallStarted, Content, Event, loaded

Start, Delta, Stop = "content_block_start", "content_block_delta", "content_block_stop"


class Blocks:
    """The blocks of an answer so far.

    Args:
        key: part of the ids of its tool calls.
        thoughts: "shown"; "omitted": their blocks are empty; "" for no such blocks.

    Attributes:
        items: finished blocks, and the one that is open.
        calls_are_whole: whether there are calls, every one complete.
    """

    def __init__(self, key: str, thoughts: str = "") -> None:
        self._key, self._thoughts = key, thoughts
        self._open = ""  # type of the block that is open
        self._arguments = ""
        self._n_calls = self._n_whole = 0
        self.items: list[Json] = []

    @property
    def calls_are_whole(self) -> bool:
        return 0 < self._n_calls == self._n_whole

    def take(self, events: Iterable[Event | ReasoningText]) -> Iterator[Json]:
        """Adds parts of the answer; yields Anthropic's events for them."""
        for event in events:
            match event:
                case ReasoningText(text):
                    if self._thoughts:
                        yield from self._add("thinking", text if self._thoughts == "shown" else "")
                case Content(text):
                    yield from self._add("text", text)
                case CallStarted(_, name):
                    yield from self._close()
                    self._n_calls += 1
                    id = f"toolu_{self._key}_{self._n_calls - 1}"
                    self._arguments = ""
                    yield self._begin({"type": "tool_use", "id": id, "name": name, "input": {}})
                case Arguments(_, text):
                    self._arguments += text
                    yield self._delta({"type": "input_json_delta", "partial_json": text})
                case CallEnded(_, is_valid, _):
                    self._n_whole += is_valid
                    yield from self._close()

    def finish(self) -> Iterator[Json]:
        """At the end of the answer: closes the open block. There is always a block."""
        if not self.items:
            yield self._begin({"type": "text", "text": ""})
        yield from self._close()

    def _add(self, kind: str, text: str) -> Iterator[Json]:
        if self._open != kind:
            yield from self._close()
            signature = {"signature": ""} if kind == "thinking" else {}
            yield self._begin({"type": kind, kind: ""} | signature)
        if text:
            self.items[-1][kind] += text
            yield self._delta({"type": f"{kind}_delta", kind: text})

    def _begin(self, block: Json) -> Json:
        self._open = block["type"]
        self.items.append(block)
        return {"type": Start, "index": len(self.items) - 1, "content_block": dict(block)}

    def _delta(self, delta: Json) -> Json:
        return {"type": Delta, "index": len(self.items) - 1, "delta": delta}

    def _close(self) -> Iterator[Json]:
        if not self._open:
            return
        if self._open == "tool_use":
            self.items[-1]["input"] = loaded(self._arguments) or {}
        if self._open == "thinking":
            signature = self.items[-1]["signature"] = _signature(self.items[-1]["thinking"])
            yield self._delta({"type": "signature_delta", "signature": signature})
        self._open = ""
        yield {"type": Stop, "index": len(self.items) - 1}


def _signature(thought: str) -> str:
    """What clients send back with a thought: its hash, since some drop a thought without a signature."""
    return base64.b64encode(hashlib.sha256(thought.encode()).digest()).decode()
