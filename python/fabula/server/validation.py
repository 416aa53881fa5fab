"""Converts pydantic's errors about a request body to one 400, in the wording of the engine's errors."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from fabula.server.failures import ApiError

_REPR = reprlib.Repr()  # bounded: the input may be megabytes long
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def body_error(error: Any, ignored: Sequence[str] = ()) -> ApiError:
    """Converts a pydantic ValidationError to a 400 that names the first invalid field, and up to 8 others.

    Args:
        error: of the body.
        ignored: unknown fields, one of which may be meant where one is missing.
    """
    if not isinstance(error, ValidationError):
        return ApiError(400, "invalid_body", f"the body must be a JSON object: {error}")
    problems = error.errors(include_url=False, include_context=False)
    unknown = [path_of(problem["loc"]) for problem in problems if problem["type"] == "extra_forbidden"] or list(ignored)
    missing = [problem for problem in problems if problem["type"] == "missing"]
    if missing and unknown:  # the one may be written for the other
        wanted = path_of(missing[0]["loc"])
        names = ", ".join(name[:80] for name in unknown[:8])
        return ApiError(400, "missing_field", f"{wanted} is missing; {names}: no such field", param=wanted)
    first = problems[0]
    param = path_of(first["loc"])
    message = f"{param}: {_sentence(first)}" if param else f"the body {_sentence(first)}"
    if len(problems) > 1:
        others = sorted({path_of(problem["loc"]) for problem in problems[1:]} - {param, ""})
        message += f" (and {', '.join(others[:8])})" if others else ""
    code = "unknown_field" if first["type"] == "extra_forbidden" else "invalid_value"
    if first["type"] == "missing":
        code = "missing_field"
    return ApiError(400, code, message, param=param or None)


def path_of(loc: tuple[int | str, ...]) -> str:
    """The path of a field, such as messages[0].content."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text[:200]


def _sentence(problem: Any) -> str:
    kind = problem["type"]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a JSON object"
    if kind == "extra_forbidden":
        return "there is no such field"
    if kind == "missing":
        return "is missing"
    given = _REPR.repr(problem.get("input"))
    given = given if len(given) <= 60 else given[:59] + "…"
    words = (
        problem["msg"]
        .replace("Input should be", "must be")
        .replace("a valid integer", "an integer")
        .replace("a valid ", "a ")
    )
    return f"is {given}, {words}" if words.startswith("must be") else words
