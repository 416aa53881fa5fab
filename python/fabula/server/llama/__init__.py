"""llama.cpp's own routes, for its clients: /completion, /infill, /apply-template, /props, /slots, /embedding, /rerank.
Those of one name with ours, /tokenize and /detokenize, understand both bodies."""

from __future__ import annotations

from quart import Blueprint


def blueprints() -> list[Blueprint]:
    """The routes."""
    from fabula.server.llama.completion import routes as completion
    from fabula.server.llama.slots import routes as slots
    from fabula.server.llama.text import routes as text

    return [completion, text, slots]
