"""Server-sent events (WHATWG HTML, "Server-sent events"): runs as streams of text."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from quart import Response

from fabula.server.runs import Event, Follower, Run

KEEP_ALIVE = b": keep-alive\n\n"


def response(body: AsyncIterator[bytes]) -> Response:
    """A response that streams events for as long as it takes."""
    # Quart cuts a response that takes longer than a minute, silently, unless told not to.
    found = Response(body, content_type="text/event-stream; charset=utf-8")
    found.timeout = None
    found.headers["Cache-Control"] = "no-cache"
    found.headers["X-Accel-Buffering"] = "no"  # nginx passes it on at once
    return found


def dumps(data: Any) -> str:
    """JSON on one line, non-ASCII letters as they are."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def native(run: Run, after: int = -1) -> AsyncIterator[bytes]:
    """The events of a run behind number `after`, in the form of Fabula's own API."""
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
    """What an event carries. `index` stands there for all but the first of several answers."""
    piece = event.piece
    if piece is None:
        found = dict(event.data or {})
    else:
        found = {"text": piece.text, "token_id": piece.token_id, "logprob": piece.logprob}
        if piece.top_logprobs:
            found["top_logprobs"] = [[token, logprob] for token, logprob in piece.top_logprobs]
    return found | {"index": event.index} if event.index else found
