"""`/v1/conversations`: a session that responses are added to by its id, without naming the response before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field
from quart import Blueprint, g
from quart_schema import document_response, tag, validate_querystring, validate_request

from fabula.model import Model
from fabula.server.describe import READING, WRITING, fails
from fabula.server.failures import refuse
from fabula.server.openai import conversations, dialects
from fabula.server.openai.format import Json
from fabula.server.openai.items import exchanges_of
from fabula.server.openai.replies import ConversationReply, DeletedConversationReply, InputItemsReply
from fabula.server.openai.response_inputs import MAX_ITEMS, ItemsQuery, items_of, page_of
from fabula.server.openai.response_json import of_turn
from fabula.server.openai.schemas import Borrowed
from fabula.server.state import Server, server
from fabula.sessions.session import Session
from fabula.sessions.turn import Turn

routes = Blueprint("openai_conversations", __name__)

MAX_NEW_ITEMS = 20  # of one request, as in OpenAI's API


class ConversationBody(Borrowed):
    """A new conversation."""

    translate: ClassVar[Any] = dialects.embedding

    items: list[dict[str, Any]] | None = Field(
        None,
        description="Messages that it begins with, at most 20. The first response answers the last of them, too.",
    )
    metadata: dict[str, Any] | None = Field(None, description="Is returned, and not stored.")


class ItemsBody(Borrowed):
    """Messages for a conversation."""

    translate: ClassVar[Any] = dialects.embedding

    items: list[dict[str, Any]] = Field(description="Messages of any role, at most 20.")


def _exchanges(state: Server, items: list[Json]) -> list[tuple[list[Json], str]]:
    if len(items) > MAX_NEW_ITEMS:
        raise refuse("items", f"holds {len(items)} items, at most {MAX_NEW_ITEMS} are allowed")
    return exchanges_of(items, state.limits)


def _items_of(session: Session, turns: Sequence[Turn], model: Model | None) -> list[Json]:
    """The input and the answers of turns, the first one first."""
    found: list[Json] = []
    for turn in turns:
        found += items_of(turn)
        if not turn.is_unanswered:
            found += of_turn(conversations.response_id(session.id, turn.id), session, turn, model)["output"]
    return found


def _told(session: Session, metadata: Json | None = None) -> Json:
    about = {"id": conversations.conversation_id(session.id), "object": "conversation"}
    return about | {"created_at": int(session.created_at), "metadata": metadata or {}}


@routes.post("/v1/conversations")
@tag(["OpenAI"])
@validate_request(ConversationBody)
@document_response(ConversationReply, 200)
@fails(*WRITING)
async def create(data: ConversationBody) -> Any:
    """Creates a conversation, for `conversation` in `/v1/responses`."""
    state, tenant = server(), g.tenant
    exchanges = _exchanges(state, data.items or [])

    def work() -> Session:
        conversations.make_room(state, tenant)
        model = state.model_for(None).name
        session = state.workspace.session(conversations.new_name(), model=model, tenant=tenant)
        state.remember(session)
        try:
            conversations.write_items(state, session, exchanges)
        except BaseException:
            state.delete(session)
            raise
        return session

    return _told(await state.call(work), data.metadata)


@routes.get("/v1/conversations/<id>")
@tag(["OpenAI"])
@document_response(ConversationReply, 200)
@fails(*READING)
async def read(id: str) -> Any:
    """A conversation."""
    state, tenant = server(), g.tenant
    return _told(await state.call(lambda: conversations.find_conversation(state, tenant, id)))


@routes.delete("/v1/conversations/<id>")
@tag(["OpenAI"])
@document_response(DeletedConversationReply, 200)
@fails(*READING)
async def delete(id: str) -> Any:
    """Deletes a conversation with its responses."""
    state, tenant = server(), g.tenant
    await state.call(lambda: state.delete(conversations.find_conversation(state, tenant, id)))
    return {"id": id, "object": "conversation.deleted", "deleted": True}


@routes.get("/v1/conversations/<id>/items")
@tag(["OpenAI"])
@validate_querystring(ItemsQuery)
@document_response(InputItemsReply, 200)
@fails(*READING)
async def items(id: str, query_args: ItemsQuery) -> Any:
    """The input and the answers of a conversation."""
    state, tenant = server(), g.tenant

    def work() -> Json:
        session = conversations.find_conversation(state, tenant, id)
        model = state.model(session.model).model
        return page_of(_items_of(session, session.path, model), query_args)

    return await state.call(work)


@routes.post("/v1/conversations/<id>/items")
@tag(["OpenAI"])
@validate_request(ItemsBody)
@document_response(InputItemsReply, 200)
@fails(*WRITING)
async def add_items(id: str, data: ItemsBody) -> Any:
    """Adds messages to a conversation. Nothing is generated."""
    state, tenant = server(), g.tenant
    exchanges = _exchanges(state, data.items)

    def work() -> Json:
        session = conversations.find_conversation(state, tenant, id)
        turns = conversations.write_items(state, session, exchanges)
        found = _items_of(session, turns, state.model(session.model).model)
        return page_of(found, ItemsQuery(limit=MAX_ITEMS, order="asc"))

    return await state.call(work)
