"""`Persistence`: from sessions in memory to rows in a store, and back.

A finished turn is committed before its reply ends. A running one is stored from time to time, so that a crash leaves a
partial turn. Writes of the head are queued, in order, without waiting for them.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fabula.engine.constraint import Constraint
from fabula.engine.generation import Timings
from fabula.engine.sampling import SamplingParams
from fabula.engine.thinking import Thinking
from fabula.errors import SessionExists, StoreCorrupt
from fabula.keyed_lock import KeyedLocks
from fabula.sessions.policy import ContextPolicy, Cut
from fabula.sessions.settings import Settings
from fabula.sessions.turn import START, Turn
from fabula.sessions.user_input import UserInput
from fabula.store.records import SessionRecord, TurnRecord

if TYPE_CHECKING:
    from fabula.sessions.reply import Reply
    from fabula.sessions.session import Session
    from fabula.store.store import Store
    from fabula.store.writer import Watch


class Persistence:
    """Stores sessions and reads them back. Methods may be called from any thread.

    Args:
        store: where they are stored.

    Attributes:
        sessions: those in use, by tenant and id.
        turns: those in use, by id: forks share the turns they were forked from.
        lock: guards both; never held while the store reads or writes.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.sessions: weakref.WeakValueDictionary[tuple[str, str], Session] = weakref.WeakValueDictionary()
        self.turns: weakref.WeakValueDictionary[str, Turn] = weakref.WeakValueDictionary()
        self.lock = threading.RLock()
        self._names = KeyedLocks()
        self._drafts: dict[tuple[str, str], set[str]] = {}  # checkpoints that could not be deleted, by session
        self._watches: weakref.WeakKeyDictionary[Reply, Watch] = weakref.WeakKeyDictionary()
        self._unflushed: set[tuple[str, str]] = set()  # sessions with a queued write

    @property
    def in_use(self) -> list[Session]:
        """The sessions in use."""
        with self.lock:
            return list(self.sessions.values())

    @contextmanager
    def exclusive(self, tenant: str, id: str) -> Iterator[None]:
        """During a `with` block no other thread creates, or reads from the store, a session of that name. The block may
        wait for the store; sessions of other names are not held up."""
        with self._names.of((tenant, id)):
            yield

    # ---- New sessions -----------------------------------------------------------------------------------------------

    def register(self, session: Session) -> None:
        """Reserves the id of a new session, which becomes visible in `sessions`; writes nothing.

        Raises:
            SessionExists: the id is taken.
        """
        key = (session.tenant, session.id)
        with self.exclusive(*key):
            if key in self.sessions or self.store.find(*key) is not None:
                raise SessionExists(f"there is a session {session.id!r} already; give another id")
            self.add(session)

    def create(self, session: Session) -> None:
        """Stores a registered session: it is committed when this returns.

        Raises:
            StoreError: it could not be committed; the id is free again.
        """
        try:
            self.store.put_session(session_record(session)).result()
        except BaseException:
            session._deleted = True  # another thread may have opened it meanwhile
            self._unregister(session)
            raise

    def create_with_turns(self, session: Session) -> None:
        """Stores a registered session and its turns: all of it is committed when this returns, or nothing.

        Raises:
            StoreError: it could not be committed; the id is free again.
        """
        last = session_record(session)
        first = dataclasses.replace(last, head_id=None, undone=())
        own = session._tree.own
        try:
            writes = [self.store.put_session(first)]
            writes += [self.store.put_turn(turn_record(turn, session.id), first) for turn in own]
            writes.append(self.store.put_session(last))
            for write in writes:
                write.result()
        except BaseException:
            self._unregister(session)
            self.store.delete_session(session.tenant, session.id, [turn.id for turn in own]).result()
            raise
        self._add_turns(*own)

    def _unregister(self, session: Session) -> None:
        with self.lock:
            self.sessions.pop((session.tenant, session.id), None)

    def _add_turns(self, *turns: Turn) -> None:
        with self.lock:
            self.turns.update({turn.id: turn for turn in turns})

    # ---- Changes ----------------------------------------------------------------------------------------------------

    def save_settings(self, session: Session, settings: Settings) -> None:
        """Stores new settings of a session: they are committed when this returns."""
        self.store.put_session(session_record(session, settings=settings)).result()

    def watch(self, reply: Reply, session: Session) -> None:
        """Stores a checkpoint of a running reply from time to time, as the head if its turn is to become that."""
        reply_of, session_of = weakref.ref(reply), weakref.ref(session)

        def snapshot() -> tuple[TurnRecord, SessionRecord] | None:
            reply, session = reply_of(), session_of()
            if reply is None or session is None:
                raise ReferenceError("the reply was forgotten")
            turn = reply.draft()
            if len(turn.token_ids) <= turn.n_begun:
                return None
            record = dataclasses.replace(turn_record(turn, session.id), finish_reason=None)
            return record, session_record(session, *((turn, []) if reply.selects else (None, None)))

        with self.lock:
            self._unflushed.add((session.tenant, session.id))
        self._watches[reply] = self.store.watch(snapshot)

    def save_reply(self, reply: Reply, turn: Turn | None, session: Session) -> None:
        """Ends the checkpoints of a reply and stores its turn, if there is one: it is committed when this returns.

        Raises:
            StoreError: it could not be committed; the store is as it was before the reply.
        """
        watch = self._watches.pop(reply, None)
        if watch is not None:
            watch.close(discard=turn is None)
        if turn is None:
            self.save_head(session)  # a checkpoint may have moved it to the draft
            return
        head, undone = (turn, []) if reply.selects else (session.head, session._tree.redo_stack)
        try:
            self.store.put_turn(turn_record(turn, session.id), session_record(session, head, undone)).result()
        except BaseException:
            with self.lock:
                self._drafts.setdefault((session.tenant, session.id), set()).add(turn.id)
            if watch is not None:
                watch.close(discard=True)  # a full disk may refuse this too
            self.save_head(session)
            raise
        self._add_turns(turn)

    def save_turn(self, turn: Turn, session: Session) -> None:
        """Stores a handwritten turn as the head: it is committed when this returns.

        Raises:
            StoreError: it could not be committed; the store is as it was before.
        """
        self.store.put_turn(turn_record(turn, session.id), session_record(session, turn, [])).result()
        self._add_turns(turn)

    def save_head(self, session: Session) -> None:
        """Queues a write of the head; does not wait for it."""
        with self.lock:
            self._unflushed.add((session.tenant, session.id))
        self.store.set_head(session.tenant, session.id, *head_ids(session.head, session._tree.redo_stack))

    def save_tags(self, turn: Turn, tags: set[str]) -> None:
        """Stores the tags of a turn: they are committed when this returns."""
        self.store.put_tags(turn.id, tags).result()

    def delete_turns(self, session: Session, turns: list[Turn], head: Turn) -> None:
        """Deletes turns, except those on the path to a fork, and stores the head: committed when this returns."""
        needed = self._needed(session, turns)
        gone = [turn.id for turn in turns if turn not in needed] + self._left_drafts(session)
        left = [turn.id for turn in turns if turn in needed]
        self.store.delete_turns(session_record(session, head, []), gone, left).result()

    def delete(self, session: Session, turns: list[Turn]) -> None:
        """Deletes a session and its turns, except those on the path to a fork: committed when this returns."""
        needed = self._needed(session, turns)
        orphans = self._orphans(session)
        delete = [turn.id for turn in turns if turn not in needed] + orphans + self._left_drafts(session)
        orphan = [turn.id for turn in turns if turn in needed]
        self.store.delete_session(session.tenant, session.id, delete, orphan).result()
        self._unregister(session)

    def _left_drafts(self, session: Session) -> list[str]:
        with self.lock:
            return list(self._drafts.pop((session.tenant, session.id), ()))

    def _needed(self, session: Session, turns: list[Turn]) -> set[Turn]:
        """Of these turns, those on the path to a fork, also one that is not committed yet."""
        mine = {turn.id: turn for turn in turns}
        stored = {mine[id] for id in self.store.pasts_of_others(session.tenant, session.id) if id in mine}
        return stored | {past for turn in turns if turn.forks for past in turn.lineage() if past.id in mine}

    def _orphans(self, session: Session) -> list[str]:
        """Turns of deleted sessions that only this fork needs."""
        _, turns = self.store.load(session.tenant, session.id)
        left = [turn.id for turn in turns if turn.session_id is None]
        others = self.store.pasts_of_others(session.tenant, session.id) if left else set()
        return [id for id in left if id not in others]

    # ---- Reading ----------------------------------------------------------------------------------------------------

    def load(self, tenant: str, id: str) -> tuple[SessionRecord, list[Turn], dict[str, Turn]]:
        """Reads a session that is not in use. Waits for the store only if this process has changed the session before.

        Returns:
            Its record, the turns it lists itself (oldest first), and every turn that can be reached, by id.

        Raises:
            SessionNotFound: there is no such session.
            StoreCorrupt: a row is damaged; names session and turn.
        """
        with self.lock:
            is_unflushed = (tenant, id) in self._unflushed
        if is_unflushed:  # a moved head or a last checkpoint may still be queued
            self.store.flush()
            with self.lock:
                self._unflushed.discard((tenant, id))
        record, turns = self.store.load(tenant, id)
        known: dict[str, Turn] = {}
        own: list[Turn] = []
        with self.lock:
            for row in turns:
                turn = self.turns.get(row.id)
                if turn is None:
                    turn = self.turns[row.id] = turn_of(row, known.get(row.parent_id or ""))
                known[row.id] = turn
                if row.session_id == id:
                    own.append(turn)
        return record, own, known

    def add(self, session: Session) -> None:
        """Adds a session that was read or is new."""
        with self.lock:
            self.sessions[session.tenant, session.id] = session


