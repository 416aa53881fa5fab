"""`/v1/embeddings`: texts as vectors."""

from __future__ import annotations

import base64
from typing import Any

from quart import Blueprint
from quart_schema import document_response, tag, validate_request

from fabula.engine.embedding import Embeddings
from fabula.server.describe import WRITING, fails
from fabula.server.embed import embedded
from fabula.server.failures import refuse
from fabula.server.openai.format import Json
from fabula.server.openai.replies import EmbeddingsReply
from fabula.server.openai.schemas import MAX_INPUTS, EmbeddingBody
from fabula.server.state import Serving, server

routes = Blueprint("openai_embeddings", __name__)


@routes.post("/v1/embeddings")
@tag(["OpenAI"])
@validate_request(EmbeddingBody)
@document_response(EmbeddingsReply, 200)
@fails(*WRITING)
async def embeddings(data: EmbeddingBody) -> Any:
    """Embeds texts as vectors of length 1. Those of a model that was not trained for it are a rough measure."""
    found, serving = await embeddings_of(data)
    n_tokens = sum(found.n_tokens)
    as_bytes = data.encoding_format == "base64"

    def encoded(vector: Any) -> Any:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_bytes else vector.tolist()

    def encode() -> list[Json]:
        vectors = enumerate(found.vectors)
        return [{"object": "embedding", "index": i, "embedding": encoded(vector)} for i, vector in vectors]

    return {
        "object": "list",
        "data": await server().call(encode),
        "model": serving.name,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }


async def embeddings_of(data: EmbeddingBody) -> tuple[Embeddings, Serving]:
    """The vectors of a request's texts, and the model they are from.

    Raises:
        ApiError: a text is empty or too long, ids are of another tokenizer, or another size is asked for.
    """
    state = server()
    texts = texts_of(data)
    for i, text in enumerate(texts):
        if isinstance(text, str):
            state.limits.check_text(text, "input" if isinstance(data.input, str) else f"input[{i}]")
    serving = state.model_for(data.model)
    model = serving.model
    assert model is not None
    size = model.config.hidden_size
    _check_ids(texts, model.config.vocab_size)
    if data.dimensions not in (None, size):
        raise refuse("dimensions", f"is {data.dimensions}, the model has {size}", "unsupported")
    special = data.parse_special is not False
    return await embedded(model, texts, pooling=data.pooling or "mean", parse_special=special), serving


def texts_of(data: EmbeddingBody) -> list[str | list[int]]:
    """The texts of a request, as texts or as token ids."""
    given: Any = [data.input] if isinstance(data.input, str) else data.input
    if given and isinstance(given[0], int):
        given = [given]
    if not given or len(given) > MAX_INPUTS:
        raise refuse("input", f"holds {len(given)} texts, must hold 1 .. {MAX_INPUTS}")
    for i, text in enumerate(given):
        if not text:
            raise refuse("input" if isinstance(data.input, str) else f"input[{i}]", "is empty")
    return list(given)


def _check_ids(texts: list[str | list[int]], vocab_size: int) -> None:
    """Refuses token ids of another tokenizer, as far as they can be told from this one's."""
    ids = [token for text in texts if not isinstance(text, str) for token in text]
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise refuse(
            "input",
            f"holds the token id {wrong}, but this model's vocabulary has {vocab_size}. Ids must be of this model's "
            "tokenizer; LangChain sends those of another one unless check_embedding_ctx_length is False",
        )
