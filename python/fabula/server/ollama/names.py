"""Names of models in Ollama's API: tags, and further names that clients gave with `/api/copy`."""

from __future__ import annotations

import re

from quart import current_app, g

from fabula.server.failures import ApiError
from fabula.server.state import Serving, server

LATEST = ":latest"  # the tag of a name without one
MAX_COPIES = 64  # further names of one key
_KEY = "fabula.ollama"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


def shown(name: str) -> str:
    """A model's name with its tag, as Ollama lists it."""
    return name if ":" in name else name + LATEST


def copies() -> dict[str, str]:
    """Further names of the current key, each with the name of its model; they last as long as the server."""
    found: dict[str, dict[str, str]] = current_app.extensions.setdefault(_KEY, {})
    return found.setdefault(g.tenant, {})


def known(name: str | None) -> Serving | None:
    """The model of exactly that name, with or without its tag; None if there is none."""
    models, others = server().models, copies()
    for one in (name or "", (name or "").removesuffix(LATEST)):
        if one in models:
            return models[one]
        if one in others and others[one] in models:
            return models[others[one]]
    return None


def find(name: str | None) -> Serving:
    """The model of a request, which is ready.

    Raises:
        ApiError: as `Server.model_for`.
    """
    serving = known(name)
    return server().model_for(name) if serving is None else server().model(serving.name)


def find_any(name: str | None) -> Serving:
    """As `find`, also while the model is loading."""
    models = server().models
    takes_any = not name or (len(models) == 1 and server().settings.model_names == "any")
    serving = known(name) or (next(iter(models.values())) if takes_any else None)
    if serving is None:
        raise missing(name)
    return serving


def missing(name: str | None) -> ApiError:
    """404 for a model that is not served."""
    words = f"model {(name or '')[:128]!r} not found; there are {', '.join(server().models)}"
    return ApiError(404, "model_not_found", words)


def add_copy(source: str, destination: str) -> None:
    """Gives a model another name for the current key.

    Raises:
        ApiError: 404, there is no such model; 400, the name is malformed or taken, or there are too many.
    """
    serving = known(source)
    if serving is None:
        raise missing(source)
    others, name = copies(), destination.removesuffix(LATEST)
    if not _NAME.fullmatch(name):
        raise ApiError(400, "invalid_value", f"destination is {destination[:80]!r}, must be 1 .. 128 of A-Za-z0-9._:/-")
    if name in server().models:
        raise ApiError(400, "invalid_value", f"destination is {name!r}, which is the name of a model")
    if name not in others and len(others) >= MAX_COPIES:
        raise ApiError(400, "too_many_names", f"this key has {MAX_COPIES} further names of models; delete one")
    others[name] = serving.name


def remove_copy(name: str) -> bool:
    """Removes such a name; returns whether there was one."""
    others = copies()
    return any(others.pop(one, None) is not None for one in (name, name.removesuffix(LATEST)))
