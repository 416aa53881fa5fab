"""What the key of the request has used, and its limits."""

from __future__ import annotations

from typing import Any

from quart import Blueprint
from quart_schema import document_response, tag

from fabula.server.describe import READING, fails
from fabula.server.limits import HIDDEN
from fabula.server.mutation import looked_up
from fabula.server.replies import KeyUsageReply
from fabula.server.state import Server

routes = Blueprint("usage", __name__)


@routes.get("/usage")
@tag(["Server"])
@document_response(KeyUsageReply, 200)
@fails(*READING)
async def usage() -> Any:
    """What the key of this request has used since the server started, and its limits."""

    def work(state: Server, tenant: str) -> dict[str, Any]:
        settings = state.settings
        return {
            "key": tenant or None,
            "since": state.limits.usage.since,
            **state.limits.usage.to_json(tenant),
            "sessions": state.workspace.n_sessions(tenant, but=HIDDEN),
            "active_answers": sum(len(run.sources) for run in state.runs.active(tenant)),
            "limits": {
                "sessions": settings.max_sessions,
                "answers": settings.max_streams,
                "tokens_per_minute": settings.tokens_per_minute or None,
            },
        }

    return await looked_up(work)
