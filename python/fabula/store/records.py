"""Sessions and turns as data, and as rows of the database.

Each row has a checksum of its values. NULL columns do not count, so that a column added by a later schema version does
not change the checksums of older rows.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from fabula.errors import InvalidArgument

Row = dict[str, Any]

_MAX_INT = 2**31 - 1
# Not in the checksum: `session_id` changes when a session is deleted; a foreign key protects it.
_UNSEALED = {"checksum", "session_id"}


class Damaged(Exception):
    """A row was damaged; the message names it. Callers of `Store` get `StoreCorrupt`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecord:
    """A stored turn.

    Attributes:
        id: unique over all tenants and sessions (a UUID's 32 hexadecimal digits).
        session_id: its session; None if that was deleted while a fork still needs the turn.
        parent_id: the turn before; None for a first one.
        number: depth in the tree, from 1.
        chat: whether prompt and reply use the chat template.
        prompt, text: user input and reply.
        kept: number of the parent's ids that it continues.
        prompt_ids, token_ids: ids of the prompt after those, and of the reply; int32.
        params: sampling settings, as JSON.
        finish_reason: why the reply ended; None: it was unfinished when this was written.
        timings: counts and times, as JSON; None if unknown.
        cut: what was dropped from the past to fit the context, as JSON; None for nothing.
        said: messages and options of the template, as JSON; None if `prompt` is the whole user input.
        created_at: seconds since 1970.
        tags: the user's tags, sorted, unique.
    """

    id: str
    session_id: str | None
    parent_id: str | None
    number: int
    chat: bool
    prompt: str
    text: str
    kept: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    params: Mapping[str, Any]
    finish_reason: str | None
    timings: Mapping[str, Any] | None
    cut: Mapping[str, Any] | None
    created_at: float
    tags: tuple[str, ...] = ()
    said: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """A stored session, without its turns. Tenant and id together are unique.

    Attributes:
        id: unique for its tenant.
        tenant: its owner.
        model: name of its model.
        fingerprint: of that model's weights and tokenizer.
        settings: system message, sampling settings and others, as JSON.
        base_id: the turn it was forked from; None for the root.
        head_id: its current turn; None for the root.
        undone: redo stack: heads before rollbacks, the last one on top.
        created_at, updated_at: seconds since 1970.
    """

    id: str
    tenant: str
    model: str
    fingerprint: str
    settings: Mapping[str, Any]
    base_id: str | None
    head_id: str | None
    undone: tuple[str, ...]
    created_at: float
    updated_at: float


@dataclass(frozen=True, slots=True)
class Match:
    """A turn that has a text.

    Attributes:
        session_id: of the session it was made in.
        turn_id, number: of the turn.
        field: where the text is: "prompt", the user's, or "text", the answer.
        excerpt: what is around the first place.
        created_at: seconds since 1970.
    """

    session_id: str
    turn_id: str
    number: int
    field: str
    excerpt: str
    created_at: float


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A session in a list.

    Attributes:
        record: the session.
        n_turns: its own turns, without those it was forked from.
    """

    record: SessionRecord
    n_turns: int

    @property
    def id(self) -> str:
        """Its id, unique for its tenant."""
        return self.record.id

    @property
    def model(self) -> str:
        """Name of its model."""
        return self.record.model

    @property
    def title(self) -> str:
        """Its title, for display."""
        return str(self.record.settings.get("title", ""))

    @property
    def tags(self) -> tuple[str, ...]:
        """Its tags."""
        return tuple(self.record.settings.get("tags", ()))

    @property
    def created_at(self) -> float:
        """Seconds since 1970."""
        return self.record.created_at

    @property
    def updated_at(self) -> float:
        """When its turns, head or settings changed last; seconds since 1970."""
        return self.record.updated_at


# ---- To rows --------------------------------------------------------------------------------------------------------


def turn_row(turn: TurnRecord, tenant: str) -> Row:
    """The row of a turn, without its tags.

    Raises:
        InvalidArgument: a value that cannot be stored; the message names it.
    """
    what = f"turn {turn.id!r}: "
    row = {
        "id": _name(what + "id", turn.id),
        "tenant": _name("tenant", tenant),
        "session_id": None if turn.session_id is None else _name(what + "session_id", turn.session_id),
        "parent_id": None if turn.parent_id is None else _name(what + "parent_id", turn.parent_id),
        "number": _count(what + "number", turn.number),
        "chat": int(turn.chat),
        "prompt": _utf8(what + "prompt", turn.prompt),
        "text": _utf8(what + "text", turn.text),
        "kept": _count(what + "kept", turn.kept),
        "prompt_ids": _packed(what + "prompt_ids", turn.prompt_ids),
        "token_ids": _packed(what + "token_ids", turn.token_ids),
        "params": _json(what + "params", dict(turn.params)),
        "finish_reason": None if turn.finish_reason is None else _name(what + "finish_reason", turn.finish_reason),
        "timings": None if turn.timings is None else _json(what + "timings", dict(turn.timings)),
        "cut": None if turn.cut is None else _json(what + "cut", dict(turn.cut)),
        "said": None if turn.said is None else _json(what + "said", dict(turn.said)),
        "created_at": _time(what + "created_at", turn.created_at),
    }
    return row | {"checksum": checksum(row)}


def session_row(session: SessionRecord) -> Row:
    """The row of a session.

    Raises:
        InvalidArgument: a value that cannot be stored; the message names it.
    """
    what = f"session {session.id!r}: "
    row = {
        "tenant": _name(what + "tenant", session.tenant),
        "id": _name(what + "id", session.id),
        "model": _name(what + "model", session.model),
        "fingerprint": _name(what + "fingerprint", session.fingerprint),
        "settings": _json(what + "settings", dict(session.settings)),
        "base_id": None if session.base_id is None else _name(what + "base_id", session.base_id),
        "head_id": None if session.head_id is None else _name(what + "head_id", session.head_id),
        "undone": _json(what + "undone", [_name(what + "undone", id) for id in session.undone]),
        "created_at": _time(what + "created_at", session.created_at),
        "updated_at": _time(what + "updated_at", session.updated_at),
    }
    return row | {"checksum": checksum(row)}


def checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Tags for storage: sorted, unique.

    Raises:
        InvalidArgument: one cannot be stored.
    """
    return tuple(sorted({_name("tag", tag) for tag in tags}))


