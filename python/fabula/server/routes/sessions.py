"""Routes about sessions as a whole: list, settings, tree, export, import."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field
from quart import Blueprint, Response, g
from quart_schema import document_response, tag, validate_querystring, validate_request

from fabula.server.describe import READING, WRITING, fails
from fabula.server.failures import ApiError
from fabula.server.limits import HIDDEN
from fabula.server.mutation import PathQuery, looked_up, mutated
from fabula.server.open_session import existing
from fabula.server.replies import SessionReply, SessionsReply, TreeReply, turn_json, with_token_names
from fabula.server.schemas import SettingsBody
from fabula.server.state import Server, server
from fabula.server.stream import dumps
from fabula.sessions.persistence import params_json
from fabula.sessions.session import Session

routes = Blueprint("sessions", __name__)


class ListQuery(BaseModel):
    """Which sessions to list."""

    limit: int = Field(100, ge=1, le=1000)
    offset: int = Field(0, ge=0, le=2**31 - 1)
    search: str = Field("", max_length=200, description="Text that the title, a tag or the id contains, in any case.")


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
@tag(["Sessions"])
@document_response(ImportBody, 200)
@fails(*READING, 409)
async def export(id: str) -> Any:
    """The whole session as JSON, for `/sessions/import` here or elsewhere."""
    state, tenant = server(), g.tenant
    text = await state.call(lambda: dumps(state.workspace.open(id, tenant=tenant).export()))
    response = Response(text + "\n", mimetype="application/json")
    response.headers["Content-Disposition"] = f'attachment; filename="{id}.json"'
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
