"""`fabula bench`: what it times, what it refuses, and what it prints."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benching import MACHINE, call, rows_of
from decoder_families import CASES, make_talking_model
from fabula import _native, _operators
from fabula.bench import library, peers
from fabula.bench import model as bench_model_module
from fabula.bench.machine import Machine, cpu_name
from fabula.bench.model import Lengths, Run, agreement, bench_models, limits, prompt_ids
from fabula.bench.neighbors import neighbors
from fabula.bench.ops import bench_ops, difference
from fabula.bench.row import KEYS as ROW_KEYS
from fabula.bench.row import Row, read_rows
from fabula.bench.status import silent
from fabula.bench.timing import Times, interleaved, measure, turns
from fabula.bench.worker import Worker, memory_bytes
from fabula.choices import ISA_NAMES
from fabula.engine.sampling import SamplingParams
from fabula.errors import EngineError, InvalidArgument, Unsupported
from fabula.model import Model
from waiting import run_program

# ---- Timing --------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that moves only when a function says how long it took."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def task(self, name: str, *seconds: float) -> Callable[[], None]:
        """A function whose calls take these times in turn, the last for ever."""
        left = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_measure_counts_after_the_warmup() -> None:
    clock = Clock()
    times = measure(clock.task("a", 100.0, 1.0, 2.0, 6.0), warmup=1, repeats=3, clock=clock)
    assert times == Times(mean=3.0, median=2.0, n=3)


def test_measure_goes_on_until_the_time_is_over() -> None:
    clock = Clock()
    assert measure(clock.task("a", 0.5), warmup=2, repeats=2, min_seconds=4.0, clock=clock).n == 8
    assert len(clock.calls) == 10


def test_interleaved_takes_turns() -> None:
    clock = Clock()
    tasks = {"a": clock.task("a", 1.0), "b": clock.task("b", 9.0, 2.0, 4.0), "c": clock.task("c", 3.0)}
    times = interleaved(tasks, 3, clock=clock)
    assert "".join(clock.calls) == "abc" + "abc" + "bca" + "cab"
    assert times["a"] == Times(1.0, 1.0, 3)
    assert times["b"] == Times(mean=10.0 / 3, median=4.0, n=3)
    assert list(turns([1, 2], 3)) == [1, 2, 2, 1, 1, 2]


def test_no_repeats_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="repeats is 0"):
        measure(lambda: None, repeats=0)
    with pytest.raises(InvalidArgument, match="rounds is 0"):
        interleaved({"a": lambda: None}, 0)


# ---- Machine -------------------------------------------------------------------------------------------------------


def test_machine(tmp_path: Path) -> None:
    machine = Machine.measure(1, read_bytes=1 << 20, repeats=3)
    assert machine.read_bytes_per_s > 0 and machine.flops_per_s > 0
    assert machine.to_json()["isa"] == _native.isa_best()
    assert "GB/s" in str(machine)
    (tmp_path / "cpuinfo").write_text("flags\t: a b\nmodel name\t: Quick 9000\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Quick 9000"
    assert cpu_name(tmp_path / "absent")


@pytest.mark.heavy
def test_forced_instruction_set() -> None:
    best = _native.isa_best()
    rows = rows_of(call("--isa", "reference", "ops", "--quick", "--json", "--threads", "1"))
    assert {row["machine"]["isa"] for row in rows} == {"reference"}
    assert _native.isa_best() == best  # only during the command
    refused = call("--isa", "reference", "load")
    assert refused.exit_code == 2 and "--isa does not apply to load" in refused.output
    missing = next(isa for isa in ISA_NAMES if not _native.isa_available(isa))
    with pytest.raises(Unsupported, match=f"isa is '{missing}', which this CPU lacks; it has reference"):
        call("--isa", missing, "ops", "--quick")


# ---- Operators -----------------------------------------------------------------------------------------------------

OPERATORS = ["rms_norm", "gather", "masked_softmax", "swiglu"]
OPERATORS += ["matmul_transb"] * 3 + ["rope", "self_attention"]


def test_ops_json() -> None:
    rows = rows_of(call("ops", "--quick", "--json", "--threads", "2"))
    assert [row["op"] for row in rows] == OPERATORS
    assert [row["weights"] for row in rows if row["op"] == "matmul_transb"] == ["f32", "f16", "bf16"]
    for row in rows:
        assert row["case"] == f"{row['op']} {row['size']}" and row["threads"] == row["machine"]["threads"] == 2
        assert row["peer_name"] == "serial C" and row["model"] is row["kv"] is None
        assert row["ratio"] == pytest.approx(row["serial_median"] / row["median"])
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"]) and row["ours"] == row["speed"]
        assert row["ours"] > 0 and row["mean"] > 0 and row["n"] >= 5
        for name in ("ours", "peer"):
            low, high = row[f"{name}_spread"]
            assert low <= row[name] * (1 + 1e-9) and row[name] <= high * (1 + 1e-9)
        assert row["limit_share"] == pytest.approx(row["ours"] / row["limit"])
        assert 0 <= row["difference"] <= row["tolerance"]
        is_compute = row["op"] in ("matmul_transb", "self_attention")
        assert row["unit"] == ("GFLOP/s" if is_compute else "GB/s")
        per_byte = row["gop_per_s"] / row["ours"] if not is_compute else row["operations_per_byte"]
        assert row["operations_per_byte"] == pytest.approx(per_byte)
    sparse, dense = (next(r for r in rows if r["op"] == op) for op in ("gather", "matmul_transb"))
    assert sparse["operations_per_byte"] == 0 and dense["operations_per_byte"] > 10


def test_ops_table() -> None:
    result = call("ops", "--quick", "--threads", "1")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in OPERATORS)


@pytest.mark.parametrize(
    "operator", ["rms_norm", "gather", "masked_softmax", "swiglu", "linear", "rope", "self_attention"]
)
def test_a_broken_operator_is_found(monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    right = getattr(_operators, operator)

    def wrong(*arguments: Any) -> Any:
        out = right(*arguments)
        out.reshape(-1)[-1] += 0.01 * np.abs(out).max()
        return out

    monkeypatch.setattr(_operators, operator, wrong)
    with pytest.raises(EngineError, match="differs from the serial loop"):
        bench_ops(MACHINE, quick=True, min_seconds=0.0)


def test_the_measuring_library_is_of_the_same_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI_VERSION", library.ABI_VERSION + 1)
    with pytest.raises(ImportError, match=r"libfabula_bench\.so has ABI .* build Fabula again"):
        library._open()


def test_only_benchmarks_load_the_measuring_library() -> None:
    code = (
        "import sys, fabula._operators, fabula.cli, fabula.model, fabula.ops, fabula.server.app, fabula.workspace\n"
        "print([m in sys.modules for m in ('fabula._ffi', 'fabula.bench.library', 'fabula._cdef_bench')])"
    )
    done = run_program([sys.executable, "-c", code])
    assert done.stdout.strip() == "[True, False, False]", done.stderr


def test_an_operator_that_gives_nan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_operators, "swiglu", lambda *arguments: np.full_like(arguments[0], np.nan))
    with pytest.raises(EngineError, match="swiglu"):
        bench_ops(MACHINE, quick=True, min_seconds=0.0)


def test_difference_is_measured_row_by_row() -> None:
    expected = np.array([[100.0, 1.0], [0.01, 0.0]], np.float32)
    found = expected + np.array([[0.0, 0.1], [0.0, 0.001]], np.float32)
    assert difference(found, expected) == pytest.approx(0.1, rel=1e-4)
    assert difference(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32)) == 0


# ---- Models --------------------------------------------------------------------------------------------------------


def test_model_json(tiny_folder: Path) -> None:
    sizes = ["--prompt-tokens", "40", "--tokens", "5", "--rounds", "2", "--threads", "1"]
    rows = rows_of(call("model", "--model", str(tiny_folder), "--weights", "f32", "--weights", "f16", *sizes, "--json"))
    assert [(row["case"], row["weights"]) for row in rows] == [
        ("prefill", "f32"), ("prefill", "f16"), ("decode", "f32"), ("decode", "f16"),
    ]  # fmt: skip
    for row in rows:
        assert (
            row["agreement"] is None
            and row["ours"] > 0
            and row["limit"] > 0
            and row["unit"] == "tokens/s"
            and row["kv"] == "f16"
        )
        assert row["limit_share"] == pytest.approx(row["ours"] / row["limit"])
        assert row["peer"] is row["ratio"] is row["peer_name"] is None
        peak = "read_bytes_per_s" if row["case"] == "decode" else "flops_per_s"
        per_unit = row["operations_per_byte"] if row["case"] == "decode" else 1
        assert row["limit_share"] == pytest.approx(1e9 * row["gop_per_s"] / (row["machine"][peak] * per_unit))


def test_model_table(tiny_folder: Path) -> None:
    result = call("model", "--model", str(tiny_folder), "--prompt-tokens", "9", "--tokens", "2", "--rounds", "1")
    assert result.exit_code == 0
    assert "prefill" in result.stdout and "decode" in result.stdout


class Slow:
    """An engine that needs 2 s for a prompt and half a second a token."""

    name = "slow"

    def __init__(self) -> None:
        self.settings = {"prefill": "p", "decode": "d", "together": "t"}
        self.closed = False

    def run(self, prompt: Sequence[int], n_tokens: int) -> Run:
        return Run(2.0, 0.5 * (n_tokens - 1), tuple(range(n_tokens)) if prompt else ())

    def together(self, prompts: Sequence[Sequence[int]], shared: int, n_tokens: int) -> float:
        assert all(list(prompt[:shared]) == list(prompts[0][:shared]) for prompt in prompts)
        assert len({tuple(prompt) for prompt in prompts}) == len(prompts) and n_tokens > 0
        return 8.0

    def close(self) -> None:
        self.closed = True


def test_model_beside_a_peer(tiny_folder: Path) -> None:
    slow = Slow()
    with Model.load(tiny_folder, weights="f32", threads=1) as model:
        rows = bench_models([model], MACHINE, Lengths(40, 6, 3), make_peers=lambda *_: [slow])
        bounds = limits(model, MACHINE, 40)
        matrices = 2 * (24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 40)
        head = model.config.vocab_size * 24
        assert bounds["prefill"] == pytest.approx(1e11 / (2 * (matrices + head / 40)))
        # Packed rows are rounded up to two panels of 16.
        assert 1e10 / (4 * (matrices + head)) * 0.7 < bounds["decode"] <= 1e10 / (4 * (matrices + head))
    prefill, decode = rows
    assert slow.closed
    assert (prefill.case, prefill.peer, prefill.peer_settings) == ("prefill", 20.0, "p")
    assert (decode.case, decode.peer, decode.peer_settings) == ("decode", 2.0, "d")
    assert decode.ratio == pytest.approx(decode.ours / 2.0)
    assert prefill.rounds == 3


def test_each_token_is_a_step(smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other engines compute a token a step; a text that repeats would be faster here than it is."""
    begun: list[Any] = []
    real = bench_model_module.Generation

    def recorded(*args: Any, **options: Any) -> Any:
        begun.append(real(*args, **options))
        return begun[-1]

    monkeypatch.setattr(bench_model_module, "Generation", recorded)
    with Model.load(smollm2_gguf, fetch=False) as model:
        prompt = [*prompt_ids(model, 20), *([model.tokenizer.encode(" so", add_bos=False)[0]] * 40)]
        with model.generate(prompt, SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)) as usual:
            usual.text()
        measured = bench_model_module.Fabula(model).run(prompt, 60)
        bench_model_module.Fabula(model).together([prompt, prompt], 0, 40)
    assert usual.timings.drafted > 20 and tuple(usual.token_ids) == measured.tokens
    assert [generation.timings.drafted for generation in begun] == [0] * 5


