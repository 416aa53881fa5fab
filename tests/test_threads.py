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


def test_efficiency_cores_do_not_count(tmp_path: Path) -> None:
    """A hybrid CPU of two P-cores with two hardware threads each and four E-cores, as Linux lists it on x86."""
    write(tmp_path / "cpu_core" / "cpus", "0-3\n")
    write(tmp_path / "cpu_atom" / "cpus", "4-7\n")
    everything = set(range(8))
    assert threads.fast_cores(everything, tmp_path) == {0, 1, 2, 3}
    assert threads.fast_cores({2, 5}, tmp_path) == {2}
    assert threads.fast_cores({5, 6}, tmp_path) == {5, 6}, "where there is nothing else, E-cores compute"
    for cpu in everything:
        siblings = f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}" if cpu < 4 else str(cpu)
        write(tmp_path / "system" / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list", siblings + "\n")
    assert threads.pinned_cores(3, everything, tmp_path) == [0, 2, 1]
    assert threads.pinned_cores(10, everything, tmp_path) == [0, 2, 1, 3, 4, 5, 6, 7, 0, 2]


@pytest.mark.parametrize(
    ("capacities", "fast"),
    [
        ([1024, 1024, 380, 380], {0, 1}),
        ([250, 250, 800, 1024], {2, 3}),
        ([1024, 1024], {0, 1}),
        ([None, None], {0, 1}),
    ],
)
def test_little_cores_do_not_count(tmp_path: Path, capacities: list[int | None], fast: set[int]) -> None:
    for cpu, capacity in enumerate(capacities):
        if capacity is not None:
            write(tmp_path / "system" / "cpu" / f"cpu{cpu}" / "cpu_capacity", f"{capacity}\n")
    assert threads.fast_cores(set(range(len(capacities))), tmp_path) == fast


@pytest.mark.parametrize(
    ("text", "numbers"), [("0-3,8\n", [0, 1, 2, 3, 8]), ("0\n", [0]), ("\n", []), ("0-x\n", []), ("-1\n", [])]
)
def test_memory_nodes(tmp_path: Path, text: str, numbers: list[int]) -> None:
    write(tmp_path / "system" / "node" / "has_memory", text)
    assert threads.memory_nodes(tmp_path) == numbers
    assert threads.memory_nodes(tmp_path / "nothing") == []


def test_affinity_limits_the_default() -> None:
    everything = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(everything)})
        assert threads.default_threads() == 1
    finally:
        os.sched_setaffinity(0, everything)
    assert 1 <= threads.default_threads() <= len(everything)
