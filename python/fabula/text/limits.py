"""Limits of chat templates on text and work, and checks before an operation runs. See `template.py`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

MAX_TEXT = 4 << 20  # characters of one text: a conversation of a million tokens
MAX_ALL_TEXT = 16 * MAX_TEXT  # characters of all texts made in one render, temporary ones included
MAX_STEPS = 1_000_000  # loop iterations and calls
MAX_WIDTH = 10_000  # of padding and of numbers in formats
MAX_BITS = 4096  # of whole numbers

# Filters that templates of open models use, and similar ones. Not allowed: access to attributes (`attr`), text of a
# chosen length (`batch`, `format`, `round`, `slice`, ...) and nondeterminism (`random`).
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
    """A template exceeded a limit."""


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
        """Counts one iteration or call.

        Raises:
            LimitError: steps or time are used up.
        """
        self._left -= 1
        if self._left < 0:
            raise LimitError(f"it loops or calls more than {MAX_STEPS} times")
        if self._left % 256 == 0 and self._clock() > self._deadline:
            raise LimitError("it takes too long")

    def spend_text(self, length: int) -> None:
        """Counts a text or list of `length` entries before it is made.

        Raises:
            LimitError: it is too long, or all texts together are.
        """
        if length > MAX_TEXT:
            raise LimitError(f"it makes a text or list of more than {MAX_TEXT} entries")
        self._text_left -= length
        if self._text_left < 0:
            raise LimitError(f"it makes texts of more than {MAX_ALL_TEXT} characters in all")


def concatenate(pieces: Iterable[str], budget: Budget) -> str:
    """Joins text within the budget; jinja2 uses it for blocks, macros and `~`."""
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
    """Upper bound of the entries in an operation's result.

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
    """Upper bound of a formatted text's length: each field may hold all arguments and the largest width."""
    widest = max((int(number) for number in re.findall(r"[0-9]{1,30}", text)), default=0)
    if "*" in text or widest > MAX_WIDTH:
        raise LimitError(f"its format has a width of more than {MAX_WIDTH}")
    fields = max(text.count("%"), text.count("{"))
    return len(text) + fields * (widest + 32 + sum(_deep_size(arg) for arg in args))


def _deep_size(value: object) -> int:
    """Length of a value when printed; lists and dicts count all their items."""
    if isinstance(value, list | tuple):
        return sum(_deep_size(item) + 4 for item in value)
    if isinstance(value, dict):
        return sum(_deep_size(key) + _deep_size(item) + 8 for key, item in value.items())
    return len(value) if isinstance(value, str) else 32


def call_size(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Upper bound of the entries in the result of a string method, or of the filter of that name.

    Args:
        target: the bound method, or the name of a filter, whose first argument is the text.
        args, kwargs: of the call.

    Raises:
        LimitError: a width is too large, or the method is not allowed.
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
        raise LimitError("translate is not allowed in templates")
    return length
