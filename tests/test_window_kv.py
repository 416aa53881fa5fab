"""KV of windowed layers that no window shows any more is dropped: results keep their bits, and the memory is free."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import tiny
from decoder_families import CASES, make_talking_model
from fabula import InvalidArgument, Model, SamplingParams, Unsupported, Workspace
from fabula._native import PAGE_POSITIONS, KvLayer, page_bytes
from fabula.cli.inspect import describe
from fabula.cli.main import cli
from fabula.engine.generation import Generation
from fabula.engine.runner import Runner
from fabula.formats.checkpoint import DType
from fabula.formats.open import open_checkpoint
from fabula.kv.pages import PagePool, Sequence, pages_for
from fabula.kv.prefix import Window
from fabula.kv.windowed import TAKE_BACK, WindowedLayers
from scheduling import settled, wishes

# Of each structure: windows in most layers; in most, with layers that reuse the KV of others; chunks; in all layers.
NAMES = ("gemma3", "cohere2", "gemma4", "llama4", "starcoder2")
VOCAB = tiny.VOCAB
I32 = npt.NDArray[np.int32]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_talking_model(CASES[name], tmp_path_factory.mktemp(name) / "model") for name in NAMES}


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is discarded becomes NaN: whoever reads it finds out."""
    create = PagePool.__init__

    def poisoned(self: PagePool, dtypes: Any, n_pages: int, layers: Any, *arguments: Any, **more: Any) -> None:
        layers = tuple(layers)
        create(self, dtypes, n_pages, layers, *arguments, **more)
        ends = np.cumsum([0, *(page_bytes(dtypes, [layer]) for layer in layers)])

        def discard(page: int, first: int, n: int) -> None:
            data = self.native.read(page)
            data[ends[first] : ends[first + n]] = 0xFF
            self.native.write(page, data)

        monkeypatch.setattr(self.native, "discard", discard)

    monkeypatch.setattr(PagePool, "__init__", poisoned)


def load(folder: Path, *, kv: DType = DType.F32, drops: bool = True, kv_memory: int | None = None) -> Runner:
    checkpoint = open_checkpoint(folder)
    try:
        return Runner(
            checkpoint, weights=DType.F32, kv=(kv, kv), n_threads=1, kv_memory=kv_memory, drops_windowed=drops
        )
    finally:
        checkpoint.close()


def some_ids(n: int, seed: int = 0) -> I32:
    return np.random.default_rng(seed).integers(4, VOCAB, n).astype(np.int32)


def from_scratch(runner: Runner, ids: I32) -> npt.NDArray[np.float32]:
    """Logits of the last token of a text, in a sequence that keeps everything."""
    with runner.sequence() as alone:
        return runner.prefill(alone, ids)


# ---- Which pages are seen -------------------------------------------------------------------------------------------


def test_windowed_layers_of_families(folders: dict[str, Path]) -> None:
    found = {}
    for name, folder in folders.items():
        runner = load(folder)
        found[name] = runner.pool.windowed
        assert 0 < runner.pool.windowed_bytes <= runner.pool.page_bytes
        layers = runner.config.kv_layers
        own = sum(page_bytes(DType.F32, [layers[i]]) for i in runner.pool.windowed.layers)
        assert runner.pool.windowed_bytes == own
        runner.close()
    assert found["gemma3"] == WindowedLayers((0, 1, 2, 3, 4, 6), 19)  # every sixth layer sees everything
    assert found["cohere2"] == WindowedLayers((0, 1, 2, 4), 19)  # every fourth
    assert found["gemma4"] == WindowedLayers((0, 1, 3), 19)  # the last two of six reuse layers 2 and 3
    assert found["llama4"] == WindowedLayers((0, 1, 3, 4), 0, (23,))
    assert found["starcoder2"] == WindowedLayers((0, 1, 2), 19)


def test_a_layer_that_one_reader_sees_whole_is_not_windowed() -> None:
    assert WindowedLayers.of([[(8, False)], [(8, False), (0, False)], [(4, True), (16, False)], []]) == WindowedLayers(
        (0, 2), 16, (4,)
    )
    assert not WindowedLayers.of([[(0, False)]])
    assert WindowedLayers((0, 1, 2, 4, 7, 8)).runs() == [(0, 3), (4, 1), (7, 2)]


