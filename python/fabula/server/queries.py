"""Refuses query parameters that a route of Fabula's own API does not have: a misspelt one must not be ignored."""

from __future__ import annotations

import difflib

from quart import Quart, request
from quart_schema.validation import QUART_SCHEMA_QUERYSTRING_ATTRIBUTE

from fabula.server.failures import ApiError

# Parts of the API with routes of their own; other clients' APIs, and pages, which links may decorate, take anything.
STRICT = frozenset({"chat", "walk", "sessions", "streams", "text", "health", "metrics", "usage"})


def install(app: Quart) -> None:
    """Checks every request to these routes."""
    app.before_request(lambda: _check(app))


def _check(app: Quart) -> None:
    if not request.args or request.blueprint not in STRICT or request.endpoint is None:
        return
    model = getattr(app.view_functions[request.endpoint], QUART_SCHEMA_QUERYSTRING_ATTRIBUTE, None)
    known = sorted(model.model_fields) if model is not None else []
    for name in request.args:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = (
                f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}" if known else "there are none"
            )
            raise ApiError(
                400, "unknown_parameter", f"{name[:80]}: there is no such query parameter; {hint}", param=name[:80]
            )
