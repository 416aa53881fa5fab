"""Ollama's API: `/api/chat`, `/api/generate`, `/api/embed`, `/api/tags` and the others.

Its clients find the server at its own port, or at a second one (`--ollama-port 11434`). Models are those of the server,
which stay loaded; `/api/copy` gives one another name for a key, and `/api/pull` reports how far its loading is.
"""

from __future__ import annotations

from quart import Blueprint


def blueprints() -> list[Blueprint]:
    """The routes below /api."""
    from fabula.server.ollama.chat import routes as chat
    from fabula.server.ollama.embed import routes as embed
    from fabula.server.ollama.generate import routes as generate
    from fabula.server.ollama.manage import routes as manage
    from fabula.server.ollama.models import routes as models

    return [models, chat, generate, embed, manage]
