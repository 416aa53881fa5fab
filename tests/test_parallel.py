"""One model on several GPUs, emulated or real: numbers, the laws of sessions, what is refused.

Emulated GPUs are four, the second of which has 1 MiB; so pairs with room for more begin with the third. Of real ones
two are enough for most.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from devices import GREEDY, PROMPT, RANDOM
from fabula import (
    DeviceError,
    DeviceOutOfMemory,
    InvalidArgument,
    Model,
    NonFinite,
    SamplingParams,
    StoreError,
    Unsupported,
    Workspace,
    _native,
    _program,
)
from fabula._native import kv_layers
from fabula._parallel import DeviceGroup
from fabula.cli.main import run
from fabula.models.builder import DamagedWeightWarning
from fabula.server.settings import Settings, from_text


def n_gpus() -> int:
    try:
        return _native.device_count()
    except (Unsupported, DeviceError):
        return 0


IS_EMULATED = n_gpus() > 0 and _native.device_info(0).is_emulated
FIRST = 2 if IS_EMULATED else 0  # of two with room
need = {n: [pytest.mark.gpu, pytest.mark.skipif(n_gpus() < n, reason=f"there are not {n} GPUs")] for n in (2, 4)}


def of(n: int, *values: Any, name: str | None = None) -> Any:
    """A case for n GPUs."""
    return pytest.param(n, *values, marks=need[n], id=name)


def with_marks(n: int) -> Any:
    def mark(test: Any) -> Any:
        for each in need[n]:
            test = each(test)
        return test

    return mark


def load(path: Path, n: int = 2, **options: Any) -> Model:
    device = "cuda" if n > 2 else f"cuda:{FIRST}"
    return Model.load(path, **{"device": device, "tensor_parallel": n, "threads": 1, "fetch": False} | options)


def apart(got: Any, wanted: Any) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def pair(tiny_folder: Path) -> Iterator[Model]:
    with load(tiny_folder, weights="f32", kv="f32") as model:
        yield model


@pytest.fixture(scope="module")
def single(tiny_folder: Path) -> Iterator[Model]:
    with load(tiny_folder, 1, weights="f32", kv="f32") as model:
        yield model


# ---- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, -1, 17, 2.0, True, "2", None])
def test_what_is_no_number_of_gpus(tiny_folder: Path, n: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"tensor_parallel is .*, must be a whole number in 1 \.\. 16"):
        Model.load(tiny_folder, tensor_parallel=n)


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_only_gpus_compute_together(tiny_folder: Path, device: str) -> None:
    with pytest.raises(InvalidArgument, match=f"tensor_parallel is 2 and device {device}: several GPUs need"):
        Model.load(tiny_folder, device=device, tensor_parallel=2)
    with pytest.raises(InvalidArgument, match="several GPUs need"):
        Settings(device=device, tensor_parallel=2)
    with Model.load(tiny_folder, device="cpu", tensor_parallel=1, threads=1) as model:
        assert model.device == "cpu"


def test_the_servers_setting() -> None:
    settings = Settings(device="cuda", tensor_parallel=from_text("tensor_parallel", "4"))
    assert settings.tensor_parallel == 4 and Settings().tensor_parallel == 1
    with pytest.raises(InvalidArgument, match="tensor_parallel"):
        Settings(device="cuda", tensor_parallel=17)


def test_the_command_line(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(["story", "--once", "--model", str(tiny_folder), "--tensor-parallel", "2", "word"])
    said = capsys.readouterr()
    assert end.value.code == 1 and "several GPUs need device cuda" in said.err.replace("\n", " ")


@with_marks(2)
def test_more_gpus_than_there_are(tiny_folder: Path) -> None:
    n = n_gpus()
    with pytest.raises(
        InvalidArgument, match=f"device cuda:{n - 1}, tensor_parallel 2: there is no device {n}: .*take"
    ):
        Model.load(tiny_folder, device=f"cuda:{n - 1}", tensor_parallel=2)


@with_marks(2)
@pytest.mark.skipif(not IS_EMULATED, reason="NCCL is the emulated GPUs' only where a loader is told of it")
def test_without_nccl(tiny_folder: Path) -> None:
    program = (
        "import sys, fabula\n"
        "try:\n"
        "    fabula.Model.load(sys.argv[1], device='cuda:2', tensor_parallel=2)\n"
        "except fabula.Unsupported as error:\n"
        "    print(error)\n"
        "fabula.Model.load(sys.argv[1], device='cuda:2', threads=1).close()\n"
    )
    there = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_folder)], env=there, capture_output=True, text=True, check=True
    )
    assert "cuda:2, tensor_parallel 2: several GPUs for one model need the library NCCL: libnccl.so.2" in done.stdout


SHAPES: dict[str, tuple[int, dict[str, Any], str, str]] = {
    "heads": (4, {"num_attention_heads": 6}, "f32", "6 heads cannot be divided by 4"),
    "KV heads": (
        2,
        {"num_attention_heads": 6, "num_key_value_heads": 3},
        "f32",
        "3 KV heads are neither a multiple of 2 nor a divisor of it",
    ),
    "columns": (4, {"intermediate_size": 3}, "f32", "3 columns of down_proj in blocks of 1 are too few"),
    "blocks": (4, {"head_dim": 32, "intermediate_size": 96}, "q4_0", "96 columns of down_proj in blocks of 32 are too"),
    "heads in blocks": (
        2,
        {"head_dim": 16, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 64},
        "q8_0",
        "o_proj.weight' would be cut at columns 0 and 48, in blocks of 32",
    ),
}


@pytest.mark.parametrize(("n", "config", "weights", "message"), [of(*v, name=k) for k, v in SHAPES.items()])
def test_shapes_that_do_not_divide(
    tmp_path: Path, n: int, config: Mapping[str, Any], weights: str, message: str
) -> None:
    config = {**tiny.CONFIG, **config}
    folder = tiny.write_model(tmp_path / "tiny", config=config, tensors=tiny.random_tensors(config))
    with pytest.raises(InvalidArgument, match=f"tensor_parallel is {n}: .*{message}"):
        load(folder, n, weights=weights, context=64)


@with_marks(2)
def test_memory_that_one_of_them_has_not(tiny_folder: Path) -> None:
    with pytest.raises(DeviceOutOfMemory, match=r"device \d+ has no memory for .*: it needs"):
        load(tiny_folder, device_memory=20_000)
    with load(tiny_folder, context=256, device_memory=700_000) as model:
        device = model._runner.device
        assert isinstance(device, DeviceGroup) and model.tokenizer is not None
        wanted = model.generate(PROMPT, GREEDY).text()
        ids = model.tokenizer.encode("z" * 250)[:250]
        full = device.members[1]
        ballast = _native.PagePool(0, (full.memory()[1] - 20_000) // 8192, kv_layers(1, 1, 32), full)
        with pytest.raises(DeviceOutOfMemory, match="for a batch: it needs"):
            model.logits(ids)
        assert model.generate(PROMPT, GREEDY).text() == wanted
        ballast.close()
        assert model.logits(ids).shape == (250, model.config.vocab_size)


# ---- Numbers --------------------------------------------------------------------------------------------------------


QWEN = {"model_type": "qwen2", "head_dim": None, "hidden_size": 24}
LARGE = {
    "hidden_size": 256,
    "head_dim": 128,
    "intermediate_size": 768,
    "num_hidden_layers": 1,
}  # blocks of 256, three columns of them
CASES: dict[str, tuple[int, dict[str, Any], str]] = {
    "llama": (2, {}, "f32"),
    "tied, odd vocabulary": (2, {"tie_word_embeddings": True, "vocab_size": 131}, "f32"),
    "biases": (2, {"attention_bias": True, "mlp_bias": True}, "f32"),
    "f16": (2, {}, "f16"),
    "bf16": (2, {"intermediate_size": 41}, "bf16"),
    "one KV head": (2, {"num_key_value_heads": 1}, "f32"),
    "four GPUs, two KV heads": (4, {"tie_word_embeddings": True}, "f32"),
    "four GPUs, one KV head, biases": (4, {"num_key_value_heads": 1, "attention_bias": True}, "f32"),
    "mistral with a window": (2, {"model_type": "mistral", "sliding_window": 7}, "f32"),
    "qwen2": (2, QWEN, "f32"),
    "qwen3": (2, {"model_type": "qwen3"}, "f32"),
    "q8_0": (2, {"head_dim": 32, "hidden_size": 64, "intermediate_size": 96}, "q8_0"),
    "q4_k": (2, LARGE, "q4_k"),
    "q4_k_m": (2, LARGE | {"num_key_value_heads": 1}, "q4_k_m"),
}


def write(folder: Path, changes: Mapping[str, Any]) -> Path:
    """A tiny checkpoint with the tensors that its config needs."""
    config = {**tiny.CONFIG, **changes}
    sizes = config | {"head_dim": config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]}
    tensors, rng = tiny.random_tensors(sizes), np.random.default_rng(1)
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    biased = ["q_proj", "k_proj", "v_proj"] if config["model_type"] == "qwen2" else []
    biased += ["q_proj", "k_proj", "v_proj", "o_proj"] if config.get("attention_bias") else []
    biased += ["gate_proj", "up_proj", "down_proj"] if config.get("mlp_bias") else []
    for name in list(tensors):
        part = name.split(".")[-2]
        if part in biased:
            n = tensors[name].shape[0]
            tensors[name.replace(".weight", ".bias")] = rng.standard_normal(n).astype(np.float32)
        if part in ("q_proj", "k_proj") and config["model_type"] == "qwen3":
            norm = 1 + 0.3 * rng.standard_normal(sizes["head_dim"])
            tensors[name.replace("_proj", "_norm")] = norm.astype(np.float32)
    n_more = config["vocab_size"] - tiny.VOCAB
    return tiny.write_model(folder, config=changes, tensors=tensors, n_more_tokens=n_more)


@pytest.mark.parametrize(("n", "changes", "weights"), [of(*case, name=name) for name, case in CASES.items()])
def test_logits_are_those_of_one_gpu(tmp_path: Path, n: int, changes: Mapping[str, Any], weights: str) -> None:
    """But for rounding: products with a share of the columns are rounded before they are added up."""
    options: dict[str, Any] = {"weights": weights, "kv": "f32", "context": 64}
    folder = write(tmp_path / "tiny", changes)
    with load(folder, 1, **options) as one, load(folder, n, **options) as several:
        ids = one.tokenizer.encode(PROMPT)
        wanted, got = one.logits(ids), several.logits(ids)
        assert np.abs(wanted).max() > 0.1 and apart(got, wanted) <= 1e-5
        assert apart(several.embed([PROMPT]).vectors, one.embed([PROMPT]).vectors) <= 1e-5
        assert several.generate(PROMPT, GREEDY).text() == one.generate(PROMPT, GREEDY).text()
        assert np.array_equal(several.logits(ids), got)


@with_marks(2)
def test_progress_ends_where_it_was_said_to(tmp_path: Path) -> None:
    """A tied head is read twice."""
    told: list[tuple[int, int]] = []
    folder = write(tmp_path / "tiny", {"tie_word_embeddings": True})
    with load(folder, context=64, load_progress=lambda *numbers: told.append(numbers)):
        assert told[-1][0] == told[-1][1] and all(done <= total for done, total in told)


@with_marks(2)
def test_a_token_has_the_same_bits_in_every_batch(pair: Model) -> None:
    runner, ids = pair._runner, np.asarray(pair.tokenizer.encode(PROMPT), np.int32)
    wanted = pair.logits(ids.tolist())
    for piece in (1, 2, 11, len(ids)):
        with runner.sequence() as one, runner.sequence() as other:
            rows = []
            for start in range(0, len(ids), piece):
                part = ids[start : start + piece]
                rows.append(runner.step([(one, part), (other, part[::-1].copy())], np.arange(len(part))))
            assert np.array_equal(np.concatenate(rows), wanted)


@with_marks(2)
@pytest.mark.parametrize("params", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_answers(pair: Model, single: Model, params: SamplingParams) -> None:
    told = [[(p.token_id, p.logprob) for p in model.generate(PROMPT, params)] for model in (pair, single, pair)]
    assert told[0] == told[2]
    assert [token for token, _ in told[0]] == [token for token, _ in told[1]]
    assert [logprob for _, logprob in told[0]] == pytest.approx([logprob for _, logprob in told[1]], abs=1e-4)


@with_marks(2)
def test_damaged_weights(tmp_path: Path) -> None:
    """What only the second GPU has; it is warned of once."""
    tensors = tiny.random_tensors()
    tensors["lm_head.weight"][100, 3] = np.inf
    folder = tiny.write_model(tmp_path / "tiny", tensors=tensors)
    with pytest.warns(DamagedWeightWarning) as warned, load(folder, context=64) as model:
        assert len(warned) == 1
        for _ in range(2):
            with pytest.raises(NonFinite):
                model.logits(model.tokenizer.encode(PROMPT))


# ---- Sessions and pages ---------------------------------------------------------------------------------------------


@with_marks(2)
def test_it_says_where_it_is(pair: Model) -> None:
    assert pair.device == f"cuda:{FIRST}+{FIRST + 1}" and pair.device_name


@with_marks(2)
def test_a_page_is_laid_out_as_on_one_gpu(pair: Model, single: Model) -> None:
    """The first layer's keys and values have the same bits: no sum over GPUs comes before them."""
    pages, ids = [], np.asarray(pair.tokenizer.encode(PROMPT)[:20], np.int32)
    for model in (single, pair):
        native = model._runner.pool.native
        with model._runner.sequence() as sequence:
            native.zero(sequence.reserve(len(ids))[0])  # or what other tests left there would be compared
            model._runner.step([(sequence, ids)], [])
            pages.append(native.read(sequence.pages[0]).view(np.float32))
    assert pages[0].size == pages[1].size
    layers = [page.reshape(2, -1) for page in pages]
    assert np.array_equal(layers[0][0], layers[1][0]) and apart(layers[1][1], layers[0][1]) <= 1e-5


