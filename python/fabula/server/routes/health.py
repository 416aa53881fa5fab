"""Health of the server."""

from __future__ import annotations

import asyncio
from typing import Any

from quart import Blueprint
from quart_schema import document_response, tag

from fabula import __version__
from fabula.server.describe import fails
from fabula.server.replies import HealthReply
from fabula.server.state import server

routes = Blueprint("health", __name__)


@routes.get("/health")
@tag(["Server"])
@document_response(HealthReply, 200)
@document_response(HealthReply, 503)
@fails(403)
async def health() -> Any:
    """Health of the server: 200 when it is ready, 503 while models load or it stops. It never waits for the engine: the
    cache's numbers may be those of the request before."""
    state = server()
    await asyncio.gather(*(serving.refresh_usage() for serving in state.models.values()))
    failed = any(serving.state == "failed" for serving in state.models.values())
    stopping = state.gate.is_draining
    ready = state.is_ready and not stopping
    word = "stopping" if stopping else "ready" if ready else "degraded" if failed else "loading"
    return {
        "status": word,
        "live": True,
        "ready": ready,
        "version": __version__,
        "models": [serving.to_json() for serving in state.models.values()],
        "answers": state.load(),
    }, 200 if ready else 503
