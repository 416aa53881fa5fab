"""The sessions of the terminal: in a workspace on disk, or in memory."""

from __future__ import annotations

import datetime
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabula.cli.console import note
from fabula.errors import InvalidArgument, StoreCorrupt, StoreError, StoreLocked

if TYPE_CHECKING:
    from fabula.engine.sampling import SamplingParams
    from fabula.model import Model
    from fabula.sessions.policy import ContextPolicy
    from fabula.sessions.session import Session
    from fabula.sessions.turn import Turn
    from fabula.store.records import SessionRecord
    from fabula.workspace import Workspace


@contextmanager
def explain_lock(way_out: str) -> Iterator[None]:
    """Adds advice to the error of a store that another process uses."""
    try:
        yield
    except StoreLocked as error:
        raise StoreLocked(f"{error}. Another fabula is running on this folder: {way_out}", path=error.path) from None


@contextmanager
def open_workspace(folder: Path | None, *, way_out: str) -> Iterator[Workspace]:
    """The workspace of a folder; None for the user's.

    Raises:
        StoreLocked: another process uses it; the message includes `way_out`.
        StoreError: it cannot be opened.
    """
    from fabula.workspace import Workspace  # imports the database: half a second

    with explain_lock(way_out):
        workspace = Workspace(folder)
    with workspace:
        yield workspace


def kind_of(session: Session) -> str | None:
    """The kind of a session, "chat" or "story"; None if it is empty."""
    first = next(iter(session.turns), None)
    return None if first is None else "chat" if first.chat else "story"


def first_words(turn: Turn) -> str:
    """The first text of a session, for lists."""
    return turn.prompt if turn.chat else turn.prompt + turn.text


@dataclass(frozen=True, slots=True)
class Listed:
    """A session in a list.

    Attributes:
        name: its id.
        kind: see `kind_of`.
        model: name of its model.
        n_turns: in its tree, including those it was forked from.
        changed_at: seconds since 1970.
        first_words: its first text.
        problem: why it cannot be read; "" if it can.
    """

    name: str
    kind: str | None
    model: str
    n_turns: int
    changed_at: float
    first_words: str
    problem: str = ""

    @classmethod
    def of(cls, session: Session, model: str, changed_at: float | None = None) -> Listed:
        """The entry of a session. Default of `changed_at`: when its last turn was created."""
        turns = session.turns
        if changed_at is None:
            changed_at = turns[-1].created_at if turns else session.created_at
        words = first_words(turns[0]) if turns else ""
        return cls(session.id, kind_of(session), model, len(turns), changed_at, words)


def listed(workspace: Workspace) -> Iterator[Listed]:
    """The sessions of a workspace, the last changed first."""
    for summary in workspace.sessions(""):
        record = summary.record
        try:
            yield Listed.of(workspace.open(record.id), record.model, record.updated_at)
        except StoreCorrupt as error:
            yield Listed(record.id, None, record.model, summary.n_turns, record.updated_at, "", str(error))


def find_record(workspace: Workspace, name: str) -> SessionRecord | None:
    """The record of a session, without opening it; None if there is none."""
    records = (summary.record for summary in workspace.sessions(""))
    return next((record for record in records if record.id == name), None)


def changed_last(workspace: Workspace, kind: str) -> SessionRecord:
    """The chat or story that was changed last.

    Raises:
        InvalidArgument: there is none.
    """
    for summary in workspace.sessions(""):
        try:
            if kind_of(workspace.open(summary.record.id)) == kind:
                return summary.record
        except StoreCorrupt as error:
            note(f"skipped, because it is damaged: {error}")
    raise InvalidArgument(f"there is no {kind} to resume in {workspace.folder}")