@pytest.mark.parametrize(("n", "n_kv_heads"), [of(2, 4), of(2, 1), of(4, 2), of(4, 4)])
def test_pages_move_as_a_whole(n: int, n_kv_heads: int) -> None:
    first = 0 if n > 2 else FIRST
    group = DeviceGroup([_native.Device(first + i) for i in range(n)])
    pool, cpu = (_native.PagePool((7, 2), 3, kv_layers(2, n_kv_heads, 10), on) for on in (group, None))
    assert pool.page_bytes == cpu.page_bytes
    raw = np.random.default_rng(n).integers(0, 256, pool.page_bytes).astype(np.uint8)
    pool.write(1, raw)
    pool.copy(2, 1)
    pool.zero(1)
    assert np.array_equal(pool.read(2), raw) and not pool.read(1).any() and not pool.read(0).any()
    for change in (lambda: pool.read(3), lambda: pool.copy(0, -1), lambda: pool.write(0, raw[1:])):
        with pytest.raises(InvalidArgument):
            change()


@with_marks(2)
def test_what_does_not_fit_a_group() -> None:
    devices = [_native.Device(FIRST + i) for i in range(2)]
    with pytest.raises(InvalidArgument, match=f"device {FIRST} is in the group twice"):
        DeviceGroup([devices[0], devices[0]])
    with pytest.raises(InvalidArgument, match="a group has 1 devices"):
        DeviceGroup(devices[:1])
    group = DeviceGroup(devices)
    with pytest.raises(InvalidArgument, match="a group itself"):
        DeviceGroup([devices[0], group])
    with pytest.raises(InvalidArgument, match="3 KV heads cannot be split over 2 devices"):
        _native.PagePool(0, 1, kv_layers(1, 3, 4), group)
    weight = _native.Weight(0, 16, 16)
    with pytest.raises(InvalidArgument, match="a weight must lie on one device"):
        weight.move(group)
    used, free = group.memory()
    assert used == 0 and free > 0


