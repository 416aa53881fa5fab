"""Limits of chat templates: how much text, how much work, and what is checked before it runs. See `template.py`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

MAX_TEXT = 4 << 20  # characters of any text a template makes: a conversation of a million tokens
MAX_ALL_TEXT = 16 * MAX_TEXT  # characters of all the text that one render makes on its way
MAX_STEPS = 1_000_000  # loop iterations and calls
MAX_WIDTH = 10_000  # of padding and of numbers in formats
MAX_BITS = 4096  # of whole numbers

# Filters that templates of open models use, and their nearest relatives. What reaches attributes (`attr`), makes text
# of a wanted length (`batch`, `format`, `round`, `slice`, ...) or says something else each time (`random`) is out.
FILTERS = frozenset(
    (
        *(
            "abs",
            "capitalize",
            "count",
            "d",
            "default",
            "dictsort",
            "e",
            "escape",
            "first",
            "float",
            "groupby",
            "indent",
        ),
        *("int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr"),
        *("replace", "reverse", "safe", "select", "selectattr", "sort", "string", "sum", "title", "tojson", "trim"),
        *("unique", "upper", "wordcount"),
    )
)


class LimitError(Exception):
    """A template asked for more than it may have."""


class Budget:
    """Steps, time and memory of one render.

    Args:
        deadline: of the clock, seconds.
        clock: CPU time of the rendering thread, so that a busy machine refuses nothing.
    """

    __slots__ = ("_clock", "_deadline", "_left", "_text_left")

    def __init__(self, deadline: float, clock: Callable[[], float] = time.thread_time) -> None:
        self._deadline, self._clock = deadline, clock
        self._left = MAX_STEPS
        self._text_left = MAX_ALL_TEXT

    def spend(self) -> None:
        """One iteration or call.

        Raises:
            LimitError: steps or time are used up.
        """
        self._left -= 1
        if self._left < 0:
            raise LimitError(f"it loops or calls more than {MAX_STEPS} times")
        if self._left % 256 == 0 and self._clock() > self._deadline:
            raise LimitError("it takes too long")

    def spend_text(self, length: int) -> None:
        """A text or list of this many entries, before it is made.

        Raises:
            LimitError: it is too long, or all that was made is.
        """
        if length > MAX_TEXT:
            raise LimitError(f"it makes a text or list of more than {MAX_TEXT} entries")
        self._text_left -= length
        if self._text_left < 0:
            raise LimitError(f"it makes texts of more than {MAX_ALL_TEXT} characters in all")


def concatenate(pieces: Iterable[str], budget: Budget) -> str:
    """Joins text within the budget: what jinja2 calls for blocks, macros and `~`."""
    kept = []
    length = 0
    for piece in pieces:
        budget.spend_text(len(piece))
        length += len(piece)
        if length > MAX_TEXT:
            raise LimitError(f"it makes a text of more than {MAX_TEXT} characters")
        kept.append(piece)
    return "".join(kept)


def _size(value: object) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def binary_size(operator: str, left: Any, right: Any) -> int:
    """Entries an operation's result may have.

    Raises:
        LimitError: a number would be too large, or a format too wide.
    """
    if operator == "+":
        return _size(left) + _size(right)
    if operator == "%":
        return _format_size(left, [right]) if isinstance(left, str) else 0
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_BITS:
            raise LimitError(f"it computes a number of more than {MAX_BITS} bits")
    elif operator == "*":
        for text, count in ((left, right), (right, left)):
            if isinstance(count, int):
                return _size(text) * max(count, 0)
    return 0


def _format_size(text: str, args: Sequence[Any]) -> int:
    """Length a format's result may have: each field may take all arguments and the widest number in it."""
    widest = max((int(number) for number in re.findall(r"[0-9]{1,30}", text)), default=0)
    if "*" in text or widest > MAX_WIDTH:
        raise LimitError(f"its format has a width of more than {MAX_WIDTH}")
    fields = max(text.count("%"), text.count("{"))
    return len(text) + fields * (widest + 32 + sum(_deep_size(arg) for arg in args))


def _deep_size(value: object) -> int:
    """Length of a text, or of the texts in a list: what printing it brings."""
    if isinstance(value, list | tuple):
        return sum(_deep_size(item) + 4 for item in value)
    if isinstance(value, dict):
        return sum(_deep_size(key) + _deep_size(item) + 8 for key, item in value.items())
    return len(value) if isinstance(value, str) else 32


def call_size(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Entries that the result of a text's method (or of the filter of that name, with the text first) may have.

    Args:
        target: the bound method, or the filter's name.
        args, kwargs: of the call.

    Raises:
        LimitError: a width is too large, or the method is not offered.
    """
    if isinstance(target, str):
        name, text, rest = target, args[0] if args else "", [*args[1:], *kwargs.values()]
    else:
        method = getattr(target, "__wrapped__", target)  # the sandbox wraps str.format
        text = getattr(method, "__self__", None)
        if not isinstance(text, str | bytes):
            return 0
        name, rest = getattr(method, "__name__", ""), [*args, *kwargs.values()]
    length = len(str(text)) if not isinstance(text, list | tuple | dict) else 0
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs", "indent"):
        widest = max([abs(value) for value in rest if isinstance(value, int)] + [_size(value) for value in rest] + [8])
        if any(isinstance(value, int) and abs(value) > MAX_WIDTH for value in rest):
            raise LimitError(f"{name} by more than {MAX_WIDTH} characters")
        marks = {"expandtabs": "\t", "indent": "\n"}
        return length + widest * (1 + (str(text).count(marks[name]) if name in marks else 0))
    if name == "replace" and len(rest) >= 2:
        return length + str(text).count(str(rest[0])) * len(str(rest[1]))
    if name == "join":
        items = text if isinstance(target, str) else (rest[0] if rest else ())
        glue = _size(rest[0]) if isinstance(target, str) and rest else length
        return sum(_size(item) + glue for item in items) if isinstance(items, list | tuple | dict | str) else 0
    if name in ("format", "format_map"):
        return _format_size(str(text), rest)
    if name == "translate":
        raise LimitError("translate is not offered to templates")
    return length