# ---- Records --------------------------------------------------------------------------------------------------------


def head_ids(head: Turn, undone: list[Turn]) -> tuple[str | None, tuple[str, ...]]:
    """Ids of the head and of the redo stack as the store has them; the empty start is None as the head, "" in the
    stack."""
    return head.id or None, tuple(turn.id for turn in undone)


def session_record(
    session: Session,
    head: Turn | None = None,
    undone: list[Turn] | None = None,
    settings: Settings | None = None,
) -> SessionRecord:
    """A session as it is stored, with another head or other settings if given."""
    settings = session._settings if settings is None else settings
    head_id, undone_ids = head_ids(
        session.head if head is None else head, session._tree.redo_stack if undone is None else undone
    )
    handle, base = session._handle, session._tree.root
    return SessionRecord(
        id=session.id,
        tenant=session.tenant,
        model=handle.name,
        fingerprint=handle.fingerprint,
        settings={
            "system": settings.system,
            "params": params_json(settings.params),
            "policy": settings.policy.to_json(),
            "vocabulary": session.vocabulary,
        }
        | ({"title": settings.title} if settings.title else {})
        | ({"tags": list(settings.tags)} if settings.tags else {}),
        base_id=base.id or None,
        head_id=head_id,
        undone=undone_ids,
        created_at=session.created_at,
        updated_at=time.time(),
    )


