"""A response as JSON: from its request while it is generated, from its turn afterwards."""

from __future__ import annotations

import json
import time
from typing import Any

from fabula.engine.constraint import Constraint
from fabula.engine.generation import Timings
from fabula.engine.sampling import SamplingParams
from fabula.model import Model
from fabula.server.openai.conversations import response_id
from fabula.server.openai.format import Json
from fabula.server.openai.items import Output, flat_tools
from fabula.server.openai.schemas import ResponseBody
from fabula.server.reasoning import count_thought
from fabula.sessions.session import Session
from fabula.sessions.tool_forms import style_of
from fabula.sessions.tool_grammar import is_exclusive
from fabula.sessions.tools import Calling
from fabula.sessions.turn import WRITTEN, Turn


def status_of(reason: str | None) -> tuple[str, Json | None]:
    """Status and details of a finish reason. What ended before its end for another reason than its length has failed:
    `incomplete_details` knows no word for that."""
    if reason in ("stop", WRITTEN):
        return "completed", None
    if reason == "length":
        return "incomplete", {"reason": "max_output_tokens"}
    return "failed", None


def failure(message: str) -> Json:
    """The error of a response that failed."""
    return {"code": "server_error", "message": message}


_STOPPED = "the answer was stopped before it was complete"
# Why a stored response is partial, by its finish reason.
_WHY = {
    "timeout": "the answer took longer than the server allows",
    "interrupted": "the server's process ended before the answer was complete",
}


def usage(timings: Timings, n_thought: int = 0) -> Json:
    """Token counts of a response, with those of its thoughts."""
    return {
        "input_tokens": timings.prompt_tokens,
        "input_tokens_details": {"cached_tokens": timings.reused_tokens},
        "output_tokens": timings.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": n_thought},
        "total_tokens": timings.prompt_tokens + timings.generated_tokens,
    }


def _common(id: str, model: str, params: SamplingParams, **more: Any) -> Json:
    """The fields of every response."""
    return {
        "id": id,
        "object": "response",
        "created_at": time.time(),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": params.max_tokens,
        "model": model,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": True,
        "temperature": params.temperature,
        "text": {"format": _format(params.constraint)},
        "tool_choice": "auto",
        "tools": [],
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": None,
        "metadata": {},
    } | more


def _format(constraint: Constraint | None) -> Json:
    """The constraint as OpenAI's text format; grammars have none."""
    if constraint is None or constraint.kind not in ("json_schema", "json_object"):
        return {"type": "text"}
    schema = json.loads(constraint.source) if constraint.source else {"type": "object"}
    if isinstance(schema, dict):
        schema.pop("x-guidance", None)
    if schema == {"type": "object"}:
        return {"type": "json_object"}
    return {"type": "json_schema", "name": "response", "schema": schema, "strict": False}


def of_request(data: ResponseBody, id: str, model: str, *, is_kept: bool, params: SamplingParams) -> Json:
    """A response that has just started."""
    about = _common(
        id,
        model,
        params,
        instructions=data.instructions,
        parallel_tool_calls=data.parallel_tool_calls is not False,
        previous_response_id=data.previous_response_id,
        reasoning={"effort": data.reasoning_effort, "summary": None},
        store=is_kept,
        tool_choice="auto" if data.tool_choice is None else data.tool_choice,
        tools=data.tools or [],
        truncation=data.truncation or "disabled",
        user=data.user,
        conversation=None if data.conversation is None else _named(data.conversation),
        metadata=data.metadata or {},
    )
    if data.text is not None and data.text.format is not None:
        about["text"] = {"format": data.text.format.model_dump(by_alias=True, exclude_none=True)}
    return about


def _named(conversation: str | Json) -> Json:
    """A conversation by its id."""
    return {"id": conversation} if isinstance(conversation, str) else {"id": conversation.get("id")}


def of_turn(id: str, session: Session, turn: Turn, model: Model | None) -> Json:
    """A response that has ended. `model` is None if it is no longer served: then tool calls are parsed in the most
    common form."""
    tools = list(turn.said.own_options.get("tools", []))
    status, details = status_of(turn.finish_reason)
    calling = Calling(model.template, model.tokenizer, tools) if tools and model is not None else None
    if calling is not None and turn.params is not None:
        calling.is_exclusive = is_exclusive(turn.params.constraint)
    stops = turn.params is not None and bool(turn.params.stop)
    ends = model.tokenizer.eos_ids if model is not None else turn.token_ids[-1:]
    whole = status == "completed"
    itself = whole and (not stops or (bool(turn.token_ids) and turn.token_ids[-1] in ends))
    output = Output(turn.id, bool(tools), calling, turn.params)
    for _ in (*output.feed(turn.text), *output.finish(is_whole=whole, ended_itself=itself)):
        pass
    parent = turn.parent
    n_thought = 0
    if model is not None and turn.params is not None:
        n_thought = count_thought(turn.params, turn.token_ids, model.tokenizer)
    return _common(
        id,
        session.model,
        turn.params or SamplingParams(),
        created_at=turn.created_at,
        status=status,
        error=failure(_WHY.get(turn.finish_reason or "", _STOPPED)) if status == "failed" else None,
        incomplete_details=details,
        instructions=session.system,
        output=output.items,
        previous_response_id=response_id(session.id, parent.id) if parent is not None and parent.number else None,
        tools=flat_tools(tools),
        truncation="auto" if session.policy.name == "drop_oldest_turns" else "disabled",
        usage=usage(turn.timings, n_thought) if turn.timings is not None else None,
    )


def repeated_calls(session: Session, turn: Turn, model: Model, messages: list[Json]) -> list[Json]:
    """A turn's answer with its calls as a message, where results of them follow and the template wants that: in the
    harmony format a result has the name of its function. Empty where it does not."""
    is_result = bool(messages) and messages[0]["role"] != "assistant" and any(m["role"] == "tool" for m in messages)
    if not is_result or not turn.number or style_of(model.template).form.arguments != "harmony":
        return []
    calls = [
        {
            "id": item["call_id"],
            "type": "function",
            "function": {"name": item["name"], "arguments": item["arguments"]},
        }
        for item in of_turn("", session, turn, model)["output"]
        if item["type"] == "function_call"
    ]
    return [{"role": "assistant", "content": "", "tool_calls": calls}] if calls else []
