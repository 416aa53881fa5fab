"""Pictures of measurements: what is in them, when they are refused, and that a PNG comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benching import MACHINE, call, rows_of
from fabula.bench import plot
from fabula.bench.row import Row
from fabula.errors import InvalidArgument, Unsupported

PNG = b"\x89PNG\r\n\x1a\n"


def json_row(case: str, ours: float | None, unit: str = "tokens/s", **more: Any) -> dict[str, Any]:
    named = {key: more.pop(key) for key in ("weights", "kv", "peer", "peer_name", "limit", "model") if key in more}
    row = Row(case=case, unit=unit, ours=ours, threads=2, more=more, **named)
    return {**row.to_json(), "machine": MACHINE.to_json()}


MODEL_ROWS = [
    json_row("prefill", 800.0, weights="f16", peer=600.0, peer_name="llama.cpp", limit=900.0, operations_per_byte=500.0,
             gop_per_s=170.0, kv="f16", model="m"),
    json_row("prefill", 800.0, weights="f16", peer=160.0, peer_name="transformers", limit=900.0, kv="f16", model="m",
             operations_per_byte=500.0, gop_per_s=170.0),
    json_row("prefill", 1500.0, weights="q8_0", peer=900.0, peer_name="llama.cpp", limit=4000.0, kv="f16", model="m",
             operations_per_byte=900.0, gop_per_s=320.0),
    json_row("peak memory", 300.0, "MB", weights="f16", limit=200.0, kv="f16", model="m"),
]  # fmt: skip


def test_rows_of_one_case_are_one_group() -> None:
    speed, memory = plot.panels(MODEL_ROWS)
    assert (speed.unit, memory.unit) == ("tokens/s", "MB")
    assert [case.label for case in speed.cases] == ["prefill, f16", "prefill, q8_0"]
    assert speed.cases[0].values == {"Fabula": 800.0, "llama.cpp": 600.0, "transformers": 160.0}
    assert speed.cases[0].limit == 900.0 and not speed.is_log
    assert memory.cases[0].values == {"Fabula": 300.0}
    points = plot.roofline(MODEL_ROWS)
    assert [(p.label, p.intensity, p.speed) for p in points] == [
        ("prefill, f16", 500.0, 170.0), ("prefill, q8_0", 900.0, 320.0),
    ]  # fmt: skip
    assert plot.title(MODEL_ROWS) == "fabula bench, m, kv f16, 2 threads\nx, avx2"


def test_a_wide_range_is_logarithmic() -> None:
    (panel,) = plot.panels([json_row("a", 0.01, "ms", peer=500.0, peer_name="slow"), json_row("b", None, "ms")])
    assert panel.is_log and len(panel.cases) == 1
    assert [plot.number(value) for value in (None, 0.0, 0.01234, 12.34, 1234.5)] == [
        "-",
        "-",
        "0.0123",
        "12.3",
        "1,234",
    ]


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, rows in {
        "model": MODEL_ROWS,
        "one": [json_row("a", 1.0)],
        "wide": [json_row("a", 0.01, "ms", peer=500.0, peer_name="slow"), json_row("b", None, "ms", peer=1.0)],
        "engines": [json_row("a", 1.0, peer=2.0, peer_name=f"engine {i}") for i in range(9)],
        "points": [
            json_row(f"$case_{i}" * (1 + 20 * i), 1.0, operations_per_byte=1e-4 * 10**i, gop_per_s=1.0)
            for i in range(9)
        ],
    }.items():
        plot.draw(rows, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "a.png"
    with pytest.raises(InvalidArgument, match="no row has a value"):
        plot.draw([json_row("a", None)], out)
    with pytest.raises(InvalidArgument, match="201 rows do not fit"):
        plot.draw([json_row("a", 1.0)] * 201, out)
    with pytest.raises(InvalidArgument, match="end in"):
        plot.check(tmp_path / "a.jpg")
    with pytest.raises(InvalidArgument, match="there is no folder"):
        plot.check(tmp_path / "absent" / "a.png")
    out.mkdir()
    with pytest.raises(InvalidArgument, match="cannot be written"):
        plot.draw([json_row("a", 1.0)], out)
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Unsupported, match="pip install matplotlib"):
        plot.check(tmp_path / "b.png")
    with pytest.raises(Unsupported, match="matplotlib"):  # before anything is measured
        call("ops", "--plot", str(tmp_path / "b.png"))


def test_plot_commands(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second, lines = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "rows.jsonl"
    result = call("ops", "--quick", "--threads", "1", "--json", "--plot", str(first))
    assert len(rows_of(result)) == 9 and first.read_bytes().startswith(PNG)
    lines.write_text(result.stdout)
    assert call("plot", str(lines), str(second)).exit_code == 0
    assert second.read_bytes() == first.read_bytes()
    lines.write_text(json.dumps({"case": "a"}))
    with pytest.raises(InvalidArgument, match="line 1 is not what"):
        call("plot", str(lines), str(second))
