"""Input of responses: the items of a stored one, and the tokens that one would have."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel
from quart import Blueprint, g
from quart_schema import document_response, tag, validate_querystring, validate_request

from fabula.server.describe import READING, WRITING, fails
from fabula.server.failures import refuse
from fabula.server.openai import conversations
from fabula.server.openai.format import Json
from fabula.server.openai.items import messages_of, tools_of
from fabula.server.openai.params import uses_tools, wish_of
from fabula.server.openai.replies import InputItemsReply, InputTokensReply
from fabula.server.openai.response_json import repeated_calls
from fabula.server.openai.schemas import ResponseBody
from fabula.server.reasoning import Reasoning
from fabula.server.state import server
from fabula.sessions.tools import with_tools
from fabula.sessions.turn import Turn

routes = Blueprint("openai_response_inputs", __name__)

MAX_ITEMS = 100  # of one page, as in OpenAI's API


class ItemsQuery(BaseModel):
    """Which items."""

    limit: int = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


@routes.get("/v1/responses/<id>/input_items")
@tag(["OpenAI"])
@validate_querystring(ItemsQuery)
@document_response(InputItemsReply, 200)
@fails(*READING)
async def input_items(id: str, query_args: ItemsQuery) -> Any:
    """The input of a stored response, without that of the responses before it."""
    state, tenant = server(), g.tenant

    def work() -> Json:
        found = conversations.find(state, tenant, id)
        if found is None:
            raise conversations.not_found(id)
        return page_of(items_of(found[1]), query_args)

    return await state.call(work)


def page_of(items: list[Json], query: ItemsQuery) -> Json:
    """A page of items.

    Raises:
        ApiError: 400, the query is out of its range.
    """
    if not 1 <= query.limit <= MAX_ITEMS:
        raise refuse("limit", f"is {query.limit}, must be in 1 .. {MAX_ITEMS}")
    items = items[::-1] if query.order == "desc" else items
    if query.after is not None:
        places = [i for i, item in enumerate(items, 1) if item["id"] == query.after]
        if not places:
            raise refuse("after", f"is {query.after!r:.80}, which is none of the items")
        items = items[places[0] :]
    page = items[: query.limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > len(page),
    }


def items_of(turn: Turn) -> list[Json]:
    """A turn's input as items, the first one first."""
    items: list[Json] = []
    for i, message in enumerate(turn.said.messages):
        role, text = message["role"], str(message.get("content") or "")
        about: Json = {"id": f"msg_{turn.id}_in{i}", "status": "completed"}
        if role == "tool":
            call = str(message.get("tool_call_id", ""))
            items.append(about | {"type": "function_call_output", "call_id": call, "output": text})
        elif role != "assistant":  # what repeats the answer before it is no input
            items.append(about | {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]})
    return items


@routes.post("/v1/responses/input_tokens")
@tag(["OpenAI"])
@validate_request(ResponseBody)
@document_response(InputTokensReply, 200)
@fails(*WRITING)
async def input_tokens(data: ResponseBody) -> Any:
    """The tokens that a request for a response would have as its prompt. Nothing is generated."""
    state, tenant = server(), g.tenant

    def work() -> Json:
        messages = messages_of(data.input, state.limits)
        if data.instructions:
            state.limits.check_text(data.instructions, "instructions")
            messages = [{"role": "system", "content": data.instructions}, *messages]
        tools = tools_of(data.tools) if uses_tools(data) else []
        special = bool(data.parse_special)
        if data.previous_response_id is None:
            model = state.model_for(data.model).model
            assert model is not None
            reasoning = Reasoning(model, wish_of(data))
            worded, options = with_tools(reasoning.messages(messages), tools, model.template)
            n_tokens = len(model.chat_ids(worded, parse_special=special, **{**reasoning.options, **options}))
        else:
            found = conversations.find(state, tenant, data.previous_response_id)
            if found is None:
                raise refuse("previous_response_id", "names no response", "previous_response_not_found")
            session, turn = found
            model = state.model(session.model).model
            assert model is not None
            options = {**Reasoning(model, wish_of(data)).options, **({"tools": tools} if tools else {})}
            messages = [*repeated_calls(session, turn, model, messages), *messages]
            count = session.count(messages, at=turn.id, template_options=options or None, parse_special=special)
            n_tokens = count.prompt_tokens
        return {"object": "response.input_tokens", "input_tokens": n_tokens}

    return await state.call(work)