@with_marks(2)
def test_a_part_does_not_run_alone(pair: Model) -> None:
    part = pair._runner.program._parts[0]  # type: ignore[attr-defined]
    pool = _native.PagePool(0, 1, kv_layers(2, 1, 6), pair._runner.device.members[0])  # type: ignore[union-attr]
    share = _program.BatchSequence(np.zeros(1, np.int32), 0, np.ones(1, np.int32))
    with pytest.raises(InvalidArgument, match="only the joined program runs"):
        part.run(pool, [share], [])


@with_marks(2)
def test_a_session_is_walked(pair: Model) -> None:
    session = pair.session()
    for text in ("one", "two " * 30, "three"):
        session.say(text, RANDOM).text()
    told = [turn.token_ids for turn in session.path]
    middle = session.path[1]
    session.rollback(middle)
    session.say("three", RANDOM).text()
    assert [turn.token_ids for turn in session.path] == told
    fork = session.fork(middle)
    fork.say("three", RANDOM).text()
    assert fork.head.token_ids == told[2] and fork.head.reused > 0
    pair.clear_cache()
    fork.say("and then", RANDOM).text()
    session.say("and then", RANDOM).text()
    assert fork.head.token_ids == session.head.token_ids
    assert session.head.reused > 0


@with_marks(2)
def test_pages_leave_and_come_back(tiny_folder: Path, tmp_path: Path) -> None:
    """By disk and by file. With another number of GPUs a session continues, and recomputes its KV."""
    options: dict[str, Any] = {"name": "tiny", "threads": 1, "device": f"cuda:{FIRST}"}
    with Workspace(tmp_path / "data") as workspace:
        workspace.load(tiny_folder, tensor_parallel=2, **options)
        session = workspace.session("a")
        session.say("words " * 20, RANDOM).text()
        exported = session.export(kv=tmp_path / "kv.safetensors")
        session.say("more", RANDOM).text()
        (ids, reused) = session.head.token_ids, session.head.reused
        session.rollback(1)
        workspace.unload("tiny")
        workspace.load(tiny_folder, tensor_parallel=2, **options)
        session.say("more", RANDOM).text()
        assert session.head.token_ids == ids and session.head.reused >= reused // 32 * 32 > 0
        session.rollback(1)
        workspace.unload("tiny")
        workspace.load(tiny_folder, **options)
        session.say("more", RANDOM).text()
        assert len(session.head.token_ids) == len(ids) and session.head.reused == 0
        workspace.unload("tiny")
        workspace.load(tiny_folder, tensor_parallel=2, **options)
        workspace.delete("a")
        carried = workspace.import_(exported, kv=tmp_path / "kv.safetensors")
        carried.say("more", RANDOM).text()
        assert carried.head.token_ids == ids and carried.head.reused > 0
    with Workspace(tmp_path / "other") as workspace:
        workspace.load(tiny_folder, **options)
        with pytest.raises(StoreError, match="on another device"):
            workspace.import_(exported, kv=tmp_path / "kv.safetensors")