@pytest.mark.parametrize(
    "windowed", [WindowedLayers((0,), 40), WindowedLayers((0,), 0, (50,)), WindowedLayers((0,), 33, (70,))]
)
def test_the_first_visible_page_never_falls(windowed: WindowedLayers) -> None:
    """What one token does not see, no later one does: so it can be dropped for good."""
    firsts = [windowed.first_page(n) for n in range(400)]
    assert firsts == sorted(firsts) and firsts[0] == 0 and firsts[-1] > 0
    for n in range(400):
        lows = [n // chunk * chunk for chunk in windowed.chunks] + [max(0, n - windowed.size + 1)] * (windowed.size > 0)
        assert windowed.first_visible(n) == min(lows) <= n
        held = pages_for(n + 1) - windowed.first_page(max(0, n - TAKE_BACK))
        assert held <= windowed.most_pages(1)


# ---- Sequences ------------------------------------------------------------------------------------------------------


BACK = st.integers(0, 300) | st.integers(0, TAKE_BACK) | st.just(TAKE_BACK)  # tokens from the end


class Texts(RuleBasedStateMachine):
    """Texts that grow, fork, shrink and drop what no window shows, over a pool that holds few whole pages."""

    runner: Runner

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[tuple[Sequence, list[int]]] = [(self.runner.sequence(), [])]
        self.rng = np.random.default_rng(0)

    def some(self, i: int) -> tuple[Sequence, list[int]]:
        return self.alive[i % len(self.alive)]

    @rule(i=st.integers(0, 99), n=st.integers(1, 90))
    def append(self, i: int, n: int) -> None:
        sequence, tokens = self.some(i)
        new = self.rng.integers(4, VOCAB, n).astype(np.int32)
        if len(tokens) + n > 300:
            return
        logits = self.runner.step([(sequence, new)], [n - 1])
        tokens += new.tolist()
        np.testing.assert_array_equal(logits[0], from_scratch(self.runner, np.array(tokens, np.int32)))

    @rule(i=st.integers(0, 99))
    def drop(self, i: int) -> None:
        sequence, tokens = self.some(i)
        sequence.drop_windowed()
        windowed = self.runner.pool.windowed
        assert sequence.n_dropped >= windowed.first_page(max(0, len(tokens) - TAKE_BACK))
        assert sequence.usable(len(tokens)) == len(tokens)
        least = max(0, len(tokens) - TAKE_BACK)
        assert sequence.usable(least) == least, "what may be taken back can go on"

    @precondition(lambda self: len(self.alive) < 6)
    @rule(i=st.integers(0, 99), back=BACK)
    def fork(self, i: int, back: int) -> None:
        sequence, tokens = self.some(i)
        n = sequence.usable(max(0, len(tokens) - back))
        self.alive.append((sequence.fork(n), tokens[:n]))

    @rule(i=st.integers(0, 99), back=BACK)
    def truncate(self, i: int, back: int) -> None:
        sequence, tokens = self.some(i)
        n = sequence.usable(max(0, len(tokens) - back))
        sequence.truncate(n)
        del tokens[n:]

    @rule(i=st.integers(0, 99))
    def retain(self, i: int) -> None:
        sequence, _ = self.some(i)
        sequence.unretain() if sequence.retained else sequence.retain()

    @precondition(lambda self: len(self.alive) > 1)
    @rule(i=st.integers(0, 99))
    def end(self, i: int) -> None:
        self.alive.pop(i % len(self.alive))[0].close()

    @invariant()
    def counts_are_right(self) -> None:
        held = [sequence for sequence, _ in self.alive]
        self.runner.pool.check([s.pages for s in held], [s.n_dropped for s in held])
        for sequence, tokens in self.alive:
            assert sequence.n_tokens == len(tokens)

    def teardown(self) -> None:
        for sequence, _ in self.alive:
            sequence.close()
        pool = self.runner.pool
        assert pool.n_bytes == 0 and pool.n_free == pool.n_pages


@pytest.mark.parametrize(
    ("name", "kv"), [("gemma3", DType.F16), ("llama4", DType.F32), ("gemma4", DType.Q8_0), ("starcoder2", DType.BF16)]
)
def test_every_text_has_the_bits_of_one_from_scratch(folders: dict[str, Path], name: str, kv: DType) -> None:
    runner = load(folders[name], kv=kv)
    machine = type("Machine", (Texts,), {"runner": runner})
    run_state_machine_as_test(machine, settings=settings(max_examples=12, stateful_step_count=25, deadline=None))
    runner.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_long_text_takes_what_the_formula_says(folders: dict[str, Path], name: str) -> None:
    runner = load(folders[name])
    pool, windowed, ids = runner.pool, runner.pool.windowed, some_ids(900)
    layers, wide = runner.config.kv_layers, pool.page_bytes - pool.windowed_bytes
    with runner.sequence() as sequence:
        for start in range(0, 900, 50):
            runner.step([(sequence, ids[start : start + 50])], [])
            sequence.drop_windowed()
            n_pages = pages_for(sequence.n_tokens)
            first = windowed.first_page(max(0, sequence.n_tokens - TAKE_BACK))
            assert sequence.n_dropped == first
            assert pool.n_bytes == n_pages * wide + (n_pages - first) * pool.windowed_bytes
            assert pool.n_bytes <= windowed.text_bytes(DType.F32, layers, n_pages, 50)
            assert pool.usage().n_dropped == first
        assert pool.n_bytes < 0.6 * n_pages * pool.page_bytes
        logits = runner.step([(sequence, some_ids(1))], [0])
        np.testing.assert_array_equal(logits[0], from_scratch(runner, np.append(ids, some_ids(1))))
        with pytest.raises(InvalidArgument, match="cannot fork at 400 tokens: its windowed KV was dropped"):
            sequence.fork(400)
    assert pool.n_bytes == 0


def test_the_memory_serves_other_texts(folders: dict[str, Path]) -> None:
    """Where 17 whole pages fit, three texts of 10 pages have room."""
    whole = load(folders["gemma3"]).pool.page_bytes
    runner = load(folders["gemma3"], kv_memory=17 * whole)
    assert runner.pool.n_pages == 17
    ids, texts = some_ids(300), [runner.sequence() for _ in range(3)]
    for text in texts:
        for start in range(0, 300, 60):
            runner.step([(text, ids[start : start + 60])], [])
            text.drop_windowed()
    assert [len(text.pages) for text in texts] == [10] * 3
    assert len({page for text in texts for page in text.pages}) == 30
    expected = from_scratch(load(folders["gemma3"]), np.append(ids, some_ids(1)))
    for text in texts:
        np.testing.assert_array_equal(runner.step([(text, some_ids(1))], [0])[0], expected)
        text.close()
    assert runner.pool.n_free == 17
    with runner.sequence() as text:  # the same page numbers, whole again
        np.testing.assert_array_equal(runner.prefill(text, np.append(ids, some_ids(1))), expected)
        runner.pool.check([text.pages], [text.n_dropped])


def test_discarded_memory_goes_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are counted, so what is touched must not exceed the limit when pages change their use."""
    monkeypatch.undo()  # as it really is
    layers = [KvLayer(1, 64, 64), KvLayer(4, 64, 64), KvLayer(4, 64, 64), KvLayer(1, 64, 64)]
    pool = PagePool(DType.F16, 16, layers, windowed=WindowedLayers((1, 2), 32))
    sequence = Sequence(pool)
    for n in range(1, 41):
        if pool.n_free == 0:
            sequence.drop_windowed()
        sequence.reserve(n * PAGE_POSITIONS)
        sequence.n_tokens = n * PAGE_POSITIONS
        pool.native.write(sequence.pages[-1], np.full(pool.page_bytes, n, np.uint8))
        pool.check([sequence.pages], [sequence.n_dropped])
    ends = np.cumsum([page_bytes(DType.F16, [layer]) for layer in layers])
    for i, page in enumerate(sequence.pages):
        data = pool.native.read(page)
        assert (data[: ends[0]] == i + 1).all() and (data[ends[2] :] == i + 1).all()
        assert (data[ends[0] : ends[2]] == (i + 1 if i >= sequence.n_dropped else 0)).all()
    sequence.close()
    pages = pool.take(16)  # numbers whose windowed part was dropped are used again, before fresh ones
    assert pool._touched_bytes <= 16 * pool.page_bytes
    pool.check([pages], [0])
    pool.give_back(pages)
    pool.close()


def test_a_text_with_a_sliding_window_drops_whole_pages_only(folders: dict[str, Path]) -> None:
    runner = load(folders["gemma3"])
    with runner.sequence(Window(100, 4)) as sequence:
        runner.prefill(sequence, some_ids(400))
        sequence.slide(400)
        sequence.drop_windowed()
        assert sequence.n_dropped == 0
        runner.pool.check([sequence.pages], [0])
    assert runner.pool.n_bytes == 0


# ---- Models ---------------------------------------------------------------------------------------------------------


def answer(model: Model, ids: Any, n: int = 8) -> Generation:
    generation = model.generate(ids, SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True))
    generation.text()
    return generation


@contextmanager
def loaded(folder: Path, window_kv: Any, **options: Any) -> Iterator[Model]:
    with Model.load(folder, threads=1, window_kv=window_kv, **options) as model:
        yield model
        model.clear_cache()
        pool = model._runner.pool
        assert pool.n_bytes == 0 and pool.n_free == pool.n_pages


@pytest.mark.parametrize("name", ["gemma3", "llama4", "starcoder2"])
def test_drop_takes_less_memory_and_gives_the_same_tokens(folders: dict[str, Path], name: str) -> None:
    ids = some_ids(700).tolist()
    with loaded(folders[name], "keep") as kept, loaded(folders[name], "drop") as dropped:
        assert (kept.window_kv, dropped.window_kv) == ("keep", "drop")
        first, second = answer(kept, ids, 90), answer(dropped, ids, 90)
        assert first.token_ids == second.token_ids
        assert kept.kv_usage.n_dropped == 0 < dropped.kv_usage.n_dropped
        assert dropped.kv_usage.used_bytes < 0.6 * kept.kv_usage.used_bytes
        assert dropped.kv_usage.n_pages < kept.kv_usage.n_pages, "four texts of the full context need less"
        assert len(second.sequence.pages) == len(first.sequence.pages) == pages_for(789)


def test_pressure_drops_before_it_evicts_or_preempts(folders: dict[str, Path]) -> None:
    whole = load(folders["gemma3"], kv=DType.F16).pool.page_bytes
    prompts = [some_ids(300, seed).tolist() for seed in range(3)]
    with loaded(folders["gemma3"], "keep") as alone:
        expected = [answer(alone, ids, 40).token_ids for ids in prompts]
    with loaded(folders["gemma3"], "keep", kv_memory=26 * whole, context=400) as model:  # two of them, whole
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        running = [model.generate(ids, params) for ids in prompts]
        for generation, tokens in zip(running, expected, strict=True):
            generation.text()
            assert generation.token_ids == tokens
        assert sum(generation._request.n_preempted for generation in running) == 0
        assert model.kv_usage.n_evicted == 0 < model.kv_usage.n_dropped


@pytest.mark.parametrize(("name", "window_kv"), [("gemma3", "keep"), ("cohere2", "drop")])
def test_requests_of_a_tight_pool(folders: dict[str, Path], tmp_path: Path, name: str, window_kv: Any) -> None:
    """Requests with common prefixes run together, end early, are preempted, and go to disk and back."""
    wanted = wishes(12, 3, longest=330)
    with Model.load(folders[name], threads=1, context=400) as clean:
        alone = [wish.alone(clean) for wish in wanted]
        n_bytes = 16 * clean._runner.pool.page_bytes
    with Workspace(tmp_path) as workspace:
        model = workspace.load(folders[name], name="m", threads=1, context=400, kv_memory=n_bytes, window_kv=window_kv)
        rng = random.Random(1)
        for _ in range(2):
            running = [wish.begin(model) for wish in wanted]
            gone = set(rng.sample(range(len(wanted)), 3))
            for i in gone:
                next(running[i])
                running[i].cancel()
            for i, generation in enumerate(running):
                if i not in gone:
                    assert list(generation) == alone[i]
        del running, generation
        assert model._runner.pool.n_dropped_ever > 0
        assert settled(model)
        model._runner.pool.check([], [])


def test_a_prefix_counts_only_where_its_windows_are_there(folders: dict[str, Path]) -> None:
    ids = some_ids(600).tolist()
    with loaded(folders["gemma3"], "drop") as model:
        answer(model, ids)
        # At 256 tokens the windows are gone; at the end they are there, and so they are after it.
        middle, end = [*ids[:256], *some_ids(40, 5).tolist()], [*ids, *some_ids(40, 6).tolist()]
        found = answer(model, middle)
        assert found.timings.reused_tokens == 0
        assert answer(model, end).timings.reused_tokens == 576
        assert answer(model, [*middle[:288], 9, 9]).timings.reused_tokens == 288, "they are there again"
        got = found.token_ids
    with loaded(folders["gemma3"], "keep") as model:
        answer(model, ids)
        kept = answer(model, middle)
        assert kept.timings.reused_tokens == 256 and kept.token_ids == got


def test_a_rollback_into_the_past_recomputes_and_says_so(folders: dict[str, Path]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
    found = {}
    for window_kv in ("keep", "drop"):
        with loaded(folders["gemma3"], window_kv) as model:
            session = model.session()
            first = session.tell(prompt="in the west", params=params)
            first.text()
            second = session.tell(prompt=" and then", params=params)
            second.text()
            # To the end of a turn: its own page table has the windows.
            session.rollback(1)
            again = session.tell(prompt=" and then", params=params)
            again.text()
            assert again.turn is not None and second.turn is not None and first.turn is not None
            assert again.turn.token_ids == second.turn.token_ids and again.turn.recomputed == 0
            # Into the middle of one: only the turn before it has what is needed.
            session.rollback(1)
            inside = session.fork_at(second.turn, 40, 7)
            inside.text()
            assert inside.turn is not None
            found[window_kv] = inside.turn
    kept, dropped = found["keep"], found["drop"]
    assert kept.token_ids == dropped.token_ids
    assert kept.recomputed == 0 == len(kept.why_recomputed)
    assert 0 < dropped.recomputed == kept.reused - dropped.reused
    assert "windowed layers was dropped" in dropped.why_recomputed


def test_pages_on_disk_with_and_without_their_windowed_part(folders: dict[str, Path], tmp_path: Path) -> None:
    ids = some_ids(600).tolist()
    with Workspace(tmp_path) as workspace:
        options = {"name": "m", "threads": 1, "window_kv": "drop"}
        model = workspace.load(folders["gemma3"], **options)
        before = answer(model, ids)
        workspace.unload("m")
        model = workspace.load(folders["gemma3"], **options)
        after = answer(model, ids)
        assert after.timings.reused_tokens == 576 and after.token_ids == before.token_ids
        usage = model.kv_usage
        assert usage.n_dropped > 0 and usage.n_spilled == 600 // PAGE_POSITIONS
        cut = answer(model, [*ids[:256], 9, 9])
        assert cut.timings.reused_tokens == 0, "without windows there is nothing to go on from"
        workspace.unload("m")
        model = workspace.load(folders["gemma3"], **options)
        assert answer(model, [*ids[:256], 9, 9]).timings.reused_tokens == 256
        pool = model._runner.pool
        model.clear_cache()
        assert pool.n_bytes == 0


def test_export_and_import_with_dropped_windows(folders: dict[str, Path], tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
    with Workspace(tmp_path, spill_bytes=0) as workspace:
        model = workspace.load(folders["gemma3"], name="m", threads=1, window_kv="drop")
        session = workspace.session("a")
        for text in ("in the west", " and then"):
            session.tell(prompt=text, params=params).text()
        exported = session.export(kv=tmp_path / "kv")
        expected = session.tell(prompt=" so", params=params)
        expected.text()
        workspace.delete("a")
        model.clear_cache()
        assert model._runner.pool.n_bytes == 0
        carried = workspace.import_(exported, kv=tmp_path / "kv")
        again = carried.tell(prompt=" so", params=params)
        again.text()
        assert again.turn is not None and expected.turn is not None
        assert again.turn.token_ids == expected.turn.token_ids
        assert again.turn.recomputed < PAGE_POSITIONS, "only what full pages do not have"
        # The end of the first turn has its windows, too.
        carried.rollback(1)
        other = carried.tell(prompt=" or", params=params)
        other.text()
        assert other.turn is not None and other.turn.recomputed < PAGE_POSITIONS
        workspace.delete(carried.id)
        model.clear_cache()
        assert model._runner.pool.n_bytes == 0


def test_a_gpu_refuses_to_drop(folders: dict[str, Path]) -> None:
    """Its pages are allocated at once. Before anything is packed, so this needs no GPU."""
    placement = SimpleNamespace(n_devices=1, is_cpu=False, products="own", choose=lambda _: SimpleNamespace(members=()))
    checkpoint = open_checkpoint(folders["gemma3"])
    options: dict[str, Any] = {"weights": DType.F32, "kv": (DType.F16, DType.F16), "n_threads": 1}
    with pytest.raises(Unsupported, match='window_kv="drop" needs the CPU'):
        Runner(checkpoint, **options, placement=placement, drops_windowed=True)
    checkpoint.close()


def test_inspect_knows_both_sizes(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = open_checkpoint(folders["gemma3"])
    found = describe(checkpoint)["kv_bytes_of_context"]["f16"]
    checkpoint.close()
    with loaded(folders["gemma3"], "keep") as kept, loaded(folders["gemma3"], "drop") as dropped:
        for model, name in ((kept, "keep"), (dropped, "drop")):
            usage = model.kv_usage
            assert usage.n_pages == -(-4 * found[name] // usage.page_bytes), "four texts of the full context"
    assert found["drop"] < found["keep"]
    cli.main(["inspect", str(folders["gemma3"])], standalone_mode=False)
    assert "without dead windows" in capsys.readouterr().out


def test_bad_values(folders: dict[str, Path]) -> None:
    with pytest.raises(InvalidArgument, match="window_kv is 'all', must be one of keep, drop"):
        Model.load(folders["gemma3"], window_kv="all")  # type: ignore[arg-type]
