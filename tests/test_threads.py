"""How many threads this process may use: affinity, quota and physical cores, each from files made here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fabula.engine import threads


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


@pytest.mark.parametrize(
    ("text", "cpus"), [("max 100000\n", None), ("250000 100000\n", 2), ("50000 100000\n", 1), ("nonsense", None)]
)
def test_version_2_quota(tmp_path: Path, text: str, cpus: int | None) -> None:
    write(tmp_path / "cg" / "cpu.max", text)
    write(tmp_path / "membership", "0::/\n")
    assert threads._quota(tmp_path / "cg", tmp_path / "membership") == cpus


def test_the_tightest_level_counts(tmp_path: Path) -> None:
    write(tmp_path / "cg" / "cpu.max", "800000 100000\n")
    write(tmp_path / "cg" / "outer" / "cpu.max", "300000 100000\n")
    write(tmp_path / "cg" / "outer" / "inner" / "cpu.max", "max 100000\n")
    write(tmp_path / "membership", "0::/outer/inner\n")
    assert threads._quota(tmp_path / "cg", tmp_path / "membership") == 3


def test_version_1_quota(tmp_path: Path) -> None:
    folder = tmp_path / "cg" / "cpu" / "box"
    write(folder / "cpu.cfs_quota_us", "200000\n")
    write(folder / "cpu.cfs_period_us", "100000\n")
    write(tmp_path / "membership", "4:memory:/box\n3:cpu:/box\n")
    assert threads._quota(tmp_path / "cg", tmp_path / "membership") == 2
    write(folder / "cpu.cfs_quota_us", "-1\n")
    assert threads._quota(tmp_path / "cg", tmp_path / "membership") is None


def test_hardware_threads_of_one_core_count_once(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        write(tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list", siblings + "\n")
    assert threads._physical({0, 1, 2, 3}, tmp_path) == 2
    assert threads._physical({0, 2}, tmp_path) == 1
    assert threads._physical({9}, tmp_path) is None


def test_affinity_limits_the_default() -> None:
    everything = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(everything)})
        assert threads.default_threads() == 1
    finally:
        os.sched_setaffinity(0, everything)
    assert 1 <= threads.default_threads() <= len(everything)
