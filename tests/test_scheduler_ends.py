"""How requests end: deadlines, cancels, asyncio, the end of the process. Every end leaves no page."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabula import InvalidArgument, Model, Piece
from fabula._native import kv_layers, page_bytes
from fabula.engine import request as request_module
from fabula.engine.generation import Generation
from fabula.engine.runner import Part
from fabula.engine.scheduler import Scheduler
from fabula.formats.checkpoint import DType
from fabula.kv.pages import Sequence
from scheduling import HOT, Clock, Steps, Wish, ids_of, settled, wishes
from threaded import in_threads
from waiting import run_program, wait_until


@pytest.fixture
def model(tiny_model: Model) -> Model:
    return tiny_model


# ---- Ends -----------------------------------------------------------------------------------------------------------


def test_a_deadline_ends_an_answer(model: Model, steps: Steps, clock: Clock) -> None:
    wish = Wish(ids_of(40), replace(HOT, max_tokens=500))
    alone = wish.alone(model)

    def tick(_: list[Part]) -> None:
        clock.now += 1 / 128

    steps.before = tick
    generation = wish.begin(model, timeout=32 / 128)
    pieces = list(generation)
    assert generation.finish_reason == "timeout" and len(pieces) == 32, "each step takes 1/128 s"
    assert pieces == alone[: len(pieces)]
    assert settled(model)


def test_a_deadline_ends_who_waits_and_who_pauses(tiny_folder: Path, clock: Clock) -> None:
    with Model.load(tiny_folder, threads=1, scheduler=Scheduler(max_running=1)) as model:
        wish = Wish(ids_of(20), replace(HOT, max_tokens=300))
        pausing = wish.begin(model, timeout=1.0)
        wait_until(lambda: pausing._request.paused)
        waiting = Wish(ids_of(20, 1), HOT).begin(model, timeout=0.2)
        clock.now += 0.5
        assert list(waiting) == [] and waiting.finish_reason == "timeout"
        clock.now += 0.5
        assert len(list(wish.begin(model))) == 300, "the one that pauses is gone by its deadline"
        pieces = list(pausing)
        assert pausing.finish_reason == "timeout" and len(pieces) == request_module.READ_AHEAD
        session = model.session()
        reply = session.say("hello", replace(HOT, max_tokens=500), timeout=1e-20)
        assert reply.text() == "" and reply.turn is None and session.turns == []
        for wrong in (0, -1, float("nan")):
            with pytest.raises(InvalidArgument, match="timeout"):
                wish.begin(model, timeout=wrong)
        assert settled(model)


@pytest.mark.parametrize("when", ["in its prompt", "drawing", "paused", "waiting"])
@pytest.mark.parametrize("reading", [False, True])
def test_cancel_by_another_thread(long_folder: Path, monkeypatch: pytest.MonkeyPatch, when: str, reading: bool) -> None:
    scheduler = Scheduler(max_running=1 if when == "waiting" else 4)
    with Model.load(long_folder, threads=1, scheduler=scheduler) as model:
        steps = Steps(model, monkeypatch)
        results: list[Any] = []
        blocker = model.generate([5], replace(HOT, max_tokens=2000)) if when == "waiting" else None
        with steps.stopped():
            n = 3000 if when == "in its prompt" else 20
            generation = Wish(ids_of(n), replace(HOT, max_tokens=900)).begin(model)
            reader = threading.Thread(target=lambda: results.append(list(generation)), daemon=True)
            if when in ("in its prompt", "waiting"):
                steps.reached() if blocker is None else None
            else:
                steps._gate.set()
                n_made = 2 if when == "drawing" else request_module.READ_AHEAD
                wait_until(lambda: generation._request.n_made >= n_made)
                if when == "drawing" or reading:  # or it may read to the end before anybody cancels
                    steps._gate.clear()
            if reading:
                reader.start()
            canceller = threading.Thread(target=generation.cancel)
            canceller.start()
        canceller.join()
        assert generation.finish_reason == "cancelled"
        if reading:
            reader.join()
            assert len(results[0]) == len(generation.token_ids)
        assert generation._request.done.is_set()
        if blocker is not None:
            blocker.cancel()
        assert settled(model)


def test_two_hundred_random_cancels_leave_no_page(tiny_folder: Path) -> None:
    n_bytes = 14 * page_bytes(DType.F16, kv_layers(2, 2, 6))
    with Model.load(tiny_folder, threads=1, kv_memory=n_bytes) as model:
        wanted = wishes(20, 7)
        alone = [[piece.token_id for piece in wish.alone(model)] for wish in wanted]

        def some(seed: int) -> int:
            rng, n = random.Random(seed), 0
            for _ in range(50):
                i = rng.randrange(len(wanted))
                generation = wanted[i].begin(model)
                for _ in range(rng.randrange(6)):
                    next(generation, None)
                if rng.random() < 0.5:
                    time.sleep(rng.random() * 0.003)
                if rng.random() < 0.7:
                    generation.cancel()
                    assert generation.token_ids == alone[i][: len(generation.token_ids)]
                    n += 1
                else:
                    del generation
            return n

        assert sum(in_threads(*[lambda seed=seed: some(seed) for seed in range(4)])) > 100
        assert settled(model)
        model._runner.pool.check([])


def test_everything_may_be_forgotten_by_any_thread(tiny_folder: Path) -> None:
    """Sessions, replies, generations and sequences are collected wherever the collector happens to run."""
    gc.collect()
    gc.freeze()  # what other tests and imports left is not walked again and again
    n_bytes = 40 * page_bytes(DType.F16, kv_layers(2, 2, 6))
    with Model.load(tiny_folder, threads=1, kv_memory=n_bytes) as model:
        stop, shared = threading.Event(), [None] * 8

        def work(seed: int) -> int:
            rng = random.Random(seed)
            for n in range(25):
                session = model.session()
                reply = session.say("hello " * rng.randrange(12), replace(HOT, seed=n, max_tokens=rng.choice([3, 60])))
                for _ in range(rng.randrange(4)):
                    next(reply, None)
                circle: list[Any] = [session, reply, model.generate([5, 6, n % 90 + 4], HOT)]
                circle.append(circle)
                shared[rng.randrange(8)] = circle  # the former one is released here
            return 25

        def collect() -> None:
            took = 0.0
            while not stop.wait(max(0.005, took)):  # half of the time is everybody else's
                began = time.perf_counter()
                gc.collect()
                took = time.perf_counter() - began

        collector = threading.Thread(target=collect)
        collector.start()
        try:
            assert in_threads(*[lambda seed=seed: work(seed) for seed in range(3)]) == [25] * 3
        finally:
            stop.set()
            collector.join()
        shared.clear()
        assert settled(model)
        model._runner.pool.check([])


def test_a_sequence_given_up_while_its_reader_cuts_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking and cutting, pages may run out elsewhere; a sequence never claims pages it has not."""
    check = Sequence._check

    def interrupted(self: Sequence, verb: str, n_tokens: int) -> None:
        check(self, verb, n_tokens)
        if verb == "truncate" and n_tokens:
            thread = threading.Thread(target=model._engine.cache.evict, args=(self,))
            thread.start()
            thread.join(0.2)  # forever, if the lock is held as required
            waiting.append(thread)

    waiting: list[threading.Thread] = []
    monkeypatch.setattr(Sequence, "_check", interrupted)
    generation = Wish(ids_of(70), replace(HOT, max_tokens=60)).begin(model)
    next(generation)
    generation.cancel()
    for thread in waiting:
        thread.join()
    sequence = generation.sequence
    assert waiting and len(sequence.pages) == -(-sequence.n_tokens // 32)
    assert settled(model)


# ---- The asynchronous face ------------------------------------------------------------------------------------------


def test_async_for(model: Model) -> None:
    wanted = wishes(3, 2)
    alone = [wish.alone(model) for wish in wanted]

    async def read(wish: Wish, delay: float) -> list[Piece]:
        pieces = []
        async for piece in wish.begin(model):
            pieces.append(piece)
            await asyncio.sleep(delay)
        return pieces

    async def main() -> list[list[Piece]]:
        return await asyncio.gather(*[read(wish, delay) for wish, delay in zip(wanted, (0, 0.005, 0), strict=True)])

    assert asyncio.run(main()) == alone
    assert asyncio.run(wanted[0].begin(model).atext()) == "".join(piece.text for piece in alone[0])
    assert settled(model)


@pytest.mark.parametrize("n_read", [0, 3, 40])
def test_a_cancelled_task_cancels_its_generation(model: Model, n_read: int) -> None:
    async def main() -> Generation:
        generation = model.generate([5, 6], replace(HOT, max_tokens=500))
        read, hang = asyncio.Event(), asyncio.Event()
        if n_read == 0:
            read.set()

        async def reader() -> None:
            n = 0
            async for _ in generation:
                n += 1
                if n == n_read:
                    read.set()
            await hang.wait()

        task = asyncio.create_task(reader())
        await read.wait()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if generation.finish_reason is None:  # cancelled between two pieces, which is nothing to the generation
            generation.cancel()
        assert generation.finish_reason == "cancelled"
        return generation

    generation = asyncio.run(main())
    assert n_read <= len(generation.token_ids) < 500
    assert settled(model)


def test_a_slow_async_reader_holds_up_nobody(model: Model) -> None:
    async def main() -> None:
        slow, fast = model.generate([5, 6], replace(HOT, max_tokens=200)), model.generate([7], HOT)
        await anext(slow)
        assert len([piece async for piece in fast]) == 20
        assert slow._request.n_made <= request_module.READ_AHEAD + 1
        assert len([piece async for piece in slow]) == 199

    asyncio.run(main())
    assert settled(model)


def test_sessions_in_one_loop(model: Model) -> None:
    async def main() -> list[str]:
        sessions = [model.session() for _ in range(4)]
        texts = await asyncio.gather(*[session.say("hello", HOT).atext() for session in sessions])
        task = asyncio.create_task(sessions[0].say("more", replace(HOT, max_tokens=400)).atext())
        while not sessions[0].is_busy:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not sessions[0].is_busy
        assert [turn.finish_reason for turn in sessions[0].path] in (["length"], ["length", "cancelled"])
        return texts

    assert len(set(asyncio.run(main()))) == 1
    assert settled(model)


def test_a_generation_read_in_two_loops(model: Model) -> None:
    wish = Wish([5, 6], HOT)
    alone, generation = wish.alone(model), wish.begin(model)

    async def some(n: int) -> list[Piece]:
        return [await anext(generation) for _ in range(n)]

    pieces = [*asyncio.run(some(5)), next(generation), *asyncio.run(some(14))]
    assert pieces == alone
    assert settled(model)


# ---- Processes ------------------------------------------------------------------------------------------------------

BEGIN = """
import os, sys, threading, time
from fabula import *
from waiting import wait_until
model = Model.load(sys.argv[1], threads=2)
long = SamplingParams(temperature=1.0, seed=1, max_tokens=500, ignore_eos=True)
"""
EXITS = {
    "reading": "g = model.generate([5, 6], long)\nnext(g)",
    "read by a thread": """
def read():
    while True:
        model.generate([5, 6], long).text()
threading.Thread(target=read, daemon=True).start()
time.sleep(0.3)
""",
    "in a workspace": """
w = Workspace(sys.argv[2])
w.load(sys.argv[1], name="m", threads=1)
s = w.session("a")
s.say("hello", long).text()
r = s.say("more", long)
next(r)
""",
    "in a circle": """
s = model.session()
r = s.say("hello", long)
next(r)
c = [s, r, model]
c.append(c)
del s, r, model
""",
    "by an error": "g = model.generate([5, 6], long)\nnext(g)\nsys.excepthook = lambda *_: None\n1 / 0",
    "by sys.exit in a thread's way": "s = model.session()\nr = s.say('a', long)\nnext(r)\nsys.exit(0)",
}
FORK = """
w = Workspace(sys.argv[2])
w.load(sys.argv[1], name="m", threads=1)
session = w.session("a")
session.say("hello", long).text()
g = model.generate([5, 6], long)
for n in range(12):
    next(g)
    time.sleep(0.002 * n)
    child = os.fork()
    if not child:
        for call in (lambda: model.generate([5], long), lambda: model.logits([5]), lambda: session.say("x")):
            try:
                call()
            except EngineError as error:
                assert "fork" in str(error), error
            else:
                raise AssertionError("nothing works in a child")
        g.cancel()
        sys.exit(0)
    try:
        wait_until(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT), "the child hangs")
    finally:
        os.kill(child, 9)  # a zombie by now
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert len(g.text()) > 0 and len(g.token_ids) == 500
session.say("more", long).text()
assert [turn.number for turn in session.path] == [1, 2]
w.close()
"""


def run_script(script: str, *arguments: Path) -> tuple[int, str]:
    """How it ended, and what it wrote on stderr."""
    done = run_program(
        [sys.executable, "-W", "error", "-c", BEGIN + script, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("how", EXITS)
def test_the_interpreter_ends_while_answers_are_made(tiny_folder: Path, tmp_path: Path, how: str) -> None:
    assert run_script(EXITS[how], tiny_folder, tmp_path) == (1 if how == "by an error" else 0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told_and_ends(tiny_folder: Path, tmp_path: Path) -> None:
    assert run_script(FORK, tiny_folder, tmp_path) == (0, "")
