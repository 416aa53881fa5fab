"""Walking: routes that move about in a tree and compute nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from quart import Blueprint, g
from quart_schema import document_response, tag, validate_request

from fabula.server.describe import WRITING, fails
from fabula.server.failures import ApiError, not_found
from fabula.server.replies import (
    AlternativesReply,
    DeletedReply,
    ForkReply,
    HeadReply,
    StoppedReply,
    TagsReply,
    head_json,
)
from fabula.server.schemas import AlternativesBody, ForkBody, RollbackBody, SessionBody, StopBody, TagBody
from fabula.server.state import server
from fabula.sessions.session import Session

routes = Blueprint("walk", __name__)


@routes.post("/rollback")
@tag(["Tree"])
@validate_request(RollbackBody)
@document_response(HeadReply, 200)
@fails(*WRITING)
async def rollback(data: RollbackBody) -> Any:
    """Goes back (or across) to a turn. An answer that is being made stops first. Nothing is computed."""
    state, tenant = server(), g.tenant

    def work() -> tuple[Session, dict[str, Any]]:
        session = state.open(tenant, data.session_id)
        session.rollback(data.target_turn)
        freed = session.prune(session.head) if data.prune else 0
        return session, head_json(session) | {"freed_bytes": freed}

    session, told = await state.call(work)
    state.feed.changed(session, "tree" if data.prune else "head")
    return told


@routes.post("/redo")
@tag(["Tree"])
@validate_request(SessionBody)
@document_response(HeadReply, 200)
@fails(*WRITING)
async def redo(data: SessionBody) -> Any:
    """Takes the last rollback back."""
    state, tenant = server(), g.tenant

    def work() -> tuple[Session, dict[str, Any]]:
        session = state.open(tenant, data.session_id)
        session.redo()
        return session, head_json(session)

    session, told = await state.call(work)
    state.feed.changed(session, "head")
    return told


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
    state, tenant = server(), g.tenant

    def work() -> tuple[Session, int]:
        session = state.workspace.open(data.session_id, tenant=tenant)
        freed = session.delete()
        state.forget(session)
        return session, freed

    session, freed = await state.call(work)
    state.feed.changed(session, "deleted")
    return {"session_id": session.id, "freed_bytes": freed}


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
    state, tenant = server(), g.tenant

    def work() -> tuple[Session, dict[str, Any]]:
        session = state.open(tenant, data.session_id)
        (session.untag if data.remove else session.tag)(data.turn, data.tag)
        turn = session.turn(data.turn)
        return session, {"turn_id": turn.id, "tags": sorted(turn.tags)}

    session, told = await state.call(work)
    state.feed.changed(session, "tags", **told)
    return told
