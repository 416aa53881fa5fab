"""`fabula bench`: what it times, what it refuses, and what it prints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from fabula import _native
from fabula.bench import model as bench_model_module
from fabula.bench import peers
from fabula.bench.machine import Machine, cpu_name
from fabula.bench.model import Lengths, Run, agreement, bench_models, limits, prompt_ids
from fabula.bench.ops import bench_ops, difference
from fabula.bench.perplexity import perplexity, read_text
from fabula.bench.status import silent
from fabula.bench.timing import Times, interleaved, measure, turns
from fabula.cli.bench import bench
from fabula.errors import EngineError, InvalidArgument, Unsupported
from fabula.model import Model

MACHINE = Machine(cpu="x", isa="avx2", cores=2, threads=2, read_bytes_per_s=1e10, flops_per_s=1e11, dots_per_s=2e11)
LIGHTHOUSE = Path(__file__).parent / "data" / "lighthouse.txt"
TEXT = "the winter in the lighthouse was long, and all the others were on the shore. " * 30


def call(*arguments: str) -> Result:
    return CliRunner().invoke(bench, list(arguments), catch_exceptions=False)


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


# ---- Operators -----------------------------------------------------------------------------------------------------

OPERATORS = ["rms_norm", "gather", "masked_softmax", "swiglu"]
OPERATORS += ["matmul_transb"] * 3 + ["rope", "self_attention"]


def test_ops_json() -> None:
    result = call("ops", "--quick", "--json", "--threads", "2")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["machine"]["threads"] == 2
    rows = found["rows"]
    assert [row["op"] for row in rows] == OPERATORS
    assert [row["weights"] for row in rows if row["op"] == "matmul_transb"] == ["f32", "f16", "bf16"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["serial_median"] / row["median"])
        assert row["ratio"] > 0 and row["speed"] > 0 and row["mean"] > 0 and row["n"] >= 5
        assert row["share"] == pytest.approx(row["speed"] / row["limit"])
        assert 0 <= row["difference"] <= row["tolerance"]
        assert row["unit"] == ("GFLOP/s" if row["op"] in ("matmul_transb", "self_attention") else "GB/s")


def test_ops_table() -> None:
    result = call("ops", "--quick", "--threads", "1")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in OPERATORS)


@pytest.mark.parametrize(
    "operator", ["rms_norm", "gather", "masked_softmax", "swiglu", "linear", "rope", "self_attention"]
)
def test_a_broken_operator_is_found(monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    right = getattr(_native, operator)

    def wrong(*arguments: Any) -> Any:
        out = right(*arguments)
        out.reshape(-1)[-1] += 0.01 * np.abs(out).max()
        return out

    monkeypatch.setattr(_native, operator, wrong)
    with pytest.raises(EngineError, match="differs from the serial loop"):
        bench_ops(MACHINE, quick=True, min_seconds=0.0)


def test_an_operator_that_gives_nan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "swiglu", lambda *arguments: np.full_like(arguments[0], np.nan))
    with pytest.raises(EngineError, match="swiglu"):
        bench_ops(MACHINE, quick=True, min_seconds=0.0)


def test_difference_is_measured_row_by_row() -> None:
    expected = np.array([[100.0, 1.0], [0.01, 0.0]], np.float32)
    found = expected + np.array([[0.0, 0.1], [0.0, 0.001]], np.float32)
    assert difference(found, expected) == pytest.approx(0.1, rel=1e-4)
    assert difference(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32)) == 0


# ---- Models --------------------------------------------------------------------------------------------------------

KEYS = {"case", "model", "weights", "kv", "threads", "unit", "ours", "peer", "peer_name", "peer_settings", "ratio"}
KEYS |= {"limit", "limit_share", "agreement"}


def test_model_json(tiny_folder: Path) -> None:
    sizes = ["--prompt-tokens", "40", "--tokens", "5", "--rounds", "2", "--threads", "1"]
    result = call("model", "--model", str(tiny_folder), "--weights", "f32", "--weights", "f16", *sizes, "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["case"], row["weights"]) for row in rows] == [
        ("prefill", "f32"), ("prefill", "f16"), ("decode", "f32"), ("decode", "f16"),
    ]  # fmt: skip
    for row in rows:
        assert row.keys() >= KEYS
        assert row["ours"] > 0 and row["limit"] > 0 and row["unit"] == "tokens/s" and row["kv"] == "f16"
        assert row["limit_share"] == pytest.approx(row["ours"] / row["limit"])
        assert row["peer"] is row["ratio"] is row["peer_name"] is None


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
        # Packed rows are rounded up to panels of 16.
        assert 1e10 / (4 * (matrices + head)) * 0.75 < bounds["decode"] <= 1e10 / (4 * (matrices + head))
    prefill, decode = rows
    assert slow.closed
    assert (prefill.case, prefill.peer, prefill.peer_settings) == ("prefill", 20.0, "p")
    assert (decode.case, decode.peer, decode.peer_settings) == ("decode", 2.0, "d")
    assert decode.ratio == pytest.approx(decode.ours / 2.0)
    assert prefill.rounds == 3


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
    assert len(told) == 2 and all('pip install "fabula[peers]"' in line for line in told)


def test_transformers_on_the_same_weights(tiny_folder: Path) -> None:
    pytest.importorskip("transformers")
    told: list[str] = []
    with Model.load(tiny_folder, weights="f32", kv="f32", threads=1) as model:
        found = peers.make_peers(model, 100, told.append)
        assert [peer.name for peer in found] == ["transformers"]
        assert any("llama.cpp is not measured" in line for line in told)  # missing, or no GGUF to start from
        prompt = prompt_ids(model, 32)
        theirs = found[0].run(prompt, 32).tokens
        assert theirs == bench_model_module.Fabula(model).run(prompt, 32).tokens
        found[0].close()


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


# ---- Perplexity ----------------------------------------------------------------------------------------------------


def expected_perplexity(model: Model, text: str, window: int, start: list[int]) -> tuple[float, int]:
    ids = model.tokenizer.encode(text, add_bos=False)
    losses: list[float] = []
    for first in range(0, len(ids), window):
        tokens = start + ids[first : first + window]
        if len(tokens) < 2:
            continue
        logits = model.logits(tokens).astype(np.float64)
        for row, token in zip(logits[:-1], tokens[1:], strict=True):
            losses.append(math.log(np.exp(row - row.max()).sum()) + row.max() - row[token])
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("with_start", [False, True])
def test_perplexity(tiny_folder: Path, with_start: bool) -> None:
    with Model.load(tiny_folder, weights="f32") as model:
        model.tokenizer.add_bos = with_start
        found = perplexity(model, TEXT, window=200)
        value, n = expected_perplexity(model, TEXT, 200, [0] if with_start else [])
    assert found.perplexity == pytest.approx(value, rel=1e-12)
    assert found.n_tokens == n and found.weights == "f32" and found.window == 200


def test_a_last_window_of_one_token_predicts_nothing(tiny_folder: Path) -> None:
    with Model.load(tiny_folder, weights="f32") as model:
        model.tokenizer.add_bos = False
        found = perplexity(model, "abcde", window=2)
        assert (found.n_tokens, found.n_windows) == (2, 2)


def test_perplexity_errors(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot be read: No such file"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        read_text(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InvalidArgument, match="is empty"):
        read_text(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InvalidArgument, match="UTF-8"):
        read_text(tmp_path / "latin.txt")
    with Model.load(tiny_folder) as model:
        model.tokenizer.add_bos = False
        with pytest.raises(InvalidArgument, match="too few"):
            perplexity(model, "a")
        with pytest.raises(InvalidArgument, match="window is 601"):
            perplexity(model, TEXT, window=601)


def test_perplexity_command(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["perplexity", str(tmp_path / "text.txt"), "--model", str(tiny_folder), "--window", "100"]
    result = call(*arguments, "--compare", "f32", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["weights"], found["compare"]["weights"]) == ("f16", "f32")
    assert found["relative_difference"] == pytest.approx(found["perplexity"] / found["compare"]["perplexity"] - 1)
    assert abs(found["relative_difference"]) < 0.01
    assert "relative difference" in call(*arguments, "--compare", "f32").stdout
    with pytest.raises(InvalidArgument, match="cannot be read"):
        call("perplexity", str(tmp_path / "absent.txt"), "--model", str(tiny_folder))


def test_half_precision_keeps_the_perplexity(smollm2_gguf: Path) -> None:
    if not LIGHTHOUSE.is_file():
        pytest.skip("tests/data/lighthouse.txt is not there")
    text = read_text(LIGHTHOUSE)
    assert len(text.encode()) >= 20_000
    found = {}
    for weights in ("f16", "f32"):
        with Model.load(smollm2_gguf, weights=weights, context=512) as model:  # type: ignore[arg-type]
            found[weights] = perplexity(model, text).perplexity
    assert found["f16"] == pytest.approx(found["f32"], rel=1e-3)
    assert 2 < found["f32"] < 100


def test_help_shows_examples() -> None:
    for command in ([], ["ops"], ["model"], ["perplexity"]):
        assert "Examples:\n" in call(*command, "--help").stdout
