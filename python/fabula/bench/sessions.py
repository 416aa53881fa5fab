"""The cost of rollback and fork, by depth and by length, compared with copying the KV cache.

"rollback and redo" moves the head back and forth, "fork" creates a session; the turn after either shows what had to be
recomputed. "full copy" reads all pages and writes them back, like an engine that keeps a copy of the cache for each
turn. The peer is such an engine: it saves and loads its state. All run in turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from fabula.bench.row import Row
from fabula.bench.status import Status, silent
from fabula.engine.sampling import SamplingParams
from fabula.errors import InvalidArgument
from fabula.model import Model
from fabula.sessions.session import Session
from fabula.sessions.turn import Turn

DEPTHS = (1, 10, 100, 150)
LENGTHS = (512, 2048, 8000)
REPEATS = 200
ROUNDS = 5
_ROOM = 64  # positions for the turns after a text
_FEW = 10  # copies run this many times less often
_TINY = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
_TEXT = "The lighthouse keeper climbed the stairs every evening before the sun went down and lit the lamp. "


class Holder(Protocol):
    """An engine that rolls back by saving and loading its whole state.

    Attributes:
        settings: for the table.
    """

    settings: str

    def read(self, tokens: Sequence[int]) -> int:
        """Replaces the conversation by these tokens; returns the bytes of its state."""
        ...

    def save_and_load(self) -> float:
        """Seconds to save and load."""
        ...

    def close(self) -> None: ...


def bench_sessions(
    model: Model,
    *,
    depths: Sequence[int] = DEPTHS,
    lengths: Sequence[int] = LENGTHS,
    repeats: int = REPEATS,
    peer: Holder | None = None,
    status: Status = silent,
) -> list[Row]:
    """Measures sessions of a loaded model. Skips lengths and depths beyond its context, and reports them.

    Args:
        depths: turns, of two tokens each.
        lengths: tokens before the head, in two turns.
        repeats: of every case; copies are made a tenth as often, the peer's once a round of five.
        peer: measured at every length; None for none. Left open.
        status: callback for progress.

    Raises:
        InvalidArgument: a number is out of its range, or nothing is left to measure.
    """
    for name, values in (("depth", depths), ("length", lengths), ("repeats", (repeats,))):
        if bad := [value for value in values if not 1 <= value <= 1 << 20]:
            raise InvalidArgument(f"{name} is {bad[0]}, must be 1 .. 2^20")
    fitting = [n for n in lengths if n + _ROOM <= model.context]
    shallow = [n for n in sorted(set(depths)) if 2 * n + _ROOM <= model.context]
    for name, asked, kept in (("length", lengths, fitting), ("depth", depths, shallow)):
        if left := sorted(set(asked) - set(kept)):
            status(f"{name} {', '.join(map(str, left))}: not measured, the context holds {model.context} tokens")
    if not fitting and not shallow:
        raise InvalidArgument(f"the context of {model.context} tokens holds none of the depths and lengths")
    return [*_by_depth(model, shallow, repeats, status), *_by_length(model, fitting, repeats, peer, status)]


def in_turns(tasks: Mapping[str, tuple[Callable[[], float], int]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Milliseconds of interleaved tasks: name -> (function that returns seconds, number of runs)."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, (task, repeats) in tasks.items():
            times[name] += [1e3 * task() for _ in range(max(1, repeats // rounds))]
    return times


def _by_depth(model: Model, depths: Sequence[int], repeats: int, status: Status) -> Iterator[Row]:
    session = model.session()
    session.tell(prompt="The lighthouse keeper", params=_TINY).text()
    for depth in depths:
        status(f"depth {depth}")
        while session.head.number < depth:
            session.tell(params=_TINY).text()
        yield from _rows(model, session, f"depth {depth}", in_turns(_moves(session, repeats)), None)
    session.delete()


def _by_length(
    model: Model, lengths: Sequence[int], repeats: int, peer: Holder | None, status: Status
) -> Iterator[Row]:
    for n_tokens in lengths:
        status(f"{n_tokens} tokens")
        session = model.session()
        session.tell(prompt="It begins.", params=_TINY).text()
        n_more = n_tokens - session.head.n_ids
        if n_more > 0:
            session.tell(prompt=model.tokenizer.decode(_ids(model, n_more)), params=_TINY).text()
        tasks, own = _moves(session, repeats), None
        tasks["full copy"] = (_copy(model, session), max(ROUNDS, repeats // _FEW))
        if peer is not None:
            own = (peer, peer.read(_ids(model, n_tokens)))
            tasks["peer"] = (peer.save_and_load, ROUNDS)
        yield from _rows(model, session, f"{session.head.n_ids} tokens", in_turns(tasks), own)
        session.delete()


def _ids(model: Model, n_tokens: int) -> list[int]:
    """The first n ids of a repeated text."""
    once = len(model.tokenizer.encode(_TEXT, add_bos=False))
    return model.tokenizer.encode(_TEXT * (2 * n_tokens // once + 1), add_bos=False)[:n_tokens]


def _moves(session: Session, repeats: int) -> dict[str, tuple[Callable[[], float], int]]:
    depth = session.head.number

    def back_and_forth() -> None:
        session.rollback(depth - 1)
        session.redo()

    return {"rollback and redo": (_timed(back_and_forth), repeats), "fork": (_timed(session.fork), repeats)}


def _copy(model: Model, session: Session) -> Callable[[], float]:
    """Reads all KV pages of the head from the pool and writes them back."""
    kv, pool = session.head.kv, model._runner.pool
    assert kv is not None
    pages = kv.pages
    copies = [pool.native.read(page) for page in pages]

    def save_and_load() -> None:
        for page, copy in zip(pages, copies, strict=True):
            copy[:] = pool.native.read(page)
        for page, copy in zip(pages, copies, strict=True):
            pool.native.write(page, copy)

    return _timed(save_and_load)


def _timed(function: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return seconds


def _rows(
    model: Model, session: Session, where: str, times: Mapping[str, list[float]], peer: tuple[Holder, int] | None
) -> Iterator[Row]:
    """The rows. The peer's time is the same in all cases: it always saves and loads its state."""
    head = session.head
    kv, pool = head.kv, model._runner.pool
    own = {"full copy": len(kv.pages) * pool.page_bytes if kv else 0}
    after = {"rollback and redo": _recomputed_after_rollback, "fork": _recomputed_after_fork}
    theirs = statistics.median(times["peer"]) if peer else None
    for case, measured in times.items():
        if case == "peer":
            continue
        more: dict[str, Any] = {
            "depth": head.number,
            "n_tokens": head.n_ids,
            "repeats": len(measured),
            "p50_ms": statistics.median(measured),
            "p99_ms": _p99(measured),
            "ours_spread": [min(measured), max(measured)],
            "recomputed": after[case](session, head) if case in after else 0,
            "bytes": own.get(case, _own_bytes(head)),
        }
        if peer:
            more |= {"peer_spread": [min(times["peer"]), max(times["peer"])], "peer_bytes": peer[1]}
        yield Row(
            case=f"{case}, {where}",
            model=model.path.name,
            weights=model.weights,
            kv=model.kv,
            threads=model.threads,
            unit="ms",
            ours=more["p50_ms"],
            peer=theirs,
            peer_name="llama-cpp-python" if peer else None,
            peer_settings=peer[0].settings if peer else None,
            more=more,
        )


def _recomputed_after_rollback(session: Session, head: Turn) -> int:
    session.rollback(head.number - 1)
    session.tell(prompt=" So", params=_TINY).text()
    found = session.head.recomputed
    session.rollback(head)
    return found


def _recomputed_after_fork(session: Session, head: Turn) -> int:
    other = session.fork(head)
    other.tell(prompt=" So", params=_TINY).text()
    found = other.head.recomputed
    other.delete()
    return found


def _own_bytes(turn: Turn) -> int:
    """Bytes of a snapshot in Python besides the KV pages: its ids and its page table."""
    pages = turn.kv.pages if turn.kv else []
    return sys.getsizeof(pages) + sys.getsizeof(turn.prompt_ids) + sys.getsizeof(turn.token_ids) + sys.getsizeof(turn)


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]
