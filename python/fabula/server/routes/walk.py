"""Routes that move the head, look at turns or write text. None of them generates."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from quart import Blueprint, g
from quart_schema import validate_querystring

from fabula.server.describe import verb_route
from fabula.server.failures import ApiError, not_found
from fabula.server.mutation import PathQuery, looked_up, mutated
from fabula.server.open_session import existing, existing_or_new
from fabula.server.replies import (
    AlternativesReply,
    DeletedReply,
    ForkReply,
    HeadReply,
    StoppedReply,
    TagsReply,
    TurnTokensReply,
)
from fabula.server.routes.sessions import deleted
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
from fabula.sessions.session import Session

routes = Blueprint("walk", __name__)


@verb_route(routes, "/rollback", RollbackBody, "Tree", HeadReply)
@validate_querystring(PathQuery)
async def rollback(data: RollbackBody, query_args: PathQuery) -> Any:
    """Makes a turn of any branch the head. A reply being generated is stopped first. Nothing is computed."""

    def verb(session: Session) -> dict[str, Any]:
        if data.prune:
            return {"freed_bytes": session.prune(data.target, select=True)}
        session.rollback(data.target)
        return {"freed_bytes": 0}

    return await mutated("tree" if data.prune else "head", existing(data.session_id), verb, path=query_args.path)


@verb_route(routes, "/redo", SessionBody, "Tree", HeadReply)
@validate_querystring(PathQuery)
async def redo(data: SessionBody, query_args: PathQuery) -> Any:
    """Undoes the last rollback."""

    def verb(session: Session) -> None:
        session.redo()

    return await mutated("head", existing(data.session_id), verb, path=query_args.path)


@verb_route(routes, "/fork", ForkBody, "Tree", ForkReply)
async def fork(data: ForkBody) -> Any:
    """Creates a session that shares this one's path up to a turn."""

    def work(state: Server, tenant: str) -> dict[str, Any]:
        session = state.open(tenant, data.session_id)
        with state.opening(tenant, data.new_session_id):
            fork = session.fork(data.turn, id=data.new_session_id)
        state.remember(fork)
        return {"session_id": fork.id, "head": fork.head.number, "head_id": fork.head.id}

    return await looked_up(work)


@verb_route(routes, "/delete_session", SessionBody, "Sessions", DeletedReply)
async def delete_session(data: SessionBody) -> Any:
    """Deletes a session; turns that forks follow stay. A reply being generated is stopped first."""
    return await deleted(data.session_id)


@verb_route(routes, "/stop", StopBody, "Conversation", StoppedReply)
async def stop(data: StopBody) -> Any:
    """Stops the replies of a session, or of a stream. What was generated stays, as partial turns."""
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


@verb_route(routes, "/write", WriteBody, "Tree", HeadReply)
@validate_querystring(PathQuery)
async def write(data: WriteBody, query_args: PathQuery) -> Any:
    """Adds handwritten text to a story, or a note for the model. Nothing is computed."""

    def verb(session: Session) -> None:
        session.write(data.text, frozen=data.frozen, parse_special=data.parse_special)

    return await mutated("tree", existing_or_new(data), verb, path=query_args.path, text=data.text)


@verb_route(routes, "/rewrite", RewriteBody, "Tree", HeadReply)
@validate_querystring(PathQuery)
async def rewrite(data: RewriteBody, query_args: PathQuery) -> Any:
    """Adds a sibling of a turn with other text as its answer. Nothing is computed; `/continue` continues it."""

    def verb(session: Session) -> None:
        session.rewrite(data.turn, data.text, parse_special=data.parse_special)

    return await mutated("tree", existing(data.session_id, n_turns=1), verb, path=query_args.path, text=data.text)


@verb_route(routes, "/turn_tokens", TurnBody, "Tree", TurnTokensReply)
async def turn_tokens(data: TurnBody) -> Any:
    """The tokens of an answer, each with its text."""

    def work(state: Server, tenant: str) -> dict[str, Any]:
        session = state.open(tenant, data.session_id)
        tokens = session.tokens(data.turn)
        id = session.turn(data.turn).id
        return {"turn_id": id, "tokens": [{"token_id": token, "text": text} for token, text in tokens]}

    return await looked_up(work)


@verb_route(routes, "/alternatives", AlternativesBody, "Tree", AlternativesReply)
async def alternatives(data: AlternativesBody) -> Any:
    """The likeliest tokens at a position of an answer; `/fork_at` takes another."""

    def work(state: Server, tenant: str) -> dict[str, Any]:
        session = state.open(tenant, data.session_id)
        found = session.alternatives(data.turn, data.position, data.n)
        return {"alternatives": [asdict(one) for one in found]}

    return await looked_up(work)


@verb_route(routes, "/tags", TagBody, "Tree", TagsReply)
async def tags(data: TagBody) -> Any:
    """Adds a tag to a turn, or removes one."""

    def verb(session: Session) -> dict[str, Any]:
        (session.untag if data.remove else session.tag)(data.turn, data.tag)
        turn = session.turn(data.turn)
        return {"turn_id": turn.id, "tags": sorted(turn.tags)}

    return await mutated("tags", existing(data.session_id), verb, is_sent=True)
