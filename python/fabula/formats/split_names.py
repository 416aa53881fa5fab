"""Names of the parts of a split GGUF model: NAME-00001-of-00003.gguf and so on (llama.cpp's tools/gguf-split)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

MAX_PARTS = 1024
_NAME = re.compile(r"(?P<stem>.*)-(?P<part>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


def part_of(name: str) -> tuple[str, int, int] | None:
    """(stem, number of the part from 1, number of parts) of a file name; None if it is not a part."""
    match = _NAME.fullmatch(name)
    if match is None or not 1 <= int(match["part"]) <= int(match["count"]) <= MAX_PARTS:
        return None
    return match["stem"], int(match["part"]), int(match["count"])


def part_name(stem: str, part: int, count: int) -> str:
    """The name of a part; `part` counts from 1."""
    return f"{stem}-{part:05}-of-{count:05}.gguf"


def part_names(name: str) -> list[str]:
    """The names of all parts, given the first; for any other file just its own name."""
    split = part_of(name)
    if split is None or split[1] != 1:
        return [name]
    stem, _, count = split
    return [part_name(stem, part, count) for part in range(1, count + 1)]


def without_later_parts(files: Iterable[Path]) -> list[Path]:
    """Drops the later parts of split models; keeps the first part that exists."""
    kept: dict[object, Path] = {}
    for file in sorted(files):
        split = part_of(file.name)
        kept.setdefault(file.name if split is None else (split[0], split[2]), file)
    return list(kept.values())
