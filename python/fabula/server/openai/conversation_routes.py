"""`/v1/conversations`: a session that responses are added to by its id, without naming the response before."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from quart import Blueprint, g
from quart_schema import document_response, tag, validate_querystring, validate_request

from fabula.server.describe import READING, WRITING, fails
from fabula.server.failures import refuse
from fabula.server.openai import conversations, dialects
from fabula.server.openai.format import Json
from fabula.server.openai.replies import ConversationReply, DeletedConversationReply, InputItemsReply
from fabula.server.openai.response_inputs import ItemsQuery, items_of, page_of
from fabula.server.openai.response_json import of_turn
from fabula.server.openai.schemas import Borrowed
from fabula.server.state import server
from fabula.sessions.session import Session

routes = Blueprint("openai_conversations", __name__)


class ConversationBody(Borrowed):
    """A new conversation."""

    translate: ClassVar[Any] = dialects.embedding

    items: list[dict[str, Any]] | None = Field(None, description="Must be empty: the first response has the input.")
    metadata: dict[str, Any] | None = Field(None, description="Is returned, and not stored.")


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
    if data.items:
        raise refuse("items", "must be empty; give the input to the first response", "unsupported")

    def work() -> Session:
        conversations.make_room(state, tenant)
        model = state.model_for(None).name
        session = state.workspace.session(conversations.new_name(), model=model, tenant=tenant)
        state.remember(session)
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
        found: list[Json] = []
        for turn in session.path:
            if turn.parent is not None:
                response = of_turn(conversations.response_id(session.id, turn.id), session, turn, model)
                found += [*items_of(turn), *response["output"]]
        return page_of(found, query_args)

    return await state.call(work)
