"""From a verb of a session that makes no answer to a response: done in a worker thread, and told to its pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quart import g

from fabula.server.feed import What
from fabula.server.state import Server, server
from fabula.sessions.session import Session

Changed = tuple[Session, dict[str, Any]]


async def changed(what: What, change: Callable[[Server, str], Changed], *, tell: bool = False) -> dict[str, Any]:
    """The response to a request that changes a session.

    Args:
        what: pages hear that this has changed.
        change: finds the session and changes it, and returns it with the response; runs in a worker thread.
        tell: whether pages hear the response as well.
    """
    state, tenant = server(), g.tenant
    session, told = await state.call(lambda: change(state, tenant))
    state.feed.changed(session, what, **(told if tell else {}))
    return told
