"""Rejoins a stream at any event."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field
from quart import Blueprint, g, request
from quart_schema import tag, validate_querystring

from fabula.server.describe import READING, fails, streams
from fabula.server.failures import ApiError, not_found
from fabula.server.state import server
from fabula.server.stream import native, response

routes = Blueprint("streams", __name__)


class StreamQuery(BaseModel):
    """Where to continue."""

    after: int | None = Field(
        None,
        ge=-1,
        le=2**53,
        description="Number of the last event read; the header Last-Event-ID means the same.",
    )


@routes.get("/streams/<id>")
@streams
@tag(["Conversation"])
@validate_querystring(StreamQuery)
@fails(*READING)
async def stream(id: str, query_args: StreamQuery) -> Any:
    """The events of an answer after a number: past ones first, then new ones as they come."""
    run = server().runs.find(id, g.tenant)
    if run is None:
        raise not_found("stream", id)
    after = query_args.after
    if after is None:
        text = request.headers.get("Last-Event-ID", "-1")
        if not (text == "-1" or (text.isascii() and text.isdigit() and len(text) < 16)):
            raise ApiError(400, "invalid_value", f"Last-Event-ID is {text[:40]!r}, must be the number of an event")
        after = int(text)
    return response(native(run, after))
