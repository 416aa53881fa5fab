"""`/api/pull`, `/api/copy`, `/api/delete`: which models there are, and under which names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from quart import Blueprint, Response
from quart_schema import document_response, tag, validate_request

from fabula.formats.locate import can_be_fetched
from fabula.server.borrowed import Json
from fabula.server.describe import WRITING, fails, sends
from fabula.server.failures import ApiError, refuse
from fabula.server.ollama.answer import LINES, lines
from fabula.server.ollama.errors import OllamaErrorReply
from fabula.server.ollama.names import LATEST, add_copy, known, missing, remove_copy
from fabula.server.ollama.schemas import CopyIn, ModelIn, PullIn, StatusReply
from fabula.server.ollama.writer import line
from fabula.server.state import Serving, server

routes = Blueprint("ollama_manage", __name__)

POLL_S = 0.1  # between two looks at a model that is loading
_HUB = ("hf.co/", "huggingface.co/")  # what Ollama writes before names on the hub


@routes.post("/api/pull")
@sends(LINES)
@tag(["Ollama"])
@validate_request(PullIn)
@document_response(StatusReply, 200)
@fails(*WRITING, reply=OllamaErrorReply)
async def pull(data: PullIn) -> Any:
    """Reports the progress of a model until it is loaded. With `--pull` it also fetches and serves one that is not
    served yet: a model that Fabula knows by name, or `owner/repository` on the Hugging Face hub."""
    name = data.model or data.name
    if not name:
        raise refuse("model", "is missing", "missing_field")
    serving = known(name) or _added(name)
    if data.stream is not False:
        return lines(_lines(serving))
    async for step in _steps(serving):
        if "error" in step:
            raise ApiError(503, "model_failed", step["error"])
    return {"status": "success"}


def _added(name: str) -> Serving:
    """A model that is served from now on; it loads in the background.

    Raises:
        ApiError: 404, there is no such model; 400, the server serves no others than those it was started with.
    """
    state = server()
    place = name.removesuffix(LATEST)
    for prefix in _HUB:
        place = place.removeprefix(prefix)
    if not state.settings.pull:
        words = f"model {name[:128]!r} is not served: start the server with --model {place[:128]}, or with --pull"
        raise ApiError(404, "model_not_found", words)
    if not state.settings.fetch or not can_be_fetched(place):
        raise missing(name)
    return state.add_model(place)


async def _lines(serving: Serving) -> AsyncIterator[bytes]:
    async for step in _steps(serving):
        yield line(step)


async def _steps(serving: Serving) -> AsyncIterator[Json]:
    """What a model's loading comes to, in Ollama's words."""
    yield {"status": "pulling manifest"}
    told: Json = {}
    while serving.state not in ("ready", "failed"):
        step: Json = {"status": "pulling manifest"}
        if serving.total:
            word = f"pulling {serving.name}" if serving.state == "fetching" else "verifying sha256 digest"
            step = {"status": word, "digest": serving.name, "total": serving.total, "completed": serving.done}
        if step != told and told:
            yield step
        told = step
        await asyncio.sleep(POLL_S)
    if serving.state == "failed":
        yield {"error": f"model {serving.name} could not be loaded: {serving.error}"}
        return
    yield {"status": "success"}


@routes.post("/api/copy")
@tag(["Ollama"])
@validate_request(CopyIn)
@document_response(StatusReply, 200)
@fails(*WRITING, reply=OllamaErrorReply)
async def copy(data: CopyIn) -> Any:
    """Gives a model another name for this key, until the server stops."""
    add_copy(data.source, data.destination)
    return {"status": "success"}


@routes.delete("/api/delete")
@tag(["Ollama"])
@validate_request(ModelIn)
@document_response(StatusReply, 200)
@fails(*WRITING, reply=OllamaErrorReply)
async def delete(data: ModelIn) -> Response | Json:
    """Removes a name that `/api/copy` gave, or a model that `/api/pull` added. Files stay."""
    name = data.model or data.name
    if not name:
        raise refuse("model", "is missing", "missing_field")
    if not remove_copy(name):
        serving = known(name)
        if serving is None:
            raise missing(name)
        await server().remove_model(serving)
    return {"status": "success"}
