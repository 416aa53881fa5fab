"""`/api/embed` and `/api/embeddings`: texts as vectors."""

from __future__ import annotations

import time
from typing import Any

from quart import Blueprint
from quart_schema import document_response, tag, validate_request

from fabula.server.describe import WRITING, fails
from fabula.server.embed import embedded
from fabula.server.failures import refuse
from fabula.server.ollama.errors import OllamaErrorReply
from fabula.server.ollama.names import find
from fabula.server.ollama.schemas import EmbeddingIn, EmbeddingOut, EmbedIn, EmbedOut
from fabula.server.openai.schemas import MAX_INPUTS
from fabula.server.state import Serving, server

routes = Blueprint("ollama_embed", __name__)


@routes.post("/api/embed")
@tag(["Ollama"])
@validate_request(EmbedIn)
@document_response(EmbedOut, 200)
@fails(*WRITING, reply=OllamaErrorReply)
async def embed(data: EmbedIn) -> Any:
    """Embeds texts as vectors of length 1. Those of a model that was not trained for it are a rough measure."""
    serving = find(data.model)
    texts = [data.input] if isinstance(data.input, str) else list(data.input or [])
    assert serving.model is not None
    size = serving.model.config.hidden_size
    if data.dimensions not in (None, size):
        raise refuse("dimensions", f"is {data.dimensions}, the model has {size}", "unsupported")
    begun = time.perf_counter()
    vectors, n_tokens = await _embedded(serving, texts, "input")
    return {
        "model": serving.name,
        "embeddings": vectors,
        "total_duration": max(1, round(1e9 * (time.perf_counter() - begun))),
        "load_duration": 0,
        "prompt_eval_count": n_tokens,
    }


@routes.post("/api/embeddings")
@tag(["Ollama"])
@validate_request(EmbeddingIn)
@document_response(EmbeddingOut, 200)
@fails(*WRITING, reply=OllamaErrorReply)
async def embeddings(data: EmbeddingIn) -> Any:
    """Embeds a text; an older form of `/api/embed`."""
    vectors, _ = await _embedded(find(data.model), [data.prompt] if data.prompt else [], "prompt")
    return {"embedding": vectors[0] if vectors else []}


async def _embedded(serving: Serving, texts: list[str], param: str) -> tuple[list[list[float]], int]:
    """The vectors of texts, and the number of their tokens.

    Raises:
        ApiError: there are too many texts, or one is empty or too long.
    """
    state, model = server(), serving.model
    assert model is not None
    if len(texts) > MAX_INPUTS:
        raise refuse(param, f"holds {len(texts)} texts, must hold {MAX_INPUTS} at most")
    for i, text in enumerate(texts):
        if not text:
            raise refuse(f"{param}[{i}]", "is empty")
        state.limits.check_text(text, f"{param}[{i}]")
    if not texts:
        return [], 0
    found = await embedded(model, texts)
    n_tokens = sum(found.n_tokens)
    return await state.call(lambda: [vector.tolist() for vector in found.vectors]), n_tokens
