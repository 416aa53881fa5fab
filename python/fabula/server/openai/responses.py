"""`/v1/responses`: conversations that the server stores; each response can be continued."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from quart import Blueprint, g
from quart_schema import document_response, tag, validate_request

from fabula.engine.generation import Generation
from fabula.engine.sampling import SamplingParams
from fabula.model import Model
from fabula.server.describe import LENDING, READING, fails, streams
from fabula.server.failures import refuse
from fabula.server.openai import conversations
from fabula.server.openai.format import Json, ended_itself, follow, start_generations
from fabula.server.openai.items import Output, messages_of, tools_of
from fabula.server.openai.params import response_params, uses_tools, wish_of
from fabula.server.openai.replies import DeletedReply, ResponseReply
from fabula.server.openai.response_json import failure, of_request, of_turn, repeated_calls, status_of, usage
from fabula.server.openai.schemas import ResponseBody
from fabula.server.reasoning import Reasoning, n_thought_tokens
from fabula.server.runs import Event
from fabula.server.start_run import begin, start_run
from fabula.server.state import Server, Serving, server
from fabula.server.stream import dumps, response
from fabula.sessions.reply import Reply
from fabula.sessions.session import Session
from fabula.sessions.tools import Calling, with_tools
from fabula.sessions.turn import Turn

routes = Blueprint("openai_responses", __name__)


@dataclass(frozen=True, slots=True)
class Started:
    """A response that is being generated.

    Attributes:
        id: of the response.
        key: prefix of its items' ids.
        model: name of the model.
        source: generates it.
        session: the session it belongs to; None for none.
        is_kept: whether later responses can follow it.
        calling: how it calls tools; None where it does not.
    """

    id: str
    key: str
    model: str
    source: Reply | Generation
    session: Session | None
    is_kept: bool
    calling: Calling | None

    @property
    def generation(self) -> Generation:
        return self.source.generation if isinstance(self.source, Reply) else self.source


@routes.post("/v1/responses")
@streams
@tag(["OpenAI"])
@validate_request(ResponseBody)
@document_response(ResponseReply, 200)
@fails(*LENDING)
async def create(data: ResponseBody) -> Any:
    """Answers, after any earlier response or as the first of a conversation.

    An input with its own history (items of the assistant) is answered as with `store: false`.
    """
    state, tenant = server(), g.tenant

    def describe(_: int) -> Json:
        if started.session is not None:
            if not started.is_kept:
                state.delete(started.session)
            elif run.is_left:
                state.drop_empty(started.session)
        return writer.whole()

    started = await begin(lambda: _start(state, tenant, data), lambda made: _undo(state, made))
    writer = ResponseWriter(data, started)
    session_id = started.session.id if started.session is not None else None
    run = start_run(state, tenant, started.model, [started.source], describe, session_id=session_id, partial_fails=True)
    if data.stream:
        return response(follow(run, writer.events, lambda: ()))
    return (await run.finish())[0]


def _undo(state: Server, started: Started) -> None:
    """Cancels a response whose client left, and deletes the session created for it; blocks."""
    started.source.cancel()
    if started.session is not None:
        if started.is_kept:
            state.drop_empty(started.session)
        else:
            state.delete(started.session)


@routes.get("/v1/responses/<id>")
@tag(["OpenAI"])
@document_response(ResponseReply, 200)
@fails(*READING)
async def read(id: str) -> Any:
    """A stored response. `metadata` and `user` are not stored."""
    state, tenant = server(), g.tenant

    def work() -> Json:
        session, turn = _found(state, tenant, id)
        serving = state.models.get(session.model)
        return of_turn(id, session, turn, serving.model if serving is not None else None)

    return await state.call(work)


@routes.delete("/v1/responses/<id>")
@tag(["OpenAI"])
@document_response(DeletedReply, 200)
@fails(*READING)
async def delete(id: str) -> Any:
    """Deletes a response. Responses that continue it stay, and its text stays in their history."""
    state, tenant = server(), g.tenant
    await state.call(lambda: conversations.delete(state, *_found(state, tenant, id)))
    return {"id": id, "object": "response", "deleted": True}


def _found(state: Server, tenant: str, id: str) -> tuple[Session, Turn]:
    found = conversations.find(state, tenant, id)
    if found is None:
        raise conversations.not_found(id)
    return found


# ---- Starting -------------------------------------------------------------------------------------------------------


def _start(state: Server, tenant: str, data: ResponseBody) -> Started:
    """Reads the request and starts its response; blocks."""
    if isinstance(data.input, list):
        state.limits.check_messages(len(data.input), "input")
    messages = messages_of(data.input, state.limits)
    if data.instructions:
        state.limits.check_text(data.instructions, "instructions")
    params = response_params(data)
    tools = tools_of(data.tools) if uses_tools(data) else []
    has_history = any(message["role"] == "assistant" for message in messages)
    given = "previous_response_id" if data.previous_response_id is not None else "conversation"
    if getattr(data, given) is not None and has_history:
        raise refuse("input", f"holds messages of the assistant; leave them out with {given}, which has them")
    if data.conversation is not None:
        return _join_conversation(state, tenant, data, messages, params, tools)
    if data.previous_response_id is not None:
        return _follow_response(state, tenant, data, messages, params, tools)
    serving = state.model_for(data.model)
    if has_history or data.store is False:
        return _answer_once(state, tenant, serving, data, messages, params, tools)
    conversations.make_room(state, tenant)
    policy = "drop_oldest_turns" if data.truncation == "auto" else None
    session = state.workspace.session(
        conversations.new_name(), model=serving.name, system=data.instructions, context_policy=policy, tenant=tenant
    )
    state.remember(session, is_new=True)
    return _add_turn(state, session, data, messages, params, tools, is_new=True)


def _join_conversation(
    state: Server, tenant: str, data: ResponseBody, messages: list[Json], params: SamplingParams, tools: list[Json]
) -> Started:
    """Starts a response that follows the last one of a conversation."""
    if data.previous_response_id is not None:
        raise refuse("conversation", "and previous_response_id exclude each other")
    given = data.conversation if isinstance(data.conversation, str) else (data.conversation or {}).get("id")
    session = conversations.find_conversation(state, tenant, str(given))
    if data.model and state.model_for(data.model).name != session.model:
        raise refuse("model", f"is {data.model!r:.128}, but the conversation uses {session.model}")
    if data.instructions and data.instructions != _instructions(session, session.head):
        messages = [{"role": "system", "content": data.instructions}, *messages]
    return _add_turn(state, session, data, messages, params, tools, is_new=False)


def _follow_response(
    state: Server, tenant: str, data: ResponseBody, messages: list[Json], params: SamplingParams, tools: list[Json]
) -> Started:
    """Starts a response that follows another."""
    found = conversations.find(state, tenant, data.previous_response_id or "")
    if found is None:
        raise refuse("previous_response_id", "names no response", "previous_response_not_found")
    session, turn = found
    if data.model and state.model_for(data.model).name != session.model:
        raise refuse("model", f"is {data.model!r:.128}, but the conversation uses {session.model}")
    if data.truncation == "auto" and session.policy.name != "drop_oldest_turns":
        raise refuse("truncation", "was disabled by the conversation's first response and cannot change", "unsupported")
    if data.instructions and data.instructions != _instructions(session, turn):
        messages = [{"role": "system", "content": data.instructions}, *messages]
    with conversations.lock_of(session):
        # In this order: an answer that ends in between moves the head.
        if data.store is not False and not session.is_busy and session.head is turn:
            return _add_turn(state, session, data, messages, params, tools, is_new=False)
        conversations.make_room(state, tenant)
        fork = session.fork(turn, id=conversations.new_name())
    state.remember(fork, is_new=True)
    return _add_turn(state, fork, data, messages, params, tools, is_new=True, is_kept=data.store is not False)


def _instructions(session: Session, turn: Turn) -> str | None:
    """The last system message up to a turn."""
    for past in turn.lineage():
        texts = [message["content"] for message in past.said.given or () if message["role"] == "system"]
        if texts:
            return str(texts[-1])
    return session.system


def _add_turn(
    state: Server,
    session: Session,
    data: ResponseBody,
    messages: list[Json],
    params: SamplingParams,
    tools: list[Json],
    *,
    is_new: bool,
    is_kept: bool = True,
) -> Started:
    """Starts a turn. If that fails, a session created for it is deleted."""
    try:
        state.limits.check_turns(session)
        model = state.model(session.model).model
        assert model is not None
        reasoning = Reasoning(model, wish_of(data))
        params, calling = _calling(data, model, params, tools, reasoning)
        messages = [*repeated_calls(session, session.head, model, messages), *messages]
        options = {**reasoning.options, **({"tools": tools} if tools else {})} or None
        reply = session.say(
            messages,
            params,
            template_options=options,
            parse_special=bool(data.parse_special),
            timeout=state.settings.answer_s,
        )
    except BaseException:
        if is_new:
            state.delete(session)
        raise
    key = reply.draft().id
    return Started(conversations.response_id(session.id, key), key, session.model, reply, session, is_kept, calling)


def _answer_once(
    state: Server,
    tenant: str,
    serving: Serving,
    data: ResponseBody,
    messages: list[Json],
    params: SamplingParams,
    tools: list[Json],
) -> Started:
    """Starts an answer that is not stored."""
    model = serving.model
    assert model is not None
    if data.instructions:
        messages = [{"role": "system", "content": data.instructions}, *messages]
    reasoning = Reasoning(model, wish_of(data))
    params, calling = _calling(data, model, params, tools, reasoning)
    worded, options = with_tools(reasoning.messages(messages), tools, model.template)
    ids = model.chat_ids(worded, parse_special=bool(data.parse_special), **{**reasoning.options, **options})
    timeout = state.settings.answer_s
    generation = start_generations(model, [ids], params, 1, continues=False, tenant=tenant, timeout=timeout)[0]
    key = secrets.token_hex(16)
    return Started(f"resp_{key}", key, serving.name, generation, None, False, calling)


def _calling(
    data: ResponseBody, model: Model, params: SamplingParams, tools: list[Json], reasoning: Reasoning
) -> tuple[SamplingParams, Calling | None]:
    """The settings with the limit of thoughts and the constraint of the tools, and how the answer calls them."""
    if not tools:
        return reasoning.params_before(params), None
    calling = Calling(model.template, model.tokenizer, tools, reasoning.options)
    constraint = calling.constraint(data.tool_choice, data.parallel_tool_calls is not False, params.constraint)
    params = replace(params, constraint=constraint)
    return reasoning.params_before(params, unless=calling.form.opening, tools=tools), calling


# ---- Writing --------------------------------------------------------------------------------------------------------


class ResponseWriter:
    """Writes a response as JSON, whole or as events.

    Args:
        data: the request.
        started: the response.
    """

    def __init__(self, data: ResponseBody, started: Started) -> None:
        self._data, self._started = data, started
        self._output = self._new_output()
        self._about = of_request(
            data, started.id, started.model, is_kept=started.is_kept, params=started.generation.params
        )
        self._n = 0

    def _new_output(self) -> Output:
        calling = self._started.calling
        return Output(self._started.key, calling is not None, calling, self._started.generation.params)

    def _ended_itself(self) -> bool:
        return ended_itself(self._started.generation, has_stops=bool(self._data.stop))

    def whole(self) -> Json:
        """The response after its end."""
        generation = self._started.generation
        status, details = status_of(generation.finish_reason)
        output = self._new_output()
        rest = output.finish(is_whole=status == "completed", ended_itself=self._ended_itself())
        for _ in (*output.feed(generation.read_so_far()[1]), *rest):
            pass
        end = {"status": status, "incomplete_details": details, "output": output.items}
        return self._about | end | self._used()

    def _used(self) -> Json:
        generation = self._started.generation
        return {"usage": usage(generation.timings, n_thought_tokens(generation))}

    def events(self, event: Event) -> Iterator[bytes]:
        """The lines of an event."""
        if event.kind == "start":
            yield self._line({"type": "response.created", "response": self._about})
            yield self._line({"type": "response.in_progress", "response": self._about})
        elif event.piece is not None:
            for one in self._output.feed(event.piece.text):
                yield self._line(one)
        elif event.kind == "error":
            error = (event.data or {}).get("error", {})
            fields = {name: error.get(name) for name in ("code", "message", "param")}
            for one in self._output.finish(is_whole=False):
                yield self._line(one)
            yield self._line({"type": "error"} | fields)
            failed = {"status": "failed", "error": failure(str(fields["message"])), "output": self._output.items}
            yield self._line({"type": "response.failed", "response": self._about | failed | self._used()})
        else:
            whole = event.data or {}
            rest = self._output.finish(is_whole=whole["status"] == "completed", ended_itself=self._ended_itself())
            for one in rest:
                yield self._line(one)
            kind = "completed" if whole["status"] == "completed" else "incomplete"
            yield self._line({"type": f"response.{kind}", "response": whole})

    def _line(self, data: Json) -> bytes:
        numbered = data | {"sequence_number": self._n}
        self._n += 1
        return f"event: {data['type']}\ndata: {dumps(numbered)}\n\n".encode()
