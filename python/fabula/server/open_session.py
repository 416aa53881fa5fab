"""Opens the session of a request: one that exists, or a new one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from fabula.server.schemas import Opening, WriteBody
from fabula.server.state import Server
from fabula.sessions.session import Session

Open = Callable[[Server, str], AbstractContextManager[Session]]  # given the server and the tenant; blocks


def existing(session_id: str, *, n_turns: int = 0, needs_model: bool = True) -> Open:
    """Opens a session that exists.

    Args:
        session_id: of the session.
        n_turns: turns that the request adds; too many are refused with 409.
        needs_model: whether its model must be served and loaded.
    """

    @contextmanager
    def open(state: Server, tenant: str) -> Iterator[Session]:
        session = state.open(tenant, session_id) if needs_model else state.workspace.open(session_id, tenant=tenant)
        if n_turns:
            state.limits.check_turns(session, n_turns)
        yield session

    return open


def existing_or_new(data: Opening | WriteBody) -> Open:
    """Opens the session a body names, or creates it with the body's settings. It is deleted if the block raises."""

    @contextmanager
    def open(state: Server, tenant: str) -> Iterator[Session]:
        settings: dict[str, Any] = {"title": data.title}
        if isinstance(data, Opening):
            settings |= {"system": data.system, "context_policy": data.policy()}
        else:
            settings["context_policy"] = data.context_policy
        with state.joined(tenant, data.session_id, data.model, data.sampling, **settings) as session:
            state.limits.check_turns(session)
            yield session

    return open
