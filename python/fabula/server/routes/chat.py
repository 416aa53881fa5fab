"""Routes of Fabula's own API that generate answers."""

from __future__ import annotations

from typing import Any

from quart import Blueprint

from fabula.server.describe import answer_route
from fabula.server.open_session import existing, existing_or_new
from fabula.server.replies import BranchesReply
from fabula.server.schemas import AgainBody, BranchBody, ChatBody, EditBody, ForkAtBody, ReplayBody, StoryBody
from fabula.server.start_run import answered
from fabula.sessions.reply import Reply
from fabula.sessions.session import Session

routes = Blueprint("chat", __name__)


@answer_route(routes, "/chat", ChatBody, "Conversation")
async def chat(data: ChatBody) -> Any:
    """Answers a message in the session of that id, or in a new one."""

    def verb(session: Session, timeout: float) -> Reply:
        params = data.params(session.params)
        return session.say(data.message, params, parse_special=bool(data.parse_special), timeout=timeout)

    return await answered(data, existing_or_new(data), verb, message=data.message)


@answer_route(routes, "/story", StoryBody, "Conversation")
async def story(data: StoryBody) -> Any:
    """Continues the text of a session, or a new one."""

    def verb(session: Session, timeout: float) -> Reply:
        params = data.params(session.params)
        return session.tell(prompt=data.prompt, params=params, parse_special=data.parse_special, timeout=timeout)

    return await answered(data, existing_or_new(data), verb, prompt=data.prompt)


@answer_route(routes, "/regenerate", AgainBody, "Tree")
async def regenerate(data: AgainBody) -> Any:
    """Answers the head's message again, as a sibling of the head. Settings that are not given are the head's; the seed
    is new unless it is given."""

    def verb(session: Session, timeout: float) -> Reply:
        return session.regenerate(data.over(session.again_params), timeout=timeout)

    return await answered(data, existing(data.session_id, n_turns=1), verb)


@answer_route(routes, "/edit", EditBody, "Tree")
async def edit(data: EditBody) -> Any:
    """Answers another message in place of a turn's, as a sibling of that turn. Settings that are not given are the
    turn's; the seed is new unless it is given."""

    def verb(session: Session, timeout: float) -> Reply:
        params = data.over(lambda: session.again_params(data.turn))
        return session.edit(data.turn, data.message, params, parse_special=data.parse_special, timeout=timeout)

    return await answered(data, existing(data.session_id, n_turns=1), verb, message=data.message)


@answer_route(routes, "/continue", AgainBody, "Tree")
async def continue_(data: AgainBody) -> Any:
    """Continues the head's answer where it stopped, as a sibling of the head. Settings and seed that are not given are
    the head's; with none given, the tokens are those that would have come next."""

    def verb(session: Session, timeout: float) -> Reply:
        return session.continue_(params=data.over(session.same_params), timeout=timeout)

    return await answered(data, existing(data.session_id, n_turns=1), verb)


@answer_route(routes, "/replay", ReplayBody, "Tree")
async def replay(data: ReplayBody) -> Any:
    """Generates a turn again from its parent. Settings and seed that are not given are the turn's; with none given, the
    tokens are the same."""

    def verb(session: Session, timeout: float) -> Reply:
        return session.replay(data.turn, data.over(lambda: session.same_params(data.turn)), timeout=timeout)

    return await answered(data, existing(data.session_id, n_turns=1), verb)


@answer_route(routes, "/fork_at", ForkAtBody, "Tree")
async def fork_at(data: ForkAtBody) -> Any:
    """Takes another token at a position of an answer and generates from there. Settings and seed that are not given are
    the turn's."""

    def verb(session: Session, timeout: float) -> Reply:
        params = data.over(lambda: session.same_params(data.turn))
        return session.fork_at(data.turn, data.position, data.token_id, params, timeout=timeout)

    return await answered(data, existing(data.session_id, n_turns=1), verb)


@answer_route(routes, "/branch", BranchBody, "Tree", BranchesReply)
async def branch(data: BranchBody) -> Any:
    """Generates several answers at the same time. The head stays until `/rollback` to one of their turn ids.
    Settings that are not given are the session's; other answers to the head's message get new seeds."""
    n = max(1, data.n)

    def verb(session: Session, timeout: float) -> list[Reply]:
        params = data.over(lambda: session.branch_params(again=data.message is None))
        return session.branch(data.n, data.message, params, parse_special=data.parse_special, timeout=timeout)

    return await answered(data, existing(data.session_id, n_turns=n), verb, n=n, message=data.message)
