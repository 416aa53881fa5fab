"""The default number of threads.

A container often sees all cores of its host but has the CPU time of two; more threads would delay each other at every
barrier. So the default is the smallest of three numbers: cores in the affinity mask, the cgroup's CPU quota rounded
down, and physical cores (two hardware threads of a core share the units that the kernels keep busy).
"""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


def default_threads() -> int:
    """The number of threads if the caller gives none; at least 1."""
    cores = _affinity()
    limits = [len(cores), _physical(cores), _quota()]
    return max(1, min(limit for limit in limits if limit is not None))


def _affinity() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except (AttributeError, OSError):
        return set(range(os.cpu_count() or 1))


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
