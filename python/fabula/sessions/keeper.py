"""Keeping sessions: between trees in memory and rows in a store.

A finished turn is committed before its reply says so. A running one is written from time to time, so that a crash
leaves it as a partial turn. The head follows without being waited for, in order.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fabula.engine.constraint import Constraint
from fabula.engine.generation import Timings
from fabula.engine.sampling import SamplingParams
from fabula.errors import SessionExists, StoreCorrupt
from fabula.sessions.policy import ContextPolicy, Cut
from fabula.sessions.said import Said
from fabula.sessions.settings import Settings
from fabula.sessions.turn import START, Turn
from fabula.store.records import SessionRecord, TurnRecord

if TYPE_CHECKING:
    from fabula.sessions.reply import Reply
    from fabula.sessions.session import Session
    from fabula.store.store import Store
    from fabula.store.writer import Watch


class Keeper:
    """Keeps every session of a store.

    Args:
        store: where they are kept.

    Attributes:
        sessions: those in use, by tenant and id.
        turns: those in use, by id: sessions that were forked share theirs.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.sessions: weakref.WeakValueDictionary[tuple[str, str], Session] = weakref.WeakValueDictionary()
        self.turns: weakref.WeakValueDictionary[str, Turn] = weakref.WeakValueDictionary()
        self.lock = threading.RLock()
        self._drafts: dict[tuple[str, str], set[str]] = {}  # that may be left in the store, by session
        self._watches: weakref.WeakKeyDictionary[Reply, Watch] = weakref.WeakKeyDictionary()

    # ---- What sessions tell -----------------------------------------------------------------------------------------

    def opened(self, session: Session) -> None:
        """A new session: it is in the store when this returns.

        Raises:
            SessionExists: there is one of that name.
        """
        self._register(session)
        try:
            self.store.put_session(session_record(session)).result()
        except BaseException:
            self.sessions.pop((session.tenant, session.id), None)
            raise

    def _register(self, session: Session) -> None:
        """Takes a name for a new session."""
        key = (session.tenant, session.id)
        with self.lock:
            if key in self.sessions or self.store.find(*key) is not None:
                raise SessionExists(f"there is a session {session.id!r} already; give another name")
            self.sessions[key] = session

    def taken_in(self, session: Session) -> None:
        """A session with turns made elsewhere: all of it is in the store when this returns, or nothing.

        Raises:
            SessionExists: there is one of that name.
            StoreError: it could not be.
        """
        self._register(session)
        last = session_record(session)
        first = dataclasses.replace(last, head_id=None, undone=())
        waits = [self.store.put_session(first)]
        waits += [self.store.put_turn(turn_record(turn, session.id), first) for turn in session._tree.own]
        waits.append(self.store.put_session(last))
        try:
            for wait in waits:
                wait.result()
        except BaseException:
            self.sessions.pop((session.tenant, session.id), None)
            turns = [turn.id for turn in session._tree.own]
            self.store.delete_session(session.tenant, session.id, turns).result()
            raise
        self.turns.update({turn.id: turn for turn in session._tree.own})

    def changed(self, session: Session, settings: Settings) -> None:
        """The session is to have other settings: they are committed when this returns."""
        self.store.put_session(session_record(session, settings=settings)).result()

    def begun(self, reply: Reply, session: Session) -> None:
        """A reply is being made: it is written down from time to time, as the head if it is to be that."""
        made, owner = weakref.ref(reply), weakref.ref(session)

        def snapshot() -> tuple[TurnRecord, SessionRecord] | None:
            reply, session = made(), owner()
            if reply is None or session is None:
                raise ReferenceError("the reply was forgotten")
            turn = reply.draft()
            if len(turn.token_ids) <= turn.n_begun:
                return None
            record = dataclasses.replace(turn_record(turn, session.id), finish_reason=None)
            return record, session_record(session, *((turn, []) if reply.selects else (None, None)))

        self._watches[reply] = self.store.watch(snapshot)

    def ended(self, reply: Reply, turn: Turn | None, session: Session) -> None:
        """A reply has ended, with a turn or without: it is committed when this returns.

        Raises:
            StoreError: it could not be; the store is as it was before.
        """
        watch = self._watches.pop(reply, None)
        if watch is not None:
            watch.close(discard=turn is None)
        if turn is None:
            self.head_moved(session)  # a checkpoint may have moved it to the draft
            return
        head, undone = (turn, []) if reply.selects else (session.head, session._tree.redo_stack)
        try:
            self.store.put_turn(turn_record(turn, session.id), session_record(session, head, undone)).result()
        except BaseException:
            self._drafts.setdefault((session.tenant, session.id), set()).add(turn.id)
            if watch is not None:
                watch.close(discard=True)  # a full disk may refuse this too
            self.head_moved(session)
            raise
        self.turns[turn.id] = turn

    def written(self, turn: Turn, session: Session) -> None:
        """A turn was written by hand, and is the head: it is committed when this returns.

        Raises:
            StoreError: it could not be; the store is as it was before.
        """
        self.store.put_turn(turn_record(turn, session.id), session_record(session, turn, [])).result()
        self.turns[turn.id] = turn

    def head_moved(self, session: Session) -> None:
        """Another turn is the head."""
        self.store.set_head(session.tenant, session.id, *head_ids(session.head, session._tree.redo_stack))

    def tagged(self, turn: Turn, tags: set[str]) -> None:
        """A turn gets other tags: they are in the store when this returns."""
        self.store.put_tags(turn.id, tags).result()

    def dropped(self, session: Session, turns: list[Turn], head: Turn) -> None:
        """Turns are to be deleted and `head` to be the head: committed when this returns, except turns on the path to a
        fork."""
        needed = self._needed(session, turns)
        gone = [turn.id for turn in turns if turn not in needed] + self._left_drafts(session)
        left = [turn.id for turn in turns if turn in needed]
        self.store.delete_turns(session_record(session, head, []), gone, left).result()

    def deleted(self, session: Session, turns: list[Turn]) -> None:
        """A session is deleted: gone from the store when this returns, but for turns that forks need."""
        needed = self._needed(session, turns)
        orphans = self._orphans(session)
        delete = [turn.id for turn in turns if turn not in needed] + orphans + self._left_drafts(session)
        orphan = [turn.id for turn in turns if turn in needed]
        self.store.delete_session(session.tenant, session.id, delete, orphan).result()
        with self.lock:
            self.sessions.pop((session.tenant, session.id), None)

    def _left_drafts(self, session: Session) -> list[str]:
        return list(self._drafts.pop((session.tenant, session.id), ()))

    def _needed(self, session: Session, turns: list[Turn]) -> set[Turn]:
        """Of these turns, those that another session of the store goes on from."""
        mine = {turn.id: turn for turn in turns}
        return {mine[id] for id in self.store.pasts_of_others(session.tenant, session.id) if id in mine}

    def _orphans(self, session: Session) -> list[str]:
        """Turns of deleted sessions that only this one goes on from."""
        _, turns = self.store.load(session.tenant, session.id)
        left = [turn.id for turn in turns if turn.session_id is None]
        others = self.store.pasts_of_others(session.tenant, session.id) if left else set()
        return [id for id in left if id not in others]

    # ---- Coming back ------------------------------------------------------------------------------------------------

    def load(self, tenant: str, id: str) -> tuple[SessionRecord, list[Turn], dict[str, Turn]]:
        """A session of the store.

        Returns:
            Its record, the turns it lists itself (oldest first), and every turn that can be reached, by id.

        Raises:
            SessionNotFound: there is no such session.
            StoreCorrupt: a row is damaged; names session and turn.
        """
        self.store.flush()  # a head that moved may still be on its way
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


