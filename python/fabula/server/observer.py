"""Observers of a server's events: metrics, logs, traces, feeds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Concatenate, ParamSpec

if TYPE_CHECKING:
    from fabula.server.runs import Run, Source

P = ParamSpec("P")

logger = logging.getLogger("fabula.server")


def notify(
    observers: Iterable[Observer], event: Callable[Concatenate[Observer, P], None], *args: P.args, **kwargs: P.kwargs
) -> None:
    """Calls a method of `Observer` on every observer. An exception is logged and stops nothing else."""
    for observer in observers:
        try:
            getattr(observer, event.__name__)(*args, **kwargs)
        except Exception:
            logger.exception("the observer %s failed at %s", type(observer).__name__, event.__name__)


class Observer:
    """Base of observers: callbacks in the event loop's thread that do nothing. Call them through `notify`."""

    def request_started(self) -> None:
        """A request arrived: `quart.request`."""

    def request_ended(self, *, method: str, route: str, status: int, seconds: float, request_id: str) -> None:
        """A response's headers are ready. `route` is the rule, such as /sessions/<id>; "" for none."""

    def answer_started(self, run: Run, source: Source) -> None:
        """An answer was passed to the engine."""

    def token(self, run: Run, source: Source, seconds: float) -> None:
        """A token arrived, `seconds` after the previous one, or after the answer's start."""

    def answer_ended(self, run: Run, source: Source, kind: str) -> None:
        """An answer ended: "done", "cancelled" or "error"."""

    def failed(self, run: Run | None, error: BaseException) -> None:
        """A run failed, or with `run` None a request without one."""
