"""How much memory is available, so that a model larger than that is refused before it is read.

Available is what the system says it can give without swapping (`MemAvailable`), and of each memory cgroup up to the
root what its limit leaves; files that its processes have read count as free, as the kernel drops them first.
"""

from __future__ import annotations

from pathlib import Path

from fabula.engine.threads import CGROUP, cgroup_folders
from fabula.errors import OutOfMemory

_FILES = {  # of a cgroup: limit, usage, and the prefix of the totals in memory.stat
    "2": ("memory.max", "memory.current", ""),
    "1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


def available_memory(
    meminfo: Path = Path("/proc/meminfo"), root: Path = CGROUP, membership: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Bytes that this process can still take; None where the system does not say."""
    found = [_of_system(meminfo)]
    for folder in cgroup_folders(root, membership, "memory"):
        found += [_of_cgroup(folder, *files) for files in _FILES.values()]
    known = [n_bytes for n_bytes in found if n_bytes is not None]
    return min(known) if known else None


def check_memory(n_bytes: int, name: str, available: int | None = None) -> None:
    """Refuses weights that do not fit the available memory.

    Args:
        n_bytes: that the weights take.
        name: of the model.
        available: bytes; None to ask the system.

    Raises:
        OutOfMemory: they do not fit; the message has both figures.
    """
    available = available_memory() if available is None else available
    if available is None or n_bytes <= available:
        return
    raise OutOfMemory(
        f"{name}: its weights take {_size(n_bytes)} of memory, but {_size(available)} are available. Take smaller"
        " weights (--weights q4) or a smaller model, or free memory; ignore_memory (--ignore-memory) loads it all the"
        " same"
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e7 else f"{n_bytes:,} bytes"


def _of_system(meminfo: Path) -> int | None:
    try:
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _of_cgroup(folder: Path, limit_file: str, usage_file: str, prefix: str) -> int | None:
    try:
        limit = int((folder / limit_file).read_text(encoding="ascii"))  # "max" for none
        used = int((folder / usage_file).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return max(0, limit - used + _file_cache(folder, prefix))


def _file_cache(folder: Path, prefix: str) -> int:
    """Bytes of files that a cgroup holds in memory."""
    wanted = (f"{prefix}inactive_file", f"{prefix}active_file")
    try:
        lines = [line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines()]
        return sum(int(line[1]) for line in lines if len(line) == 2 and line[0] in wanted)
    except (OSError, ValueError):
        return 0
