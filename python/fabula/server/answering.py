"""From a verb of a session to a response: the run that makes the answer, sent whole or as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from quart import Response, g

from fabula.engine.generation import Generation
from fabula.server.replies import answer_json
from fabula.server.runs import Run, Source
from fabula.server.schemas import Answering
from fabula.server.state import Server, server
from fabula.server.stream import native, response
from fabula.sessions.reply import Reply
from fabula.sessions.session import Session

Made = tuple[Session, Sequence[Reply]]
T = TypeVar("T")


async def answered(how: Answering, make: Callable[[Server, str], Made], *, n: int | None = None) -> Any:
    """The response to a request for answers.

    Args:
        how: whether they are streamed, and whether they need a reader.
        make: finds the session and begins the replies; runs in a worker thread.
        n: how many there will be, side by side; None for one alone.
    """
    state, tenant = server(), g.tenant
    with state.limits.beginning(state.runs, tenant, 1 if n is None else n):
        session, replies = await begun(state, lambda: make(state, tenant), lambda made: _undo(state, made))
        run = run_of(state, session, replies, background=how.background)
    if how.stream:
        return response(native(run))
    if how.background:
        return {"session_id": session.id, "stream_id": run.id}, 202
    results = await run.finish()
    if n is None:
        return results[0]
    return {"session_id": session.id, "stream_id": run.id, "replies": results}


async def begun(state: Server, make: Callable[[], T], undo: Callable[[T], None]) -> T:
    """What `make` begins in a worker thread. A client may leave meanwhile, which does not stop the thread: then `undo`
    gets what it made, in a worker thread too, so that nothing is left of a request that nobody waits for."""
    making = asyncio.create_task(state.call(make))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(lambda _: state.later(_undone(state, making, undo)))
        raise


async def _undone(state: Server, making: asyncio.Task[T], undo: Callable[[T], None]) -> None:
    if not making.cancelled() and making.exception() is None:
        await state.call(lambda: undo(making.result()))


def _undo(state: Server, made: Made) -> None:
    session, replies = made
    for reply in replies:
        reply.cancel()
    state.drop_empty(session)


def run_of(state: Server, session: Session, replies: Sequence[Reply], *, background: bool = False) -> Run:
    """A run of a session's replies."""
    tenant = session.tenant
    run: Run

    def describe(index: int) -> dict[str, Any]:
        state.limits.pay(tenant, replies[index].timings)
        told = answer_json(session, replies[index], run.id)
        if run.is_left:
            state.drop_empty(session)
        return told

    first = replies[0]
    start: dict[str, Any] = {"session_id": session.id, "model": session.model, "turn": first.number}
    start |= {"parent_id": first.parent_id, "prompt": first.prompt, "selects": first.selects}
    begun = [reply.begun_text for reply in replies]
    if any(begun):
        start["begun_text"] = begun[0]
    if len(replies) > 1:
        start["n"] = len(replies)
    run = Run(
        replies,
        tenant=tenant,
        model=session.model,
        describe=describe,
        start=start,
        session_id=session.id,
        background=background,
        observers=state.observers,
        request_id=g.get("request_id", ""),
    )
    return state.begin(run)


def run_of_texts(
    state: Server, tenant: str, model: str, generations: Sequence[Generation], describe: Callable[[int], dict[str, Any]]
) -> Run:
    """A run of generations that belong to no session."""

    def paid(index: int) -> dict[str, Any]:
        state.limits.pay(tenant, generations[index].timings)
        return describe(index)

    sources: Sequence[Source] = generations
    run = Run(
        sources,
        tenant=tenant,
        model=model,
        describe=paid,
        observers=state.observers,
        request_id=g.get("request_id", ""),
    )
    return state.begin(run)


__all__ = ["Made", "Response", "answered", "begun", "run_of", "run_of_texts"]
