"""Routes about sessions as a whole: list, settings, tree, export, import."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, Field
from quart import Blueprint, Response, g
from quart_schema import document_response, tag, validate_querystring, validate_request

from fabula.errors import SessionNotFound
from fabula.server.describe import READING, WRITING, fails, sends
from fabula.server.failures import ApiError
from fabula.server.limits import HIDDEN
from fabula.server.mutation import PathQuery, looked_up, mutated
from fabula.server.open_session import existing
from fabula.server.replies import (
    DeletedReply,
    DeletedSessionsReply,
    SearchReply,
    SessionReply,
    SessionsReply,
    TreeReply,
    turn_json,
    with_token_names,
)
from fabula.server.schemas import CreateBody, SettingsBody
from fabula.server.state import Server, server
from fabula.server.stream import dumps
from fabula.sessions.persistence import params_json
from fabula.sessions.session import Session

routes = Blueprint("sessions", __name__)

_AGE = re.compile(r"^[0-9]{1,6}[mhd]$")
_SECONDS = {"m": 60, "h": 3600, "d": 86400}
_TYPES = {"markdown": ("md", "text/markdown"), "text": ("txt", "text/plain")}


class ListQuery(BaseModel):
    """Which sessions to list."""

    limit: int = Field(100, ge=1, le=1000)
    offset: int = Field(0, ge=0, le=2**31 - 1)
    search: str = Field("", max_length=200, description="Text that the title, a tag or the id contains, in any case.")


class OldQuery(BaseModel):
    """Which sessions to delete."""

    older_than: str = Field(
        description="Sessions that did not change for so long: a number and `m`, `h` or `d` (minutes, hours, days).",
        pattern=_AGE.pattern,
    )


class SearchQuery(BaseModel):
    """What to find."""

    text: str = Field(min_length=1, max_length=200, description="In any case.")
    session_id: str | None = Field(None, description="The only session to search. Default: all of the key's.")
    limit: int = Field(100, ge=1, le=1000)
    offset: int = Field(0, ge=0, le=2**31 - 1)


class ExportQuery(BaseModel):
    """Form of an export."""

    format: Literal["json", "markdown", "text"] = Field(
        "json", description="`json` holds the whole tree and can be imported; the others hold the path, for people."
    )


class ImportQuery(BaseModel):
    """Id of the imported session."""

    id: str | None = Field(None, description="Default: the id it had.")


class ImportBody(BaseModel):
    """A session, as `/sessions/{id}/export` gives it."""

    model_config = {"extra": "allow"}


def about(session: Session, *, path: bool = True) -> dict[str, Any]:
    """A session's settings, and its path if wanted; as `SessionReply`."""
    found = {
        "session_id": session.id,
        "title": session.title,
        "tags": list(session.tags),
        "model": session.model,
        "system": session.system,
        "head": session.head.number,
        "head_id": session.head.id,
        "busy": session.is_busy,
        "n_turns": session.n_turns,
        "created_at": session.created_at,
        "sampling": params_json(session.params),
        "sampling_defaults": defaults.to_json() if (defaults := session.sampling_defaults) is not None else None,
        "context_policy": session.policy.to_json(),
    }
    return found | {"path": [turn_json(turn) for turn in session.path]} if path else found


@routes.get("/sessions")
@tag(["Sessions"])
@validate_querystring(ListQuery)
@document_response(SessionsReply, 200)
@fails(*READING)
async def sessions(query_args: ListQuery) -> Any:
    """The sessions of this key, the last changed first."""

    def work(state: Server, tenant: str) -> dict[str, Any]:
        wanted = query_args.search.casefold()
        found = [
            one
            for one in state.workspace.sessions(tenant)
            if not one.record.id.startswith(HIDDEN)
            and wanted in "\n".join((one.title, one.record.id, *one.tags)).casefold()
        ]
        page = found[query_args.offset : query_args.offset + query_args.limit]
        return {
            "sessions": [
                {
                    "session_id": one.record.id,
                    "title": one.title,
                    "tags": list(one.tags),
                    "model": one.record.model,
                    "n_turns": one.n_turns,
                    "created_at": one.record.created_at,
                    "updated_at": one.record.updated_at,
                }
                for one in page
            ]
        }

    return await looked_up(work)


@routes.post("/sessions")
@tag(["Sessions"])
@validate_request(CreateBody)
@document_response(SessionReply, 201)
@fails(*WRITING)
async def create(data: CreateBody) -> Any:
    """Creates an empty session."""

    def work(state: Server, tenant: str) -> dict[str, Any]:
        if data.session_id is not None and state.workspace.has(data.session_id, tenant=tenant):
            raise ApiError(409, "session_exists", f"there is a session {data.session_id!r} already", param="session_id")
        settings = {"system": data.system, "title": data.title, "context_policy": data.policy()}
        with state.joined(tenant, data.session_id, data.model, data.sampling, **settings) as session:
            if data.tags is not None:
                session.configure(tags=data.tags)
            state.keep_empty(session)
            return about(session)

    return await looked_up(work), 201


