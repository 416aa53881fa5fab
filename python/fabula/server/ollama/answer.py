"""Shared by `/api/chat` and `/api/generate`: starting an answer and sending it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quart import Response, g

from fabula.engine.generation import Generation
from fabula.server.borrowed import Json, follow
from fabula.server.ollama.schemas import Answered
from fabula.server.ollama.writer import AnswerWriter, now
from fabula.server.reasoning import AnswerParser
from fabula.server.start_run import begin, cancel_all, start_run
from fabula.server.state import Serving, server
from fabula.server.stream import response
from fabula.sessions.tools import Calling

LINES = "application/x-ndjson"
Shaped = Callable[[Json], Json]
Made = tuple[list[Generation], Calling | None]


async def answer(
    serving: Serving,
    make: Callable[[], Made],
    shaped: Shaped,
    *,
    data: Answered,
    more: Callable[[Generation], Json] = lambda _: {},
) -> Any:
    """The response to a request for an answer.

    Args:
        serving: the model.
        make: starts the answer; blocks.
        shaped, more: as for `AnswerWriter`.
        data: the request; says whether to send lines while it is generated.
    """
    state, tenant = server(), g.tenant
    writer: AnswerWriter

    def describe(_: int) -> Json:
        return writer.whole()

    generations, calling = await begin(make, lambda made: cancel_all(made[0]))
    run = start_run(state, tenant, serving.name, generations, describe, partial_fails=True)
    generation = generations[0]
    writer = AnswerWriter(
        serving.name,
        generation,
        run,
        lambda: AnswerParser(generation.params, calling),
        shaped,
        more,
        logprobs=bool(data.logprobs),
    )
    if data.stream is not False:
        return lines(follow(run, writer.lines, lambda: ()))
    return (await run.finish())[0]


def lines(body: Any) -> Response:
    """A response that streams lines of JSON for as long as it takes."""
    found = response(body)
    found.content_type = LINES
    return found


def loaded(serving: Serving, shaped: Shaped) -> Json:
    """The reply to a request without a prompt: the model is loaded."""
    about = {"model": serving.name, "created_at": now()}
    return about | shaped({"content": ""}) | {"done_reason": "load", "done": True}