def test_sequences_together(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, weights="f32", threads=1) as model:
        rows = bench_models([model], MACHINE, Lengths(40, 100, 3, 3, 30), make_peers=lambda *_: [Slow()])
        alone, shared = limits(model, MACHINE, 40, 3), limits(model, MACHINE, 40, 3, 30)
        assert limits(model, MACHINE, 40)["decode"] < alone["together"] < shared["together"]
    (row,) = rows
    assert (row.case, row.tokens, row.rounds) == ("together", 300, 3)
    assert row.peer == pytest.approx(8.0) and row.ratio == pytest.approx(row.ours / 8.0)
    assert row.ours_spread[0] <= row.ours <= row.ours_spread[1]
    with pytest.raises(InvalidArgument, match="shared is 40"):
        Lengths(40, shared=40)


def test_a_peer_without_llama_cpp_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    from fabula.bench.peer_llama_cpp import LlamaCpp

    with pytest.raises(Unsupported, match="cannot be run"):
        LlamaCpp(tmp_path / "a", threads=1, kv="f16", n_positions=8, python=str(tmp_path / "absent"))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(Unsupported, match="is llama_cpp installed"):
        LlamaCpp(tmp_path / "a", threads=1, kv="f16", n_positions=8, python=str(python))
    assert call("model", "--model", str(tiny_folder), "--peer-python", str(python)).exit_code == 2


