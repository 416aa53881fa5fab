"""What each API key has used since the server started."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass, replace

from fabula.engine.generation import Timings


@dataclass(frozen=True, slots=True)
class Used:
    """Counts of one key.

    Attributes:
        answers: that ended, embeddings included.
        prompt_tokens: of their prompts.
        reused_tokens: of those, tokens whose KV was there.
        generated_tokens: of the answers.
    """

    answers: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0


class Usage:
    """Counts by key. Thread-safe.

    Attributes:
        since: when it began, in seconds since 1970.
    """

    def __init__(self) -> None:
        self.since = time.time()
        self._lock = threading.Lock()
        self._used: dict[str, Used] = {}  # keys are few and known

    def count(self, tenant: str, timings: Timings) -> None:
        """Adds an answer that ended."""
        with self._lock:
            used = self._used.get(tenant, Used())
            self._used[tenant] = replace(
                used,
                answers=used.answers + 1,
                prompt_tokens=used.prompt_tokens + timings.prompt_tokens,
                reused_tokens=used.reused_tokens + timings.reused_tokens,
                generated_tokens=used.generated_tokens + timings.generated_tokens,
            )

    def to_json(self, tenant: str) -> dict[str, int]:
        """The counts of a key."""
        with self._lock:
            return asdict(self._used.get(tenant, Used()))
