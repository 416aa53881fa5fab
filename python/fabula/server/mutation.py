"""Routes that change a session without generating: open it, apply the verb, reply, notify pages that show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, Field
from quart import g

from fabula.server.feed import What
from fabula.server.open_session import Open
from fabula.server.replies import head_json
from fabula.server.state import Server, server
from fabula.sessions.session import Session

Verb = Callable[[Session], dict[str, Any] | None]


class PathQuery(BaseModel):
    """What the reply holds."""

    path: bool = Field(
        False,
        description="true: the reply also holds `path`, the turns from the first to the head. It grows with the path.",
    )


async def mutated(
    what: What, open: Open, verb: Verb, *, path: bool | None = None, is_sent: bool = False, **texts: str
) -> dict[str, Any]:
    """The response to a request that changes a session; the work is done in a worker thread.

    Args:
        what: kind of the event that pages receive.
        open: opens the session.
        verb: changes it; may return fields of the reply.
        path: None: the verb's fields are the whole reply. Otherwise they are added to `head_json`, with or without the
            path.
        is_sent: whether the event carries the reply.
        texts: user input by its field's name, checked against the length limit first.
    """
    state, tenant = server(), g.tenant

    def work() -> tuple[Session, dict[str, Any]]:
        for name, text in texts.items():
            state.limits.check_text(text, name)
        with open(state, tenant) as session:
            found = verb(session) or {}
            return session, found if path is None else head_json(session, path=path) | found

    session, reply = await state.call(work)
    state.feed.changed(session, what, **(reply if is_sent else {}))
    return reply


async def looked_up(work: Callable[[Server, str], dict[str, Any]]) -> dict[str, Any]:
    """The response to a request that changes nothing; `work` gets the server and the tenant in a worker thread."""
    state, tenant = server(), g.tenant
    return await state.call(lambda: work(state, tenant))