@routes.delete("/sessions")
@tag(["Sessions"])
@validate_querystring(OldQuery)
@document_response(DeletedSessionsReply, 200)
@fails(*WRITING)
async def delete_old(query_args: OldQuery) -> Any:
    """Deletes the sessions of this key that did not change for a while. Those that are answering stay."""
    oldest = time.time() - int(query_args.older_than[:-1]) * _SECONDS[query_args.older_than[-1]]
    state, tenant = server(), g.tenant

    def work() -> tuple[list[Session], int]:
        deleted, freed = [], 0
        for one in state.workspace.sessions(tenant):
            if one.updated_at > oldest or one.id.startswith(HIDDEN):
                continue
            with suppress(SessionNotFound):  # somebody else deleted it
                session = state.workspace.open(one.id, tenant=tenant)
                if not session.is_busy:
                    freed += state.delete(session)
                    deleted.append(session)
        return deleted, freed

    deleted, freed = await state.call(work)
    for session in deleted:
        state.feed.changed(session, "deleted")
    return {"session_ids": [session.id for session in deleted], "freed_bytes": freed}


@routes.delete("/sessions/<id>")
@tag(["Sessions"])
@document_response(DeletedReply, 200)
@fails(*WRITING)
async def delete(id: str) -> Any:
    """Deletes a session; turns that forks follow stay. A reply being generated is stopped first."""
    return await deleted(id)


async def deleted(id: str) -> dict[str, Any]:
    """Deletes a session; the reply."""
    state = server()

    def verb(session: Session) -> dict[str, Any]:
        return {"session_id": session.id, "freed_bytes": state.delete(session)}

    return await mutated("deleted", existing(id, needs_model=False), verb)


@routes.get("/search")
@tag(["Sessions"])
@validate_querystring(SearchQuery)
@document_response(SearchReply, 200)
@fails(*READING)
async def search(query_args: SearchQuery) -> Any:
    """Turns of this key's sessions whose prompt or answer has a text."""

    def work(state: Server, tenant: str) -> dict[str, Any]:
        if query_args.session_id is not None:
            state.workspace.open(query_args.session_id, tenant=tenant)  # or 404
        asked = query_args.model_dump()
        found = state.workspace.search(asked.pop("text"), tenant=tenant, but=HIDDEN, **asked)
        return {"matches": [asdict(one) for one in found]}

    return await looked_up(work)


@routes.get("/sessions/<id>")
@tag(["Sessions"])
@document_response(SessionReply, 200)
@fails(*READING)
async def session(id: str) -> Any:
    """A session: its settings and its path, the turns from the first to the head."""
    return await looked_up(lambda state, tenant: about(state.workspace.open(id, tenant=tenant)))


@routes.patch("/sessions/<id>")
@tag(["Sessions"])
@validate_request(SettingsBody)
@validate_querystring(PathQuery)
@document_response(SessionReply, 200)
@fails(*WRITING)
async def change(id: str, data: SettingsBody, query_args: PathQuery) -> Any:
    """Changes settings of a session, for later turns."""

    def configure(session: Session) -> dict[str, Any]:
        params = data.sampling.changed(session.params) if data.sampling is not None else None
        session.configure(title=data.title, system=data.system, sampling=params, tags=data.tags)
        return about(session, path=query_args.path)

    return await mutated("settings", existing(id), configure)


@routes.get("/sessions/<id>/tree")
@tag(["Sessions"])
@document_response(TreeReply, 200)
@fails(*READING)
async def tree(id: str) -> Any:
    """Every turn of a session, parents before children."""
    return await looked_up(lambda state, tenant: tree_json(state.workspace.open(id, tenant=tenant)))


def tree_json(session: Session) -> dict[str, Any]:
    """A session's tree, as `TreeReply`."""
    found = session.tree_json()
    turns = [with_token_names(turn) for turn in found["turns"]]
    return {"session_id": session.id} | found | {"turns": turns}


@routes.get("/sessions/<id>/export")
@sends(*(kind for _, kind in _TYPES.values()))
@tag(["Sessions"])
@validate_querystring(ExportQuery)
@document_response(ImportBody, 200)
@fails(*READING, 409)
async def export(id: str, query_args: ExportQuery) -> Any:
    """The whole session as JSON, for `/sessions/import` here or elsewhere; or its path as Markdown or plain text."""
    state, tenant = server(), g.tenant
    suffix, kind = _TYPES.get(query_args.format, ("json", "application/json"))

    def work() -> str:
        session = state.workspace.open(id, tenant=tenant)
        if query_args.format == "json":
            return dumps(session.export()) + "\n"
        return session.to_markdown() if query_args.format == "markdown" else session.to_text()

    response = Response(await state.call(work), mimetype=kind)
    response.headers["Content-Disposition"] = f'attachment; filename="{id}.{suffix}"'
    return response


@routes.post("/sessions/import")
@tag(["Sessions"])
@validate_querystring(ImportQuery)
@validate_request(ImportBody)
@document_response(SessionReply, 201)
@fails(*WRITING)
async def import_(data: ImportBody, query_args: ImportQuery) -> Any:
    """Imports an exported session. Its KV cache is recomputed when it continues."""
    state, tenant = server(), g.tenant
    value = data.model_extra or {}

    def work() -> dict[str, Any]:
        model, turns = value.get("model"), value.get("turns")
        state.limits.check_import(len(turns) if isinstance(turns, list) else 0)
        if isinstance(model, str) and model not in state.models:
            raise ApiError(
                409, "model_not_served", f"the session uses the model {model[:128]!r}, which this server does not serve"
            )
        id = query_args.id or value.get("id")
        with state.opening(tenant, id if isinstance(id, str) else None):
            session = state.workspace.import_(value, id=query_args.id, tenant=tenant)
        state.remember(session)
        return about(session)

    return await state.call(work), 201
