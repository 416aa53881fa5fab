"""`/v1/messages`: answers to conversations that the client stores; `/v1/messages/count_tokens` counts their tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quart import Blueprint, Response, g
from quart_schema import document_response, tag, validate_request

from fabula.engine.generation import Generation
from fabula.model import Model
from fabula.server.anthropic.errors import AnthropicErrorReply
from fabula.server.anthropic.prompt import Prompt, params_of, prompt_of, thoughts_of, wish_of
from fabula.server.anthropic.schemas import CountBody, CountReply, MessageReply, MessagesBody, PromptBody
from fabula.server.anthropic.writer import PING, MessageWriter
from fabula.server.borrowed import Json, follow
from fabula.server.describe import LENDING, WRITING, fails, streams
from fabula.server.openai.format import start_generations
from fabula.server.reasoning import AnswerParser, Reasoning
from fabula.server.start_run import begin, cancel_all, start_run
from fabula.server.state import Server, Serving, server
from fabula.server.stream import response
from fabula.sessions.tools import Calling, with_tools
from fabula.text.prefill import is_prefilled

routes = Blueprint("anthropic_messages", __name__)


@routes.after_request
async def _name_request(response: Response) -> Response:
    response.headers["request-id"] = g.get("request_id", "")  # under this name Anthropic's clients look for it
    return response


@routes.post("/v1/messages")
@streams
@tag(["Anthropic"])
@validate_request(MessagesBody)
@document_response(MessageReply, 200)
@fails(*LENDING, reply=AnthropicErrorReply)
async def messages(data: MessagesBody) -> Any:
    """Answers a conversation in the form of Anthropic's Messages API. It is not stored; a prefix shared with an earlier
    request is not recomputed."""
    state, tenant = server(), g.tenant
    serving = state.model_for(data.model)
    writer: MessageWriter

    def describe(_: int) -> Json:
        return writer.whole()

    generations, calling = await begin(lambda: _begin(state, serving, tenant, data), lambda made: cancel_all(made[0]))
    run = start_run(state, tenant, serving.name, generations, describe, partial_fails=True)
    generation = generations[0]
    writer = MessageWriter(
        serving.name, generation, run, lambda: AnswerParser(generation.params, calling), thoughts_of(data)
    )
    if data.stream:
        return response(follow(run, writer.events, lambda: (), idle=PING))
    return (await run.finish())[0]


@routes.post("/v1/messages/count_tokens")
@tag(["Anthropic"])
@validate_request(CountBody)
@document_response(CountReply, 200)
@fails(*WRITING, reply=AnthropicErrorReply)
async def count_tokens(data: CountBody) -> Any:
    """Counts the tokens of a conversation's prompt; generates nothing."""
    state = server()
    model = _model(state.model_for(data.model))

    def count() -> int:
        return len(_prompt_ids(model, data, prompt_of(data, state.limits), Reasoning(model, wish_of(data)))[0])

    return {"input_tokens": await state.call(count)}


def _model(serving: Serving) -> Model:
    assert serving.model is not None
    return serving.model


def _prompt_ids(model: Model, data: PromptBody, prompt: Prompt, reasoning: Reasoning) -> tuple[list[int], str | None]:
    """Token ids of the prompt, and the text at its end that the answer continues; None for a new turn. Blocks."""
    plain, options = reasoning.messages(prompt.messages), dict(reasoning.options)
    if prompt.tools or any(m["role"] == "tool" or "tool_calls" in m for m in plain):
        plain, more = with_tools(plain, prompt.tools, model.template)
        options |= more
    ids = model.chat_ids(plain, parse_special=bool(data.parse_special), **options)
    return ids, str(plain[-1]["content"]) if is_prefilled(plain, None) else None


def _begin(state: Server, serving: Serving, tenant: str, data: MessagesBody) -> tuple[list[Generation], Calling | None]:
    """Reads the request and starts its answer; blocks."""
    model, params, prompt = _model(serving), params_of(data), prompt_of(data, state.limits)
    reasoning, calling = Reasoning(model, wish_of(data)), None
    if prompt.tools:
        calling = Calling(model.template, model.tokenizer, prompt.tools, reasoning.options)
        params = replace(params, constraint=calling.constraint(prompt.choice, prompt.parallel, params.constraint))
    ids, reply = _prompt_ids(model, data, prompt, reasoning)
    unless, timeout = calling.form.opening if calling is not None else "", state.settings.answer_s
    params = reasoning.params(params, ids, reply or "", unless=unless)
    continues = reply is not None
    made = start_generations(model, [ids], params, 1, continues=continues, tenant=tenant, timeout=timeout)
    return made, calling
