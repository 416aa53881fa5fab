"""`/api/version`, `/api/tags`, `/api/show`, `/api/ps`: the server and its models."""

from __future__ import annotations

from typing import Any

from quart import Blueprint
from quart_schema import document_response, tag, validate_request

from fabula import __version__
from fabula.server.borrowed import Json
from fabula.server.describe import READING, WRITING, fails
from fabula.server.ollama import facts
from fabula.server.ollama.errors import OllamaErrorReply
from fabula.server.ollama.names import find_any
from fabula.server.ollama.schemas import ModelIn, ShowReply, TagsReply, VersionReply
from fabula.server.ollama.writer import rfc3339
from fabula.server.state import server

routes = Blueprint("ollama_models", __name__)

API_VERSION = "0.13.0"  # of Ollama, whose API this follows; clients ask for a lowest one
NEVER = "9999-12-31T23:59:59Z"  # when a model is unloaded


@routes.get("/api/version")
@tag(["Ollama"])
@document_response(VersionReply, 200)
@fails(*READING, reply=OllamaErrorReply)
async def version() -> Any:
    """The version of Ollama's API that this server follows, and its own."""
    return {"version": API_VERSION, "fabula": __version__}


@routes.get("/api/tags")
@tag(["Ollama"])
@document_response(TagsReply, 200)
@fails(*READING, reply=OllamaErrorReply)
async def tags() -> Any:
    """The models, also those that are still loading."""
    return {"models": [await facts.tag(serving) for serving in server().models.values()]}


@routes.get("/api/ps")
@tag(["Ollama"])
@document_response(TagsReply, 200)
@fails(*READING, reply=OllamaErrorReply)
async def ps() -> Any:
    """The models that are loaded."""
    found: list[Json] = []
    for serving in server().models.values():
        if (model := serving.model) is None:
            continue
        about = await facts.tag(serving)
        del about["modified_at"]
        size = model.weight_bytes
        loaded = {"expires_at": NEVER, "size_vram": 0 if model.device == "cpu" else size}
        found.append(about | {"size": size} | loaded | {"context_length": model.context})
    return {"models": found}


@routes.post("/api/show")
@tag(["Ollama"])
@validate_request(ModelIn)
@document_response(ShowReply, 200)
@fails(*WRITING, reply=OllamaErrorReply)
async def show(data: ModelIn) -> Any:
    """What is known of a model: its chat template, sampling defaults, metadata, and what it can do."""
    state, serving = server(), find_any(data.model or data.name)
    state.model(serving.name)  # 503 while it is loading
    model, known = serving.model, await facts.facts_of(serving)
    assert model is not None and known is not None
    settings = {name: value for name, value in model.defaults.values.items() if value is not None}
    return {
        "modelfile": f"FROM {serving.name}\n",
        "parameters": "\n".join(f"{name} {value}" for name, value in settings.items()),
        "template": model.tokenizer.chat_template or "",
        "details": facts.details(serving, known),
        "model_info": known.info,
        "capabilities": await state.call(lambda: facts.capabilities(model, known)),
        "modified_at": rfc3339(known.modified),
    }
