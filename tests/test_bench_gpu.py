"""benchmarks/gpu.py: runs from end to end with tiny shapes, leaves out what does not fit, says what is missing."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fabula import _native
from fabula.bench import library
from fabula.bench.row import KEYS, read_rows
from fabula.errors import DeviceError, DeviceOutOfMemory, InvalidArgument, Unsupported
from fabula.formats.checkpoint import DType
from waiting import run_program

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", *arguments]
    return run_program(command)


@pytest.mark.gpu
def test_from_end_to_end(tmp_path: Path) -> None:
    done = run("--json")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "rows.jsonl"
    out.write_text(done.stdout, encoding="utf-8")
    rows = read_rows(out)
    assert all(row.keys() == {*KEYS, "device"} and row["device"] for row in rows)
    cases = ["decode 1 x 8", "decode 3 x 8", "decode 1 x 40", "decode 3 x 40", "decode 1 x 8, by operators"]
    cases += ["prefill 8", "prefill 40", "prefill 8, cuBLASLt", "prefill 40, cuBLASLt"]
    for weights in ("bf16", "q8_0", "q4_0"):
        assert [row["case"] for row in rows if row["weights"] == weights and row["model"]] == cases
    assert rows[0]["case"] == "copy 1 MiB" and all(row["ours"] > 0 for row in rows if row["model"])
    assert all(row["limit"] > 0 for row in rows if row["case"].startswith("decode"))
    assert "0 left out" in done.stderr


@pytest.mark.gpu
def test_what_does_not_fit_is_left_out(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    device = _native.Device(0)
    budget = gpu.Budget(time.perf_counter() - 1)
    rows = list(gpu.measure(device, gpu.TINY_PLAN, budget))
    assert [row.model for row in rows if row.model] == [] and len(budget.left_out) == 3
    assert "left out: tiny q4_0: it needs about 0 s, 0 s are left" in capsys.readouterr().err
    ours = gpu.Ours(gpu.TINY, DType.Q8_0, gpu.TINY_PLAN)
    with pytest.raises(gpu.LeftOut, match="memory for 6 pages"):
        ours.decode(4, 8, 3, gpu.Budget(time.perf_counter() + 60))
    ours.close()
    assert device.memory()[0] == 0


@pytest.mark.gpu
def test_measuring_copies() -> None:
    device = _native.Device(0, 1 << 20)
    assert library.measure_copy(device, 1000, 3) > 0
    with pytest.raises(InvalidArgument, match="n_bytes is 0"):
        library.measure_copy(device, 0, 3)
    with pytest.raises(InvalidArgument, match="n_repeats is 2"):
        library.measure_copy(device, 1000, 2)
    with pytest.raises(DeviceOutOfMemory, match="for a measurement"):  # twice that does not fit
        library.measure_copy(device, 1 << 20, 3)
    assert device.memory()[0] == 0


class Peers:
    """In gpu_peer's place."""

    settings = "as the test says"

    def __init__(self, config: dict[str, Any]) -> None:
        assert config["max_position_embeddings"] > 8

    @staticmethod
    def matrix_peak(size: int) -> float:
        return 1e12 * size

    def run(self, *case: int) -> tuple[float, float]:
        return 100.0 * case[0], 10.0 * case[0]

    def close(self) -> None:
        pass


@pytest.mark.gpu
def test_the_peer_comes_last(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it stands beside waits for it, everything else does not."""
    monkeypatch.setattr(
        gpu, "peer_module", lambda: type("", (), {"Transformers": Peers, "matrix_peak": Peers.matrix_peak})
    )
    budget = gpu.Budget(time.perf_counter() + 600)
    rows = [row for row in gpu.measure(_native.Device(0), gpu.TINY_PLAN, budget) if row.model]
    beside = [(row.case, row.peer) for row in rows if row.peer is not None]
    assert beside == [("decode 1 x 8", 10.0), ("prefill 8", 100.0), ("prefill 8, cuBLASLt", 100.0)]
    assert all(row.weights == "bf16" and row.limit > 0 for row in rows[-3:])
    assert all(row.peer is None for row in rows[:-3]) and len(rows) == 3 * 9


def test_without_a_gpu() -> None:
    try:
        _native.device_count()
    except (Unsupported, DeviceError):
        done = run()
        assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("nothing is measured: ")
    else:
        pytest.skip("there is a GPU")


def test_transformers_takes_part(gpu: Any) -> None:
    """On the processor and not compiled, which takes minutes; the rest is the same."""
    peers = importlib.import_module("gpu_peer")
    peer = peers.Transformers(gpu.TINY.config(64), "cpu", is_compiled=False)
    prefill, decode = peer.run(2, 8, 3)
    assert prefill > 0 and decode > 0 and "static cache, not compiled" in peer.settings
    peer.close()
    assert peers.matrix_peak(64, "cpu", 2) > 0
