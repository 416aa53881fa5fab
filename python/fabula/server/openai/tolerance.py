"""Tolerance of the routes of OpenAI's API: null means absent, unknown fields are ignored and named, 3.0 is 3.

The fields that were ignored stand in the header `fabula-ignored` of the reply, and in a line of the log at level debug.
The setting `strict` refuses them instead.
"""

from __future__ import annotations

import logging
import re
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from quart import Response, g, has_request_context

from fabula.server.logs import log_line
from fabula.server.state import server

HEADER = "fabula-ignored"
MAX_NAMED = 32  # fields in the header
_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,80}")


def tolerant(kind: type[BaseModel], given: Any, translate: Callable[[dict[str, Any]], None]) -> Any:
    """The JSON of a request as its schema wants it.

    Args:
        kind: the schema.
        given: the body; returned as it is if it is no object.
        translate: turns dialects into fields of the schema; changes its argument.

    Raises:
        ApiError: a field of a dialect is malformed.
    """
    if not isinstance(given, Mapping):
        return given
    body = {name: value for name, value in given.items() if value is not None}
    translate(body)
    ignored: list[str] = []
    is_strict = has_request_context() and server().settings.strict
    found = _pruned(kind, body, "", ignored, is_strict=is_strict)
    if ignored and has_request_context():
        g.ignored = ignored
    return found


def _pruned(
    kind: type[BaseModel], given: Mapping[str, Any], where: str, ignored: list[str], *, is_strict: bool
) -> dict[str, Any]:
    """The fields that the schema has and that are not null."""
    fields = {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in fields:
            if is_strict:
                found[name] = value
            elif value is not None:
                ignored.append(where + name)
        elif value is not None:
            found[name] = _fitted(fields[name], value, where + name, ignored, is_strict=is_strict)
    return found


def _fitted(annotation: Any, value: Any, where: str, ignored: list[str], *, is_strict: bool) -> Any:
    """A value with the fields and numbers that its type has."""
    for kind in _kinds(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(value, dict):
            return _pruned(kind, value, where + ".", ignored, is_strict=is_strict)
        if get_origin(kind) is list and isinstance(value, list):
            (inner,) = get_args(kind)
            if inner is int or (isinstance(inner, type) and issubclass(inner, BaseModel)):
                return [
                    _fitted(inner, one, f"{where}[{i}]", ignored, is_strict=is_strict) for i, one in enumerate(value)
                ]
    kinds = _kinds(annotation)
    return int(value) if int in kinds and float not in kinds and type(value) is float and value.is_integer() else value


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a type."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def ignored_fields() -> list[str]:
    """The fields of the current request that were ignored."""
    return list(g.get("ignored", ())) if has_request_context() else []


async def name_ignored(response: Response) -> Response:
    """Adds the header; a hook after each request."""
    ignored = ignored_fields()
    if ignored:
        names = [name if _NAME.fullmatch(name) else "?" for name in ignored[:MAX_NAMED]]
        response.headers[HEADER] = ", ".join(names)
        log_line(logging.DEBUG, "ignored", {"request": g.get("request_id", ""), "fields": ", ".join(names)})
    return response