# ---- From rows ------------------------------------------------------------------------------------------------------


def turn_of(row: Row, tags: Iterable[str]) -> TurnRecord:
    """The turn of a row.

    Raises:
        Damaged: the checksum does not match.
    """
    verify(row)
    try:
        return TurnRecord(
            id=row["id"],
            session_id=row["session_id"],
            parent_id=row["parent_id"],
            number=row["number"],
            chat=bool(row["chat"]),
            prompt=row["prompt"].decode(),
            text=row["text"].decode(),
            kept=row["kept"],
            prompt_ids=_unpacked(row["prompt_ids"]),
            token_ids=_unpacked(row["token_ids"]),
            params=json.loads(row["params"]),
            finish_reason=row["finish_reason"],
            timings=None if row["timings"] is None else json.loads(row["timings"]),
            cut=None if row["cut"] is None else json.loads(row["cut"]),
            said=None if row["said"] is None else json.loads(row["said"]),
            created_at=row["created_at"],
            tags=tuple(sorted(tags)),
        )
    except (AttributeError, TypeError, ValueError, struct.error) as error:
        raise Damaged(f"a column is not of its type ({error})") from None


def session_of(row: Row) -> SessionRecord:
    """The session of a row.

    Raises:
        Damaged: the checksum does not match.
    """
    verify(row)
    try:
        decoded = {"settings": json.loads(row["settings"]), "undone": tuple(json.loads(row["undone"]))}
        return SessionRecord(**{name: value for name, value in (row | decoded).items() if name != "checksum"})
    except (TypeError, ValueError) as error:
        raise Damaged(f"a column is not of its type ({error})") from None


def checksum(row: Row) -> bytes:
    """BLAKE2b, 128 bits, over names, types and values of a row's columns."""
    digest = blake2b(digest_size=16)
    for name in sorted(row.keys() - _UNSEALED):
        value = row[name]
        if value is not None:
            data = value if isinstance(value, bytes) else str(value).encode(errors="surrogateescape")
            digest.update(f"{name} {type(value).__name__} {len(data)} ".encode() + data)
    return digest.digest()


def verify(row: Row) -> None:
    """Raises `Damaged` if a row's checksum does not match its columns."""
    if row["checksum"] != checksum(row):
        raise Damaged("its checksum does not match")


# ---- Values ---------------------------------------------------------------------------------------------------------


def _utf8(what: str, text: str) -> bytes:
    """Text as bytes: PostgreSQL's text type cannot hold NUL, which a model may generate."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{what} holds half of a surrogate pair, which is not valid text") from None


def _name(what: str, text: str) -> str:
    if b"\0" in _utf8(what, text):
        raise InvalidArgument(f"{what} holds a NUL character")
    return text


def _json(what: str, value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{what} is not JSON: {error}") from None
    return _name(what, text)


def _count(what: str, number: int) -> int:
    if not 0 <= number <= _MAX_INT:
        raise InvalidArgument(f"{what} must be 0 .. {_MAX_INT}, not {number}")
    return int(number)


def _time(what: str, seconds: float) -> float:
    if not math.isfinite(seconds):
        raise InvalidArgument(f"{what} must be a time, not {seconds}")
    return float(seconds) + 0.0  # SQLite stores -0.0 as 0.0, which would change the checksum


def _packed(what: str, ids: tuple[int, ...]) -> bytes:
    """Token ids as little-endian 32-bit integers."""
    try:
        return struct.pack(f"<{len(ids)}i", *ids)
    except struct.error as error:
        raise InvalidArgument(f"{what} must fit 32 bits each: {error}") from None


def _unpacked(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 4}i", data)
