"""`fabula bench speculation`: the cases, their JSON, and what cannot be measured."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from benching import call, rows_of
from fabula.bench import speculation as bench_module
from fabula.bench.speculation import bench_speculation
from fabula.errors import EngineError, InvalidArgument
from fabula.model import Model

FEW = ["--tokens", "64", "--rounds", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a context that holds the program, which is 600 tokens of its vocabulary."""
    return tiny.write_model(tmp_path_factory.mktemp("long") / "m", config={"max_position_embeddings": 1000})


def test_json_and_table(tiny_folder: Path) -> None:
    rows = rows_of(call("speculation", "--model", str(tiny_folder), *FEW, "--draft-model", str(tiny_folder), "--json"))
    assert [row["case"] for row in rows] == ["edit", "code", "story"]
    for row in rows:
        assert (row["unit"], row["peer_name"], row["tokens"]) == ("tokens/s", "without speculation", 64)
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
        assert 0 <= row["accepted"] <= row["drafted"]
        assert row["tokens_per_step"] == pytest.approx(64 / (64 - row["accepted"]))
    shown = call("speculation", "--model", str(tiny_folder), *FEW, "--case", "story")
    assert "tokens a step" in shown.stdout and "story" in shown.stdout and "edit" not in shown.stdout


def test_what_cannot_be_measured(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model.load(tiny_folder, threads=1) as model:
        for options, words in (
            ({"cases": ["poem"]}, "poem"),
            ({"n_tokens": 63}, "64"),
            ({"rounds": 0}, "rounds"),
            ({"n_tokens": 999}, "positions"),
        ):
            with pytest.raises(InvalidArgument, match=words):
                bench_speculation(model, **options)  # type: ignore[arg-type]
        run, n = bench_module._run, 0

        def differs(*arguments: object) -> bench_module._Run:
            nonlocal n
            n += 1
            found = run(*arguments)  # type: ignore[arg-type]
            return bench_module._Run((n,), found.timings, found.cpu_s)

        monkeypatch.setattr(bench_module, "_run", differs)
        with pytest.raises(EngineError, match="changed the answer"):
            bench_speculation(model, cases=["story"], n_tokens=64, rounds=1)
    with (
        Model.load(tiny_folder, threads=1, speculation="off") as model,
        pytest.raises(InvalidArgument, match="speculation is off"),
    ):
        bench_speculation(model)
