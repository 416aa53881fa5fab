"""Export and import of sessions: JSON, and on request their KV as a safetensors file.

The JSON has what the store has: every turn with its ids as they were sampled. Each full KV page is a tensor
"<turn>/<index>", or "<turn>/<index>/partial" if the KV of its windowed layers was dropped (those bytes mean nothing).
Each recurrent state of a hybrid is one, "<turn>/state/<position>", with the page that it ends in before it. Only a
model with the same fingerprint imports it.
"""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fabula._native import PAGE_POSITIONS
from fabula.errors import InvalidArgument, OutOfMemory, StoreCorrupt, StoreError
from fabula.kv.pages import HOLE, Sequence
from fabula.kv.prefix import KeyChain
from fabula.kv.prefix_read import StoredState, partial_key
from fabula.kv.states import tail_of
from fabula.sessions.persistence import Persistence, params_of, policy_of, session_record, turn_of, turn_record
from fabula.sessions.session import Session
from fabula.sessions.turn import START, WRITTEN, Turn
from fabula.store.records import TurnRecord

if TYPE_CHECKING:
    from fabula.sessions.model_handle import ModelHandle

FORMAT, VERSION = "fabula session", 1
MAX_TURNS = 100_000
_FIELDS: dict[str, tuple[type, ...]] = {  # of a turn, with their types
    "id": (str,), "parent_id": (str, type(None)), "number": (int,), "chat": (bool,), "prompt": (str,), "text": (str,),
    "kept": (int,), "prompt_ids": (list,), "token_ids": (list,), "params": (dict,),
    "finish_reason": (str, type(None)), "timings": (dict, type(None)), "cut": (dict, type(None)),
    "created_at": (int, float), "tags": (list,),
}  # fmt: skip
_OPTIONAL = {"said": (dict,)}  # only where the input is more than `prompt`


# ---- Export ---------------------------------------------------------------------------------------------------------


def export_session(session: Session, *, kv: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """A session as JSON data.

    Args:
        session: with no running reply.
        kv: file to write the KV in memory to; None for none.

    Raises:
        SessionBusy: a reply is running.
        StoreError: the file cannot be written; no part of it is left.
    """
    with session.quiet():
        turns = session.turns
        record = session_record(session)
        data: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "id": record.id,
            "model": record.model,
            "fingerprint": record.fingerprint,
            "settings": dict(record.settings),
            "head": record.head_id,
            "undone": list(record.undone),
            "created_at": record.created_at,
            "turns": [_turn_json(turn) for turn in turns],
        }
    if kv is not None:  # without the session's lock: it waits for the disk
        _write_kv(Path(kv), _pages_of(session, turns), record.fingerprint)
    return data


def _turn_json(turn: Turn) -> dict[str, Any]:
    fields = dataclasses.asdict(turn_record(turn, None))
    del fields["session_id"]
    if fields["said"] is None:
        del fields["said"]
    return fields | {name: list(fields[name]) for name in ("prompt_ids", "token_ids", "tags")}


