"""The default number of threads.

A container often sees all cores of its host but has the CPU time of two; more threads would delay each other at every
barrier. So the default is the smallest of three numbers: cores in the affinity mask, the cgroup's CPU quota rounded
down, and physical cores (two hardware threads of a core share the units that the kernels keep busy).

Of a hybrid CPU only the fast cores count. A step has a few hundred barriers, and a core of half the speed finishes the
item that it began last when the others have long been waiting; it adds little before.
"""

from __future__ import annotations

import os
from pathlib import Path

from fabula.models.packing import Placing

CGROUP = Path("/sys/fs/cgroup")
_DEVICES = Path("/sys/devices")  # of sysfs
_CPUS = _DEVICES / "system" / "cpu"
_SLOW = 0.5  # share of the largest capacity below which a core counts as slow: Arm's little cores have 0.2 to 0.45


def default_threads() -> int:
    """The number of threads if the caller gives none; at least 1."""
    cores = fast_cores(_affinity())
    limits = [len(cores), _physical(cores), _quota()]
    return max(1, min(limit for limit in limits if limit is not None))


def _affinity() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except (AttributeError, OSError):
        return set(range(os.cpu_count() or 1))


def fast_cores(cores: set[int], devices: Path = _DEVICES) -> set[int]:
    """Those of `cores` that are not the slow ones of a hybrid CPU; all of them if none is left, or none is known.

    Args:
        cores: numbers of CPUs.
        devices: /sys/devices. On x86 Linux lists a hybrid CPU's P-cores in cpu_core/cpus; elsewhere each CPU has a
            cpu_capacity, 1024 for the fastest.
    """
    performance = _cpu_list(devices / "cpu_core" / "cpus")
    if performance:
        return cores & performance or cores
    capacities = {core: _number(devices / "system" / "cpu" / f"cpu{core}" / "cpu_capacity") for core in cores}
    most = max((capacity or 0 for capacity in capacities.values()), default=0)
    return {core for core, capacity in capacities.items() if capacity is None or capacity >= _SLOW * most}


def pinned_cores(n_threads: int, cores: set[int] | None = None, devices: Path = _DEVICES) -> list[int]:
    """The CPU of each thread when threads are pinned: a core of its own as far as there are any, neighbors first.

    Args:
        n_threads: at least 1; with more threads than CPUs they share them in turns.
        cores: CPUs that may be used; None for the affinity mask.
        devices: /sys/devices.
    """
    allowed = _affinity() if cores is None else cores
    fast = fast_cores(allowed, devices)
    first: dict[str, int] = {}  # of each physical core, by the list of its hardware threads
    for cpu in sorted(fast):
        path = devices / "system" / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        first.setdefault(_text(path) or str(cpu), cpu)
    chosen = sorted(first.values())
    order = [*chosen, *sorted(fast - set(chosen)), *sorted(allowed - fast)]
    return [order[i % len(order)] for i in range(n_threads)]


def placing_of(n_threads: int, pins: bool, devices: Path = _DEVICES) -> Placing:
    """Where a model's threads run: bound to CPUs, or with weights spread over the nodes if there are several."""
    if pins:
        return Placing(cpus=tuple(pinned_cores(n_threads, devices=devices)))
    return Placing(interleaves=len(memory_nodes(devices)) > 1)


def memory_nodes(devices: Path = _DEVICES) -> list[int]:
    """Numbers of the NUMA nodes with memory; [] if the system does not list them."""
    return sorted(_cpu_list(devices / "system" / "node" / "has_memory"))


def _cpu_list(path: Path) -> set[int]:
    """The numbers of a list like "0-3,8"; none if it cannot be read."""
    found: set[int] = set()
    for part in filter(None, _text(path).split(",")):
        low, _, high = part.partition("-")
        if not low.isdecimal() or not (high or low).isdecimal():
            return set()
        found |= set(range(int(low), int(high or low) + 1))
    return found


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    """A short file's text; "" if it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _physical(cores: set[int], cpus: Path = _CPUS) -> int | None:
    """Number of distinct physical cores among `cores`; None if the system does not expose it."""
    siblings = set()
    for core in cores:
        try:
            text = (cpus / f"cpu{core}" / "topology" / "thread_siblings_list").read_text(encoding="ascii")
        except (OSError, ValueError):
            return None
        siblings.add(text.strip())
    return len(siblings) or None


def _quota(root: Path = CGROUP, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Whole CPUs of the cgroup's quota, at least 1; None without a quota. Every level up to the root may set one."""
    quotas = []
    for folder in cgroup_folders(root, membership, "cpu"):
        quota = _read_quota(folder)
        if quota is not None:
            quotas.append(quota)
    return max(1, int(min(quotas))) if quotas else None


def cgroup_folders(root: Path, membership: Path, controller: str) -> list[Path]:
    """The folders of the cgroups that limit this process by a controller, in both versions, up to the root.

    Args:
        root: where cgroups are mounted.
        membership: the process's /proc/self/cgroup.
        controller: "cpu" or "memory".
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    folders = [root, root / controller, *([root / "cpu,cpuacct"] if controller == "cpu" else [])]
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        folder = base / path.lstrip("/")
        while folder != base and base in folder.parents:
            folders.append(folder)
            folder = folder.parent
    return folders


def _read_quota(folder: Path) -> float | None:
    """CPUs of one cgroup: `cpu.max` ("quota period" or "max period") in version 2, two files in version 1."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        pass
    try:
        micros = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
        period_micros = int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))
        return micros / period_micros if micros > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
