"""Replies of Fabula's own API: their models for the OpenAPI description, and the JSON of turns and answers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fabula.engine.generation import Timings
from fabula.sessions.reply import Reply
from fabula.sessions.session import Session
from fabula.sessions.turn import Turn


class ReplyModel(BaseModel):
    """Base of replies: no other fields."""

    model_config = ConfigDict(extra="forbid")


class ErrorAbout(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(ReplyModel):
    """An error."""

    error: ErrorAbout


class UsageReply(ReplyModel):
    """Token counts of an answer. Reused tokens came from the KV cache. Tokens of the past are recomputed only if their
    KV pages were evicted."""

    prompt_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    generated_tokens: int


class TimingsReply(ReplyModel):
    """Times of an answer. Of the tokens that speculation `drafted`, `accepted` were right, and each saved a step."""

    queued_ms: float
    prompt_ms: float
    first_token_ms: float
    total_ms: float
    prompt_tokens_per_s: float
    tokens_per_s: float
    drafted: int
    accepted: int


class CutReply(ReplyModel):
    """What the context policy left out."""

    policy: str
    n_tokens: int
    n_turns: int


class AnswerReply(ReplyModel):
    """An answer. `turn` is null if it was stopped before its first token: then the session is as before."""

    session_id: str
    stream_id: str
    model: str
    turn: int | None
    turn_id: str | None
    text: str
    finish_reason: Literal["stop", "length", "cancelled", "timeout", "interrupted"] | None
    seed: int
    usage: UsageReply
    timings: TimingsReply
    why_recomputed: str
    cut: CutReply | None


class BegunReply(ReplyModel):
    """An answer that is generated in the background; `GET /streams/{stream_id}` reads it."""

    session_id: str
    stream_id: str


class TurnReply(BaseModel):
    """A turn."""

    model_config = ConfigDict(extra="allow")
    number: int
    id: str
    prompt: str
    text: str
    finish_reason: str | None
    reused_tokens: int = Field(0, description="Prompt tokens taken from the KV cache. `reused` is an older name.")
    recomputed_tokens: int = Field(
        0, description="Tokens of the past that were recomputed. `recomputed` is an older name."
    )


class HeadReply(ReplyModel):
    """The session's head: the current turn. Nothing was computed to get there."""

    session_id: str
    head: int
    head_id: str
    path: list[TurnReply] | None = Field(
        None, description="The turns from the first to the head; only with `?path=true`, as it grows with the path."
    )
    recomputed_tokens: Literal[0] = 0
    freed_bytes: int = Field(0, description="KV cache freed by pruning.")


class DeletedReply(ReplyModel):
    """A session that was deleted."""

    session_id: str
    freed_bytes: int = Field(description="KV cache that was freed.")


class DeletedSessionsReply(ReplyModel):
    """Sessions that were deleted."""

    session_ids: list[str]
    freed_bytes: int = Field(description="KV cache that was freed.")


class MatchReply(ReplyModel):
    """A turn that has the text."""

    session_id: str
    turn_id: str
    number: int
    field: Literal["prompt", "text"] = Field(description="Where it is: what was said to the model, or its answer.")
    excerpt: str
    created_at: float


class SearchReply(ReplyModel):
    """Turns that have a text, the last made first."""

    matches: list[MatchReply]


class KeyLimits(ReplyModel):
    """Limits of each key."""

    sessions: int
    answers: int = Field(description="Answers that may be generated at the same time.")
    tokens_per_minute: int | None = Field(description="Null for no limit.")


class KeyUsageReply(ReplyModel):
    """What a key has used."""

    key: str | None = Field(description="Its name; null on a server without keys.")
    since: float = Field(description="When the server started, in seconds since 1970.")
    answers: int = Field(description="Answers that ended, embeddings included.")
    prompt_tokens: int
    reused_tokens: int = Field(description="Of the prompts' tokens, those whose KV was there.")
    generated_tokens: int
    sessions: int
    active_answers: int
    limits: KeyLimits


class BranchesReply(ReplyModel):
    """Alternative answers; `/rollback` to one of their turn ids makes it the head."""

    session_id: str
    stream_id: str
    replies: list[AnswerReply]


class ForkReply(ReplyModel):
    """A session that shares another's path."""

    session_id: str
    head: int
    head_id: str


class StoppedReply(ReplyModel):
    """Answers that were stopped."""

    stopped: int


class AlternativeReply(ReplyModel):
    """A candidate token."""

    token_id: int
    text: str
    logprob: float
    chosen: bool


