"""`/api/generate`: answers to single prompts, and continuations of raw text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quart import Blueprint, g
from quart_schema import document_response, tag, validate_request

from fabula.engine.generation import Generation
from fabula.model import Model
from fabula.server.borrowed import Json, ignore
from fabula.server.describe import LENDING, fails, sends
from fabula.server.failures import refuse
from fabula.server.ollama.answer import LINES, Made, answer, loaded
from fabula.server.ollama.errors import OllamaErrorReply
from fabula.server.ollama.names import find
from fabula.server.ollama.options import params_of, wish_of
from fabula.server.ollama.prompt import NO_IMAGES
from fabula.server.ollama.schemas import GenerateIn, GenerateOut
from fabula.server.openai.format import start_generations
from fabula.server.reasoning import Reasoning
from fabula.server.state import Server, Serving, server
from fabula.text.continuation import encode_next
from fabula.text.fim import gap_prompt

routes = Blueprint("ollama_generate", __name__)


@routes.post("/api/generate")
@sends(LINES)
@tag(["Ollama"])
@validate_request(GenerateIn)
@document_response(GenerateOut, 200)
@fails(*LENDING, reply=OllamaErrorReply)
async def generate(data: GenerateIn) -> Any:
    """Answers a prompt in the form of Ollama's API; with `raw`, continues it as it is."""
    state, tenant = server(), g.tenant
    serving = find(data.model)
    _check(data)
    if not data.prompt:
        return loaded(serving, _shaped)
    if data.context and data.system:
        ignore("system")  # the context has its own
    more = _nothing if data.raw or data.suffix else _context
    return await answer(serving, lambda: _begin(state, serving, tenant, data), _shaped, data=data, more=more)


def _check(data: GenerateIn) -> None:
    """Raises ApiError for a field that would change the answer, but is not supported."""
    if data.images:
        raise refuse("images", NO_IMAGES, "unsupported")
    if data.template:
        raise refuse(
            "template", "is not supported: the model's own chat template is used, or none with raw", "unsupported"
        )
    if (data.raw or data.suffix) and (data.context or data.system):
        word = "raw" if data.raw else "suffix"
        raise refuse(word, "excludes context and system: write them into the prompt")


def _shaped(piece: Json) -> Json:
    """The fields of a reply; its text is called `response`."""
    return {"response" if name == "content" else name: value for name, value in piece.items()}


def _nothing(_: Generation) -> Json:
    return {}


def _context(generation: Generation) -> Json:
    """The tokens of the prompt and the answer, to continue from."""
    return {"context": [*generation.prompt_ids, *generation.read_so_far()[0]]}


def _begin(state: Server, serving: Serving, tenant: str, data: GenerateIn) -> Made:
    """Reads the request and starts its answer; blocks."""
    model = serving.model
    assert model is not None and data.prompt is not None
    params, prompt = params_of(data), data.prompt
    state.limits.check_text(prompt, "prompt")
    state.limits.check_text(data.system or "", "system")
    if data.suffix:
        state.limits.check_text(data.suffix, "suffix")
        gap = gap_prompt(model.tokenizer, prompt, data.suffix)
        if gap is None:
            raise refuse("suffix", "needs a model with marks for gaps, such as Qwen2.5-Coder", "unsupported")
        ids, params = gap.ids, replace(params, stop_tokens=(*params.stop_tokens, *gap.ends))
    elif data.raw:
        ids = model.tokenizer.encode(prompt, special=True)
    else:
        reasoning = Reasoning(model, wish_of(data.think))
        options = reasoning.options
        messages = [{"role": "user", "content": prompt}]
        if data.context:
            ids = _continued(model, list(data.context), messages, options)
        else:
            system = [{"role": "system", "content": data.system}] if data.system else []
            ids = model.chat_ids([*system, *messages], **options)
        params = reasoning.params(params, ids)
    continues, timeout = bool(data.raw or data.suffix), state.settings.answer_s
    made = start_generations(model, [ids], params, 1, continues=continues, tenant=tenant, timeout=timeout)
    return made, None


def _continued(model: Model, context: list[int], messages: list[Json], options: Json) -> list[int]:
    """Token ids of a conversation that is known by its ids alone, and a new message.

    The template's text between a reply and the next one does not depend on what was said before, so a stand-in for the
    past gives it.
    """
    past = [{"role": "user", "content": "Hello."}]
    stand_in = [*past, {"role": "assistant", "content": "Hello."}, *messages]
    ids = encode_next(model.tokenizer, model.template, stand_in, context, options, (past, options))
    if ids[: len(context)] != context:
        raise refuse(
            "context", "cannot be continued with this model's template; send messages to /api/chat", "unsupported"
        )
    return ids
