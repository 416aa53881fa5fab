"""Reads request bodies: strict JSON of limited depth."""

from __future__ import annotations

import re
from typing import Any

from fabula import strict_json
from fabula.server.failures import ApiError

MAX_DEPTH = 64
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)


def parse(data: bytes) -> Any:
    """Parses a request body.

    Raises:
        ApiError: 400 for an empty body, more than MAX_DEPTH levels, or what `strict_json.parse` refuses.
    """
    if not data:
        raise fail("the body is empty, it must be JSON")
    check_depth(data)
    return strict_json.parse(data, fail, subject="the body ")


def check_depth(data: bytes) -> None:
    """Raises ApiError if brackets are nested deeper than MAX_DEPTH, since json's parser recurses."""
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