def _pages_of(session: Session, turns: list[Turn]) -> dict[str, npt.NDArray[np.uint8]]:
    """The full KV pages of turns, each once: from the turns, the prefix index or the disk."""
    engine = session._handle.engine
    pool, window = engine.runner.pool, session.policy.visible_in(engine.runner)
    pages: dict[str, npt.NDArray[np.uint8]] = {}
    seen: set[bytes | int] = set()
    for turn in turns:
        ids = np.asarray(turn.ids(), np.int32)
        keys = KeyChain(session.tenant, window).keys(ids)
        with pool.lock:
            usable = turn.kv.usable(turn.n_ids) if turn.kv is not None and engine.cache.owns(turn.kv) else 0
            kv = turn.kv.fork(usable) if turn.kv is not None and usable else None
        kv = kv or engine.cache.find(keys, window, ids)  # without the lock: it may read from disk
        if kv is None:
            continue
        with kv:
            for i, (key, page) in enumerate(zip(keys, kv.pages[: kv.n_tokens // PAGE_POSITIONS], strict=False)):
                if page == HOLE:
                    continue
                with pool.lock:  # or another thread drops its windowed part meanwhile
                    is_whole = pool.is_whole(page)
                    if key in seen or (not is_whole and partial_key(key) in seen):
                        continue
                    seen.add(key if is_whole else partial_key(key))
                    pages[_page_name(turn.id, i, is_whole=is_whole)] = pool.read(page)
            for state in kv.states():
                with pool.lock:  # or it is evicted meanwhile
                    if state.slot >= 0 and state.rank and id(state) not in seen:
                        seen.add(id(state))
                        pages[_state_name(turn.id, state.position)] = kv.read_state(state)
    return pages


def _page_name(turn_id: str, i: int, *, is_whole: bool) -> str:
    return f"{turn_id}/{i}" if is_whole else f"{turn_id}/{i}/partial"


def _state_name(turn_id: str, position: int) -> str:
    return f"{turn_id}/state/{position}"


def _write_kv(path: Path, pages: Mapping[str, npt.NDArray[np.uint8]], fingerprint: str) -> None:
    from safetensors.numpy import save_file

    draft = path.with_name(path.name + ".tmp")
    try:
        save_file(dict(pages), draft, {"format": FORMAT, "fingerprint": fingerprint})
        draft.replace(path)
    except Exception as error:  # safetensors raises its own kind for a full disk
        draft.unlink(missing_ok=True)
        raise StoreError(f"{path}: the KV cannot be written: {error}", path=path) from error


# ---- Import ---------------------------------------------------------------------------------------------------------


def import_session(
    data: Mapping[str, Any],
    handle: ModelHandle,
    *,
    id: str | None = None,
    tenant: str = "",
    kv: str | os.PathLike[str] | None = None,
    persistence: Persistence | None = None,
) -> Session:
    """Imports a session from the data of `export_session`. Its turns get new ids, so that it can be imported twice.

    Args:
        data: JSON data.
        handle: its model.
        id: its id; None for that of the exported session.
        tenant: its owner.
        kv: file with its KV; None for none.
        persistence: where it is stored; None for in memory.

    Raises:
        InvalidArgument: the data is not an exported session; names the field.
        StoreError: the KV belongs to another model, or the session cannot be stored.
        StoreCorrupt: the KV file is damaged.
    """
    _check_head(data)
    turns = _turns_of(data["turns"])
    named = {"": START} | turns
    try:
        settings = data["settings"]
        session = Session(
            handle,
            id=data["id"] if id is None else id,
            tenant=tenant,
            system=settings["system"],
            params=params_of(settings["params"]),
            policy=policy_of(settings),
            persistence=persistence,
            created_at=float(data["created_at"]),
            vocabulary=settings["vocabulary"],
            title=settings.get("title", ""),
            tags=settings.get("tags", ()),
        )
        redo_stack = [named[name] for name in data["undone"]]
        session._tree.restore(turns.values(), named[data["head"] or ""], redo_stack)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(f"the exported session is damaged: {error!r}") from None
    if kv is not None:
        _read_kv(Path(kv), data["turns"], turns, session)
    if persistence is not None:
        persistence.register(session)
        persistence.create_with_turns(session)
    return session


def _check_head(data: Mapping[str, Any]) -> None:
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise InvalidArgument('this is not an exported session: "format" is missing or has another value')
    if data.get("version") != VERSION:
        raise InvalidArgument(f"the exported session has version {data.get('version')!r}; this Fabula reads {VERSION}")
    turns = data.get("turns")
    if not isinstance(turns, list) or len(turns) > MAX_TURNS:
        raise InvalidArgument(f'"turns" must be a list of at most {MAX_TURNS}')


def _has_words(row: Mapping[str, Any]) -> bool:
    """Whether a turn has an answer, or is a handwritten piece of a story or message of a chat."""
    return bool(row["token_ids"] or (row["finish_reason"] == WRITTEN and (row["chat"] or row["prompt_ids"])))


def _turns_of(rows: list[Any]) -> dict[str, Turn]:
    """Turns by their ids in the export, parents first."""
    turns: dict[str, Turn] = {}
    for i, row in enumerate(rows):
        where = f"turn {i} of the exported session"
        if not isinstance(row, dict) or row.keys() - _OPTIONAL.keys() != _FIELDS.keys():
            raise InvalidArgument(f"{where} must have the fields {', '.join(_FIELDS)}")
        for name, kinds in (_FIELDS | {name: kinds for name, kinds in _OPTIONAL.items() if name in row}).items():
            if not isinstance(row[name], kinds) or (isinstance(row[name], bool) and bool not in kinds):
                raise InvalidArgument(f"{where}: {name} is {row[name]!r:.80}")
        for name in ("prompt_ids", "token_ids"):
            if any(type(token) is not int or not 0 <= token < 1 << 31 for token in row[name]):
                raise InvalidArgument(f"{where}: {name} has a value that is not a token id")
        if any(not isinstance(tag, str) for tag in row["tags"]):
            raise InvalidArgument(f"{where}: tags must be strings")
        parent = START if row["parent_id"] is None else turns.get(row["parent_id"])
        if parent is None or row["id"] in turns or not row["id"]:
            raise InvalidArgument(f"{where}: its parent is not before it, or its id is not unique")
        if row["number"] != parent.number + 1 or not 0 <= row["kept"] <= parent.n_ids or not _has_words(row):
            raise InvalidArgument(f"{where}: its number, kept or token_ids do not follow from its parent")
        fields = row | {name: tuple(row[name]) for name in ("prompt_ids", "token_ids", "tags")}
        fields |= {"id": uuid.uuid4().hex, "parent_id": None, "session_id": None}
        try:
            turns[row["id"]] = turn_of(TurnRecord(**fields), parent)
        except StoreCorrupt as error:
            raise InvalidArgument(f"{where}: {error}") from None
        if not 0 <= turns[row["id"]].n_begun <= len(row["token_ids"]):
            raise InvalidArgument(f"{where}: n_begun is out of its range")
    return turns


def _read_kv(path: Path, rows: list[dict[str, Any]], turns: Mapping[str, Turn], session: Session) -> None:
    """Reads as many KV pages as there are free pages for."""
    from safetensors import safe_open

    engine, fingerprint = session._handle.engine, session._handle.fingerprint
    pool, window = engine.runner.pool, session.policy.visible_in(engine.runner)
    try:
        with safe_open(path, framework="numpy") as file:
            theirs = (file.metadata() or {}).get("fingerprint")
            if theirs != fingerprint or not fingerprint:
                raise StoreError(
                    f"{path}: the KV was computed by another model, on another device or in another precision; "
                    "import without it",
                    path=path,
                )
            names = set(file.keys())
            for row in rows:
                turn = turns[row["id"]]
                ids = np.asarray(turn.ids(), np.int32)
                keys = KeyChain(session.tenant, window).keys(ids)
                read: list[Sequence] = []  # keeps the pages until the turn does
                for i, key in enumerate(keys):
                    known = pool.index.page(key)
                    is_whole = _page_name(row["id"], i, is_whole=True) in names
                    name = _page_name(row["id"], i, is_whole=is_whole)
                    if name not in names or (known is not None and (pool.is_whole(known) or not is_whole)):
                        continue
                    data = file.get_tensor(name)
                    if data.dtype != np.uint8 or data.shape != (pool.page_bytes,):
                        raise StoreCorrupt(f"{path}: {name} is not a KV page of this model", path=path)
                    (page,) = pool.take(1)
                    pool.write(page, data)
                    if not is_whole:
                        pool.drop([page])
                    pool.name(page, key)
                    read.append(Sequence.of(pool, [page], n_dropped=0 if is_whole else 1))
                with_states: list[Sequence] = []
                for state in _states_of(row["id"], names, keys, ids) if pool.states is not None else ():
                    source = _Tensor(file, _state_name(row["id"], state.n_tokens), pool.state_record_bytes)
                    sequence = engine.cache.read_state(keys, window, state, source)
                    with_states += [] if sequence is None else [sequence]
                turn.kv = engine.cache.find(keys, window, ids)
                if turn.kv is not None:
                    turn.kv.add_states(state for sequence in with_states for state in sequence.states())
                    engine.cache.keep(turn.kv)
                for sequence in (*read, *with_states):
                    sequence.close()
    except OutOfMemory:  # the rest is recomputed on demand
        return
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, StoreError | InvalidArgument):  # InvalidArgument: the model was closed meanwhile
            raise
        raise StoreCorrupt(f"{path}: the KV cannot be read: {error}", path=path) from error
    except Exception as error:  # safetensors raises its own kind
        raise StoreCorrupt(f"{path}: the KV cannot be read: {error}", path=path) from error


class _Tensor:
    """A tensor of the file as the source of a state, for `KvEvictionList.read_state`."""

    def __init__(self, file: Any, name: str, n_bytes: int) -> None:
        self._file, self._name, self._n_bytes = file, name, n_bytes

    def get(self, key: bytes, out: npt.NDArray[np.uint8]) -> bool:
        del key  # there is only one
        if out.nbytes != self._n_bytes:
            return False  # a page, which is in memory or was damaged
        data = self._file.get_tensor(self._name)
        if data.dtype != np.uint8 or data.shape != out.shape:
            raise StoreCorrupt(f"{self._name} is not a recurrent state of this model")
        out[:] = data
        return True


def _states_of(turn_id: str, names: set[str], keys: list[bytes], ids: npt.NDArray[np.int32]) -> list[StoredState]:
    """The states of a turn in a file, in order."""
    prefix = _state_name(turn_id, 0)[:-1]
    numbers = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    states = []
    for n_tokens in sorted(int(number) for number in numbers if number.isdecimal()):
        n_pages = n_tokens // PAGE_POSITIONS
        if 0 < n_pages <= len(keys) and n_tokens <= len(ids):
            name = keys[n_pages - 1], tail_of(ids[n_pages * PAGE_POSITIONS : n_tokens])
            states.append(StoredState(n_tokens, name))
    return states