# ---- Records --------------------------------------------------------------------------------------------------------


def head_ids(head: Turn, undone: list[Turn]) -> tuple[str | None, tuple[str, ...]]:
    """The head and the heads of redo as the store names them: the empty start has no name but "" among the latter."""
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
    host, base = session._host, session._tree.root
    return SessionRecord(
        id=session.id,
        tenant=session.tenant,
        model=host.name,
        fingerprint=host.fingerprint,
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
    """A turn as it is kept."""
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
        | ({"frozen": True} if turn.frozen else {}),
        finish_reason=turn.finish_reason,
        timings={**dataclasses.asdict(turn.timings), "why_recomputed": turn.why_recomputed} if turn.timings else None,
        cut=turn.cut.to_json() if turn.cut else None,
        said=turn.said.to_json(),
        created_at=turn.created_at,
        tags=tuple(turn.tags),
    )


def turn_of(record: TurnRecord, parent: Turn | None) -> Turn:
    """The turn of a record; one that was being made when the process died is partial: "interrupted".

    Raises:
        StoreCorrupt: it does not say what a turn says.
    """
    try:
        timings = dict(record.timings) if record.timings is not None else None
        why = timings.pop("why_recomputed") if timings else ""
        return Turn(
            id=record.id,
            parent=parent if parent is not None else START,
            number=record.number,
            chat=record.chat,
            said=Said.from_json(record.prompt, record.said),
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
            created_at=record.created_at,
            tags=set(record.tags),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreCorrupt(f"turn {record.id} does not say what a turn says: {error!r}") from None


def policy_of(settings: Mapping[str, Any]) -> ContextPolicy:
    """The context policy among a session's settings."""
    return ContextPolicy.from_json(settings["policy"])


def used_params_json(params: SamplingParams) -> dict[str, Any]:
    """The settings a turn was made with, as JSON: those that are not neutral, as a turn knows no model's defaults."""
    default = SamplingParams()
    return {name: value for name, value in params_json(params).items() if value != getattr(default, name)}


def params_json(params: SamplingParams) -> dict[str, Any]:
    """Sampling settings as JSON: those that are given, and others that are not the default; -inf as text."""
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
    return found


def params_of(value: Mapping[str, Any]) -> SamplingParams:
    """Sampling settings from JSON.

    Raises:
        InvalidArgument, TypeError: it says something else.
    """
    found = dict(value)
    if "logit_bias" in found:
        found["logit_bias"] = {token: float(bias) for token, bias in found["logit_bias"]}
    if "constraint" in found:
        found["constraint"] = Constraint(**found["constraint"])
    return SamplingParams(**found)
