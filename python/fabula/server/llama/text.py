"""`/apply-template`, `/props`, `/embedding` and `/rerank` of llama.cpp's server."""

from __future__ import annotations

from typing import Any

from quart import Blueprint
from quart_schema import document_response, tag, validate_request

from fabula import __version__
from fabula.server.describe import READING, WRITING, fails
from fabula.server.embed import embedded
from fabula.server.failures import refuse
from fabula.server.llama.schemas import (
    LlamaEmbeddingBody,
    LlamaEmbeddingReply,
    PropsReply,
    RerankBody,
    RerankReply,
    TemplateBody,
    TemplateReply,
)
from fabula.server.openai.embeddings import embeddings_of
from fabula.server.openai.format import Json
from fabula.server.openai.messages import plain_messages
from fabula.server.reasoning import Reasoning, Wish
from fabula.server.state import server
from fabula.sessions.tools import with_tools

routes = Blueprint("llama_text", __name__)

MAX_DOCUMENTS = 1024


@routes.post("/apply-template")
@tag(["llama.cpp"])
@validate_request(TemplateBody)
@document_response(TemplateReply, 200)
@fails(*WRITING)
async def apply_template(data: TemplateBody) -> Any:
    """A conversation as the model's chat template renders it."""
    state = server()
    model = state.model_for(data.model).model
    assert model is not None
    state.limits.check_messages(len(data.messages), "messages")

    def work() -> Json:
        wish = Wish(data.enable_thinking, data.reasoning_effort, data.thinking_budget)
        reasoning = Reasoning(model, wish, data.chat_template_kwargs)
        messages = reasoning.messages(plain_messages(data.messages, state.limits))
        options = reasoning.options
        if data.tools or any("tool_calls" in message or message["role"] == "tool" for message in messages):
            messages, more = with_tools(messages, data.tools or [], model.template)
            options = {**options, **more}
        if data.add_generation_prompt is not None:
            options = {**options, "add_generation_prompt": data.add_generation_prompt}
        ids = model.chat_ids(messages, continue_final_message=data.continue_final_message, **options)
        return {"prompt": model.tokenizer.decode(ids, skip_special=False)}

    return await state.call(work)


@routes.get("/props")
@tag(["llama.cpp"])
@document_response(PropsReply, 200)
@fails(*READING)
async def props() -> Any:
    """The first model and its settings."""
    state = server()
    serving = state.model_for(None)
    model = serving.model
    assert model is not None
    tokenizer = model.tokenizer

    def name(token: int | None) -> str:
        return "" if token is None else tokenizer.token_text(token)

    return {
        "default_generation_settings": {"n_ctx": model.context, "params": dict(model.defaults.to_json())},
        "total_slots": state.settings.max_running,
        "model_alias": serving.name,
        "model_path": serving.name,  # clients do not see paths
        "chat_template": tokenizer.chat_template or "",
        "bos_token": name(tokenizer.bos_id),
        "eos_token": name(next(iter(tokenizer.eos_ids), None)),
        "modalities": {"vision": False, "audio": False},
        "build_info": f"fabula {__version__}",
    }


@routes.post("/embedding")
@tag(["llama.cpp"])
@validate_request(LlamaEmbeddingBody)
@document_response(list[LlamaEmbeddingReply], 200)
@fails(*WRITING)
async def embedding(data: LlamaEmbeddingBody) -> Any:
    """Embeds texts as vectors of length 1, in llama.cpp's form."""
    if data.embd_normalize not in (None, 2):
        raise refuse("embd_normalize", f"is {data.embd_normalize}, must be 2: vectors have the length 1", "unsupported")
    found, _ = await embeddings_of(data)
    return [{"index": i, "embedding": [vector]} for i, vector in enumerate(found.vectors.tolist())]


@routes.post("/rerank")
@tag(["llama.cpp"])
@validate_request(RerankBody)
@document_response(RerankReply, 200)
@fails(*WRITING)
async def rerank(data: RerankBody) -> Any:
    """Documents in the order of their likeness to a query: the cosine of their embeddings' angle."""
    state = server()
    serving = state.model_for(data.model)
    model = serving.model
    assert model is not None
    given = [one if isinstance(one, str) else one.get("text") for one in data.documents]
    if not 1 <= len(given) <= MAX_DOCUMENTS:
        raise refuse("documents", f"holds {len(given)} texts, must hold 1 .. {MAX_DOCUMENTS}")
    texts: list[str] = []
    for i, text in enumerate([data.query, *given]):
        where = f"documents[{i - 1}]" if i else "query"
        if not isinstance(text, str) or not text:
            raise refuse(where, "must be a text that is not empty")
        state.limits.check_text(text, where)
        texts.append(text)
    if data.top_n is not None and data.top_n < 1:
        raise refuse("top_n", f"is {data.top_n}, must be 1 or more")
    found = await embedded(model, texts)
    n_tokens = sum(found.n_tokens)
    scores = (found.vectors[1:] @ found.vectors[0]).tolist()
    order = sorted(range(len(given)), key=lambda i: -scores[i])[: data.top_n]
    results: list[Json] = [{"index": i, "relevance_score": scores[i]} for i in order]
    if data.return_documents:
        results = [one | {"document": {"text": given[one["index"]]}} for one in results]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"model": serving.name, "object": "list", "usage": usage, "results": results}
