"""Limits per API key. Each error says how much was requested, how much is allowed, and when to retry."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fabula.engine.generation import Timings
from fabula.server.failures import ApiError
from fabula.server.runs import Runs
from fabula.server.settings import Settings
from fabula.server.usage import Usage
from fabula.sessions.session import Session
from fabula.workspace import Workspace

HIDDEN = "resp."  # prefix of the sessions of /v1/responses; they have a limit of their own


def check_free(id: str | None) -> None:
    """Raises ApiError 400 for a session id that is reserved for the server."""
    if id is not None and id.startswith(HIDDEN):
        raise ApiError(
            400,
            "invalid_value",
            f"session_id starts with {HIDDEN!r}, which is reserved for sessions of /v1/responses; choose another",
            param="session_id",
        )


class Bucket:
    """A token bucket (as in RFC 2697) that holds up to a minute's worth.

    A request may start while the level is above 0 and is charged when it ends, since its length is not known before.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._level, self._at = float(per_minute), time.monotonic()

    def wait(self) -> float:
        """Seconds until a request may start; 0: it may start now."""
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
        settings: the limits.
        workspace: its sessions are counted.

    Attributes:
        usage: what each key has used.
    """

    def __init__(self, settings: Settings, workspace: Workspace) -> None:
        self._settings, self._workspace = settings, workspace
        self._buckets: dict[str, Bucket] = {}  # by key; keys are few and known
        self._beginning: dict[str, int] = {}  # by key
        self.usage = Usage()

    @contextmanager
    def beginning(self, runs: Runs, tenant: str, n: int = 1) -> Iterator[None]:
        """Counts n answers that are being started against a key's limit, until their run exists.

        Raises:
            ApiError: 429, the key may not start that many now.
        """
        self.check_answers(runs, tenant, n)
        self._beginning[tenant] = self._beginning.get(tenant, 0) + n
        try:
            yield
        finally:
            self._beginning[tenant] -= n

    def check_answers(self, runs: Runs, tenant: str, n: int = 1) -> None:
        """Raises ApiError 429 if a key may not start n answers now."""
        most = self._settings.max_streams
        have = sum(len(run.sources) for run in runs.active(tenant)) + self._beginning.get(tenant, 0)
        if have + n > most:
            raise ApiError(
                429,
                "too_many_streams",
                f"{have} answers are being generated for this key, {n} more were requested; {most} are allowed",
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
                    f"this key has used its {per_minute} tokens per minute; retry in {wait:.0f} s",
                    retry_after=wait,
                    limit=per_minute,
                )

    def _bucket(self, tenant: str) -> Bucket:
        if tenant not in self._buckets:
            self._buckets[tenant] = Bucket(self._settings.tokens_per_minute)
        return self._buckets[tenant]

    def pay(self, tenant: str, timings: Timings) -> None:
        """Charges a key for an answer that ended: for the tokens computed, not for those reused."""
        self.usage.count(tenant, timings)
        if self._settings.tokens_per_minute:
            n = timings.prompt_tokens - timings.reused_tokens + timings.generated_tokens
            self._bucket(tenant).pay(n)

    def check_sessions(self, tenant: str, n_more: int = 0) -> None:
        """Raises ApiError 429 if a key may not have another session besides its own and `n_more`; blocks."""
        most = self._settings.max_sessions
        have = self._workspace.n_sessions(tenant, but=HIDDEN) + n_more
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
                f"session {session.id} has {have} turns and {n} more were requested; {most} are allowed: "
                "roll back with prune, or start another session",
                limit=most,
            )

    def check_import(self, n: int) -> None:
        """Raises ApiError 413 if an imported session has more than the allowed number of turns."""
        most = self._settings.max_turns
        if n > most:
            raise ApiError(
                413, "too_many_turns", f"turns holds {n} turns, {most} are allowed", param="turns", limit=most
            )

    def check_messages(self, n: int, param: str) -> None:
        """Raises ApiError 413 if a request holds too many messages."""
        most = self._settings.max_messages
        if n > most:
            message = f"{param} holds {n} messages, {most} are allowed"
            raise ApiError(413, "too_many_messages", message, param=param, limit=most)

    def check_text(self, text: str, param: str) -> None:
        """Raises ApiError 413 if a message is too long."""
        most, have = self._settings.max_message_bytes, len(text.encode("utf-8"))
        if have > most:
            raise ApiError(
                413, "message_too_long", f"{param} has {have} bytes, {most} are allowed", param=param, limit=most
            )
