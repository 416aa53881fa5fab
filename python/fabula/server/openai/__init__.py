"""OpenAI's API, as far as a server of language models can speak it: chat, completions, responses, embeddings, models.

Clients of that API need another address and nothing else. What stands in a request and cannot be done is refused by its
name, so that nobody believes in a setting that has no effect; fields that ask for nothing are listed as `Tolerated`.
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
