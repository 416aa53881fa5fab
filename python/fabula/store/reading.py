"""Reads, as SQL. Each function runs in the caller's transaction, which sees one snapshot of the database."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import sqlalchemy as sa

from fabula.errors import SessionNotFound
from fabula.store.records import (
    Damaged,
    Match,
    Row,
    SessionRecord,
    SessionSummary,
    TurnRecord,
    session_of,
    turn_of,
)
from fabula.store.schema import sessions, tags, turns

_AROUND = 60  # characters of an excerpt before and after what was found


def find_session(connection: sa.Connection, tenant: str, id: str) -> SessionRecord | None:
    """A session; None if there is none.

    Raises:
        Damaged: the checksum of its row does not match.
    """
    query = sa.select(sessions).where(sessions.c.tenant == tenant, sessions.c.id == id)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else _session(dict(row))


def pasts_of_others(connection: sa.Connection, tenant: str, id: str) -> set[str]:
    """Ids of all ancestors of the forked sessions of a tenant, except of session `id`."""
    others = (sessions.c.tenant == tenant, sessions.c.id != id, sessions.c.base_id.is_not(None))
    lineage = sa.select(sessions.c.base_id.label("id")).where(*others).cte("lineage", recursive=True)
    before = (
        sa.select(turns.c.parent_id).join(lineage, turns.c.id == lineage.c.id).where(turns.c.parent_id.is_not(None))
    )
    return set(connection.scalars(sa.select(lineage.union(before).c.id)))


def list_sessions(connection: sa.Connection, tenant: str | None) -> tuple[list[SessionSummary], list[str]]:
    """Sessions, the last changed first, and the problems of damaged ones."""
    own = sa.select(sa.func.count()).where(turns.c.tenant == sessions.c.tenant, turns.c.session_id == sessions.c.id)
    query = sa.select(sessions, own.scalar_subquery().label("n_turns")).order_by(sessions.c.updated_at.desc())
    if tenant is not None:
        query = query.where(sessions.c.tenant == tenant)
    found, problems = [], []
    for row in connection.execute(query).mappings():
        columns = dict(row)
        n_turns = columns.pop("n_turns")
        try:
            found.append(SessionSummary(_session(columns), n_turns))
        except Damaged as damage:
            problems.append(str(damage))
    return found, problems


def count_sessions(connection: sa.Connection, tenant: str | None, but: str = "") -> int:
    """The number of sessions, of one tenant or all; excludes names that begin with `but`."""
    query = sa.select(sa.func.count()).select_from(sessions)
    if but:
        query = query.where(~sessions.c.id.startswith(but, autoescape=True))
    return connection.scalar(query if tenant is None else query.where(sessions.c.tenant == tenant)) or 0


def search(
    connection: sa.Connection, tenant: str, text: str, *, session_id: str | None, but: str, limit: int, offset: int
) -> list[Match]:
    """Turns whose prompt or answer has a text, in any case, the last made first.

    Args:
        tenant: their owner.
        text: to find; not empty.
        session_id: of the only session to search; None for all.
        but: sessions whose ids begin with it are left out; "" for none.
        limit, offset: which of the matches.
    """
    columns = (turns.c.session_id, turns.c.id, turns.c.number, turns.c.prompt, turns.c.text, turns.c.created_at)
    query = sa.select(*columns).where(turns.c.tenant == tenant, turns.c.session_id.is_not(None))
    if session_id is not None:
        query = query.where(turns.c.session_id == session_id)
    if but:
        query = query.where(~turns.c.session_id.startswith(but, autoescape=True))
    wanted, found, n_found = text.casefold(), [], 0
    query = query.order_by(turns.c.created_at.desc(), turns.c.id).execution_options(yield_per=256)
    for row in connection.execute(query):
        for field, raw in (("prompt", row.prompt), ("text", row.text)):
            held = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else ""
            at = _find(held, wanted)
            if at < 0:
                continue
            n_found += 1
            if n_found > offset:
                excerpt = _excerpt(held, at, len(text))
                found.append(Match(row.session_id, row.id, row.number, field, excerpt, row.created_at))
            if len(found) == limit:
                return found
    return found


def _find(text: str, folded: str) -> int:
    """Where a text has one that is case-folded; -1 if it has not. Folding may make a letter two."""
    whole = text.casefold()
    at = whole.find(folded)
    if at <= 0 or len(whole) == len(text):
        return at
    n = 0
    for i, letter in enumerate(text):
        if n >= at:
            return i
        n += len(letter.casefold())
    return len(text) - 1


def _excerpt(text: str, at: int, length: int) -> str:
    start, end = max(0, at - _AROUND), min(len(text), at + length + _AROUND)
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")


def load(connection: sa.Connection, tenant: str, id: str) -> tuple[SessionRecord, list[TurnRecord]]:
    """A session and all turns it needs.

    Raises:
        SessionNotFound: unknown session.
        Damaged: a checksum does not match, or a turn is missing.
    """
    session = find_session(connection, tenant, id)
    if session is None:
        raise SessionNotFound(f"there is no session {id!r}")
    step = sa.select(turns.c.id, turns.c.parent_id).where(turns.c.tenant == tenant, turns.c.id == session.base_id)
    # UNION drops duplicates, so that a cycle of damaged parents ends.
    lineage = step.cte("lineage", recursive=True)
    lineage = lineage.union(sa.select(turns.c.id, turns.c.parent_id).where(turns.c.id == lineage.c.parent_id))
    belongs = sa.or_(
        sa.and_(turns.c.tenant == tenant, turns.c.session_id == id),
        turns.c.id.in_(sa.select(lineage.c.id)),
    )
    names: dict[str, list[str]] = defaultdict(list)
    tagged = sa.select(tags.c.turn_id, tags.c.tag).join(turns, turns.c.id == tags.c.turn_id).where(belongs)
    for turn_id, tag in connection.execute(tagged):
        names[turn_id].append(tag)
    query = sa.select(turns).where(belongs).order_by(turns.c.created_at, turns.c.number)
    found = []
    for row in connection.execute(query).mappings():
        try:
            found.append(turn_of(dict(row), names[row["id"]]))
        except Damaged as damage:
            raise Damaged(f"session {id!r}: turn {row['id']!r} is damaged: {damage}") from None
    known = {turn.id for turn in found}
    for role, turn_id in (("base", session.base_id), ("head", session.head_id)):
        if turn_id is not None and turn_id not in known:
            raise Damaged(f"session {id!r}: turn {turn_id!r}, its {role}, is missing")
    return session, _parents_first(session, found)


def check(connection: sa.Connection) -> list[str]:
    """Problems of the database, as messages: its structure, checksums of all rows, missing turns. Reads everything."""
    problems = []
    if connection.dialect.name == "sqlite":
        verdicts = connection.exec_driver_sql("PRAGMA integrity_check").scalars()
        problems += [f"SQLite: {verdict}" for verdict in verdicts if verdict != "ok"]
    parents: dict[str, str | None] = {}
    listed: set[tuple[str, str]] = set()
    for row in _stream(connection, turns):
        parents[row["id"]] = row["parent_id"]
        if row["session_id"] is not None:
            listed.add((row["tenant"], row["session_id"]))
        try:
            turn_of(row, ())
        except Damaged as damage:
            problems.append(f"session {row['session_id']!r}: turn {row['id']!r} is damaged: {damage}")
    problems += [
        f"turn {id!r}: turn {parent!r} before it is missing"
        for id, parent in parents.items()
        if parent is not None and parent not in parents
    ]
    for row in _stream(connection, sessions):
        listed.discard((row["tenant"], row["id"]))
        try:
            session = _session(row)
        except Damaged as damage:
            problems.append(str(damage))
            continue
        for turn_id in {session.base_id, session.head_id, *session.undone} - {None, *parents}:
            problems.append(f"session {session.id!r}: turn {turn_id!r} is missing")
    problems += [f"session {id!r} of tenant {tenant!r} has turns, but is missing" for tenant, id in sorted(listed)]
    return problems


def _stream(connection: sa.Connection, table: sa.Table) -> Iterator[Row]:
    rows = connection.execution_options(yield_per=200).execute(sa.select(table)).mappings()
    return (dict(row) for row in rows)


def _session(row: Row) -> SessionRecord:
    try:
        return session_of(row)
    except Damaged as damage:
        raise Damaged(f"session {row['id']!r} of tenant {row['tenant']!r} is damaged: {damage}") from None


def _parents_first(session: SessionRecord, found: list[TurnRecord]) -> list[TurnRecord]:
    """Turns in the order given, oldest first, but parents before children even if the clock was set back."""
    waiting = {turn.id: turn for turn in found}
    ordered: dict[str, TurnRecord] = {}
    for turn in found:
        path = []
        step: TurnRecord | None = turn
        while step is not None and step.id not in ordered:
            path.append(step)
            parent_id = step.parent_id
            # Turns on this path are no longer in `waiting`, so a cycle of parents is reported as missing.
            del waiting[step.id]
            if parent_id is None or parent_id in ordered:
                break
            if (step := waiting.get(parent_id)) is None:
                raise Damaged(f"session {session.id!r}: turn {parent_id!r} before turn {path[-1].id!r} is missing")
        ordered.update((past.id, past) for past in reversed(path))
    return list(ordered.values())
