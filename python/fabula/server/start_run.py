"""Starts the run of a request: starts its answers in a worker thread, then sends them whole or as a stream.

Every route that generates uses `begin`, which undoes the start if the client leaves meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from quart import g

from fabula.engine.generation import Generation
from fabula.server.open_session import Open
from fabula.server.replies import answer_json
from fabula.server.runs import Run, Source
from fabula.server.schemas import Answering
from fabula.server.state import Server, server
from fabula.server.stream import native, response
from fabula.sessions.reply import Reply
from fabula.sessions.session import Session

Made = tuple[Session, Sequence[Reply]]
Verb = Callable[[Session, float], Reply | Sequence[Reply]]
T = TypeVar("T")


async def begin(make: Callable[[], T], undo: Callable[[T], None], n: int = 1) -> T:
    """Runs `make` in a worker thread.

    A client may leave meanwhile, which does not stop the thread. Then `undo` gets the result, also in a worker thread.
    The n answers count against the key's limit until `make` has returned and, if the client left, until `undo` has.
    The caller creates the `Run` right after this returns, without another `await` between.

    Args:
        make: starts the answers; blocks.
        undo: cancels them and deletes what was created for them; blocks.
        n: number of answers.

    Raises:
        ApiError: 429, the key may not start n answers now. Errors of `make` pass through.
    """
    state = server()
    with ExitStack() as stack:
        stack.enter_context(state.limits.beginning(state.runs, g.tenant, n))
        making = asyncio.create_task(state.call(make))
        try:
            await asyncio.wait([making])
        except asyncio.CancelledError:
            state.later(_undo_when_made(state, making, undo, stack.pop_all()))
            raise
        return making.result()


async def _undo_when_made(state: Server, making: asyncio.Task[T], undo: Callable[[T], None], limit: ExitStack) -> None:
    with limit:
        await asyncio.wait([making])
        if not making.cancelled() and making.exception() is None:
            await state.call(lambda: undo(making.result()))


async def answered(data: Answering, open: Open, verb: Verb, *, n: int | None = None, **texts: str | None) -> Any:
    """The response to a request of Fabula's own API for answers of a session.

    Args:
        data: says whether the answers are streamed or generated in the background.
        open: opens the session; runs in a worker thread, as `verb` does.
        verb: starts the reply or the replies, given the session and the time limit in seconds.
        n: number of replies that run at the same time; None for one reply, whose JSON is then not in a list.
        texts: user input by its field's name, checked against the length limit first.
    """
    state, tenant = server(), g.tenant

    def make() -> Made:
        for name, text in texts.items():
            state.limits.check_text(text or "", name)
        with open(state, tenant) as session:
            started = verb(session, state.settings.answer_s)
            return session, [started] if isinstance(started, Reply) else started

    session, replies = await begin(make, lambda made: _undo(state, made), 1 if n is None else n)
    run = run_of(state, session, replies, background=data.background)
    if data.stream:
        return response(native(run))
    if data.background:
        return {"session_id": session.id, "stream_id": run.id}, 202
    results = await run.finish()
    if n is None:
        return results[0]
    return {"session_id": session.id, "stream_id": run.id, "replies": results}


def _undo(state: Server, made: Made) -> None:
    session, replies = made
    for reply in replies:
        reply.cancel()
    state.drop_empty(session)


def run_of(state: Server, session: Session, replies: Sequence[Reply], *, background: bool = False) -> Run:
    """The run of a session's replies."""

    def describe(index: int) -> dict[str, Any]:
        found = answer_json(session, replies[index], run.id)
        if run.is_left:
            state.drop_empty(session)
        return found

    first = replies[0]
    start: dict[str, Any] = {"session_id": session.id, "model": session.model, "turn": first.number}
    start |= {"parent_id": first.parent_id, "prompt": first.prompt, "selects": first.selects}
    prefixes = [reply.begun_text for reply in replies]
    if any(prefixes):
        start["begun_text"] = prefixes[0]
    if len(replies) > 1:
        start["n"] = len(replies)
    run = start_run(
        state,
        session.tenant,
        session.model,
        replies,
        describe,
        start=start,
        session_id=session.id,
        background=background,
    )
    return run


def cancel_all(generations: Sequence[Generation]) -> None:
    """Undoes the start of generations that belong to no session; blocks."""
    for generation in generations:
        generation.cancel()


def start_run(
    state: Server,
    tenant: str,
    model: str,
    sources: Sequence[Source],
    describe: Callable[[int], dict[str, Any]],
    **options: Any,
) -> Run:
    """Starts a run; the key is charged for each answer when it ends.

    Args:
        state, tenant: server and owner of the run.
        model: name of the model.
        sources: the answers.
        describe, options: as for `Run`.
    """

    def pay_and_describe(index: int) -> dict[str, Any]:
        state.limits.pay(tenant, sources[index].timings)
        return describe(index)

    run = Run(
        sources,
        tenant=tenant,
        model=model,
        describe=pay_and_describe,
        observers=state.observers,
        request_id=g.get("request_id", ""),
        **options,
    )
    return state.begin(run)
