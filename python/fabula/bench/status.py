"""How measurements tell what they are doing: a function that takes one line."""

from __future__ import annotations

from collections.abc import Callable

Status = Callable[[str], None]


def silent(_: str) -> None:
    """Tells nobody."""
