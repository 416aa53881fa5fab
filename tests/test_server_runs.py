"""Runs on their own: readers that come, leave and are slow, and events that are kept for reconnecting."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from fabula import Model, SamplingParams
from fabula.engine.generation import Generation
from fabula.server import runs
from fabula.server.observer import Observer
from fabula.server.runs import Run, Runs


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose answers may be long enough to be interrupted."""
    return tiny.write_model(tmp_path_factory.mktemp("long") / "tiny", config={"max_position_embeddings": 20_000})


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Iterator[Model]:
    with Model.load(tiny_folder, threads=1, context=20_000) as loaded:
        yield loaded


def begun(model: Model, n_tokens: int, **how: Any) -> Run:
    params = SamplingParams(max_tokens=n_tokens, ignore_eos=True, seed=1)
    generation = Generation(model._engine, model.tokenizer.encode("the whale"), params, continues=True)
    return Run([generation], **{"tenant": "", "model": "tiny", "describe": lambda _: {}, **how})


def n_tokens(run: Run) -> int:
    return sum(event.kind == "token" for event in run.events)


async def end_of(run: Run) -> str:
    await asyncio.wait(run._tasks)
    return run.events[-1].kind


@pytest.mark.parametrize("n_read", [0, 1, 5, 40])
def test_a_run_that_loses_its_reader_ends_within_two_tokens(model: Model, n_read: int) -> None:
    async def work() -> None:
        run = begun(model, 15_000)
        follower, generation = run.follow(), run.sources[0]
        while n_tokens(run) < n_read:
            await anext(follower)
        there = n_tokens(run)
        follower.close()
        assert await end_of(run) == "cancelled" and run.is_left
        assert n_tokens(run) <= there + 2
        assert len(generation.token_ids) == n_tokens(run)  # pieces that were generated ahead are not part of it

    asyncio.run(work())


def test_one_of_two_readers_may_leave(model: Model) -> None:
    async def work() -> None:
        run = begun(model, 200)
        first, second = run.follow(), run.follow()
        await anext(first)
        first.close()
        heard = [event async for events in second for _, event in events]
        assert [event.kind for event in heard] == ["start", *["token"] * 200, "done"] and not run.is_left

    asyncio.run(work())


@pytest.mark.parametrize("background", [False, True])
def test_a_reader_that_stops_reading_is_given_up(
    model: Model, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    monkeypatch.setattr(runs, "LAG_S", 0.2)

    async def work() -> None:
        run, other = begun(model, 2000, background=background), begun(model, 500)
        stuck, quick = run.follow(), other.follow()
        await anext(stuck)
        async for _ in quick:  # others are not held up
            assert background or len(run.events) <= runs.LAG + 3  # the backlog of a slow reader is bounded
        assert n_tokens(other) == 500
        assert await end_of(run) == ("done" if background else "cancelled")
        assert n_tokens(run) == 2000 if background else n_tokens(run) <= runs.LAG + 3
        assert [one async for one in stuck] == []  # the stream ends

    asyncio.run(work())


def test_finished_runs_are_kept_for_a_while_and_not_too_many(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    async def finished(kept: Runs, n: int) -> Run:
        run = begun(model, n, background=True, session_id="s")
        kept.add(run)
        await end_of(run)
        return run

    def there(kept: Runs, made: list[Run]) -> list[bool]:
        kept.forget_old()
        return [kept.find(run.id, "") is run for run in made]

    async def work() -> None:
        kept = Runs(keep_s=3600)
        made = [await finished(kept, 8) for _ in range(4)]  # of ten events each
        assert there(kept, made) == [True] * 4 and kept.find(made[0].id, "another") is None
        monkeypatch.setattr(runs, "MAX_KEPT_EVENTS", 30)
        assert there(kept, made) == [False, True, True, True]
        monkeypatch.setattr(runs, "MAX_KEPT", 2)
        assert there(kept, made) == [False, False, True, True]
        made[2].finished_at -= 3601
        assert there(kept, made) == [False, False, False, True]
        going = begun(model, 15_000, background=True, session_id="s")
        kept.add(going)
        monkeypatch.setattr(runs, "MAX_KEPT", 0)
        assert there(kept, [*made, going])[-1]  # what is being made is not forgotten
        await going.stop()

    asyncio.run(work())


def test_finished_runs_are_dropped_on_an_idle_server_too(model: Model) -> None:
    async def work() -> None:
        kept = Runs(keep_s=0.05)
        run = begun(model, 4, background=True, session_id="s")
        kept.add(run)
        await end_of(run)
        while kept.find(run.id, "") is not None:  # none is added
            await asyncio.sleep(0.01)

    asyncio.run(work())


def test_what_is_kept_holds_neither_answers_nor_the_request(model: Model) -> None:
    class Body:
        """What a request brought."""

        def describe(self, _: int) -> dict[str, Any]:
            return {"n": 1}

    async def work() -> None:
        for session_id in ("s", None):
            kept, body = Runs(keep_s=3600), Body()
            run = begun(model, 4, background=True, session_id=session_id, describe=body.describe)
            there = [weakref.ref(body), weakref.ref(run.sources[0])]
            del body
            kept.add(run)
            await end_of(run)
            assert run.results == [{"n": 1}] and run.is_done
            assert (kept.find(run.id, "") is run) == (session_id is not None), "who cannot be joined is not kept"
            run._tasks.clear()  # which asyncio frees by itself, a little later
            gc.collect()
            assert [reference() for reference in there] == [None, None]

    asyncio.run(work())


@pytest.mark.parametrize("event", ["answer_started", "token", "answer_ended"])
def test_an_observer_that_raises_is_logged_and_harms_nobody(
    model: Model, event: str, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []

    class Broken(Observer):
        pass

    class Sound(Observer):
        def answer_ended(self, *about: Any) -> None:
            heard.append(about[-1])

    def fail(*_: object) -> None:
        raise RuntimeError("it is broken")

    setattr(Broken, event, fail)

    async def work() -> None:
        run = begun(model, 5, observers=[Broken(), Sound()])
        assert await run.finish() == [{}] and run.is_done
        assert n_tokens(run) == 5 and run.events[-1].kind == "done"

    asyncio.run(work())
    assert heard == ["done"] and f"Broken failed at {event}" in caplog.text and "it is broken" in caplog.text
