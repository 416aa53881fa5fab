"""Saying and telling: routes that make answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quart import Blueprint
from quart_schema import document_response, tag, validate_request

from fabula.server.start_run import Made, answered
from fabula.server.describe import WRITING, fails, streams
from fabula.server.replies import AnswerReply, BegunReply, BranchesReply
from fabula.server.schemas import (
    AgainBody,
    BranchBody,
    ChatBody,
    EditBody,
    ForkAtBody,
    Opening,
    ReplayBody,
    StoryBody,
)
from fabula.server.state import Server
from fabula.sessions.session import Session

routes = Blueprint("chat", __name__)


@contextmanager
def _joined(state: Server, tenant: str, data: Opening) -> Iterator[Session]:
    settings = {"system": data.system, "title": data.title, "context_policy": data.policy()}
    with state.joined(tenant, data.session_id, data.model, data.sampling, **settings) as session:
        state.limits.check_turns(session)
        yield session


def _open(state: Server, tenant: str, data: AgainBody, n: int = 1) -> Session:
    session = state.open(tenant, data.session_id)
    state.limits.check_turns(session, n)
    return session


@routes.post("/chat")
@streams
@tag(["Conversation"])
@validate_request(ChatBody)
@document_response(AnswerReply, 200)
@document_response(BegunReply, 202)
@fails(*WRITING)
async def chat(data: ChatBody) -> Any:
    """Answers a message: in the session of that id, or in a new one."""

    def make(state: Server, tenant: str) -> Made:
        state.limits.check_text(data.message, "message")
        with _joined(state, tenant, data) as session:
            params = data.params(session.params)
            reply = session.say(
                data.message, params, parse_special=bool(data.parse_special), timeout=state.settings.answer_s
            )
            return session, [reply]

    return await answered(data, make)


@routes.post("/story")
@streams
@tag(["Conversation"])
@validate_request(StoryBody)
@document_response(AnswerReply, 200)
@document_response(BegunReply, 202)
@fails(*WRITING)
async def story(data: StoryBody) -> Any:
    """Continues a text: that of a session, or a new one."""

    def make(state: Server, tenant: str) -> Made:
        state.limits.check_text(data.prompt or "", "prompt")
        with _joined(state, tenant, data) as session:
            params = data.params(session.params)
            reply = session.tell(
                prompt=data.prompt,
                params=params,
                parse_special=data.parse_special,
                timeout=state.settings.answer_s,
            )
            return session, [reply]

    return await answered(data, make)


@routes.post("/regenerate")
@streams
@tag(["Tree"])
@validate_request(AgainBody)
@document_response(AnswerReply, 200)
@document_response(BegunReply, 202)
@fails(*WRITING)
async def regenerate(data: AgainBody) -> Any:
    """Answers the head's message again, beside the answer that stands there: with its settings, but for those that are
    given, and a new seed unless one is given."""

    def make(state: Server, tenant: str) -> Made:
        session = _open(state, tenant, data)
        given = None if data.is_empty else data.params(session.again_params())
        return session, [session.regenerate(given, timeout=state.settings.answer_s)]

    return await answered(data, make)


@routes.post("/edit")
@streams
@tag(["Tree"])
@validate_request(EditBody)
@document_response(AnswerReply, 200)
@document_response(BegunReply, 202)
@fails(*WRITING)
async def edit(data: EditBody) -> Any:
    """Says something else in place of a turn's message, beside that turn: with its settings, but for those that are
    given, and a new seed unless one is given."""

    def make(state: Server, tenant: str) -> Made:
        state.limits.check_text(data.message, "message")
        session = _open(state, tenant, data)
        given = None if data.is_empty else data.params(session.again_params(data.turn))
        reply = session.edit(
            data.turn,
            data.message,
            given,
            parse_special=data.parse_special,
            timeout=state.settings.answer_s,
        )
        return session, [reply]

    return await answered(data, make)


@routes.post("/continue")
@streams
@tag(["Tree"])
@validate_request(AgainBody)
@document_response(AnswerReply, 200)
@document_response(BegunReply, 202)
@fails(*WRITING)
async def continue_(data: AgainBody) -> Any:
    """Goes on where the head's answer stopped, beside it: with its settings and its seed, but for those that are given;
    with none, what would have come next."""

    def make(state: Server, tenant: str) -> Made:
        session = _open(state, tenant, data)
        given = None if data.is_empty else data.params(session.same_params())
        return session, [session.continue_(params=given, timeout=state.settings.answer_s)]

    return await answered(data, make)


@routes.post("/replay")
@streams
@tag(["Tree"])
@validate_request(ReplayBody)
@document_response(AnswerReply, 200)
@document_response(BegunReply, 202)
@fails(*WRITING)
async def replay(data: ReplayBody) -> Any:
    """Makes a turn again from its parent: the same tokens with its settings and its seed, but for those that are
    given."""

    def make(state: Server, tenant: str) -> Made:
        session = _open(state, tenant, data)
        given = None if data.is_empty else data.params(session.same_params(data.turn))
        return session, [session.replay(data.turn, given, timeout=state.settings.answer_s)]

    return await answered(data, make)


@routes.post("/fork_at")
@streams
@tag(["Tree"])
@validate_request(ForkAtBody)
@document_response(AnswerReply, 200)
@document_response(BegunReply, 202)
@fails(*WRITING)
async def fork_at(data: ForkAtBody) -> Any:
    """Takes another token at a place of an answer and goes on from there: with the turn's settings and its seed, but
    for those that are given."""

    def make(state: Server, tenant: str) -> Made:
        session = _open(state, tenant, data)
        given = None if data.is_empty else data.params(session.same_params(data.turn))
        timeout = state.settings.answer_s
        return session, [session.fork_at(data.turn, data.position, data.token_id, given, timeout=timeout)]

    return await answered(data, make)


@routes.post("/branch")
@streams
@tag(["Tree"])
@validate_request(BranchBody)
@document_response(BranchesReply, 200)
@document_response(BegunReply, 202)
@fails(*WRITING)
async def branch(data: BranchBody) -> Any:
    """Several answers side by side; the head stays until one is chosen by `/rollback` to its turn id. They have the
    session's settings, but for those that are given; other answers to the head's message get new seeds."""

    def make(state: Server, tenant: str) -> Made:
        state.limits.check_text(data.message or "", "message")
        session = _open(state, tenant, data, max(1, data.n))
        given = None if data.is_empty else data.params(session.branch_params(again=data.message is None))
        replies = session.branch(
            data.n,
            data.message,
            given,
            parse_special=data.parse_special,
            timeout=state.settings.answer_s,
        )
        return session, replies

    return await answered(data, make, n=max(1, data.n))