def turn_record(turn: Turn, session_id: str | None) -> TurnRecord:
    """A turn as it is stored."""
    parent = turn.parent
    return TurnRecord(
        id=turn.id,
        session_id=session_id,
        parent_id=parent.id or None if parent is not None else None,
        number=turn.number,
        chat=turn.chat,
        prompt=turn.prompt,
        text=turn.text,
        kept=turn.kept,
        prompt_ids=turn.prompt_ids,
        token_ids=turn.token_ids,
        params={"sampling": used_params_json(turn.params or SamplingParams()), "n_begun": turn.n_begun}
        | ({"frozen": True} if turn.frozen else {})
        | ({"prompt_unread": True} if turn.prompt_unread else {}),
        finish_reason=turn.finish_reason,
        timings={**dataclasses.asdict(turn.timings), "why_recomputed": turn.why_recomputed} if turn.timings else None,
        cut=turn.cut.to_json() if turn.cut else None,
        said=turn.said.to_json(),
        created_at=turn.created_at,
        tags=tuple(turn.tags),
    )


def turn_of(record: TurnRecord, parent: Turn | None) -> Turn:
    """The turn of a record. One that was running when the process died is partial: "interrupted".

    Raises:
        StoreCorrupt: a field is missing or malformed.
    """
    try:
        timings = dict(record.timings) if record.timings is not None else None
        why = timings.pop("why_recomputed") if timings else ""
        return Turn(
            id=record.id,
            parent=parent if parent is not None else START,
            number=record.number,
            chat=record.chat,
            said=UserInput.from_json(record.prompt, record.said),
            text=record.text,
            kept=record.kept,
            prompt_ids=record.prompt_ids,
            token_ids=record.token_ids,
            n_begun=record.params["n_begun"],
            params=params_of(record.params["sampling"]).resolved({}),
            finish_reason=record.finish_reason or "interrupted",  # type: ignore[arg-type]
            timings=Timings(**timings) if timings else None,
            cut=Cut(**record.cut) if record.cut else None,
            why_recomputed=why,
            frozen=record.params.get("frozen") is True,
            prompt_unread=record.params.get("prompt_unread") is True,
            created_at=record.created_at,
            tags=set(record.tags),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreCorrupt(f"turn {record.id} is damaged: {error!r}") from None


def policy_of(settings: Mapping[str, Any]) -> ContextPolicy:
    """The context policy among a session's settings."""
    return ContextPolicy.from_json(settings["policy"])


def used_params_json(params: SamplingParams) -> dict[str, Any]:
    """The sampling parameters of a turn as JSON: those that are not neutral, as a turn does not depend on a model's
    defaults."""
    default = SamplingParams()
    return {name: value for name, value in params_json(params).items() if value != getattr(default, name)}


def params_json(params: SamplingParams) -> dict[str, Any]:
    """Sampling parameters as JSON: those that were given, and others that are not the default; -inf as a string."""
    default = SamplingParams()
    found = {
        field.name: value
        for field in dataclasses.fields(params)
        if field.init
        and ((value := getattr(params, field.name)) != getattr(default, field.name) or field.name in params.given)
    }
    if "logit_bias" in found:
        pairs = dict(found["logit_bias"]).items()
        found["logit_bias"] = [[token, "-inf" if bias == -math.inf else bias] for token, bias in pairs]
    if params.constraint is not None:
        constraint = dataclasses.asdict(params.constraint)
        found["constraint"] = {name: value for name, value in constraint.items() if name != "shown" or value}
    if params.thinking is not None:
        found["thinking"] = dataclasses.asdict(params.thinking)
    return found


def params_of(value: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters from JSON.

    Raises:
        InvalidArgument, TypeError: it holds something else.
    """
    found = dict(value)
    if "logit_bias" in found:
        found["logit_bias"] = {token: float(bias) for token, bias in found["logit_bias"]}
    if "constraint" in found:
        found["constraint"] = Constraint(**found["constraint"])
    if "thinking" in found:
        found["thinking"] = Thinking(**found["thinking"])
    return SamplingParams(**found)
