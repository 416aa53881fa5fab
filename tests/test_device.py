"""Devices: names, messages on machines without a GPU, and a tiny model on a GPU, real or emulated.

FABULA_TEST_DEVICE=cuda lets the tests of sessions, schedulers and pages load their models there too; see conftest.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decoder_families import CASES, make_talking_model
from devices import GREEDY, PROMPT, RANDOM
from fabula import (
    DeviceError,
    DeviceOutOfMemory,
    EngineError,
    InvalidArgument,
    Model,
    OutOfMemory,
    SamplingParams,
    StoreError,
    Unsupported,
    Workspace,
    _native,
)
from fabula._native import kv_layers
from fabula.cli.main import run
from fabula.engine.device import Placement
from fabula.server.settings import Settings, from_text


def missing() -> type[EngineError] | None:
    """Why there is no GPU: the error that says so; None where there is one."""
    try:
        _native.device_count()
    except (Unsupported, DeviceError) as error:
        return type(error)
    return None


without = pytest.mark.skipif(missing() is None, reason="there is a GPU")


# ---- Names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:1000", " cpu", "", 3, None])
def test_what_is_no_device(tiny_folder: Path, name: Any) -> None:
    with pytest.raises(InvalidArgument, match="must be cpu, cuda, cuda:N"):
        Model.load(tiny_folder, device=name)
    if isinstance(name, str):
        with pytest.raises(InvalidArgument, match="device is"):
            Settings(device=name)


@pytest.mark.parametrize("name", ["", "cublas", "Own", None, 1])
def test_what_computes_no_products(tiny_folder: Path, name: Any) -> None:
    with pytest.raises(InvalidArgument, match="must be own or library"):
        Model.load(tiny_folder, device_products=name)
    if isinstance(name, str):
        with pytest.raises(InvalidArgument, match="device_products is"):
            Settings(device_products=name)


def test_the_servers_settings() -> None:
    settings = Settings(device=from_text("device", "cuda:1"), device_memory=from_text("device_memory", "1000"))
    assert (settings.device, settings.device_memory) == ("cuda:1", 1000)
    assert Settings().device == "cpu" and Settings().device_products == "own"
    with pytest.raises(InvalidArgument, match="device_memory"):
        Settings(device_memory=0)


def test_the_cpu_is_the_default(tiny_model: Model) -> None:
    if tiny_model.device == "cpu":
        with pytest.raises(Unsupported, match="have no graphs"):
            tiny_model._runner.program.set_graphs(True)
        with pytest.raises(Unsupported, match="have no graphs"):
            _ = tiny_model._runner.program.graphs
        assert tiny_model.device_name == "" and "device cpu" in repr(tiny_model)


def test_auto_passes_over_a_gpu_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Opened:
        def __init__(self, index: int, _memory: int | None) -> None:
            if index == 0:
                raise DeviceError("this build of Fabula has no code for it")
            self.index = index

        def memory(self) -> tuple[int, int]:
            return 0, 10_000

    monkeypatch.setattr(_native, "device_count", lambda: 2)
    monkeypatch.setattr(_native, "Device", Opened)
    assert getattr(Placement("auto").choose(9_000), "index", None) == 1
    assert Placement("auto").choose(11_000) is None
    with pytest.raises(DeviceError, match=r"device cuda: this build .* no code for it; take device cpu or auto"):
        Placement("cuda")


# ---- Without a GPU --------------------------------------------------------------------------------------------------


@without
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_asking_for_a_gpu_that_is_not_there(tiny_folder: Path, name: str) -> None:
    error = missing()
    assert error is not None
    text = "this build of Fabula has no CUDA" if error is Unsupported else "no NVIDIA driver|too old|finds no GPU"
    with pytest.raises(error, match=f"device {name}: ({text}).*take device cpu or auto") as caught:
        Model.load(tiny_folder / "is not looked for", device=name)
    assert caught.value.status in (3, 5)


@without
def test_auto_is_then_the_cpu(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, device="auto", threads=1) as model:
        assert model.device == "cpu"
        assert model.generate(PROMPT, GREEDY).text()


@without
def test_the_command_line_says_so(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(["story", "--once", "--model", str(tiny_folder), "--device", "cuda", "word"])
    said = capsys.readouterr()
    assert end.value.code == 1 and said.out == "" and "Traceback" not in said.err
    assert "take device cpu or auto" in said.err.replace("\n", " ")


def test_a_wrong_device_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(["chat", "--device", "gpu"])
    assert end.value.code == 2 and "cuda:N" in capsys.readouterr().err


# ---- With one -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_gpu(tiny_folder: Path) -> Iterator[Model]:
    with Model.load(tiny_folder, device="cuda", threads=1, weights="f32", kv="f32") as model:
        yield model


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("weights", "kv", "bound"),
    [("f32", "f32", 1e-5), ("f16", "f32", 1e-5), ("f32", "f16", 2e-3), ("f32", "q8", 2e-2), ("bf16", "bf16", 2e-2)],
)
def test_logits_are_those_of_the_cpu(tiny_folder: Path, weights: Any, kv: str, bound: float) -> None:
    """Bounds: order of sums; inputs, which the CPU rounds to bf16; keys and values between two numbers."""
    with (
        Model.load(tiny_folder, device="cpu", threads=1, weights=weights, kv=kv) as cpu,
        Model.load(tiny_folder, device="cuda", threads=1, weights=weights, kv=kv) as cuda,
    ):
        assert (cpu.device, cuda.device) == ("cpu", "cuda:0") and cuda.device_name
        ids = cpu.tokenizer.encode(PROMPT * 2)
        wanted, got = cpu.logits(ids), cuda.logits(ids)
        assert np.linalg.norm(got - wanted) <= bound * np.linalg.norm(wanted)
        a, b = cpu.embed([PROMPT]).vectors[0], cuda.embed([PROMPT]).vectors[0]
        assert float(a @ b) > 1 - bound


@pytest.mark.gpu
def test_a_token_has_the_same_bits_in_every_batch(on_gpu: Model) -> None:
    runner, ids = on_gpu._runner, np.asarray(on_gpu.tokenizer.encode(PROMPT), np.int32)
    wanted = on_gpu.logits(ids.tolist())
    for piece in (2, 11):
        with runner.sequence() as one, runner.sequence() as other:
            rows = []
            for start in range(0, len(ids), piece):
                part = ids[start : start + piece]
                found = runner.step([(one, part), (other, part[::-1].copy())], np.arange(len(part)))
                rows.append(found)
            assert np.array_equal(np.concatenate(rows), wanted)


@pytest.mark.gpu
def test_recorded_steps_give_the_same_bits(on_gpu: Model) -> None:
    """The answers of a batch and their pages, whether each step is one launch or many."""
    program, said = on_gpu._runner.program, []
    for is_on in (True, False):
        program.set_graphs(is_on)
        before = program.graphs
        on_gpu.clear_cache()
        answers = [on_gpu.generate(PROMPT[i:], params) for i in range(3) for params in (GREEDY, RANDOM)]
        said.append([[(piece.token_id, piece.logprob) for piece in answer] for answer in answers])
        after = program.graphs
        assert after.is_on == is_on and after.reason == ""
        assert (after.n_replayed > before.n_replayed) == is_on
    assert said[0] == said[1]
    program.set_graphs(True)


@pytest.mark.gpu
@pytest.mark.parametrize("params", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_answers_are_those_of_the_cpu(on_gpu: Model, tiny_folder: Path, params: SamplingParams) -> None:
    with Model.load(tiny_folder, device="cpu", threads=1, weights="f32", kv="f32") as cpu:
        wanted = cpu.generate(PROMPT, params)
        wanted.text()
    got = on_gpu.generate(PROMPT, params)
    got.text()
    assert got.token_ids == wanted.token_ids
    again = on_gpu.generate(PROMPT, params)
    again.text()
    assert again.token_ids == got.token_ids


DRAWS = {
    "greedy": SamplingParams(temperature=0.0),
    "plain": SamplingParams(temperature=1.3),
    "nucleus": SamplingParams(temperature=0.8, top_p=0.9, min_p=0.02),
    "top_k": SamplingParams(temperature=1.5, top_k=9, repetition_penalty=1.2, frequency_penalty=0.3),
    "typical": SamplingParams(typical_p=0.7, xtc_probability=0.5, presence_penalty=0.4, penalty_window=9),
    "greedy with bias": SamplingParams(temperature=0.0, logit_bias={7: 2.0, 3: -1.0}, banned_tokens=(9, 4)),
    "dry": SamplingParams(dry_multiplier=0.8, dry_allowed_length=1, dry_breakers=("a",)),
    "chain": SamplingParams(temperature=0.5, top_k=40, top_p=0.7, chain=("temperature", "top_p", "top_k", "penalties")),
}


@pytest.mark.gpu
@pytest.mark.parametrize("params", DRAWS.values(), ids=DRAWS)
def test_the_gpu_draws_what_the_cpu_draws_from_its_logits(
    on_gpu: Model, monkeypatch: pytest.MonkeyPatch, params: SamplingParams
) -> None:
    """A request with log-probabilities gets logits, from which the CPU samples; for others none are copied, not even in
    prefill steps."""
    params = replace(params, seed=5, max_tokens=40, ignore_eos=True)
    runner = on_gpu._runner
    wanted = list(on_gpu.generate(PROMPT, replace(params, n_logprobs=1)))
    assert all(len(piece.top_logprobs) == 1 for piece in wanted)

    def refuse(*_: Any) -> Any:
        raise AssertionError("a step whose logits are copied")

    monkeypatch.setattr(runner, "run", refuse)
    scratch = np.full(4 * runner.program.n_outputs, np.nan, np.float32)
    monkeypatch.setattr(runner.program, "_decode_logits", scratch)
    on_gpu.clear_cache()
    both = [on_gpu.generate(PROMPT, params), on_gpu.generate(PROMPT[:20], replace(params, max_tokens=9))]
    got = [list(generation) for generation in both]
    assert [piece.token_id for piece in got[0]] == [piece.token_id for piece in wanted] and len(got[1]) == 9
    for a, b in zip(got[0], wanted, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-6)
    assert np.isnan(scratch).all()


@pytest.mark.gpu
def test_a_prompt_is_read_beside_those_that_draw(on_gpu: Model) -> None:
    """An answer does not depend on the other requests of the batch."""
    params = [replace(RANDOM, seed=i, max_tokens=30, n_logprobs=i // 3) for i in range(4)]
    prompts = [PROMPT, PROMPT * 4, "words", PROMPT * 2]
    alone = [on_gpu.generate(prompt, p).text() for prompt, p in zip(prompts, params, strict=True)]
    on_gpu.clear_cache()
    together = [on_gpu.generate(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    assert [generation.text() for generation in together] == alone


@pytest.mark.gpu
def test_a_draw_without_any_token(on_gpu: Model) -> None:
    everything = tuple(range(on_gpu.config.vocab_size))
    with pytest.raises(InvalidArgument, match="every token is banned"):
        on_gpu.generate(PROMPT, replace(RANDOM, banned_tokens=everything)).text()
    last = replace(RANDOM, banned_tokens=everything[:-1], max_tokens=3)
    assert [piece.token_id for piece in on_gpu.generate(PROMPT, last)] == [everything[-1]] * 3


@pytest.mark.gpu
def test_a_session_is_walked_as_on_the_cpu(on_gpu: Model) -> None:
    session = on_gpu.session()
    for text in ("one", "two " * 30, "three"):
        session.say(text, RANDOM).text()
    told = [turn.token_ids for turn in session.path]
    middle = session.path[1]
    last = session.head
    session.rollback(middle)
    assert session.head is middle
    session.say("three", RANDOM).text()
    assert [turn.token_ids for turn in session.path] == told and session.head is not last
    fork = session.fork(middle)
    fork.say("three", RANDOM).text()
    assert fork.head.token_ids == told[2]
    on_gpu.clear_cache()
    fork.say("and then", RANDOM).text()
    session.say("and then", RANDOM).text()
    assert fork.head.token_ids == session.head.token_ids
    assert session.head.reused > 0


@pytest.mark.gpu
def test_pages_leave_and_come_back(tiny_folder: Path, tmp_path: Path) -> None:
    """By disk and by file; those of the CPU are not taken, as their numbers differ by rounding."""
    options: dict[str, Any] = {"name": "tiny", "threads": 1}
    with Workspace(tmp_path / "data") as workspace:
        workspace.load(tiny_folder, device="cuda", **options)
        session = workspace.session("a")
        session.say("words " * 20, RANDOM).text()
        exported = session.export(kv=tmp_path / "kv.safetensors")
        session.say("more", RANDOM).text()
        (ids, reused) = session.head.token_ids, session.head.reused
        session.rollback(1)
        workspace.unload("tiny")
        workspace.load(tiny_folder, device="cuda", **options)
        session.say("more", RANDOM).text()
        assert session.head.token_ids == ids and session.head.reused >= reused // 32 * 32 > 0
        workspace.delete("a")
        carried = workspace.import_(exported, kv=tmp_path / "kv.safetensors")
        carried.say("more", RANDOM).text()
        assert carried.head.token_ids == ids and carried.head.reused > 0
    with Workspace(tmp_path / "other") as workspace:
        workspace.load(tiny_folder, device="cpu", **options)
        with pytest.raises(StoreError, match="on another device"):
            workspace.import_(exported, kv=tmp_path / "kv.safetensors")


@pytest.mark.gpu
def test_memory_that_a_gpu_has_not(tiny_folder: Path) -> None:
    for options in ({"device_memory": 10_000}, {"device_memory": 400_000, "kv_memory": 1_000_000}):
        with pytest.raises(DeviceOutOfMemory, match=r"needs [0-9.]+ MiB, [0-9.]+ MiB are free of its budget;.* CPU"):
            Model.load(tiny_folder, device="cuda", threads=1, **options)
    assert issubclass(DeviceOutOfMemory, OutOfMemory)
    with Model.load(tiny_folder, device="cuda", threads=1, context=256, device_memory=700_000) as model:
        device = model._runner.device
        assert device is not None and 0 < device.memory()[0] <= 700_000
        used = device.memory()[0]
        wanted = model.generate(PROMPT, GREEDY).text()
        ids = model.tokenizer.encode("z" * 250)[:250]
        filler = _native.PagePool(0, 1, kv_layers(1, 1, 16), device)
        fill = (device.memory()[1] - 20_000) // filler.page_bytes
        ballast = _native.PagePool(0, fill, kv_layers(1, 1, 16), device)
        with pytest.raises(DeviceOutOfMemory, match="for a batch: it needs"):
            model.logits(ids)
        assert model.generate(PROMPT, GREEDY).text() == wanted
        ballast.close()
        filler.close()
        assert model.logits(ids).shape == (250, model.config.vocab_size)
        assert used <= device.memory()[0] <= 700_000


@pytest.mark.gpu
def test_a_library_of_products_that_is_missing(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABULA_CUBLASLT", "/nowhere/libcublasLt.so")
    for device in ("cuda", "auto"):
        with pytest.raises(Unsupported, match=r"device_products library: .*cuBLASLt.*device_products own"):
            Model.load(tiny_folder, device=device, device_products="library", threads=1)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["f16", "bf16"])
def test_long_prompts_by_a_library(tiny_folder: Path, weights: Any) -> None:
    """Short ones get the same bits as without it; and pages are not taken for those computed without it."""
    options: dict[str, Any] = {"device": "cuda", "threads": 1, "weights": weights, "kv": "f32"}
    try:
        model = Model.load(tiny_folder, device_products="library", **options)
    except Unsupported:
        pytest.skip("there is no cuBLASLt")
    with model, Model.load(tiny_folder, **options) as own:
        ids = (own.tokenizer.encode(PROMPT) * 12)[:150]
        wanted, got = own.logits(ids), model.logits(ids)
        assert 0.0 < np.linalg.norm(got - wanted) <= (2e-2 if weights == "bf16" else 2e-3) * np.linalg.norm(wanted)
        assert np.array_equal(own.logits(ids[:100]), model.logits(ids[:100]))
        assert model.fingerprint != own.fingerprint


@pytest.mark.gpu
def test_a_gpu_that_is_not_there_beside_one_that_is(tiny_folder: Path) -> None:
    n = _native.device_count()
    with pytest.raises(InvalidArgument, match=f"device cuda:{n + 1}: there is no device {n + 1}: this machine has {n}"):
        Model.load(tiny_folder, device=f"cuda:{n + 1}")


@pytest.mark.gpu
def test_auto_takes_a_gpu_with_room(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, device="auto", threads=1) as model:
        assert model.device == "cuda:0"
    with Model.load(tiny_folder, device="auto", device_memory=10_000, threads=1) as model:
        assert model.device == "cpu"
    if _native.device_count() > 1:
        with Model.load(tiny_folder, device="cuda:1", threads=1) as model:
            assert model.device == "cuda:1" and model.generate(PROMPT, GREEDY).text()


# ---- Families -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gemma2", "operator attention with a soft cap"),
        ("gemma3", "operator embed for layers whose heads differ"),
        ("gemma3n", "operator embed for layers whose rope differs"),
        ("gpt2", "operator embed for layers whose rope differs"),
        ("cohere", "operator layer_norm"),
        ("granite", "operator linear with a scale"),
    ],
)
def test_a_gpu_refuses_a_model_by_the_operator_it_lacks(tmp_path: Path, name: str, text: str) -> None:
    make_talking_model(CASES[name], tmp_path)
    with pytest.raises(Unsupported, match=f"the GPU has no {text}"):
        Model.load(tmp_path, device="cuda")
