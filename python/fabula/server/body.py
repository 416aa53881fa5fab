"""Request bodies: JSON read strictly, so that what the server acts on is what the client wrote and nothing else."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from fabula.server.failures import ApiError

MAX_DEPTH = 64
_INT_MAX = 2**64 - 1
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)


def parse(data: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ApiError: 400, for anything but strict JSON: not UTF-8, NaN or Infinity, a number beyond 64 bits or double
            precision, a key twice, half a UTF-16 pair, or more than MAX_DEPTH levels.
    """
    if not data:
        raise fail("the body is empty, it must be JSON")
    check_depth(data)
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_number,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as error:
        raise fail(f"the body is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise fail(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    if b"\\ud" in data or b"\\uD" in data:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise fail("the body holds half a UTF-16 pair, which UTF-8 cannot carry") from None
    return value


def check_depth(data: bytes) -> None:
    """Raises ApiError if brackets are nested too deep: json's parser would recurse as deep."""
    depth = 0
    for match in _BRACKETS.finditer(data):
        mark = match[0]
        if mark in (b"[", b"{"):
            depth += 1
            if depth > MAX_DEPTH:
                raise fail(f"the body is nested deeper than {MAX_DEPTH} levels")
        elif mark in (b"]", b"}"):
            depth -= 1


def fail(message: str) -> ApiError:
    return ApiError(400, "invalid_json", message)


def _constant(text: str) -> NoReturn:
    raise fail(f"{text} is not JSON")


def _integer(text: str) -> int:
    # The length comes first: turning very many digits into an int takes quadratic time.
    if len(text) > 20 or not -_INT_MAX <= (value := int(text)) <= _INT_MAX:
        raise fail(f"the number {text[:24]}{'…' * (len(text) > 24)} does not fit 64 bits")
    return value


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise fail(f"the number {text[:24]} is too large")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in result if names.count(name) > 1)
        raise fail(f"the key {twice[:64]!r} appears twice")
    return result