class SessionSource:
    """The sessions of a conversation in the terminal. A new one is added when it gets its first message.

    Args:
        model: the model of the sessions.
        workspace: stores them; None: in memory only.
        name: the model's name in the workspace.
    """

    def __init__(self, model: Model, workspace: Workspace | None = None, name: str = "") -> None:
        self.model = model
        self._workspace, self._name = workspace, name or model.path.name
        self._in_memory: dict[str, Session] = {}
        self._blank: Session | None = None

    def blank(
        self,
        name: str,
        *,
        system: str | None = None,
        params: SamplingParams | None = None,
        policy: ContextPolicy | None = None,
    ) -> Session:
        """A new session that is not stored yet."""
        self._blank = self.model.session(name, system=system, sampling=params, context_policy=policy)
        return self._blank

    def blank_like(self, session: Session, name: str, system: str | None) -> Session:
        """A new session with the settings of another one, except the system message."""
        return self.blank(name, system=system, params=session.params, policy=session.policy)

    def keep(self, session: Session) -> Session:
        """Adds a blank session before its first message, and returns the session to use."""
        if session is not self._blank:
            return session
        if self._workspace is None:
            self._in_memory[session.id] = kept = session
        else:
            kept = self._workspace.session(
                session.id,
                model=self._name,
                system=session.system,
                sampling=session.params,
                context_policy=session.policy,
            )
        self._blank = None
        return kept

    def settle(self, session: Session) -> Session:
        """Removes a session that is still empty after a failed reply, and returns the session to use."""
        if session is self._blank or session.turns:
            return session
        session.delete()
        self._in_memory.pop(session.id, None)
        return self.blank_like(session, session.id, session.system)

    def open(self, name: str) -> Session:
        """Opens a session.

        Raises:
            InvalidArgument: no session has that name, or it uses another model.
            StoreCorrupt: it is damaged.
        """
        if self._workspace is None:
            if name not in self._in_memory:
                raise InvalidArgument(f"there is no session {name!r}; /sessions lists them")
            return self._in_memory[name]
        record = find_record(self._workspace, name)
        if record is None:
            raise InvalidArgument(f"there is no session {name!r}; /sessions lists them")
        if record.model != self._name:
            raise InvalidArgument(f"{name} uses the model {record.model}; exit, and open it with --session {name}")
        return self._workspace.open(name)

    def fork(self, session: Session, name: str) -> Session:
        """A new session, forked from the head of another one."""
        self.check_free(name)
        fork = session.fork(id=name)
        if self._workspace is None:
            self._in_memory[name] = fork
        return fork

    def import_(self, data: Any) -> Session:
        """Imports the data of `Session.export` for this model, under its name or a similar free one.

        Raises:
            InvalidArgument: the data is not an exported session.
        """
        if not isinstance(data, dict) or not isinstance(data.get("id"), str):
            raise InvalidArgument("the file holds no exported session")
        name = data["id"] if data["id"] not in self.names() else self.free_name(data["id"])
        if self._workspace is not None:
            return self._workspace.import_({**data, "model": self._name}, id=name)
        self._in_memory[name] = session = self.model.import_(data, id=name)
        return session

    def contents(self) -> list[Listed]:
        """The sessions for a list, the last changed first."""
        if self._workspace is not None:
            return list(listed(self._workspace))
        found = [Listed.of(session, self._name) for session in self._in_memory.values()]
        return sorted(found, key=lambda item: item.changed_at, reverse=True)

    def names(self) -> set[str]:
        """The names in use."""
        if self._workspace is None:
            return set(self._in_memory)
        return {summary.record.id for summary in self._workspace.sessions("")}

    def check_free(self, name: str) -> None:
        """Raises InvalidArgument if a name is taken."""
        if name in self.names():
            raise InvalidArgument(f"there is a session {name!r} already; /open {name} switches to it")

    def free_name(self, stem: str) -> str:
        """A free name that begins with `stem`."""
        taken = self.names()
        return next(name for n in itertools.count(1) if (name := f"{stem}-{n}") not in taken)

    def new_name(self, kind: str) -> str:
        """A name for a new chat or story, such as chat-2026-11-24-1."""
        return self.free_name(f"{kind}-{datetime.date.today()}")


# ---- Files ----------------------------------------------------------------------------------------------------------


def write_json(path: Path, data: Any) -> None:
    """Writes a JSON file atomically.

    Raises:
        StoreError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with draft.open("w", encoding="utf-8") as file:
                json.dump(data, file, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be written: {error}", path=path) from None


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        InvalidArgument: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path} is not JSON: {error}") from None
