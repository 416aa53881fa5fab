"""What one key may use. Each refusal says how much was asked for, how much is allowed, and when it may work again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fabula.engine.generation import Timings
from fabula.server.failures import ApiError
from fabula.server.runs import Runs
from fabula.server.settings import Settings
from fabula.sessions.session import Session
from fabula.workspace import Workspace

HIDDEN = "resp."  # sessions that hold the responses of OpenAI's API; they are limited on their own


def check_free(id: str | None) -> None:
    """Raises ApiError 400 for a name that only the server gives."""
    if id is not None and id.startswith(HIDDEN):
        raise ApiError(
            400,
            "invalid_value",
            f"session_id begins with {HIDDEN!r}, as the sessions behind /v1/responses do; choose another",
            param="session_id",
        )


class Bucket:
    """Tokens that flow in steadily, up to a minute's worth (a token bucket; RFC 2697 has the idea).

    A request may begin while the bucket is not empty, and pays at its end: nobody knows before how long an answer is.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._level, self._at = float(per_minute), time.monotonic()

    def wait(self) -> float:
        """Seconds until a request may begin; 0 for now."""
        now = time.monotonic()
        self._level = min(self._per_minute, self._level + (now - self._at) * self._per_minute / 60)
        self._at = now
        return 0.0 if self._level > 0 else (1 - self._level) * 60 / self._per_minute

    def pay(self, n_tokens: int) -> None:
        """Takes tokens out; the level may fall below 0."""
        self._level -= n_tokens


class Limits:
    """The limits of a server.

    Args:
        settings: say how much.
        workspace: whose sessions are counted.
    """

    def __init__(self, settings: Settings, workspace: Workspace) -> None:
        self._settings, self._workspace = settings, workspace
        self._buckets: dict[str, Bucket] = {}  # by key; keys are few and known
        self._beginning: dict[str, int] = {}  # by key

    @contextmanager
    def beginning(self, runs: Runs, tenant: str, n: int = 1) -> Iterator[None]:
        """Counts n answers that are about to begin among a key's, until their run is there.

        Raises:
            ApiError: 429, the key may not begin so many now.
        """
        self.check_answers(runs, tenant, n)
        self._beginning[tenant] = self._beginning.get(tenant, 0) + n
        try:
            yield
        finally:
            self._beginning[tenant] -= n

    def check_answers(self, runs: Runs, tenant: str, n: int = 1) -> None:
        """Raises ApiError 429 if a key may not begin n answers now."""
        most = self._settings.max_streams
        have = sum(len(run.sources) for run in runs.active(tenant)) + self._beginning.get(tenant, 0)
        if have + n > most:
            raise ApiError(
                429,
                "too_many_streams",
                f"{have} answers are being made for this key and {n} more were asked for; {most} are allowed at a time",
                retry_after=2,
                limit=most,
            )
        per_minute = self._settings.tokens_per_minute
        if per_minute:
            wait = self._bucket(tenant).wait()
            if wait > 0:
                raise ApiError(
                    429,
                    "tokens_exceeded",
                    f"this key has used its {per_minute} tokens per minute; come again in {wait:.0f} s",
                    retry_after=wait,
                    limit=per_minute,
                )

    def _bucket(self, tenant: str) -> Bucket:
        if tenant not in self._buckets:
            self._buckets[tenant] = Bucket(self._settings.tokens_per_minute)
        return self._buckets[tenant]

    def pay(self, tenant: str, timings: Timings) -> None:
        """An answer has ended: the key pays what was computed for it, not what was reused."""
        if self._settings.tokens_per_minute:
            n = timings.prompt_tokens - timings.reused_tokens + timings.generated_tokens
            self._bucket(tenant).pay(n)

    def check_sessions(self, tenant: str) -> None:
        """Raises ApiError 429 if a key may not have another session; blocks."""
        most = self._settings.max_sessions
        have = self._workspace.n_sessions(tenant, but=HIDDEN)
        if have >= most:
            raise ApiError(
                429, "too_many_sessions", f"this key has {have} sessions, {most} are allowed; delete one", limit=most
            )

    def check_turns(self, session: Session, n: int = 1) -> None:
        """Raises ApiError 409 if a session may not have n more turns."""
        most, have = self._settings.max_turns, session.n_turns
        if have + n > most:
            raise ApiError(
                409,
                "too_many_turns",
                f"session {session.id} has {have} turns and {n} more were asked for; {most} are allowed: "
                "roll back with prune, or begin another session",
                limit=most,
            )

    def check_import(self, n: int) -> None:
        """Raises ApiError 413 if a session with so many turns may not be taken in."""
        most = self._settings.max_turns
        if n > most:
            raise ApiError(
                413, "too_many_turns", f"turns holds {n} turns, {most} are allowed", param="turns", limit=most
            )

    def check_text(self, text: str, param: str) -> None:
        """Raises ApiError 413 if a message is too long."""
        most, have = self._settings.max_message_bytes, len(text.encode("utf-8"))
        if have > most:
            raise ApiError(
                413, "message_too_long", f"{param} has {have} bytes, {most} are allowed", param=param, limit=most
            )
