"""Shared by the APIs of others that the server speaks besides OpenAI's: Anthropic's and Ollama's.

Their clients send fields that mean nothing here. Such a field is ignored and named (`openai/tolerance.py`). Errors have
the shape that the API's own clients read (`faces.py`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, ClassVar

from pydantic import model_validator
from quart import g

from fabula.server.openai.tolerance import ignored_fields, tolerant
from fabula.server.runs import Event, Follower, Run
from fabula.server.schemas import Strict

Json = dict[str, Any]


def as_it_is(_: Json) -> None:
    """Translates nothing."""


class Tolerant(Strict):
    """A body whose unknown fields, and those of bodies in it, are ignored and named. Null means absent.

    Attributes:
        translate: turns dialects into fields of the body, in place.
    """

    translate: ClassVar[Callable[[Json], None]] = as_it_is

    @model_validator(mode="before")
    @classmethod
    def _tolerant(cls, given: Any) -> Any:
        return tolerant(cls, given, cls.translate)


def ignore(*paths: str) -> None:
    """Notes fields of the current request that have no effect."""
    known = ignored_fields()
    g.ignored = [*known, *(path for path in paths if path not in known)]


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