class AlternativesReply(ReplyModel):
    """Candidate tokens at a position, the likeliest first."""

    alternatives: list[AlternativeReply]


class TokenReply(ReplyModel):
    """A token of an answer."""

    token_id: int
    text: str


class TurnTokensReply(ReplyModel):
    """The tokens of an answer, in their order."""

    turn_id: str
    tokens: list[TokenReply]


class SessionAbout(BaseModel):
    """A session in a list."""

    model_config = ConfigDict(extra="allow")
    session_id: str
    title: str
    tags: list[str]
    model: str
    n_turns: int
    created_at: float
    updated_at: float


class SessionsReply(ReplyModel):
    """Sessions, the last changed first."""

    sessions: list[SessionAbout]


class SessionReply(BaseModel):
    """A session: its settings and its path."""

    model_config = ConfigDict(extra="allow")
    session_id: str
    title: str
    tags: list[str]
    model: str
    system: str | None
    head: int
    head_id: str
    busy: bool
    n_turns: int
    sampling: dict[str, Any] = Field(description="Settings that the session sets.")
    sampling_defaults: dict[str, Any] | None = Field(
        None, description="The model's defaults for the others; null while it is not loaded."
    )
    context_policy: dict[str, Any]
    path: list[TurnReply] | None = Field(
        None, description="The turns from the first to the head. A reply to PATCH has it only with `?path=true`."
    )


class TreeReply(BaseModel):
    """Every turn of a session, parents before children."""

    model_config = ConfigDict(extra="allow")
    session_id: str
    head_id: str
    turns: list[dict[str, Any]]


class TagsReply(ReplyModel):
    """Tags of a turn."""

    turn_id: str
    tags: list[str]


class TokensReply(ReplyModel):
    """Token ids of a text."""

    tokens: list[int] | list[dict[str, Any]]
    n_tokens: int


class TextReply(ReplyModel):
    """The text of token ids; `content`, llama.cpp's name, has control tokens too."""

    text: str
    content: str


class CountReply(ReplyModel):
    """Whether a message fits, and what it would cost."""

    prompt_tokens: int
    new_tokens: int
    context: int
    fits: bool
    max_answer: int
    cut: CutReply | None


class HealthReply(BaseModel):
    """Health of the server."""

    model_config = ConfigDict(extra="allow")
    status: Literal["ready", "loading", "degraded", "stopping"]
    live: bool
    ready: bool
    version: str
    models: list[dict[str, Any]]


# ---- JSON -----------------------------------------------------------------------------------------------------------


def timings_json(timings: Timings) -> dict[str, float]:
    """Times of an answer; its counts are in `usage`."""
    return {name: round(value, 3) for name, value in asdict(timings).items() if not name.endswith("_tokens")}


def answer_json(session: Session, reply: Reply, stream_id: str) -> dict[str, Any]:
    """An answer that has ended, as `AnswerReply`."""
    turn, generation = reply.turn, reply.generation
    timings = generation.timings
    return {
        "session_id": session.id,
        "stream_id": stream_id,
        "model": session.model,
        "turn": turn.number if turn is not None else None,
        "turn_id": turn.id if turn is not None else None,
        "text": turn.text if turn is not None else "",
        "finish_reason": generation.finish_reason,
        "seed": generation.seed,
        "usage": {
            "prompt_tokens": timings.prompt_tokens,
            "reused_tokens": timings.reused_tokens,
            "recomputed_tokens": turn.recomputed if turn is not None else 0,
            "generated_tokens": timings.generated_tokens,
        },
        "timings": timings_json(timings),
        "why_recomputed": turn.why_recomputed if turn is not None else "",
        "cut": turn.cut.to_json() if turn is not None and turn.cut is not None else None,
    }


def turn_json(turn: Turn) -> dict[str, Any]:
    """A turn, as `TurnReply`."""
    return with_token_names(turn.to_json())


def with_token_names(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn's JSON with its token counts also under the names that `usage` has."""
    return turn | {"reused_tokens": turn["reused"], "recomputed_tokens": turn["recomputed"]}


def head_json(session: Session, *, path: bool = False) -> dict[str, Any]:
    """A session's head, as `HeadReply`."""
    head = session.head
    found = {"session_id": session.id, "head": head.number, "head_id": head.id}
    if path:  # of the same head: another request may move the session's
        found["path"] = [turn_json(turn) for turn in head.lineage() if turn.number > 0][::-1]
    return found | {"recomputed_tokens": 0, "freed_bytes": 0}
