"""Argument values in forms that write them as plain text: the JSON types a schema allows, and text to JSON."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

KINDS = frozenset(("string", "number", "integer", "boolean", "null", "array", "object"))
_MAX_DEPTH = 16  # of references and combinations followed in a schema
_MAX_LITERAL = 100_000  # max characters of a Python literal
_WORDS = {"True": "true", "False": "false", "None": "null"}


def kinds_of(schema: object, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """The JSON types that a schema allows.

    Args:
        schema: of a value.
        root: the schema that its references refer to.
        depth: of the recursion.
    """
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return KINDS
    kinds = KINDS
    if "$ref" in schema:
        kinds &= kinds_of(resolved(schema["$ref"], root), root, depth + 1)
    given = schema.get("type")
    if isinstance(given, str):
        kinds &= _with_integer({given})
    elif isinstance(given, list):
        kinds &= _with_integer({one for one in given if isinstance(one, str)})
    if isinstance(schema.get("enum"), list):
        kinds &= _with_integer({kind_of(value) for value in schema["enum"]})
    if "const" in schema:
        kinds &= _with_integer({kind_of(schema["const"])})
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            kinds &= frozenset().union(*(kinds_of(one, root, depth + 1) for one in schema[word]))
    for one in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        kinds &= kinds_of(one, root, depth + 1)
    return kinds


def resolved(reference: object, root: Mapping[str, Any]) -> object:
    """The target of a reference within a schema; None if it is external or missing."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found: object = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or name not in found:
            return None
        found = found[name]
    return found


def kind_of(value: object) -> str:
    """The JSON type of a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list | tuple) else "object"


def _with_integer(kinds: set[str]) -> frozenset[str]:
    return frozenset(kinds | {"integer"} if "number" in kinds else kinds)


def json_of(text: str, kinds: frozenset[str]) -> str:
    """Converts a plain-text value to JSON: a string if only strings are allowed; otherwise parsed as JSON or as a
    Python literal, and a string if it is neither."""
    if kinds == {"string"}:
        return json.dumps(text, ensure_ascii=False)
    found = _as_json(text, kinds)
    if found is None and ("string" not in kinds or kinds == KINDS):
        found = _as_python(text)
    return json.dumps(text, ensure_ascii=False) if found is None else found


def json_of_python(text: str) -> str | None:
    """Converts a Python literal, or JSON, to JSON; None for anything else."""
    found = _as_json(text, KINDS)
    return _as_python(text, strings=True) if found is None else found


def _as_json(text: str, kinds: frozenset[str]) -> str | None:
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return text.strip() if kind_of(value) in kinds else None


def _refuse(word: str) -> None:
    raise ValueError(word)


def _as_python(text: str, *, strings: bool = False) -> str | None:
    stripped = text.strip()
    if stripped in _WORDS:
        return _WORDS[stripped]
    starts = "[{(" + ("'\"" if strings else "")
    if not stripped.startswith(tuple(starts)) or len(stripped) > _MAX_LITERAL:
        return None
    try:
        return json.dumps(ast.literal_eval(stripped), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
