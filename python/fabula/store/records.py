"""Sessions and turns as data, and as rows of the database.

A row carries a checksum of what it says. Columns that are NULL do not count in it, so that a column which a later
schema version adds leaves the checksums of older rows as they are.
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
# `session_id` says who lists a turn, which changes when its session is deleted; foreign keys look after it.
_UNSEALED = {"checksum", "session_id"}


class Damaged(Exception):
    """A row does not say what was written; the message names it. Callers of `Store` see it as `StoreCorrupt`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecord:
    """A turn as it is kept.

    Attributes:
        id: its name, one for all tenants and sessions (a UUID's 32 hexadecimal digits).
        session_id: the session that lists it; None once that was deleted, while a fork goes on from the turn.
        parent_id: the turn before; None for a first one.
        number: distance from the empty start, from 1.
        chat: whether prompt and answer went through the chat template.
        prompt, text: what was said and answered.
        kept: ids of the parent's past that it goes on from.
        prompt_ids, token_ids: ids behind those, and of the answer; each fits 32 bits.
        params: sampling settings, as JSON.
        finish_reason: why the answer ended; None when it was being made as this was written.
        timings: counts and times, as JSON; None when unknown.
        cut: what was left out of the past to fit the context, as JSON; None for nothing.
        said: messages and options of the template, as JSON; None where `prompt` says it all.
        created_at: seconds since 1970.
        tags: names the user gave it, sorted, each once.
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
    """A session as it is kept; its turns name it. Tenant and id together tell it from others.

    Attributes:
        id: its name among its tenant's.
        tenant: whom it belongs to.
        model: name of the model it talks to.
        fingerprint: of that model's weights and tokenizer.
        settings: system prompt, sampling settings and the like, as JSON.
        base_id: the turn it was forked from; None for the empty start.
        head_id: the turn that the next one follows; None for the empty start.
        undone: heads that rollback left, for redo; the last one comes back first.
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
class SessionSummary:
    """A session in a list.

    Attributes:
        record: the session.
        n_turns: turns that it lists itself, without those it was forked from.
    """

    record: SessionRecord
    n_turns: int

    @property
    def id(self) -> str:
        """Its name among its tenant's."""
        return self.record.id

    @property
    def model(self) -> str:
        """Name of the model it talks to."""
        return self.record.model

    @property
    def title(self) -> str:
        """What people call it."""
        return str(self.record.settings.get("title", ""))

    @property
    def tags(self) -> tuple[str, ...]:
        """Names it has in common with others."""
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
    """The row of a turn, but for its tags.

    Raises:
        InvalidArgument: a value that cannot be kept; the message names it.
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
        InvalidArgument: a value that cannot be kept; the message names it.
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
    """Tags as they are kept: sorted, each once.

    Raises:
        InvalidArgument: one cannot be kept.
    """
    return tuple(sorted({_name("tag", tag) for tag in tags}))


# ---- From rows ------------------------------------------------------------------------------------------------------


def turn_of(row: Row, tags: Iterable[str]) -> TurnRecord:
    """The turn of a row.

    Raises:
        Damaged: the row is not as it was written.
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
        Damaged: the row is not as it was written.
    """
    verify(row)
    try:
        decoded = {"settings": json.loads(row["settings"]), "undone": tuple(json.loads(row["undone"]))}
        return SessionRecord(**{name: value for name, value in (row | decoded).items() if name != "checksum"})
    except (TypeError, ValueError) as error:
        raise Damaged(f"a column is not of its type ({error})") from None


def checksum(row: Row) -> bytes:
    """BLAKE2b, 128 bits, of a row's columns with their names and types."""
    digest = blake2b(digest_size=16)
    for name in sorted(row.keys() - _UNSEALED):
        value = row[name]
        if value is not None:
            data = value if isinstance(value, bytes) else str(value).encode(errors="surrogateescape")
            digest.update(f"{name} {type(value).__name__} {len(data)} ".encode() + data)
    return digest.digest()


def verify(row: Row) -> None:
    """Raises `Damaged` unless a row's checksum is that of its columns."""
    if row["checksum"] != checksum(row):
        raise Damaged("its checksum does not match")


# ---- Values ---------------------------------------------------------------------------------------------------------


def _utf8(what: str, text: str) -> bytes:
    """Text as bytes: PostgreSQL's own text type cannot hold NUL, which a model may say."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{what} holds half of a surrogate pair, which is no text") from None


def _name(what: str, text: str) -> str:
    if b"\0" in _utf8(what, text):
        raise InvalidArgument(f"{what} holds a NUL character")
    return text


def _json(what: str, value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{what} is no JSON: {error}") from None
    return _name(what, text)


def _count(what: str, number: int) -> int:
    if not 0 <= number <= _MAX_INT:
        raise InvalidArgument(f"{what} must be 0 .. {_MAX_INT}, not {number}")
    return int(number)


def _time(what: str, seconds: float) -> float:
    if not math.isfinite(seconds):
        raise InvalidArgument(f"{what} must be a time, not {seconds}")
    return float(seconds) + 0.0  # SQLite keeps no -0.0, and the checksum would see it


def _packed(what: str, ids: tuple[int, ...]) -> bytes:
    """Token ids as little-endian 32-bit integers."""
    try:
        return struct.pack(f"<{len(ids)}i", *ids)
    except struct.error as error:
        raise InvalidArgument(f"{what} must fit 32 bits each: {error}") from None


def _unpacked(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 4}i", data)
