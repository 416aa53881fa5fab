"""Writes, as SQL. Each function runs in the caller's transaction, and may run again after a rollback."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice

import sqlalchemy as sa

from fabula.errors import InvalidArgument, SessionNotFound
from fabula.store.reading import find_session
from fabula.store.records import Row, session_row
from fabula.store.schema import sessions, tags, turns

_MAX_LIST = 500  # values in one statement


def put_session(connection: sa.Connection, row: Row) -> None:
    """Inserts or updates a session."""
    _put(connection, sessions, ("tenant", "id"), row)


def put_turn(connection: sa.Connection, turn: Row, tags: Sequence[str], session: Row) -> None:
    """Inserts or updates a turn, its tags and its session."""
    put_session(connection, session)
    # A turn cannot move: the primary key refuses an id that another session or tenant uses.
    _put(connection, turns, ("id", "tenant", "session_id"), turn)
    _set_tags(connection, turn["id"], tags)


def put_tags(connection: sa.Connection, turn_id: str, tags: Sequence[str]) -> None:
    """Replaces the tags of a turn.

    Raises:
        InvalidArgument: unknown turn.
    """
    if connection.scalar(sa.select(turns.c.id).where(turns.c.id == turn_id)) is None:
        raise InvalidArgument(f"there is no turn {turn_id!r} in the store")
    _set_tags(connection, turn_id, tags)


def set_head(
    connection: sa.Connection, tenant: str, id: str, head_id: str | None, undone: tuple[str, ...], updated_at: float
) -> None:
    """Moves the head of a session.

    Raises:
        SessionNotFound: unknown session.
        Damaged: the checksum of its row does not match.
    """
    session = find_session(connection, tenant, id)
    if session is None:
        raise SessionNotFound(f"there is no session {id!r}")
    put_session(connection, session_row(replace(session, head_id=head_id, undone=undone, updated_at=updated_at)))


def delete_turns(connection: sa.Connection, session: Row, ids: Iterable[str], orphan: Iterable[str]) -> None:
    """Updates a session, deletes some of its turns and orphans others, which forked sessions still need.

    Raises:
        InvalidArgument: another session was forked from one of the deleted turns.
    """
    put_session(connection, session)
    _orphan(connection, session["tenant"], session["id"], orphan)
    _delete_turns(connection, session["tenant"], session["id"], ids)


def delete_session(
    connection: sa.Connection, tenant: str, id: str, delete: Iterable[str], orphan: Iterable[str]
) -> None:
    """Deletes a session and some turns, and orphans its other turns, which forked sessions still need. Does nothing for
    an unknown session.

    Raises:
        InvalidArgument: another session was forked from a deleted turn.
    """
    delete = list(delete)
    _orphan(connection, tenant, id, chain(delete, orphan))  # the foreign key of a turn would keep the session
    connection.execute(sa.delete(sessions).where(sessions.c.tenant == tenant, sessions.c.id == id))
    _delete_turns(connection, tenant, id, delete)


def discard_draft(connection: sa.Connection, turn: Row) -> None:
    """Deletes a discarded turn; if it is the head of its session, the parent becomes the head."""
    session = find_session(connection, turn["tenant"], turn["session_id"])
    if session is not None and session.head_id == turn["id"]:
        put_session(connection, session_row(replace(session, head_id=turn["parent_id"])))
    _delete_turns(connection, turn["tenant"], turn["session_id"], [turn["id"]])


def _put(connection: sa.Connection, table: sa.Table, key: tuple[str, ...], row: Row) -> None:
    """Updates the row with the same key, or inserts it."""
    update = sa.update(table).where(*(table.c[name] == row[name] for name in key)).values(row)
    if connection.execute(update).rowcount == 0:
        connection.execute(sa.insert(table), row)


def _set_tags(connection: sa.Connection, turn_id: str, names: Sequence[str]) -> None:
    connection.execute(sa.delete(tags).where(tags.c.turn_id == turn_id))
    if names:
        connection.execute(sa.insert(tags), [{"turn_id": turn_id, "tag": name} for name in names])


def _orphan(connection: sa.Connection, tenant: str, session_id: str, ids: Iterable[str]) -> None:
    """Orphans turns: they belong to no session any more."""
    mine = (turns.c.tenant == tenant, turns.c.session_id == session_id)
    for some in _batches(ids):
        connection.execute(sa.update(turns).where(*mine, turns.c.id.in_(some)).values(session_id=None))


def _delete_turns(connection: sa.Connection, tenant: str, session_id: str, ids: Iterable[str]) -> None:
    """Deletes turns of the session, or orphaned ones."""
    mine = (turns.c.tenant == tenant, sa.or_(turns.c.session_id == session_id, turns.c.session_id.is_(None)))
    found: list[tuple[int, str]] = []
    for some in _batches(ids):
        begun = connection.scalar(sa.select(sessions.c.id).where(sessions.c.base_id.in_(some)).limit(1))
        if begun is not None:
            raise InvalidArgument(f"a turn cannot be deleted, as session {begun!r} begins at it")
        query = sa.select(turns.c.number, turns.c.id).where(*mine, turns.c.id.in_(some))
        found += [(number, id) for number, id in connection.execute(query)]
    # Children before parents: foreign keys are checked at the end of each statement.
    for some in _batches(id for _, id in sorted(found, reverse=True)):
        connection.execute(sa.delete(turns).where(turns.c.id.in_(some)))


def _batches(ids: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(ids)
    while some := list(islice(rest, _MAX_LIST)):
        yield some
