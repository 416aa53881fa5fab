"""Work for a store that can be checked afterwards: everything about a turn follows from its number."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from fabula.store.records import SessionRecord, TurnRecord
from fabula.store.store import Store

SIDE = 7  # each so many turns comes one that nothing follows, and that is deleted again


def id_of(number: int) -> str:
    return f"{number:032x}"


def is_side(number: int) -> bool:
    return number % SIDE == SIDE - 1


def session_name(number: int) -> str:
    return f"s{number % 2}"


def parent_of(number: int) -> int | None:
    """The last turn of the same session, side turns left out."""
    return next((i for i in range(number - 2, -1, -2) if not is_side(i)), None)


def turn_of(number: int) -> TurnRecord:
    parent, rng = parent_of(number), random.Random(number)
    return TurnRecord(
        id=id_of(number),
        session_id=session_name(number),
        parent_id=None if parent is None else id_of(parent),
        number=number + 1,
        chat=True,
        prompt=f"say {number}",
        text=f"{number} " * rng.choice([1, 30, 3000]),
        kept=0,
        prompt_ids=(number,),
        token_ids=tuple(rng.choices(range(50_000), k=rng.choice([1, 500]))),
        params={"seed": number},
        finish_reason="stop",
        timings=None,
        cut=None,
        created_at=float(number),
        tags=("side",) if is_side(number) else (),
    )


def session_of(number: int) -> SessionRecord:
    """The session as it is behind a turn, whose head it is unless that is a side turn."""
    parent = parent_of(number)
    head = parent if is_side(number) else number
    return SessionRecord(
        id=session_name(number),
        tenant="t",
        model="m",
        fingerprint="f",
        settings={},
        base_id=None,
        head_id=None if head is None else id_of(head),
        undone=(),
        created_at=0.0,
        updated_at=float(number),
    )


@dataclass(slots=True)
class Ledger:
    """What a store must hold.

    Attributes:
        kept: turns whose put was acknowledged.
        going: turns whose deletion was begun.
        gone: turns whose deletion was acknowledged.
    """

    kept: set[int] = field(default_factory=set)
    going: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)

    def note(self, line: str) -> None:
        """Takes in a line of `steps`."""
        what, number = line.split()
        getattr(self, what).add(int(number))

    def verify(self, store: Store) -> None:
        assert store.check() == []
        found = {turn.id: turn for each in store.sessions() for turn in store.load("t", each.record.id)[1]}
        for number in self.kept - self.going:
            assert found.get(id_of(number)) == turn_of(number), f"turn {number} was acknowledged"
        for number in self.gone:
            assert id_of(number) not in found, f"turn {number} was deleted"
        for id, turn in found.items():
            whole = turn_of(int(id, 16))
            partial = replace(whole, text=turn.text, finish_reason=None, tags=())
            assert turn == whole or (turn == partial and whole.text.startswith(turn.text)), f"{turn} is neither"


Step = tuple[str, Callable[[Store], None]]


def steps(number: int) -> Iterator[Step]:
    """What is done for a turn: lines for the ledger, each true once its function returned."""
    yield f"kept {number}", lambda store: put(store, number)
    if is_side(number):
        yield f"going {number}", lambda _: None
        yield f"gone {number}", lambda store: delete(store, number)


def put(store: Store, number: int) -> None:
    turn, session = turn_of(number), session_of(number)
    if not is_side(number) and number % 5 == 0:
        draft(store, number)
    neighbour = store.put_session(replace(session, id="other", head_id=None))
    future = store.put_turn(turn, session)
    errors = [each.exception() for each in (neighbour, future)]
    for error in errors:
        if error is not None:
            raise error


def draft(store: Store, number: int) -> None:
    """Lets the store see the turn while it is being made."""
    turn, looks, shown = turn_of(number), threading.Semaphore(0), iter(range(1, 10_000))

    def snapshot() -> tuple[TurnRecord, SessionRecord]:
        looks.release()
        return replace(turn, text=turn.text[: next(shown)], finish_reason=None), session_of(number)

    watch = store.watch(snapshot)
    for _ in range(2):
        looks.acquire()
    watch.close()


def delete(store: Store, number: int) -> None:
    store.delete_turns(session_of(number), [id_of(number)]).result()


def checkpoint_often(store: Store) -> None:
    """Has SQLite move its log into the file after each few pages."""
    store._writer.submit(lambda connection: connection.exec_driver_sql("PRAGMA wal_autocheckpoint = 12")).result()
