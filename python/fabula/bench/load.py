"""Time from process start to the first token, and peak memory.

Each run is a new process: Python, imports, reading the file (from the page cache, since a first process of each kind is
not counted), packing, a short prompt and one token. llama.cpp runs in Python with llama-cpp-python on the same file.
Engines run in turns. Memory is the peak resident size at the first token, including touched pages of mapped files; its
lower limit is the packed weights.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fabula.bench.peer_llama_cpp import gguf_of, start_worker
from fabula.bench.row import Row
from fabula.bench.status import Status, silent
from fabula.bench.timing import Times, turns
from fabula.bench.worker import Killed, Worker
from fabula.choices import WeightsName
from fabula.errors import EngineError, InvalidArgument
from fabula.model import Model

PROMPT = "The lighthouse keeper climbed the stairs"
ROUNDS = 5
_POSITIONS = 512


@dataclass(frozen=True, slots=True)
class _Engine:
    """How to start an engine's process, how else if a signal ends it, and the request for it."""

    name: str
    start: Callable[[], Worker]
    request: Mapping[str, Any]
    otherwise: Callable[[], Worker] | None = None


@dataclass(slots=True)
class _Measured:
    """Results of one engine's processes: seconds, and peak bytes if the system reports them."""

    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    answer: dict[str, Any] = field(default_factory=dict)


def bench_load(
    path: Path,
    *,
    weights: WeightsName = "auto",
    kv: str = "f16",
    threads: int,
    rounds: int = ROUNDS,
    peers: bool = False,
    python: str | None = None,
    device: str = "cpu",
    status: Status = silent,
) -> list[Row]:
    """Measures a model's start: time to the first token, and peak memory.

    Args:
        path: the model. With `peers`, a GGUF file with these weights is written for both if it is not one.
        rounds: counted processes of each engine; results are medians.
        peers: whether to measure llama.cpp too; if it cannot run, `status` says so.
        python: interpreter with llama_cpp; None for this one.
        device: as `Model.load`, for Fabula.

    Raises:
        InvalidArgument: rounds is out of its range.
        EngineError: the model cannot be loaded.
    """
    if not 1 <= rounds <= 1000:
        raise InvalidArgument(f"rounds is {rounds}, must be 1 .. 1000")
    with ExitStack() as stack:
        model = stack.enter_context(
            Model.load(path, weights=weights, kv=kv, threads=threads, context=_POSITIONS, device=device, fetch=False)
        )
        same = stack.enter_context(gguf_of(model, status)) if peers else path
        model.close()  # leave the memory to the processes
        request = {
            "path": str(same),
            "threads": threads,
            "kv": kv,
            "positions": _POSITIONS,
            "prompt": model.tokenizer.encode(PROMPT),
        }
        ours = _Engine("fabula", _start_ours, {**request, "weights": "auto" if peers else weights, "device": device})
        theirs = _Engine("llama.cpp", lambda: start_worker(python), request, lambda: start_worker(python, repack=False))
        found = _measure([ours, theirs] if peers else [ours], rounds, status)
    return _rows(path.name, kv, threads, found)


def _measure(engines: Sequence[_Engine], rounds: int, status: Status) -> dict[str, _Measured]:
    """Results by name, ours first. A peer that fails is reported and left out."""
    found: dict[str, _Measured] = {}
    working = []
    for engine in engines:
        status(f"{engine.name}: warm-up process")
        try:
            working.append(_warmed_up(engine))
        except EngineError as error:
            if engine is engines[0]:
                raise
            status(f"{engine.name} is not measured: {error}")
            continue
        found[engine.name] = _Measured()
    status(f"{rounds} rounds of {', '.join(found)}")
    for engine in turns(working, rounds):
        _once(engine, found[engine.name])
    return found


def _warmed_up(engine: _Engine) -> _Engine:
    """The engine, with the start that works, after a first run."""
    try:
        _once(engine, _Measured())
    except Killed:
        if engine.otherwise is None:
            raise
        engine = replace(engine, start=engine.otherwise, otherwise=None)
        _once(engine, _Measured())
    return engine


def _once(engine: _Engine, measured: _Measured) -> None:
    begin = time.perf_counter()
    worker = engine.start()
    try:
        measured.answer = worker.ask("first", **engine.request)
        measured.seconds.append(time.perf_counter() - begin)
        peak = worker.peak_bytes
        if peak is not None:
            measured.peaks.append(peak)
    finally:
        worker.close()


def _start_ours() -> Worker:
    return Worker("fabula", [sys.executable, "-m", "fabula.bench.load_worker"])


def _rows(model: str, kv: str, threads: int, found: Mapping[str, _Measured]) -> list[Row]:
    ours = found["fabula"]
    weight_bytes = int(ours.answer["weight_bytes"])
    others: list[str | None] = [name for name in found if name != "fabula"] or [None]
    rows = []
    for peer in others:
        theirs = found[peer] if peer else None
        common: dict[str, Any] = {
            "model": model,
            "weights": ours.answer["weights"],
            "kv": kv,
            "threads": threads,
            "peer_name": peer,
            "peer_settings": theirs.answer["settings"] if theirs else None,
        }
        times = Times.of(ours.seconds)
        their_times = Times.of(theirs.seconds) if theirs else None
        more = {
            "rounds": times.n,
            "ours_spread": [1e3 * times.low, 1e3 * times.high],
            "peer_spread": [1e3 * their_times.low, 1e3 * their_times.high] if their_times else None,
            "same_token": ours.answer["token"] == theirs.answer["token"] if theirs else None,
        }
        rows.append(
            Row(
                case="start to first token",
                unit="ms",
                ours=1e3 * times.median,
                peer=1e3 * their_times.median if their_times else None,
                more=more,
                **common,
            )
        )
        if ours.peaks:
            peak, their_peak = _median_mb(ours), _median_mb(theirs) if theirs else None
            weights_mb = weight_bytes / 1e6
            more = {
                "rounds": len(ours.peaks),
                "ours_spread": [min(ours.peaks) / 1e6, max(ours.peaks) / 1e6],
                "peer_spread": [min(theirs.peaks) / 1e6, max(theirs.peaks) / 1e6] if theirs and theirs.peaks else None,
                "over_weights": peak - weights_mb,
                "peer_over_weights": None if their_peak is None else their_peak - weights_mb,
                "to_weights": peak / weights_mb,
                "peer_to_weights": None if their_peak is None else their_peak / weights_mb,
            }
            rows.append(
                Row(case="peak memory", unit="MB", ours=peak, peer=their_peak, limit=weights_mb, more=more, **common)
            )
    return rows


def _median_mb(measured: _Measured) -> float:
    return Times.of([float(peak) for peak in measured.peaks]).median / 1e6
