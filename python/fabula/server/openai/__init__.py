"""OpenAI's API: chat, completions, responses, embeddings, models.

Its clients only change the base URL. Fields of other servers' dialects are understood (`dialects.py`), and unknown ones
are ignored and named in a header of the reply (`tolerance.py`). What would change the answer's meaning is refused.
"""

from __future__ import annotations

from quart import Blueprint


def blueprints() -> list[Blueprint]:
    """The routes below /v1."""
    from fabula.server.openai.chat import routes as chat
    from fabula.server.openai.completions import routes as completions
    from fabula.server.openai.embeddings import routes as embeddings
    from fabula.server.openai.models import routes as models
    from fabula.server.openai.response_inputs import routes as response_inputs
    from fabula.server.openai.responses import routes as responses

    return [models, chat, completions, responses, response_inputs, embeddings]
