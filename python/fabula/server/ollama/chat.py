"""`/api/chat`: answers to conversations that the client stores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quart import Blueprint, g
from quart_schema import document_response, tag, validate_request

from fabula.server.borrowed import Json
from fabula.server.describe import LENDING, fails, sends
from fabula.server.ollama.answer import LINES, Made, answer, loaded
from fabula.server.ollama.errors import OllamaErrorReply
from fabula.server.ollama.names import find
from fabula.server.ollama.options import params_of, wish_of
from fabula.server.ollama.prompt import messages_of
from fabula.server.ollama.schemas import ChatIn, ChatOut
from fabula.server.openai.format import start_generations
from fabula.server.reasoning import Reasoning
from fabula.server.state import Server, Serving, server
from fabula.sessions.tools import Calling, with_tools
from fabula.text.prefill import is_prefilled

routes = Blueprint("ollama_chat", __name__)


@routes.post("/api/chat")
@sends(LINES)
@tag(["Ollama"])
@validate_request(ChatIn)
@document_response(ChatOut, 200)
@fails(*LENDING, reply=OllamaErrorReply)
async def chat(data: ChatIn) -> Any:
    """Answers a conversation in the form of Ollama's API. It is not stored; a prefix shared with an earlier request is
    not recomputed."""
    state, tenant = server(), g.tenant
    serving = find(data.model)
    if not data.messages:
        return loaded(serving, _shaped)
    return await answer(serving, lambda: _begin(state, serving, tenant, data), _shaped, data=data)


def _shaped(piece: Json) -> Json:
    return {"message": {"role": "assistant", **piece}}


def _begin(state: Server, serving: Serving, tenant: str, data: ChatIn) -> Made:
    """Reads the request and starts its answer; blocks."""
    model = serving.model
    assert model is not None and data.messages is not None
    params, messages = params_of(data), messages_of(data.messages, state.limits)
    reasoning = Reasoning(model, wish_of(data.think))
    messages, options = reasoning.messages(messages), dict(reasoning.options)
    calling, tools = None, [{"type": "function"} | tool for tool in data.tools or []]
    if tools:
        calling = Calling(model.template, model.tokenizer, tools, options)
        params = replace(params, constraint=calling.constraint("auto", True, params.constraint))
    if tools or any(m["role"] == "tool" or "tool_calls" in m for m in messages):
        messages, more = with_tools(messages, tools, model.template)
        options |= more
    ids = model.chat_ids(messages, **options)
    continues, timeout = is_prefilled(messages, None), state.settings.answer_s
    reply, unless = str(messages[-1]["content"]) if continues else "", calling.form.opening if calling else ""
    params = reasoning.params(params, ids, reply, unless=unless)
    made = start_generations(model, [ids], params, 1, continues=continues, tenant=tenant, timeout=timeout)
    return made, calling
