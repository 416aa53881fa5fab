"""`fabula bench perplexity`: against plain sums, the peer's side, and the gate."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benching import TEXT, broken_python, call, peer_python, rows_of
from fabula.bench.accuracy import bench_accuracy
from fabula.bench.perplexity import Tally, perplexity, read_text
from fabula.bench.status import silent
from fabula.errors import EngineError, InvalidArgument, Unsupported
from fabula.model import Model

LIGHTHOUSE = Path(__file__).parent / "data" / "lighthouse.txt"


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


def test_half_precision_keeps_the_perplexity(smollm2_gguf: Path) -> None:
    if not LIGHTHOUSE.is_file():
        pytest.skip("tests/data/lighthouse.txt is not there")
    text = read_text(LIGHTHOUSE)
    assert len(text.encode()) >= 20_000
    found = {}
    for weights in ("f16", "f32"):
        with Model.load(smollm2_gguf, weights=weights, context=512) as model:  # type: ignore[arg-type]
            found[weights] = perplexity(model, text[:2500]).perplexity
    assert found["f16"] == pytest.approx(found["f32"], rel=1e-3)
    assert 2 < found["f32"] < 100


# ---- Distances -----------------------------------------------------------------------------------------------------


def log_probabilities(model: Model, tokens: list[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    logits = model.logits(tokens)[:-1].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_distances_are_those_of_their_formula(tiny_folder: Path) -> None:
    told: list[str] = []
    with Model.load(tiny_folder, weights="bf16") as rough, Model.load(tiny_folder, weights="f32") as exact:
        rows = bench_accuracy([rough, exact], TEXT, window=100, reference=1, file="a.txt", status=told.append)
        ids = exact.tokenizer.encode(TEXT, add_bos=False)
        start = [0] if exact.tokenizer.add_bos else []
        divergences, same = [], 0
        for first in range(0, len(ids), 100):
            tokens = start + ids[first : first + 100]
            if len(tokens) < 2:
                continue
            p, r = log_probabilities(rough, tokens), log_probabilities(exact, tokens)
            divergences += list((np.exp(r) * (r - p)).sum(axis=1))
            same += int((p.argmax(axis=1) == r.argmax(axis=1)).sum())
        found = perplexity(rough, TEXT, window=100)
    row, base = rows
    assert row.ours == pytest.approx(found.perplexity, rel=1e-12) and row.more["n_tokens"] == len(divergences)
    assert row.more["kl_mean"] == pytest.approx(np.mean(divergences), rel=1e-6) and row.more["kl_mean"] > 0
    assert row.more["kl_max"] == pytest.approx(np.max(divergences), rel=1e-6)
    assert row.more["same_top"] == same / len(divergences)
    assert base.ours and row.ours and row.more["relative_difference"] == pytest.approx(row.ours / base.ours - 1)
    assert (base.more["kl_mean"], base.more["kl_max"], base.more["same_top"]) == (0, 0, 1)
    assert row.peer is None and row.more["peer_kl_mean"] is None
    assert told[-1].startswith("window")


def test_perplexity_command(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["perplexity", str(tmp_path / "text.txt"), "--model", str(tiny_folder), "--window", "100"]
    formats = ["--weights", "f16", "--weights", "bf16"]
    half, brain, full = rows_of(call(*arguments, *formats, "--compare", "f32", "--json"))
    assert [row["weights"] for row in (half, brain, full)] == ["f16", "bf16", "f32"]
    assert half["compare"] == "f32" and half["unit"] == "perplexity" and half["limit"] is half["peer"] is None
    assert half["relative_difference"] == pytest.approx(half["ours"] / full["ours"] - 1)
    assert 0 < half["kl_mean"] < brain["kl_mean"] < 0.01 and half["kl_mean"] <= half["kl_max"]
    (alone,) = rows_of(call(*arguments, "--json"))
    assert alone["ours"] == half["ours"] and alone["compare"] is alone["kl_mean"] is None
    table = call(*arguments, "--compare", "f16").stdout
    assert "KL mean" in table and table.count("\n f16 ") == 1  # measured once
    assert "KL mean" not in call(*arguments).stdout
    with pytest.raises(InvalidArgument, match="cannot be read"):
        call("perplexity", str(tmp_path / "absent.txt"), "--model", str(tiny_folder))


# ---- Beside llama.cpp ----------------------------------------------------------------------------------------------


def test_perplexity_beside_a_peer(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:600])
    arguments = ["perplexity", str(tmp_path / "text.txt"), "--model", str(tiny_folder), "--window", "100", "--peers"]
    arguments += ["--compare", "f32", "--peer-python"]
    same = str(peer_python(tmp_path))
    half, full = rows_of(call(*arguments, same, "--gate", "0.3", "--json"))
    for row in (half, full):
        assert (row["peer_name"], row["peer_settings"]) == ("llama.cpp", "a stand-in")
        assert row["difference_to_peer"] == pytest.approx(row["ours"] / row["peer"] - 1)
        assert row["ratio"] == pytest.approx(row["peer"] / row["ours"])
        assert abs(row["difference_to_peer"]) < 1e-3 and 0 <= row["difference_to_peer_error"] < 1e-3
        assert row["peer_same_top"] > 0.9
    assert half["peer_kl_mean"] == pytest.approx(half["kl_mean"], rel=0.5)
    table = call(*arguments, same).stdout
    assert "its KL mean" in table and "ours to it" in table


def test_the_gate(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:600])
    arguments = ["perplexity", str(tmp_path / "text.txt"), "--model", str(tiny_folder), "--window", "100"]
    skewed = ["--peers", "--peer-python", str(peer_python(tmp_path, 0.8))]
    assert call(*arguments, *skewed, "--json").exit_code == 0
    result = call(*arguments, *skewed, "--gate", "0.3", "--json")
    assert result.exit_code == 1 and len(result.stdout.splitlines()) == 1
    assert "f16: perplexity" in result.stderr and "allowed are 0.3 %" in result.stderr
    assert call(*arguments, *skewed, "--gate", "1e6").exit_code == 0
    assert call(*arguments, "--gate", "0.3").exit_code == 2
    broken = ["--peers", "--peer-python", str(broken_python(tmp_path))]
    result = call(*arguments, *broken)
    assert result.exit_code == 0 and "llama.cpp is not measured" in result.stderr
    with pytest.raises(Unsupported, match="is llama_cpp installed there"):
        call(*arguments, *broken, "--gate", "0.3")


def test_the_error_of_a_difference() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 40, 9)).astype(np.float32)
    targets = np.arange(40) % 9
    one, other = Tally(), Tally()
    for part in logits[:3]:
        one.add(part, targets)
        other.add(part + np.float32(3), targets)  # the same probabilities
    assert one.error_to(other) == pytest.approx(0, abs=1e-6) and one.perplexity == pytest.approx(other.perplexity)
    more = Tally()
    for part in logits[3:]:
        more.add(part, targets)
    differences = np.concatenate(one.losses) - np.concatenate(more.losses)
    assert one.error_to(more) == pytest.approx(np.std(differences, ddof=1) / math.sqrt(120))
    single = Tally()
    single.add(logits[0][:1], targets[:1])
    assert single.error_to(single) is None


def test_another_vocabulary_is_told(tiny_folder: Path) -> None:
    class Wrong:
        name, settings, closed = "wrong", {"prefill": ""}, False

        def logits(self, tokens: Any) -> Any:
            return np.zeros((len(tokens) - 1, 7), np.float32)

        def close(self) -> None:
            self.closed = True

    peer = Wrong()
    with Model.load(tiny_folder) as model, pytest.raises(EngineError, match="wrong: has a vocabulary of 7"):
        bench_accuracy([model], TEXT, make_peer=lambda *_: peer)
    assert peer.closed


def test_llama_cpp_has_the_same_perplexity(smollm2_gguf: Path) -> None:
    python = os.environ.get("FABULA_PEER_PYTHON")
    if python is None:
        pytest.importorskip("llama_cpp")
    from fabula.bench.peer_llama_cpp import LlamaCpp

    with Model.load(smollm2_gguf, weights="q8_0", threads=1, context=160) as model:
        (row,) = bench_accuracy(
            [model],
            TEXT[:500],
            window=64,
            reference=0,
            make_peer=lambda model, n: LlamaCpp.of(model, n, silent, python=python, choose=False),
        )
    assert row.peer and abs(row.more["difference_to_peer"]) < 0.01
    assert 0 < row.more["peer_kl_mean"] < 0.01 and row.more["peer_same_top"] > 0.9
