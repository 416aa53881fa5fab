"""Shared by the APIs of others that the server speaks besides OpenAI's: Anthropic's and Ollama's.

Their clients send fields that mean nothing here. Such a field is ignored; the header `fabula-ignored` of the response
names it, and so does a line of the log at level debug. Errors have the shape that the API's own clients read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from quart import Blueprint, Response, g

from fabula.server.runs import Event, Follower, Run
from fabula.server.state import Server, Serving

Json = dict[str, Any]
IGNORED = "fabula-ignored"
MAX_NAMED = 16  # ignored fields that the header names
_UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]-]")
logger = logging.getLogger("fabula.server")


# ---- Bodies ---------------------------------------------------------------------------------------------------------


class Tolerant(BaseModel):
    """A body whose unknown fields are kept aside instead of refused."""

    model_config = ConfigDict(strict=True, extra="allow")


def _integral(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_integral)]  # also written 100.0, as some JSON encoders do


def unknown_fields(body: BaseModel) -> Iterator[str]:
    """Paths of the fields that a body does not declare, those of bodies in it included."""
    for name in body.model_extra or {}:
        yield name
    for name in type(body).model_fields:
        value = getattr(body, name)
        for place, item in enumerate(value) if isinstance(value, list) else [(-1, value)]:
            if isinstance(item, BaseModel):
                where = name if place < 0 else f"{name}[{place}]"
                yield from (f"{where}.{path}" for path in unknown_fields(item))


def ignore(*paths: str) -> None:
    """Notes fields of the current request that have no effect."""
    found: list[str] = g.setdefault("ignored", [])
    found += [path for path in paths if path not in found]


def ignored() -> list[str]:
    """The fields noted so far, as the header names them."""
    return [_UNSAFE.sub("_", path)[:64] for path in g.get("ignored", [])]


async def name_ignored(response: Response) -> Response:
    """Names the ignored fields in the response's header and the log."""
    names = ignored()
    if names:
        more = [f"+{len(names) - MAX_NAMED}"] if len(names) > MAX_NAMED else []
        response.headers[IGNORED] = ", ".join([*names[:MAX_NAMED], *more])
        logger.debug("request %s: ignored %s", g.get("request_id", ""), response.headers[IGNORED])
    return response


# ---- Models ---------------------------------------------------------------------------------------------------------


def serving_of(state: Server, name: str | None) -> Serving:
    """The model of a request. Where one model is served, every name means it; the reply says which it is.

    Raises:
        ApiError: 404, several are served and none has that name; or as `Server.model`.
    """
    return state.model(None if not name or (name not in state.models and len(state.models) == 1) else name)


def add_face(blueprint: Blueprint) -> Blueprint:
    """Makes the routes of a blueprint name the fields they ignore."""
    blueprint.after_request(name_ignored)
    return blueprint


# ---- Streams --------------------------------------------------------------------------------------------------------


def follow(
    run: Run, encode: Callable[[Event], Iterable[bytes]], last: Callable[[], Iterable[bytes]], *, idle: bytes = b""
) -> AsyncIterator[bytes]:
    """A run as a stream.

    Args:
        run: generates the answer.
        encode: makes the bytes of an event.
        last: makes those after the last event.
        idle: sent when nothing happens for a while; b"" for nothing.
    """
    return _follow(run, run.follow(), encode, last, idle)


async def _follow(
    run: Run,
    follower: Follower,
    encode: Callable[[Event], Iterable[bytes]],
    last: Callable[[], Iterable[bytes]],
    idle: bytes,
) -> AsyncIterator[bytes]:
    try:
        async for events in follower:
            found = b"".join([part for _, event in events for part in encode(event)]) if events else idle
            if found:
                yield found
        if run.is_done:
            yield b"".join(last())
    finally:
        follower.close()
