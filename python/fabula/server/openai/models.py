"""The models of the server."""

from __future__ import annotations

from typing import Any

from quart import Blueprint
from quart_schema import document_response, tag

from fabula.server.describe import READING, fails
from fabula.server.failures import not_found
from fabula.server.openai.replies import ModelReply, ModelsReply
from fabula.server.state import Server, server

routes = Blueprint("openai_models", __name__)


def _told(state: Server, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(state.begun_at), "owned_by": "fabula"}


@routes.get("/v1/models")
@tag(["OpenAI"])
@document_response(ModelsReply, 200)
@fails(*READING)
async def models() -> Any:
    """The models, also those that are still loading."""
    state = server()
    return {"object": "list", "data": [_told(state, name) for name in state.models]}


@routes.get("/v1/models/<path:id>")
@tag(["OpenAI"])
@document_response(ModelReply, 200)
@fails(*READING)
async def model(id: str) -> Any:
    """A model."""
    state = server()
    if id not in state.models:
        raise not_found("model", id)
    return _told(state, id)
