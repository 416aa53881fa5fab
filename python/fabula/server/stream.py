"""Server-sent events (WHATWG HTML, "Server-sent events"): runs as streams of text."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from quart import Response

from fabula.server.runs import Event, Follower, Run

MAX_PARTS, MAX_LETTERS = 2_000, 100_000  # of a reply that the event loop's thread writes as JSON
KEEP_ALIVE = b": keep-alive\n\n"


def response(body: AsyncIterator[bytes]) -> Response:
    """A response that streams events for as long as it takes."""
    # Quart's default timeout truncates a response after a minute, silently.
    found = Response(body, content_type="text/event-stream; charset=utf-8")
    found.timeout = None
    found.headers["Cache-Control"] = "no-cache"
    found.headers["X-Accel-Buffering"] = "no"  # nginx passes it on at once
    return found


def dumps(data: Any) -> str:
    """JSON on one line, non-ASCII letters as they are."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def dumps_in_parts(data: Any, depth: int = 4) -> str:
    """`dumps` for large values, in a worker thread: it writes the items of the outer containers one by one, so other
    threads get the interpreter's lock between them."""
    if depth and isinstance(data, dict) and all(isinstance(name, str) for name in data):
        return "{" + ",".join([f"{dumps(name)}:{dumps_in_parts(one, depth - 1)}" for name, one in data.items()]) + "}"
    if depth and isinstance(data, list):
        return "[" + ",".join([dumps_in_parts(one, depth - 1) for one in data]) + "]"
    return dumps(data)


def is_large(data: Any) -> bool:
    """Whether a value's JSON may take the event loop more than a few milliseconds. Looks at MAX_PARTS parts at most."""
    parts, n_letters = [data], 0
    for n_seen, part in enumerate(parts):  # which grows meanwhile
        if isinstance(part, str):
            n_letters += len(part)
        elif isinstance(part, (dict, list, tuple)):
            parts += part.values() if isinstance(part, dict) else part
        if n_letters > MAX_LETTERS or n_seen > MAX_PARTS or len(parts) > 2 * MAX_PARTS:
            return True
    return False


def native(run: Run, after: int = -1) -> AsyncIterator[bytes]:
    """The events of a run after number `after`, in the form of Fabula's own API."""
    return _native(run.follow(after))


async def _native(follower: Follower) -> AsyncIterator[bytes]:
    try:
        async for events in follower:
            yield "".join([encode(number, event) for number, event in events]).encode() if events else KEEP_ALIVE
    finally:
        follower.close()


def encode(number: int, event: Event) -> str:
    """One event of Fabula's own API."""
    return f"id: {number}\nevent: {event.kind}\ndata: {dumps(payload(event))}\n\n"


def payload(event: Event) -> dict[str, Any]:
    """The data of an event. `index` is left out for the first answer."""
    piece = event.piece
    if piece is None:
        found = dict(event.data or {})
    else:
        found = {"text": piece.text, "token_id": piece.token_id, "logprob": piece.logprob}
        if piece.top_logprobs:
            found["top_logprobs"] = [[token, logprob] for token, logprob in piece.top_logprobs]
    return found | {"index": event.index} if event.index else found
