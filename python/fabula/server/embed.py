"""Embeds the texts of a request, for every API that has a route for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from quart import g

from fabula.engine.embedding import Embeddings
from fabula.engine.generation import Timings
from fabula.model import Model
from fabula.server.start_run import begin
from fabula.server.state import server


async def embedded(model: Model, texts: Sequence[Any], **options: Any) -> Embeddings:
    """The vectors of texts; stops when the client leaves, and charges the key for the tokens.

    Args:
        model, texts, options: as for `Model.embed`.
    """
    left = threading.Event()
    try:
        found = await begin(lambda: model.embed(texts, should_stop=left.is_set, **options), lambda _: None)
    except asyncio.CancelledError:  # the client left
        left.set()
        raise
    server().limits.pay(g.tenant, Timings(sum(found.n_tokens), 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    return found
