"""Records for tests of the store, and stores to put them in."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fabula.store.records import SessionRecord, TurnRecord
from fabula.store.store import Store


def a_session(id: str = "s", **fields: Any) -> SessionRecord:
    values: dict[str, Any] = {"tenant": "t", "model": "tiny", "fingerprint": "f00d", "settings": {"system": "be kind"}}
    values |= {"base_id": None, "head_id": None, "undone": (), "created_at": 1.0, "updated_at": 2.0}
    return SessionRecord(id=id, **(values | fields))


def a_turn(parent: TurnRecord | None = None, **fields: Any) -> TurnRecord:
    values: dict[str, Any] = {"id": uuid.uuid4().hex, "session_id": "s", "parent_id": parent and parent.id}
    values |= {"number": parent.number + 1 if parent else 1, "chat": True, "prompt": "hello", "text": "good day"}
    values |= {"kept": 0, "prompt_ids": (1, 2), "token_ids": (3,), "params": {"seed": 7}, "finish_reason": "stop"}
    values |= {"timings": {"prompt_tokens": 2}, "cut": None, "created_at": 1.5, "tags": ()}
    return TurnRecord(**(values | fields))


def chain(n: int, **fields: Any) -> list[TurnRecord]:
    """Turns that follow each other."""
    found: list[TurnRecord] = []
    for i in range(n):
        found.append(a_turn(found[-1] if found else None, created_at=float(i), prompt=f"say {i}", **fields))
    return found


def put_all(store: Store, found: list[TurnRecord], **fields: Any) -> list[Future[None]]:
    return [store.put_turn(turn, a_session(str(turn.session_id), head_id=turn.id, **fields)) for turn in found]


def done(*futures: Future[None]) -> None:
    for future in futures:
        future.result()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as store:
        yield store
        assert store.check() == []


class Gate:
    """Holds the store's thread in a transaction until it is opened."""

    def __init__(self, store: Store) -> None:
        self._entered, self._open = threading.Event(), threading.Event()
        self.future = store._writer.submit(self._wait)
        self._entered.wait()

    def _wait(self, _: sa.Connection) -> None:
        self._entered.set()
        self._open.wait()

    def open(self) -> None:
        self._open.set()
        self.future.result()


class Draft:
    """A turn that grows with every snapshot."""

    def __init__(self) -> None:
        self.turn, self.looks = a_turn(text="", token_ids=()), threading.Semaphore(0)

    def __call__(self) -> tuple[TurnRecord, SessionRecord]:
        self.looks.release()
        self.turn = replace(self.turn, text=self.turn.text + "la")
        return self.turn, a_session(head_id=self.turn.id)

    def wait_until_stored(self) -> None:
        for _ in range(2):  # the snapshot before was stored
            self.looks.acquire()
