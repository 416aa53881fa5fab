"""Models larger than the available memory: refused with both figures before a weight is read, unless one insists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from fabula import Model
from fabula.engine import memory
from fabula.engine.runner import Runner
from fabula.errors import OutOfMemory
from fabula.formats.checkpoint import DType
from fabula.models.opening import open_model, packed_bytes
from fabula.models.precision import precision_of
from fabula.models.shares import Shares
from fabula.models.views import viewed

GIB = 1 << 30


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


@pytest.fixture
def system(tmp_path: Path) -> dict[str, Path]:
    """A system with 8 GiB available and no cgroup limit; as arguments of `available_memory`."""
    write(tmp_path / "meminfo", f"MemTotal: {16 << 20} kB\nMemFree: 1024 kB\nMemAvailable: {8 << 20} kB\n")
    write(tmp_path / "membership", "0::/a/b\n")
    write(tmp_path / "cg" / "a" / "b" / "memory.max", "max\n")
    return {"meminfo": tmp_path / "meminfo", "root": tmp_path / "cg", "membership": tmp_path / "membership"}


def test_without_limits_it_is_what_the_system_says(system: dict[str, Path]) -> None:
    assert memory.available_memory(**system) == 8 * GIB


def test_the_tightest_cgroup_counts_and_file_cache_is_free(system: dict[str, Path]) -> None:
    above = system["root"] / "a"
    write(above / "memory.max", f"{4 * GIB}\n")
    write(above / "memory.current", f"{3 * GIB}\n")
    write(above / "memory.stat", f"anon 5\ninactive_file {GIB // 2}\nactive_file {GIB // 4}\nfile 99\n")
    assert memory.available_memory(**system) == 4 * GIB - 3 * GIB + GIB // 2 + GIB // 4
    write(above / "b" / "memory.max", f"{GIB}\n")
    write(above / "b" / "memory.current", f"{2 * GIB}\n")  # a limit that was lowered later
    assert memory.available_memory(**system) == 0


def test_version_1(system: dict[str, Path], tmp_path: Path) -> None:
    write(tmp_path / "membership", "5:cpu,cpuacct:/x\n9:memory:/c\n")
    folder = system["root"] / "memory" / "c"
    write(folder / "memory.limit_in_bytes", f"{2 * GIB}\n")
    write(folder / "memory.usage_in_bytes", f"{GIB}\n")
    write(folder / "memory.stat", "inactive_file 7\ntotal_inactive_file 1000\ntotal_active_file 24\n")
    assert memory.available_memory(**system) == GIB + 1024
    write(folder / "memory.limit_in_bytes", "9223372036854771712\n")  # how version 1 says that there is none
    assert memory.available_memory(**system) == 8 * GIB


def test_a_system_that_does_not_say(system: dict[str, Path]) -> None:
    system["meminfo"].write_text("MemAvailable: many kB\n", encoding="ascii")
    assert memory.available_memory(**system) is None
    memory.check_memory(1 << 60, "m", memory.available_memory(**system) or 1 << 61)


def test_the_message_has_both_figures() -> None:
    memory.check_memory(1000, "m", 1000)
    with pytest.raises(OutOfMemory, match=r"^m: its weights take 63\.50 GB of memory, but 12\.00 GB are available"):
        memory.check_memory(63_500_000_000, "m", 12_000_000_000)
    with pytest.raises(OutOfMemory, match=r"take 1,001 bytes of memory, but 1,000 bytes are"):
        memory.check_memory(1001, "m", 1000)


@pytest.mark.parametrize("weights", ["auto", "f32", "bf16", "q8_0", "q4_0"])
def test_bytes_are_counted_exactly(tmp_path: Path, weights: str) -> None:
    tiny.write_model(tmp_path)
    checkpoint, config = open_model(tmp_path)
    try:
        precision, shares = precision_of(weights, config), Shares(config)
        counted = packed_bytes(viewed(checkpoint, config), precision, config, shares)
        runner = Runner(checkpoint, weights=precision, kv=(DType.F16, DType.F16), n_threads=1)
    finally:
        checkpoint.close()
    assert counted == runner.weight_bytes


def test_a_model_that_does_not_fit_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_model(tmp_path / "model")
    monkeypatch.setattr(memory, "available_memory", lambda: 5000)
    read: list[Any] = []
    with pytest.raises(OutOfMemory, match=r"^model: its weights take .* but 5,000 bytes are available"):
        Model.load(tmp_path / "model", load_progress=lambda *done: read.append(done))
    assert not read
    with Model.load(tmp_path / "model", ignore_memory=True) as model:
        assert model.weight_bytes > 5000