def test_model_beyond_the_context(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, context=100) as model, pytest.raises(InvalidArgument, match="takes 141 positions"):
        bench_models([model], MACHINE, Lengths(100, 40, 1))
    with pytest.raises(InvalidArgument, match="rounds is 0"):
        Lengths(rounds=0)


def test_prompt_and_agreement(tiny_folder: Path) -> None:
    with Model.load(tiny_folder) as model:
        assert [len(prompt_ids(model, n)) for n in (1, 32, 1000)] == [1, 32, 1000]
        assert prompt_ids(model, 1000)[:32] == prompt_ids(model, 32)
    assert agreement([1, 2, 3], [1, 2, 4]) == 2
    assert agreement([1, 2, 3], [1, 2, 3]) == 3


def test_missing_peers_are_told(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    with Model.load(tiny_folder) as model:
        assert peers.make_peers(model, 100, told.append) == []
    assert len(told) == 2 and all("pip install llama-cpp-python" in line for line in told)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_transformers_on_the_same_weights(tiny_folder: Path, tmp_path: Path, family: str) -> None:
    pytest.importorskip("transformers")
    folder = tiny_folder if family == "llama" else make_talking_model(CASES[family], tmp_path / family)
    told: list[str] = []
    with Model.load(folder, weights="f32", kv="f32", threads=1) as model:
        found = peers.make_peers(model, 100, told.append)
        assert [peer.name for peer in found] == ["transformers"]
        assert any("llama.cpp is not measured" in line for line in told)  # missing, or no GGUF to start from
        prompt = prompt_ids(model, 32)
        theirs = found[0].run(prompt, 32).tokens
        assert theirs == bench_model_module.Fabula(model).run(prompt, 32).tokens
        found[0].close()


def test_what_transformers_cannot_load_is_told(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    told: list[str] = []
    with Model.load(tiny_folder, weights="q8_0") as model:
        assert peers.make_peers(model, 100, told.append) == []
        assert any("it computes in f32, f16, bf16, the weights are q8_0" in line for line in told)
    monkeypatch.setattr(transformers.models.llama.LlamaForCausalLM, "from_pretrained", lambda *_, **__: 1 / 0)
    with Model.load(tiny_folder) as model:
        assert peers.make_peers(model, 100, told.append) == []
    assert any("cannot load tiny: division by zero" in line for line in told)


@pytest.mark.parametrize("weights", ["auto", "q8_0"])
def test_llama_cpp_on_the_same_weights(smollm2_gguf: Path, weights: Any) -> None:
    python = os.environ.get("FABULA_PEER_PYTHON")
    if python is None:
        pytest.importorskip("llama_cpp")
    from fabula.bench.peer_llama_cpp import LlamaCpp

    with Model.load(smollm2_gguf, weights=weights, context=160, threads=1) as model:
        peer = LlamaCpp.of(model, 64, silent, n_sequences=2, python=python)
        prompt = prompt_ids(model, 32)
        theirs = peer.run(prompt, 16)
        assert theirs.prefill_s > 0 and theirs.decode_s > 0
        # Products are summed in another precision there: the first words must agree, not all.
        assert agreement(bench_model_module.Fabula(model).run(prompt, 16).tokens, theirs.tokens) >= 4
        assert peer.run(prompt, 16).tokens == theirs.tokens
        assert peer.together([prompt, [*prompt[:20], *prompt[:12]]], 20, 4) > 0
        assert "threads" in peer.settings["together"]
        peer.close()
        peer.close()


# ---- Rows ----------------------------------------------------------------------------------------------------------


def test_a_ratio_above_one_is_better() -> None:
    fast = Row(case="a", unit="tokens/s", ours=20.0, peer=10.0, limit=40.0)
    assert (fast.ratio, fast.limit_share) == (2.0, 0.5)
    slow = Row(case="b", unit="ms", ours=20.0, peer=10.0, limit=5.0, more={"depth": 3})
    assert (slow.ratio, slow.limit_share) == (0.5, 0.25)
    assert list(slow.to_json()) == [*ROW_KEYS, "depth"]
    assert Row(case="c", unit="ms", ours=None, peer=10.0).ratio is None


def test_a_file_of_rows_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(Row(case="a", unit="ms", ours=1.0).to_json())
    path.write_text(f"{good}\n\n{good}\n")
    assert len(read_rows(path)) == 2
    bad = {
        "line 1 .* not an object": "[1]",
        "line 1 is not what": "{",
        "limit_share missing": good.replace("limit_share", "limit_"),
        "ours is not a number": good.replace("1.0", '"fast"'),
        "peer is not a number": good.replace('"peer": null', '"peer": NaN'),
        "limit is not a number": good.replace('"limit": null', '"limit": -1'),
        "unit is not a string": good.replace('"ms"', "3"),
        "machine is not an object": good[:-1] + ', "machine": 3}',
        "flops_per_s is not a number": good[:-1] + ', "machine": {"flops_per_s": "many"}}',
        "holds no rows": "\n",
    }
    for message, line in bad.items():
        path.write_text(line)
        with pytest.raises(InvalidArgument, match=message):
            read_rows(path)
    path.write_bytes(b"\xff")
    with pytest.raises(InvalidArgument, match="UTF-8"):
        read_rows(path)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        read_rows(tmp_path / "absent")


# ---- Workers -------------------------------------------------------------------------------------------------------


def test_a_worker_that_says_something_else() -> None:
    worker = Worker("echo", ["/bin/sh", "-c", 'read line; echo hello; read line; echo \'{"error": "no room"}\''])
    with pytest.raises(EngineError, match="printed 'hello'"):
        worker.ask("anything")
    with pytest.raises(EngineError, match="echo: no room"):
        worker.ask("anything")
    worker.close()
    worker.close()
    with pytest.raises(EngineError, match="has ended"):
        worker.ask("anything")
    with pytest.raises(Unsupported, match="cannot be run: No such file"):
        Worker("x", ["/nowhere/python"])


def test_memory_of_a_process() -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs Linux")
    now, most = memory_bytes(os.getpid()), memory_bytes(os.getpid(), "VmHWM")
    assert now and most and 1 << 20 < now <= most
    assert memory_bytes(1 << 30) is None


# ---- Help ----------------------------------------------------------------------------------------------------------


def test_help_shows_examples() -> None:
    for command in ([], ["ops"], ["model"], ["sessions"], ["serve"], ["load"], ["perplexity"], ["plot"]):
        assert "Examples:\n" in call(*command, "--help").stdout


def test_busy_neighbors_end_with_the_measurement(tiny_folder: Path) -> None:
    few = ("--prompt-tokens", "9", "--tokens", "2", "--rounds", "1")
    rows = rows_of(call("model", "--model", str(tiny_folder), *few, "--neighbors", "2", "--json"))
    assert [row["case"] for row in rows] == ["prefill", "decode"]
    with neighbors(2) as busy:
        assert [process.poll() for process in busy] == [None, None]
    assert [process.poll() for process in busy] == [-signal.SIGKILL] * 2
    assert call("model", "--neighbours", "-1").exit_code == 2
