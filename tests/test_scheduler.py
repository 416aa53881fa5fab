"""The scheduler: many requests in one batch give what each gives alone, nobody starves, and every end leaves no page.

Nothing here looks at the clock to judge: what a step holds is read off a wrapper around `Runner.run`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from fabula import EngineBusy, EngineError, InvalidArgument, Model, NonFinite, OutOfMemory, Piece, SamplingParams
from fabula._native import page_bytes
from fabula.engine import request as request_module
from fabula.engine import scheduler as scheduler_module
from fabula.engine.generation import Generation
from fabula.engine.runner import Part, Runner
from fabula.engine.scheduler import Load, Scheduler
from fabula.formats.checkpoint import DType
from fabula.kv.pages import HOLE, PagePool, Sequence
from fabula.kv.prefix import EVERYTHING, Window
from threaded import WAIT_S, in_threads

RNG = np.random.default_rng(3)
HOT = SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True, n_logprobs=2)


@pytest.fixture
def model(tiny_model: Model) -> Model:
    return tiny_model


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context that is not read in one step."""
    return tiny.write_model(tmp_path_factory.mktemp("long") / "m", config={"max_position_embeddings": 4096})


def ids_of(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(4, tiny.VOCAB, n).tolist()


@dataclass(frozen=True)
class Wish:
    """A request."""

    ids: list[int]
    params: SamplingParams
    window: Window = EVERYTHING
    salt: str = ""

    def begin(self, model: Model, timeout: float | None = None) -> Generation:
        return Generation(
            model._engine, self.ids, self.params, window=self.window, salt=self.salt, timeout=timeout, continues=True
        )

    def alone(self, model: Model) -> list[Piece]:
        model.clear_cache()
        pieces = list(self.begin(model))
        model.clear_cache()
        return pieces


def wishes(n: int, seed: int, longest: int = 150) -> list[Wish]:
    """Requests of all kinds: long and short, greedy and not, alike at the beginning, with windows and salts."""
    rng, common = random.Random(seed), ids_of(longest, seed)
    found = []
    for i in range(n):
        ids = [*common[: rng.randrange(longest)], *ids_of(rng.randrange(1, 40), i)]
        params = replace(HOT, temperature=rng.choice([0.0, 0.7, 1.5]), seed=i, max_tokens=rng.randrange(1, 40))
        params = replace(params, top_k=rng.choice([0, 5]), repetition_penalty=rng.choice([1.0, 1.2]))
        found.append(Wish(ids, params, rng.choice([EVERYTHING, Window(40, 4)]), rng.choice(["", "a"])))
    return found


class Steps:
    """What each step of a model holds, and a gate before them. Every token is a step of its own.

    Attributes:
        held: of each step, the tokens of each request's sequence.
    """

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[dict[int, int]] = []
        self.before: Callable[[list[Part]], None] = lambda _: None
        self._inside, self._gate = threading.Event(), threading.Event()
        self._gate.set()
        run = model._runner.run

        def watched(parts: list[Part], outputs: Any) -> Any:
            self._inside.set()
            assert self._gate.wait(WAIT_S)
            self.held.append({id(part.sequence): part.n_tokens for part in parts})
            self.before(parts)
            return run(parts, outputs)

        monkeypatch.setattr(model._runner, "run", watched)
        monkeypatch.setattr(scheduler_module, "MAX_STEPS", 1)

    @property
    def n_computed(self) -> int:
        return sum(sum(step.values()) for step in self.held)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """No step gets anywhere; the first that tries is waited for by `reached`."""
        self._inside.clear()
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()

    def reached(self) -> None:
        """Waits until a step stands at the gate."""
        assert self._inside.wait(WAIT_S)

    @contextmanager
    def all_at_once(self, model: Model) -> Iterator[None]:
        """What is begun in the block comes to the scheduler at one time."""
        with self.stopped():
            first = model.generate([7], SamplingParams(max_tokens=1))
            self.reached()
            yield
            self.held.clear()
        first.text()
        self.held[:] = self.held[1:]


@pytest.fixture
def steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(model, monkeypatch)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody pauses, however slow the reader."""
    monkeypatch.setattr(request_module, "READ_AHEAD", 10**6)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it does not come to be"
        time.sleep(0.001)


def settled(model: Model) -> bool:
    gc.collect()
    wait_for(lambda: model._engine.scheduler.load == Load(0, 0))
    model.clear_cache()
    return model._runner.pool.n_free == model._runner.pool.n_pages


# ---- The same tokens, whoever else is there -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_many_at_once_equal_each_alone(model: Model, seed: int) -> None:
    """Tokens, and log-probabilities bit for bit, in two orders of arrival, read in any order."""
    wanted = wishes(14, seed)
    alone = [wish.alone(model) for wish in wanted]
    rng = random.Random(seed)
    for _ in range(2):
        order = rng.sample(range(len(wanted)), len(wanted))
        running = {i: wanted[i].begin(model) for i in order}
        pieces: dict[int, list[Piece]] = {i: [] for i in order}
        while running:
            i = rng.choice(list(running))
            piece = next(running[i], None)
            if piece is None:
                del running[i]
            else:
                pieces[i].append(piece)
        assert [pieces[i] for i in range(len(wanted))] == alone
    assert settled(model)


@pytest.mark.parametrize("seed", range(3))
def test_those_that_give_way_say_the_same(tiny_folder: Path, model: Model, seed: int) -> None:
    wanted = wishes(12, seed)
    alone = [wish.alone(model) for wish in wanted]
    n_bytes = 9 * page_bytes(DType.F16, 2, 2, 6)  # the longest alone has 8 pages
    with Model.load(tiny_folder, threads=1, kv_memory=n_bytes) as small:
        running = [wish.begin(small) for wish in wanted]
        random.Random(seed).shuffle(running)
        results = {tuple(generation.prompt_ids): in_threads(lambda g=generation: list(g))[0] for generation in running}
        assert [results[tuple(wish.ids)] for wish in wanted] == alone
        assert settled(small)


def test_more_than_the_pool_holds_fails_alone(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, threads=1, kv_memory=3 * page_bytes(DType.F16, 2, 2, 6)) as small:
        large, other = Wish(ids_of(90), HOT), Wish(ids_of(20, 1), HOT)
        alone = other.alone(small)
        doomed, fine = large.begin(small), other.begin(small)
        assert list(fine) == alone
        with pytest.raises(OutOfMemory, match="pages"):
            list(doomed)
        assert settled(small)


def test_those_that_wait_hold_up_nobody(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sessions fill the pool with their past and go on at once: the one that waits gives up what it holds."""
    with Model.load(tiny_folder, threads=1, kv_memory=10 * page_bytes(DType.F16, 2, 2, 6)) as small:
        steps = Steps(small, monkeypatch)
        sessions = [small.session() for _ in range(2)]
        for i, session in enumerate(sessions):
            session.tell(1, prompt=f"{i} " + "a b c d " * 19).text()
            assert session.head.kv is not None and len(session.head.kv.pages) == 5
        with steps.all_at_once(small):
            replies = [session.tell(40, prompt=" x" * 30, params=HOT) for session in sessions]
        for reply in replies:
            reply.text()
            assert reply.turn is not None and len(reply.turn.token_ids) == 40
        del replies, reply, sessions, session
        assert settled(small)


def test_two_models_on_one_scheduler(tiny_folder: Path, tmp_path: Path) -> None:
    scheduler = Scheduler()
    other_folder = tiny.write_model(tmp_path / "m", tensors=tiny.random_tensors(seed=9))
    with Model.load(tiny_folder, threads=1, scheduler=scheduler) as one:
        two = Model.load(other_folder, threads=1, scheduler=scheduler)
        wanted = wishes(6, 1)
        alone = [[wish.alone(model) for wish in wanted] for model in (one, two)]
        assert alone[0] != alone[1]
        running = [[wish.begin(model) for wish in wanted] for model in (one, two)]
        assert [[list(generation) for generation in each] for each in running] == alone
        kept, lost = one.generate([5, 6], HOT), two.generate([5, 6], replace(HOT, max_tokens=200))
        next(lost)
        two.close()
        with pytest.raises(InvalidArgument, match="closed"):
            lost.text()
        assert len(list(kept)) == 20
        assert len(one.generate([5, 6], HOT).text()) > 0
        assert settled(one)


# ---- What a step holds ----------------------------------------------------------------------------------------------


def test_a_short_prompt_is_done_while_a_long_one_is_read(long_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model.load(long_folder, threads=1) as model:
        steps = Steps(model, monkeypatch)
        with steps.all_at_once(model):
            long = Wish(ids_of(3000), replace(HOT, max_tokens=1)).begin(model)
            shorts = [Wish(ids_of(20, i), replace(HOT, max_tokens=3)).begin(model) for i in range(1, 4)]
            names = {id(generation.sequence): generation for generation in (long, *shorts)}
        for generation in (*shorts, long):
            generation.text()
        last = {name: max(i for i, step in enumerate(steps.held) if name in step) for name in names}
        assert all(last[name] < last[id(long.sequence)] for name in last if names[name] is not long)
        assert sum(step.get(id(long.sequence), 0) for step in steps.held) == 3000
        assert all(sum(step.values()) <= model._runner.max_tokens for step in steps.held)


def test_the_oldest_prompt_gets_half_of_each_step(long_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many short prompts come, the long one is read on."""
    with Model.load(long_folder, threads=1) as model:
        steps = Steps(model, monkeypatch)
        with steps.all_at_once(model):
            one = replace(HOT, max_tokens=1)
            long = Wish(ids_of(3000), one).begin(model)
            others = [Wish(ids_of(100, i), one).begin(model) for i in range(1, 41)]
        long.text()
        mine = [step[id(long.sequence)] for step in steps.held if id(long.sequence) in step]
        assert len(mine) == max(i for i, step in enumerate(steps.held) if id(long.sequence) in step) + 1
        assert all(n >= model._runner.max_tokens // 2 for n in mine[:-1])
        for generation in others:
            generation.text()


@pytest.mark.usefixtures("patient")
def test_while_one_draws_a_long_prompt_is_read_in_chunks(long_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model.load(long_folder, threads=1) as model:
        steps = Steps(model, monkeypatch)
        drawing = Wish([5, 6], replace(HOT, max_tokens=4000)).begin(model)
        next(drawing)
        long = Wish(ids_of(2000), replace(HOT, max_tokens=1)).begin(model)
        long.text()
        chunks = [step for step in steps.held if id(long.sequence) in step]
        assert len(chunks) >= 4 and sum(step[id(long.sequence)] for step in chunks) == 2000
        assert all(step.get(id(drawing.sequence)) == 1 for step in chunks), "who draws waits for nobody"
        assert chunks[0][id(long.sequence)] <= 16, "nothing is known of the times yet"
        drawing.cancel()


@pytest.mark.parametrize("n_own", [0, 5, 40])
def test_what_many_ask_at_once_is_computed_once(model: Model, steps: Steps, n_own: int) -> None:
    shared, n = ids_of(200), 8
    with steps.all_at_once(model):
        running = [Wish([*shared, *ids_of(n_own, i)], replace(HOT, max_tokens=3)).begin(model) for i in range(1, n + 1)]
    for generation in running:
        generation.text()
    own = n_own or 1  # the last token is computed by everybody, for its logits
    assert steps.n_computed == 200 + n_own + (n - 1) * own + 2 * n
    assert [generation.timings.reused_tokens for generation in running] == [0] + [200 + n_own - own] * (n - 1)
    assert settled(model)


def test_who_waits_for_another_does_not_wait_in_vain(model: Model, steps: Steps) -> None:
    """The reader of the words that others wait for goes away in the middle of them."""
    wanted = Wish(ids_of(560), replace(HOT, max_tokens=4))
    alone = wanted.alone(model)
    with steps.all_at_once(model):
        first, *others = [wanted.begin(model) for _ in range(4)]
        steps.before = lambda parts: first.abandon() if parts[0].n_tokens > 100 else None
    assert [list(generation) for generation in others] == [alone] * 3
    assert settled(model)


# ---- Owners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
def test_nothing_is_shared_under_another_salt(model: Model, steps: Steps, at_once: bool) -> None:
    wish = Wish(ids_of(130), replace(HOT, max_tokens=3))
    if at_once:
        with steps.all_at_once(model):
            running = [replace(wish, salt=salt).begin(model) for salt in ("a", "b", "a")]
        results = [list(generation) for generation in running]
    else:
        results = [list(replace(wish, salt=salt).begin(model)) for salt in ("a", "b", "a")]
    assert results[0] == results[1] == results[2]
    assert steps.n_computed == 2 * 130 + (1 if at_once else 130 % 32) + 3 * 2


@pytest.mark.parametrize("kv", ["f16", "f32"])
def test_no_freed_page_is_ever_read(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, kv: Any) -> None:
    """A page is filled with NaN as soon as nobody holds it: whoever reads what another left behind fails."""
    give_back = PagePool.give_back
    poisoned = 0

    def poisoning(self: PagePool, pages: list[int]) -> None:
        nonlocal poisoned
        with self.lock:
            give_back(self, pages)
            for page in {page for page in pages if page != HOLE and not self.holders(page)}:
                self.native.write(page, np.full(self.page_bytes, 0xFF, np.uint8))
                poisoned += 1

    wanted = wishes(16, 4)
    with Model.load(tiny_folder, threads=1, kv=kv) as clean:
        alone = [wish.alone(clean) for wish in wanted]
    monkeypatch.setattr(PagePool, "give_back", poisoning)
    layers = page_bytes(DType.F16 if kv == "f16" else DType.F32, 2, 2, 6)
    with Model.load(tiny_folder, threads=1, kv=kv, kv_memory=12 * layers) as model:
        for page in range(12):
            model._runner.pool.native.write(page, np.full(layers, 0xFF, np.uint8))
        rng = random.Random(1)
        for _ in range(3):
            running = [wish.begin(model) for wish in wanted]
            gone = set(rng.sample(range(len(wanted)), 4))
            for i in gone:
                next(running[i])
                running[i].cancel()
            for i, generation in enumerate(running):
                if i not in gone:
                    assert list(generation) == alone[i]
        assert poisoned > 20 and settled(model)


# ---- Failures -------------------------------------------------------------------------------------------------------


def test_damaged_logits_fail_only_who_has_them(model: Model, steps: Steps) -> None:
    wanted = [Wish(ids_of(30 + i, i), HOT) for i in range(5)]
    alone = [wish.alone(model) for wish in wanted]

    def damage(parts: list[Part]) -> None:
        sick = running[2]._request
        if any(part.sequence is sick.sequence for part in parts) and sick.n_made >= 7:
            raise NonFinite("logits hold NaN")

    with steps.all_at_once(model):
        running = [wish.begin(model) for wish in wanted]
        steps.before = damage
    for i, generation in enumerate(running):
        if i != 2:
            assert list(generation) == alone[i]
    with pytest.raises(NonFinite):
        list(running[2])
    assert len(running[2].token_ids) == 7
    steps.before = lambda _: None
    assert wanted[2].alone(model) == alone[2]
    assert settled(model)


@pytest.mark.parametrize("error", [RuntimeError("a step failed"), MemoryError(), EngineError("no")])
def test_a_failing_step_reaches_every_reader(model: Model, steps: Steps, error: Exception) -> None:

    def fail(_: list[Part]) -> None:
        if len(steps.held) > 6:
            raise error

    with steps.all_at_once(model):
        running = [Wish(ids_of(20, i), HOT).begin(model) for i in range(4)]
        steps.before = fail
    results = in_threads(*[lambda g=generation: list(g) for generation in running])
    assert all(result is error for result in results)
    steps.before = lambda _: None
    assert len(list(model.generate([5, 6], HOT))) == 20
    assert settled(model)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_of_the_scheduler_itself_reaches_everybody(
    model: Model, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those who came while it failed, and those who cancel then."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    scheduler = model._engine.scheduler
    plan, late = scheduler._plan, []

    def failing(_: Runner) -> Any:
        monkeypatch.setattr(scheduler, "_plan", plan)
        late.extend(in_threads(*[lambda: model.generate([5, 6, 7], HOT)] * 2))
        raise ValueError("a mistake in the scheduler")

    with steps.stopped():
        first = model.generate([5, 6], HOT)
        steps.reached()
        monkeypatch.setattr(scheduler, "_plan", failing)
    with pytest.raises(EngineError, match="a mistake"):
        list(first)
    results = in_threads(lambda: list(late[0]), late[1].cancel)
    assert isinstance(results[0], EngineError) or len(results[0]) == 20
    assert len(list(model.generate([5, 6], HOT))) == 20
    assert settled(model)


def test_a_listener_that_fails_harms_nobody(model: Model, steps: Steps) -> None:
    """An event loop may be closed in the moment before it is told."""

    def closed() -> None:
        raise RuntimeError("Event loop is closed")

    with steps.all_at_once(model):
        one, two = model.generate([5, 6], HOT), model.generate([7, 8], HOT)
        one._request.listen(closed)
    assert len(list(two)) == 20 and len(list(one)) in (0, 20), "who listened may be given up"
    assert settled(model)


def test_as_many_as_may_wait_and_no_more(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, threads=1, scheduler=Scheduler(max_running=2, max_waiting=3)) as model:
        long = replace(HOT, max_tokens=100)
        running = [model.generate([5, i], long) for i in range(5)]
        session = model.session()
        for call in (lambda: model.generate([5], HOT), lambda: session.say("a"), lambda: session.branch(4, "a")):
            with pytest.raises(EngineBusy) as caught:
                call()
            assert caught.value.n_waiting <= 3
        assert not session.is_busy and session.turns == []
        running[0].cancel()
        running.append(model.generate([5, 9], HOT))
        with pytest.raises(EngineBusy):
            session.branch(2, "a")
        assert [len(list(generation)) for generation in running] == [0, 100, 100, 100, 100, 20]
        assert len(session.branch(4, "a", HOT)) == 4
        session.stop()
        assert settled(model)


# ---- Ends -----------------------------------------------------------------------------------------------------------


def test_a_deadline_ends_an_answer(model: Model, steps: Steps) -> None:
    wish = Wish(ids_of(40), replace(HOT, max_tokens=500))
    alone = wish.alone(model)
    steps.before = lambda _: time.sleep(0.01)
    generation = wish.begin(model, timeout=0.3)
    pieces = list(generation)
    assert generation.finish_reason == "timeout" and 0 < len(pieces) < 400
    assert pieces == alone[: len(pieces)]
    assert settled(model)


def test_a_deadline_ends_who_waits_and_who_pauses(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, threads=1, scheduler=Scheduler(max_running=1)) as model:
        wish = Wish(ids_of(20), replace(HOT, max_tokens=300))
        pausing = wish.begin(model, timeout=1.0)
        waiting = Wish(ids_of(20, 1), HOT).begin(model, timeout=0.2)
        assert list(waiting) == [] and waiting.finish_reason == "timeout"
        assert len(list(wish.begin(model))) == 300, "the one that pauses is gone by its deadline"
        pieces = list(pausing)
        assert pausing.finish_reason == "timeout" and len(pieces) == request_module.READ_AHEAD
        session = model.session()
        reply = session.say("hello", replace(HOT, max_tokens=500), timeout=1e-9)
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
                wait_for(lambda: generation._request.n_made >= (2 if when == "drawing" else request_module.READ_AHEAD))
                if when == "drawing":
                    steps._gate.clear()
            if reading:
                reader.start()
            canceller = threading.Thread(target=generation.cancel)
            canceller.start()
        canceller.join(WAIT_S)
        assert not canceller.is_alive() and generation.finish_reason == "cancelled"
        if reading:
            reader.join(WAIT_S)
            assert not reader.is_alive() and len(results[0]) == len(generation.token_ids)
        assert generation._request.done.is_set()
        if blocker is not None:
            blocker.cancel()
        assert settled(model)


def test_two_hundred_random_cancels_leave_no_page(tiny_folder: Path) -> None:
    n_bytes = 14 * page_bytes(DType.F16, 2, 2, 6)
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
    n_bytes = 40 * page_bytes(DType.F16, 2, 2, 6)
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
                shared[rng.randrange(8)] = circle  # the former one is let go of here
            return 25

        def collect() -> None:
            while not stop.is_set():
                gc.collect()
                time.sleep(0.005)

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
            thread = threading.Thread(target=model._engine.cache.give_up, args=(self,))
            thread.start()
            thread.join(0.2)  # for ever, if the lock is held as it must be
            waiting.append(thread)

    waiting: list[threading.Thread] = []
    monkeypatch.setattr(Sequence, "_check", interrupted)
    generation = Wish(ids_of(70), replace(HOT, max_tokens=60)).begin(model)
    next(generation)
    generation.cancel()
    for thread in waiting:
        thread.join(WAIT_S)
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
    end = time.monotonic() + 20
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > end:
            os.kill(child, 9)
            sys.exit("the child hangs")
        time.sleep(0.002)
    assert os.waitstatus_to_exitcode(status) == 0, status
assert len(g.text()) > 0 and len(g.token_ids) == 500
session.say("more", long).text()
assert [turn.number for turn in session.path] == [1, 2]
w.close()
"""


def run_script(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BEGIN + script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=50,
    )


@pytest.mark.parametrize("how", EXITS)
def test_the_interpreter_ends_while_answers_are_made(tiny_folder: Path, tmp_path: Path, how: str) -> None:
    result = run_script(EXITS[how], tiny_folder, tmp_path)
    assert (result.returncode, result.stderr) == (1 if how == "by an error" else 0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told_and_ends(tiny_folder: Path, tmp_path: Path) -> None:
    result = run_script(FORK, tiny_folder, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
