"""Progress callback of benchmarks: a function that takes a line of text."""

from __future__ import annotations

from collections.abc import Callable

Status = Callable[[str], None]


def silent(_: str) -> None:
    """Ignores the text."""
