"""Walking and writing: routes that move about in a tree, or put words into it, and compute nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from quart import Blueprint, g
from quart_schema import document_response, tag, validate_request

from fabula.server.mutation import Changed, changed
from fabula.server.describe import WRITING, fails
from fabula.server.failures import ApiError, not_found
from fabula.server.replies import (
    AlternativesReply,
    DeletedReply,
    ForkReply,
    HeadReply,
    StoppedReply,
    TagsReply,
    TurnTokensReply,
    head_json,
)
from fabula.server.schemas import (
    AlternativesBody,
    ForkBody,
    RewriteBody,
    RollbackBody,
    SessionBody,
    StopBody,
    TagBody,
    TurnBody,
    WriteBody,
)
from fabula.server.state import Server, server

routes = Blueprint("walk", __name__)


@routes.post("/rollback")
@tag(["Tree"])
@validate_request(RollbackBody)
@document_response(HeadReply, 200)
@fails(*WRITING)
async def rollback(data: RollbackBody) -> Any:
    """Goes back (or across) to a turn. An answer that is being made stops first. Nothing is computed."""

    def change(state: Server, tenant: str) -> Changed:
        session = state.open(tenant, data.session_id)
        session.rollback(data.target_turn)
        freed = session.prune(session.head) if data.prune else 0
        return session, head_json(session) | {"freed_bytes": freed}

    return await changed("tree" if data.prune else "head", change)


@routes.post("/redo")
@tag(["Tree"])
@validate_request(SessionBody)
@document_response(HeadReply, 200)
@fails(*WRITING)
async def redo(data: SessionBody) -> Any:
    """Takes the last rollback back."""

    def change(state: Server, tenant: str) -> Changed:
        session = state.open(tenant, data.session_id)
        session.redo()
        return session, head_json(session)

    return await changed("head", change)


@routes.post("/fork")
@tag(["Tree"])
@validate_request(ForkBody)
@document_response(ForkReply, 200)
@fails(*WRITING)
async def fork(data: ForkBody) -> Any:
    """A new session that shares this one's past up to a turn and goes on alone."""
    state, tenant = server(), g.tenant

    def work() -> dict[str, Any]:
        session = state.open(tenant, data.session_id)
        with state.opening(tenant, data.new_session_id):
            fork = session.fork(data.turn, id=data.new_session_id)
        state.remember(fork)
        return {"session_id": fork.id, "head": fork.head.number, "head_id": fork.head.id}

    return await state.call(work)


@routes.post("/delete_session")
@tag(["Sessions"])
@validate_request(SessionBody)
@document_response(DeletedReply, 200)
@fails(*WRITING)
async def delete_session(data: SessionBody) -> Any:
    """Deletes a session, but for turns that forks go on from. An answer that is being made stops first."""

    def change(state: Server, tenant: str) -> Changed:
        session = state.workspace.open(data.session_id, tenant=tenant)
        freed = session.delete()
        state.forget(session)
        return session, {"session_id": session.id, "freed_bytes": freed}

    return await changed("deleted", change)


@routes.post("/stop")
@tag(["Conversation"])
@validate_request(StopBody)
@document_response(StoppedReply, 200)
@fails(*WRITING)
async def stop(data: StopBody) -> Any:
    """Stops the answers of a session, or of a stream; what was read of them stays, as partial turns."""
    state, tenant = server(), g.tenant
    if (data.session_id is None) is (data.stream_id is None):
        raise ApiError(400, "invalid_value", "give either session_id or stream_id")
    if data.stream_id is not None:
        run = state.runs.find(data.stream_id, tenant)
        if run is None:
            raise not_found("stream", data.stream_id)
        runs = [] if run.is_done else [run]
    else:
        assert data.session_id is not None
        id = data.session_id
        session = await state.call(lambda: state.workspace.open(id, tenant=tenant))
        runs = state.runs.of_session(tenant, session.id)
        await state.call(session.stop)
    for run in runs:
        await run.stop()
    return {"stopped": len(runs)}


@routes.post("/write")
@tag(["Tree"])
@validate_request(WriteBody)
@document_response(HeadReply, 200)
@fails(*WRITING)
async def write(data: WriteBody) -> Any:
    """Adds a piece to a story as its author wrote it, or a note for the model; nothing is computed."""

    def change(state: Server, tenant: str) -> Changed:
        state.limits.check_text(data.text, "text")
        settings = {"title": data.title, "context_policy": data.context_policy}
        with state.joined(tenant, data.session_id, data.model, data.sampling, **settings) as session:
            state.limits.check_turns(session)
            session.write(data.text, frozen=data.frozen, parse_special=data.parse_special)
        return session, head_json(session)

    return await changed("tree", change)


@routes.post("/rewrite")
@tag(["Tree"])
@validate_request(RewriteBody)
@document_response(HeadReply, 200)
@fails(*WRITING)
async def rewrite(data: RewriteBody) -> Any:
    """Puts other words in place of an answer, beside it; nothing is computed. `/continue` goes on with them."""

    def change(state: Server, tenant: str) -> Changed:
        state.limits.check_text(data.text, "text")
        session = state.open(tenant, data.session_id)
        state.limits.check_turns(session)
        session.rewrite(data.turn, data.text, parse_special=data.parse_special)
        return session, head_json(session)

    return await changed("tree", change)


@routes.post("/turn_tokens")
@tag(["Tree"])
@validate_request(TurnBody)
@document_response(TurnTokensReply, 200)
@fails(*WRITING)
async def turn_tokens(data: TurnBody) -> Any:
    """The tokens of an answer, each with its text."""
    state, tenant = server(), g.tenant

    def work() -> dict[str, Any]:
        session = state.open(tenant, data.session_id)
        tokens = session.tokens(data.turn)
        id = session.turn(data.turn).id
        return {"turn_id": id, "tokens": [{"token_id": token, "text": text} for token, text in tokens]}

    return await state.call(work)


@routes.post("/alternatives")
@tag(["Tree"])
@validate_request(AlternativesBody)
@document_response(AlternativesReply, 200)
@fails(*WRITING)
async def alternatives(data: AlternativesBody) -> Any:
    """The likeliest tokens at a place of an answer; `/fork_at` takes another."""
    state, tenant = server(), g.tenant

    def work() -> dict[str, Any]:
        session = state.open(tenant, data.session_id)
        found = session.alternatives(data.turn, data.position, data.n)
        return {"alternatives": [asdict(one) for one in found]}

    return await state.call(work)


@routes.post("/tags")
@tag(["Tree"])
@validate_request(TagBody)
@document_response(TagsReply, 200)
@fails(*WRITING)
async def tags(data: TagBody) -> Any:
    """Gives a turn a name, or takes one away."""

    def change(state: Server, tenant: str) -> Changed:
        session = state.open(tenant, data.session_id)
        (session.untag if data.remove else session.tag)(data.turn, data.tag)
        turn = session.turn(data.turn)
        return session, {"turn_id": turn.id, "tags": sorted(turn.tags)}

    return await changed("tags", change, tell=True)
