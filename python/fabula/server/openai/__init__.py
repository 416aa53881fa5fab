"""OpenAI's API: chat, completions, responses, embeddings, models.

Its clients only change the base URL. A request with a field that is not supported is refused, and the error names the
field, so that no setting is ignored silently; fields that need nothing from a server are listed in `Tolerated`.
"""

from __future__ import annotations

from quart import Blueprint


def blueprints() -> list[Blueprint]:
    """The routes below /v1."""
    from fabula.server.openai.chat import routes as chat
    from fabula.server.openai.completions import routes as completions
    from fabula.server.openai.embeddings import routes as embeddings
    from fabula.server.openai.models import routes as models
    from fabula.server.openai.responses import routes as responses

    return [models, chat, completions, responses, embeddings]
