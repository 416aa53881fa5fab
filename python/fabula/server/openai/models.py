"""The models of the server."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from quart import Blueprint
from quart_schema import document_response, tag

from fabula.server.describe import READING, fails
from fabula.server.failures import not_found
from fabula.server.openai.replies import ModelReply, ModelsReply
from fabula.server.state import Server, server

routes = Blueprint("openai_models", __name__)


def _told(state: Server, name: str) -> dict[str, Any]:
    """A model, with what clients of other servers look for: its context length, family and quantization."""
    found = {"id": name, "object": "model", "created": int(state.begun_at), "owned_by": "fabula"}
    begun_at = datetime.fromtimestamp(int(state.begun_at), UTC).isoformat().replace("+00:00", "Z")
    found |= {"type": "model", "display_name": name, "created_at": begun_at}  # Anthropic's
    model = state.models[name].model
    if model is None:  # still loading
        return found
    return found | {
        "context_length": model.context,
        "max_model_len": model.context,  # vLLM's name for it
        "max_input_tokens": model.context,  # Anthropic's
        "family": model.config.model_type,
        "quantization": model.weights,
        "meta": {  # llama.cpp's
            "n_ctx_train": model.config.context_length,
            "n_ctx": model.context,
            "n_vocab": model.config.vocab_size,
            "n_embd": model.config.hidden_size,
            "size": model.weight_bytes,
        },
    }


@routes.get("/v1/models")
@tag(["OpenAI"])
@document_response(ModelsReply, 200)
@fails(*READING)
async def models() -> Any:
    """The models, also those that are still loading."""
    state = server()
    found = [_told(state, name) for name in state.models]
    pages = {"has_more": False, "first_id": found[0]["id"], "last_id": found[-1]["id"]}  # Anthropic's
    return {"object": "list", "data": found} | pages


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
