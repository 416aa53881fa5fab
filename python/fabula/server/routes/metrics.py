"""Metrics for Prometheus."""

from __future__ import annotations

from quart import Blueprint, Response
from quart_schema import hide

from fabula.server.metrics import CONTENT_TYPE
from fabula.server.state import server

routes = Blueprint("metrics", __name__)


@routes.get("/metrics")
@hide
async def metrics() -> Response:
    """Metrics in Prometheus' text format; needs a key if the server has keys."""
    state = server()
    return Response(await state.call(state.metrics.text), content_type=CONTENT_TYPE)
