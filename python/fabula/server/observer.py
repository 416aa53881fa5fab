"""Those who watch a server work: metrics, logs, traces. Each does what it needs and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fabula.server.runs import Run, Source


class Observer:
    """Told what happens in a server, in the event loop's thread; does nothing of it itself."""

    def request_begun(self) -> None:
        """A request came in; `quart.request` is it."""

    def request_ended(self, *, method: str, route: str, status: int, seconds: float, request_id: str) -> None:
        """A response's headers are ready. `route` is the rule, such as /sessions/<id>; "" for none."""

    def answer_begun(self, run: Run, source: Source) -> None:
        """An answer was given to the engine."""

    def token(self, run: Run, source: Source, seconds: float) -> None:
        """A token arrived, `seconds` after the one before, or after the answer's begin."""

    def answer_ended(self, run: Run, source: Source, kind: str) -> None:
        """An answer ended: "done", "cancelled" or "error"."""

    def failed(self, run: Run | None, error: BaseException) -> None:
        """Something failed; a run, or a request outside of any."""
