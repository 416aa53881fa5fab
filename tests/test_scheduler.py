"""The scheduler: many requests in one batch give the same as each alone, and no request starves.

No test depends on the clock: a wrapper around `Runner.run` records the requests of each step.
"""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from fabula import EngineBusy, EngineError, InvalidArgument, Model, NonFinite, OutOfMemory, Piece
from fabula._native import kv_layers, page_bytes
from fabula.engine import generation as generation_module
from fabula.engine import request as request_module
from fabula.engine.runner import Part, Runner
from fabula.engine.scheduler import Scheduler
from fabula.formats.checkpoint import DType
from fabula.kv.pages import HOLE, PagePool
from scheduling import HOT, Steps, Wish, ids_of, settled, wishes
from threaded import in_threads


@pytest.fixture
def model(tiny_model: Model) -> Model:
    return tiny_model


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No request pauses, however slow its reader."""
    monkeypatch.setattr(request_module, "READ_AHEAD", 10**6)


# ---- The same tokens in every batch ---------------------------------------------------------------------------------


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
    n_bytes = 9 * page_bytes(DType.F16, kv_layers(2, 2, 6))  # the longest alone has 8 pages
    with Model.load(tiny_folder, threads=1, kv_memory=n_bytes) as small:
        running = [wish.begin(small) for wish in wanted]
        random.Random(seed).shuffle(running)
        results = {tuple(generation.prompt_ids): in_threads(lambda g=generation: list(g))[0] for generation in running}
        assert [results[tuple(wish.ids)] for wish in wanted] == alone
        assert settled(small)


def test_more_than_the_pool_holds_fails_alone(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, threads=1, kv_memory=3 * page_bytes(DType.F16, kv_layers(2, 2, 6))) as small:
        large, other = Wish(ids_of(90), HOT), Wish(ids_of(20, 1), HOT)
        alone = other.alone(small)
        doomed, fine = large.begin(small), other.begin(small)
        assert list(fine) == alone
        with pytest.raises(OutOfMemory, match="pages"):
            list(doomed)
        assert settled(small)


def test_those_that_wait_hold_up_nobody(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sessions fill the pool and continue at the same time: the KV of the waiting one is evicted."""
    with Model.load(tiny_folder, threads=1, kv_memory=10 * page_bytes(DType.F16, kv_layers(2, 2, 6))) as small:
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


def test_pages_of_a_request_that_has_just_come_are_waited_for(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the inbox when the only running request finds no page: nobody fails."""
    with Model.load(tiny_folder, threads=1, kv_memory=10 * page_bytes(DType.F16, kv_layers(2, 2, 6))) as small:
        first = Wish(ids_of(180), HOT)
        past, large = list(first.begin(small)), Wish(ids_of(200, 1), HOT)
        alone = large.alone(small)
        held = [first.begin(small)]
        assert list(held[0]) == past
        forks, come = [held.pop().sequence.fork(192)], []
        prepare = small._runner.prepare

        def prepared(*args: Any) -> Part:
            try:
                return prepare(*args)
            except OutOfMemory:
                if not come:
                    engine, ids = small._engine, [*first.ids, *(piece.token_id for piece in past)]
                    come.append(generation_module.Generation(engine, ids, HOT, sequence=forks.pop(), continues=True))
                raise

        monkeypatch.setattr(small._runner, "prepare", prepared)
        assert list(large.begin(small)) == alone and len(list(come.pop())) == HOT.max_tokens
        del held
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
    """However many short prompts come, the prefill of the long one advances."""
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
    """A page is filled with NaN as soon as it is free: a request that reads old contents fails."""
    give_back = PagePool.give_back
    poisoned = 0

    def poisoning(self: PagePool, pages: list[int], n_dropped: int = 0) -> None:
        nonlocal poisoned
        with self.lock:
            give_back(self, pages, n_dropped)
            for page in {page for page in pages if page != HOLE and not self.holders(page)}:
                self.native.write(page, np.full(self.page_bytes, 0xFF, np.uint8))
                poisoned += 1

    wanted = wishes(16, 4)
    with Model.load(tiny_folder, threads=1, kv=kv) as clean:
        alone = [wish.alone(clean) for wish in wanted]
    monkeypatch.setattr(PagePool, "give_back", poisoning)
    layers = page_bytes(DType.F16 if kv == "f16" else DType.F32, kv_layers(2, 2, 6))
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
    """Also requests that came while it failed, and those that are cancelled then."""
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
    """An event loop may be closed right before it is notified."""

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
