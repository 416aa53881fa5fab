"""The sessions of `/v1/responses`. A response is a turn; its id names the session and the turn.

They are ordinary sessions with hidden ids. A response to a session's head is added to the session. A response to an
earlier turn, or while another one is running, goes to a fork, which shares the path and recomputes nothing.
"""

from __future__ import annotations

import re
import secrets
import threading
from typing import Any
from weakref import WeakKeyDictionary

from fabula.errors import InvalidArgument, SessionNotFound
from fabula.server.failures import ApiError
from fabula.server.limits import HIDDEN
from fabula.server.state import Server
from fabula.sessions.session import Session
from fabula.sessions.turn import Turn

MAX_CONVERSATIONS = 1000  # of one key; the least recently used is deleted for a new one
DELETED = "deleted"  # tag of a deleted response that others continue

_ID = re.compile(r"resp_([0-9a-f]{24})_([0-9a-f]{32})")
_CONVERSATION = re.compile(r"conv_([0-9a-f]{24})")
_LOCKS: WeakKeyDictionary[Session, threading.Lock] = WeakKeyDictionary()
_GUARD = threading.Lock()


def new_name() -> str:
    """A random session id."""
    return HIDDEN + secrets.token_hex(12)


def response_id(session_id: str, turn_id: str) -> str:
    """The id of a response."""
    return f"resp_{session_id.removeprefix(HIDDEN)}_{turn_id}"


def lock_of(session: Session) -> threading.Lock:
    """Lock to hold from reading a session's head until its next turn has started."""
    with _GUARD:
        return _LOCKS.setdefault(session, threading.Lock())


def find(state: Server, tenant: str, id: str) -> tuple[Session, Turn] | None:
    """A response's session and turn; None if there is none. Blocks."""
    match = _ID.fullmatch(id)
    if match is None:
        return None
    try:
        session = state.open(tenant, HIDDEN + match[1])
        turn = session.turn(match[2])
    except (SessionNotFound, InvalidArgument):
        return None
    return None if DELETED in turn.tags else (session, turn)


def make_room(state: Server, tenant: str) -> None:
    """Deletes least recently used conversations of a key until it may have another one; blocks.

    Raises:
        ApiError: 429, the key's other sessions are too many.
    """
    n_all = state.workspace.n_sessions(tenant)
    most_all = state.settings.max_sessions
    if n_all < min(MAX_CONVERSATIONS, most_all):
        return
    hidden = [one.record.id for one in state.workspace.sessions(tenant) if one.record.id.startswith(HIDDEN)]
    while hidden and (len(hidden) >= MAX_CONVERSATIONS or n_all >= most_all):
        session = state.workspace.open(hidden.pop(), tenant=tenant)
        if not session.is_busy:
            state.delete(session)
            n_all -= 1
    state.limits.check_sessions(tenant)


def delete(state: Server, session: Session, turn: Turn) -> None:
    """Deletes a response; blocks. If others continue it, its turn stays and is tagged as deleted."""
    with lock_of(session):
        own = session.turns[len(session.turns) - session.n_turns :]
        if session.is_busy or turn is not session.head or turn not in own or turn.parent is None:
            session.tag(turn.id, DELETED)
        elif len(own) == 1:
            state.delete(session)
        else:
            session.rollback(turn.parent, prune=True)


def conversation_id(session_id: str) -> str:
    """The id of a conversation."""
    return "conv_" + session_id.removeprefix(HIDDEN)


def find_conversation(state: Server, tenant: str, id: str) -> Session:
    """A conversation's session; blocks.

    Raises:
        ApiError: 404, there is none, or it belongs to another key.
    """
    match = _CONVERSATION.fullmatch(id)
    try:
        if match is not None:
            return state.open(tenant, HIDDEN + match[1])
    except SessionNotFound:
        pass
    raise ApiError(404, "conversation_not_found", f"there is no conversation {id[:128]!r}")


def write_items(state: Server, session: Session, exchanges: list[tuple[list[dict[str, Any]], str]]) -> list[Turn]:
    """Adds messages and answers to a conversation as turns; blocks.

    Raises:
        ApiError, InvalidArgument, ContextOverflow: as `Session.write`; the exchanges before that one are written.
    """
    turns = []
    with lock_of(session):
        for messages, answer in exchanges:
            state.limits.check_turns(session)
            turns.append(session.write(answer, said=messages, wait=True))
    return turns


def not_found(id: str) -> ApiError:
    """404 for a response that does not exist or belongs to another key."""
    return ApiError(404, "response_not_found", f"there is no response {id[:128]!r}")
