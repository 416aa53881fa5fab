"""`/v1/chat/completions`: answers to conversations that the client stores."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from quart import Blueprint, g
from quart_schema import document_response, tag, validate_request

from fabula.engine.decoding import Piece
from fabula.engine.generation import Generation
from fabula.server.describe import LENDING, fails, streams
from fabula.server.openai.format import (
    DONE,
    CertainPieces,
    Json,
    chat_logprob,
    choices_of,
    ended_itself,
    fingerprint,
    follow,
    line,
    pieces_of,
    reason_of,
    start_generations,
    usage,
)
from fabula.server.openai.messages import plain_messages
from fabula.server.openai.params import chat_params, uses_tools, wish_of
from fabula.server.openai.replies import ChatCompletionReply
from fabula.server.openai.schemas import ChatCompletionBody
from fabula.server.reasoning import AnswerParser, Reasoning, ReasoningText
from fabula.server.runs import Event, Run
from fabula.server.start_run import begin, cancel_all, start_run
from fabula.server.state import Server, Serving, server
from fabula.server.stream import response
from fabula.sessions.tool_call_parser import Arguments, CallEnded, CallStarted, Content, gathered
from fabula.sessions.tool_call_parser import Event as Read
from fabula.sessions.tools import Calling, with_tools
from fabula.text.prefill import is_prefilled

routes = Blueprint("openai_chat", __name__)


@routes.post("/v1/chat/completions")
@streams
@tag(["OpenAI"])
@validate_request(ChatCompletionBody)
@document_response(ChatCompletionReply, 200)
@fails(*LENDING)
async def chat_completions(data: ChatCompletionBody) -> Any:
    """Answers a conversation. It is not stored; a prefix shared with an earlier request is not recomputed."""
    state, tenant = server(), g.tenant
    n = choices_of(data)
    serving = state.model_for(data.model)
    chat: Chat

    def describe(index: int) -> Json:
        return chat.choice(index)

    generations, calling = await begin(
        lambda: _begin(state, serving, tenant, data, n), lambda made: cancel_all(made[0]), n
    )
    run = start_run(state, tenant, serving.name, generations, describe, partial_fails=True)
    chat = Chat(data, serving, generations, run, calling)
    if data.stream:
        return response(follow(run, chat.chunks, chat.last))
    choices = await run.finish()
    return chat.about("chat.completion") | {"choices": choices, "usage": usage(generations, n)}


def _begin(
    state: Server, serving: Serving, tenant: str, data: ChatCompletionBody, n: int
) -> tuple[list[Generation], Calling | None]:
    """Reads the request and starts its answers; blocks."""
    model = serving.model
    assert model is not None
    state.limits.check_messages(len(data.messages), "messages")
    messages = plain_messages(data.messages, state.limits)
    params = chat_params(data)
    reasoning = Reasoning(model, wish_of(data), data.chat_template_kwargs)
    messages, options = reasoning.messages(messages), reasoning.options
    tools = data.tools if uses_tools(data) and data.tools else []
    calling = Calling(model.template, model.tokenizer, tools, options) if tools else None
    if calling is not None:
        constraint = calling.constraint(data.tool_choice, data.parallel_tool_calls is not False, params.constraint)
        params = replace(params, constraint=constraint)
    if tools or any(m["role"] == "tool" or "tool_calls" in m for m in messages):
        messages, more = with_tools(messages, tools, model.template)
        options = {**options, **more}
    asked, turn = data.continue_final_message, data.add_generation_prompt
    continues = is_prefilled(messages, asked, turn)
    if turn is not None:
        options = {**options, "add_generation_prompt": turn}
    special = bool(data.parse_special)
    ids = model.chat_ids(messages, continue_final_message=asked, parse_special=special, **options)
    reply = str(messages[-1]["content"]) if continues else ""
    params = reasoning.params(params, ids, reply, unless=calling.form.opening if calling is not None else "")
    made = start_generations(
        model, [ids], params, n, continues=continues, tenant=tenant, timeout=state.settings.answer_s
    )
    return made, calling


class Chat:
    """Writes the answers to a request as JSON.

    Args:
        data: the request.
        serving: the model.
        generations: the answers.
        run: generates them.
        calling: how they call tools; None if they do not.
    """

    def __init__(
        self,
        data: ChatCompletionBody,
        serving: Serving,
        generations: list[Generation],
        run: Run,
        calling: Calling | None,
    ) -> None:
        assert serving.model is not None
        self._data, self._generations, self._run = data, generations, run
        self._tokenizer = serving.model.tokenizer
        self._common: Json = {
            "id": "chatcmpl-" + run.id.removeprefix("run_"),
            "created": int(time.time()),
            "model": serving.name,
            "system_fingerprint": fingerprint(serving.model),
        }
        self._calling = calling
        self._is_legacy = data.functions is not None
        self._parsers = [self._parser(generation) for generation in generations]
        self._certain = [CertainPieces() for _ in generations]
        self._wants_usage = bool(data.stream_options and data.stream_options.include_usage)

    def about(self, kind: str) -> Json:
        """The first fields of every object."""
        return {"id": self._common["id"], "object": kind} | self._common

    def call_id(self, index: int, call: int) -> str:
        """The id of a tool call."""
        return f"call_{self._common['id'][-16:]}_{index}_{call}"

    def _parser(self, generation: Generation) -> AnswerParser:
        return AnswerParser(generation.params, self._calling, separates=self._data.reasoning_format != "none")

    # ---- Whole ------------------------------------------------------------------------------------------------------

    def choice(self, index: int) -> Json:
        """An answer that has ended."""
        generation = self._generations[index]
        text = generation.read_so_far()[1]
        reason = reason_of(generation.finish_reason)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        parser = self._parser(generation)
        events = [*parser.feed(text), *parser.finish(is_whole=self._ended_itself(index))]
        thought = "".join(event.text for event in events if isinstance(event, ReasoningText))
        content, calls = gathered([event for event in events if not isinstance(event, ReasoningText)])
        message["content"] = content
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message["content"] = content or None
            functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
            if self._is_legacy:
                message["function_call"] = functions[0]
            else:
                message["tool_calls"] = [
                    {"id": self.call_id(index, i), "type": "function", "function": function}
                    for i, function in enumerate(functions)
                ]
            if reason == "stop" and all(call.is_whole for call in calls):
                reason = "function_call" if self._is_legacy else "tool_calls"
        return {"index": index, "message": message, "logprobs": self._logprobs(index), "finish_reason": reason}

    def _ended_itself(self, index: int) -> bool:
        return ended_itself(self._generations[index], has_stops=bool(self._data.stop))

    def _logprobs(self, index: int) -> Json | None:
        if not self._data.logprobs:
            return None
        return self._logprobs_of(pieces_of(self._run, index))

    def _logprobs_of(self, pieces: list[Piece]) -> Json:
        return {"content": [chat_logprob(self._tokenizer, piece) for piece in pieces], "refusal": None}

    # ---- Streamed ---------------------------------------------------------------------------------------------------

    def chunks(self, event: Event) -> Iterator[bytes]:
        """The lines of an event."""
        if event.kind == "start":
            for index in range(len(self._generations)):
                yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
        elif event.piece is not None:
            piece, logprobs = event.piece, None
            if self._data.logprobs and (certain := self._certain[event.index].feed(piece)):
                logprobs = self._logprobs_of(certain)
            deltas = self._deltas(event.index, piece.text)
            if logprobs is not None and not deltas:
                deltas = [{"content": ""}]
            for i, delta in enumerate(deltas):
                yield self._chunk(event.index, delta, logprobs=logprobs if i == 0 else None)
        elif event.kind == "error":
            yield line(event.data or {})
        else:
            for delta in self._rest(event.index):
                yield self._chunk(event.index, delta)
            yield self._chunk(event.index, {}, reason=(event.data or {})["finish_reason"])

    def _deltas(self, index: int, text: str) -> list[Json]:
        return self._read(self._parsers[index].feed(text), index) if text else []

    def _rest(self, index: int) -> list[Json]:
        """The deltas held back until the end of an answer."""
        return self._read(self._parsers[index].finish(is_whole=self._ended_itself(index)), index)

    def _read(self, events: Iterable[Read | ReasoningText], index: int) -> list[Json]:
        """The deltas for events of the parser."""
        return [delta for event in events if (delta := self._delta(index, event)) is not None]

    def _delta(self, index: int, event: Read | ReasoningText) -> Json | None:
        if self._is_legacy and isinstance(event, CallStarted | Arguments):
            if event.index:  # it had room for one call only
                return None
            if isinstance(event, CallStarted):
                return {"function_call": {"name": event.name, "arguments": ""}}
            return {"function_call": {"arguments": event.text}} if event.text else None
        match event:
            case ReasoningText(text):
                return {"reasoning_content": text}
            case Content(text):
                return {"content": text}
            case CallStarted(call, name):
                about = {"id": self.call_id(index, call), "type": "function"}
                return {"tool_calls": [{"index": call, **about, "function": {"name": name, "arguments": ""}}]}
            case Arguments(call, text):
                return {"tool_calls": [{"index": call, "function": {"arguments": text}}]} if text else None
            case CallEnded():
                return None

    def _chunk(self, index: int, delta: Json, *, logprobs: Json | None = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = self.about("chat.completion.chunk") | {"choices": [choice]}
        return line(chunk | {"usage": None} if self._wants_usage else chunk)

    def last(self) -> Iterator[bytes]:
        """The lines at the end."""
        if self._wants_usage:
            counts = usage(self._generations, len(self._generations))
            yield line(self.about("chat.completion.chunk") | {"choices": [], "usage": counts})
        yield DONE
