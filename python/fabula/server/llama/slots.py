"""`/slots` of llama.cpp's server: what it computes now.

Fabula has no slots: any answer may run in any step. So each answer that runs is shown as a busy slot, and the rest, up
to the setting `max_running`, are idle. Of other keys' answers there is nothing but that they run.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from quart import Blueprint, g
from quart_schema import document_response, tag, validate_querystring

from fabula.engine.generation import Generation
from fabula.server.describe import READING, fails
from fabula.server.failures import ApiError
from fabula.server.llama.schemas import SlotReply
from fabula.server.openai.format import Json
from fabula.server.runs import Run
from fabula.server.state import server
from fabula.sessions.reply import Reply

routes = Blueprint("llama_slots", __name__)


class SlotsQuery(BaseModel):
    """How to answer when all slots are busy."""

    fail_on_no_slot: str | None = None


@routes.get("/slots")
@tag(["llama.cpp"])
@validate_querystring(SlotsQuery)
@document_response(list[SlotReply], 200)
@fails(*READING)
async def slots(query_args: SlotsQuery) -> Any:
    """The answers that run, and how many more may. With `fail_on_no_slot`, 503 if none may."""
    state, tenant = server(), g.tenant
    busy = [about for run in state.runs.active() for about in _slots_of(run, is_own=run.tenant == tenant)]
    n_all = max(state.settings.max_running, len(busy))
    if query_args.fail_on_no_slot and len(busy) == n_all:
        raise ApiError(503, "no_slot", "all slots are busy; try again later", retry_after=1.0)
    model = state.model_for(None).model
    context = model.context if model is not None else 0
    idle: list[Json] = [{"n_ctx": context, "is_processing": False, "id_task": -1}] * (n_all - len(busy))
    shown = busy + idle
    return [{"id": i, "speculative": False, "n_ctx": context} | about for i, about in enumerate(shown)]


def _slots_of(run: Run, *, is_own: bool) -> list[Json]:
    """The answers of a run that are not complete."""
    generations = [one.generation if isinstance(one, Reply) else one for one in run.sources]
    return [_slot(one, is_own=is_own) for one in generations if one.finish_reason is None]


def _slot(generation: Generation, *, is_own: bool) -> Json:
    found: Json = {"is_processing": True}
    if not is_own:
        return found
    times, limit = generation.timings, generation.params.max_tokens
    n_left = -1 if limit is None else max(0, limit - times.generated_tokens)
    return found | {
        "n_prompt_tokens": times.prompt_tokens,
        "n_prompt_tokens_processed": times.prompt_tokens - times.reused_tokens if times.generated_tokens else 0,
        "n_prompt_tokens_cache": times.reused_tokens,
        "next_token": [{"has_next_token": True, "n_remain": n_left, "n_decoded": times.generated_tokens}],
    }
