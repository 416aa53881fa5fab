"""JSON from files and clients that are not trusted, read exactly as RFC 8259 has it.

Python's `json` also takes NaN, Infinity, numbers of any size and the same key twice. Readers disagree about those, so
they are refused here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

from fabula.errors import shown

_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1
_INT_CHARACTERS = 20  # of either limit
_WIDE_CHARACTERS = 40


def parse(data: bytes, error: Callable[[str], Exception], *, subject: str = "", wide_integers: bool = False) -> Any:
    """Parses a JSON text strictly.

    Args:
        data: the whole text.
        error: makes the exception to raise from a message.
        subject: what the messages are about, with a space at its end ("the body "); "" where `error` names it.
        wide_integers: accept integers of up to 40 digits; transformers writes 10^30 for "no limit".

    Raises:
        Exception: what `error` returns, where the text is not UTF-8, not JSON, nested too deep, or holds a key twice,
            half a UTF-16 pair, NaN, Infinity, an integer beyond 64 bits or a number beyond float64.
    """

    def fail(reason: str) -> NoReturn:
        raise error(reason) from None

    def parse_constant(text: str) -> NoReturn:
        fail(f"{text} is not JSON")

    def parse_int(text: str) -> int:
        # The length comes first: converting many digits takes quadratic time.
        if wide_integers and len(text) <= _WIDE_CHARACTERS:
            return int(text)
        if len(text) > _INT_CHARACTERS or not _INT_MIN <= (value := int(text)) <= _INT_MAX:
            fail(f"the number {shown(text)} does not fit 64 bits")
        return value

    def parse_float(text: str) -> float:
        if not math.isfinite(value := float(text)):
            fail(f"the number {shown(text)} is too large")
        return value

    def parse_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    fail(f"the key {shown(key)} appears twice")
                seen.add(key)
        return result

    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=parse_constant,
            parse_int=parse_int,
            parse_float=parse_float,
            object_pairs_hook=parse_pairs,
        )
    except UnicodeDecodeError as problem:
        fail(f"{subject}is not UTF-8 at byte {problem.start}")
    except json.JSONDecodeError as problem:
        fail(f"{subject}is not JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}")
    except RecursionError:
        fail(f"{subject}is nested too deep")
    if b"\\ud" in data or b"\\uD" in data:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            fail(f"{subject}holds half a UTF-16 pair, which UTF-8 cannot carry")
    return value
