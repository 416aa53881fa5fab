"""Paths as clients write them: with a slash at the end, without /v1 or with two; and what a wrong one may mean."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

PREFIX = "/v1/"
BORROWED = ("chat/completions", "completions", "embeddings", "messages", "models", "responses")  # below PREFIX
ALIASES = {"/v1/health": "/health", "/healthz": "/health", "/api/v1/health": "/health"} | dict.fromkeys(
    ("/v1/rerank", "/v1/reranking", "/reranking"), "/rerank"
)
BEFORE = ("/api/v1/", "/openai/v1/", "/v1/v1/")  # other servers' names for PREFIX, and a base URL with one too many


def canonical(path: str) -> str:
    """The path of the route that is meant.

    Args:
        path: of a request, without its query.
    """
    if path.endswith("/") and path.strip("/") and not path.startswith("/static/"):
        path = path.rstrip("/")
    if path in ALIASES:
        return ALIASES[path]
    for prefix in BEFORE:
        if path.startswith(prefix):
            path = PREFIX + path[len(prefix) :]
    rest = path.removeprefix("/")
    is_borrowed = any(rest == name or rest.startswith(name + "/") for name in BORROWED)
    return PREFIX + rest if is_borrowed and path.startswith("/") else path


def nearest(path: str, known: Iterable[str]) -> str | None:
    """The path among known ones that is most like a wrong one; None if none is."""
    paths = sorted(one for one in set(known) if "<" not in one)
    last = path.rstrip("/").rpartition("/")[2]
    ends = [one for one in paths if last and one.rpartition("/")[2] == last]
    found = ends[:1] or difflib.get_close_matches(path[:128], paths, n=1, cutoff=0.6)
    return found[0] if found else None
