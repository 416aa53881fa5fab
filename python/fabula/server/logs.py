"""The server's log: a line on stderr for each request and each answer, as text or as JSON, without users' texts.

Values from clients are escaped, so that none can forge a line.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from quart import g, has_request_context

from fabula.errors import EngineError
from fabula.server.metrics import generation_of
from fabula.server.observer import Observer
from fabula.server.settings import Settings
from fabula.sessions.reply import Reply

if TYPE_CHECKING:
    from fabula.server.runs import Run, Source

logger = logging.getLogger("fabula.server")
QUIET = frozenset({"/health", "/metrics"})  # asked every few seconds by machines


MAX_QUEUED = 10_000  # lines that wait to be written, a few MB
FLUSH_S = 2.0  # how long the end of the process waits for a reader that stands still


def set_up(settings: Settings) -> None:
    """Sends the log to stderr as the settings say; for the process that serves."""
    handler = QueuedHandler(sys.stderr)
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextLines())
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(settings.log_level.upper())


def escaped(value: object) -> str:
    """A value on one line, with control characters, line breaks and bidirectional marks escaped."""
    text = str(value)
    return (
        text
        if text.isascii() and text.isprintable()
        else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    )


class QueuedHandler(logging.Handler):
    """Writes lines in a thread of its own, for the event loop logs, and must not wait for who reads stderr. Lines that
    find MAX_QUEUED others before them are dropped and counted."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: deque[str] = deque()
        self._n_dropped = 0
        self._is_writing = False
        self._changed = threading.Condition()  # held over no writing
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Queues a line; does not wait."""
        line = self.format(record)
        with self._changed:
            if len(self._lines) >= MAX_QUEUED:
                self._n_dropped += 1
                return
            self._lines.append(line)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="fabula-log", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Waits FLUSH_S at most until all lines are written; called by logging when the process ends."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines and not self._is_writing, FLUSH_S)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines)
                self._is_writing = True
                lines, n_dropped = list(self._lines), self._n_dropped
                self._lines.clear()
                self._n_dropped = 0
            if n_dropped:
                record = logger.makeRecord(
                    logger.name,
                    logging.WARNING,
                    __file__,
                    0,
                    "lines dropped",
                    (),
                    None,
                    None,
                    {"fields": {"n": n_dropped}},
                )
                lines.append(self.format(record))
            with suppress(OSError, ValueError):  # nobody reads it any more
                self._stream.write("".join(f"{line}\n" for line in lines))
                self._stream.flush()


class TextLines(logging.Formatter):
    """`2026-01-31T12:00:00.000Z info answer model=... tokens=...`"""

    def format(self, record: logging.LogRecord) -> str:
        words = [stamp(record), record.levelname.lower(), escaped(record.getMessage())]
        for name, value in fields_of(record).items():
            shown = escaped(value)
            words.append(f"{name}={json.dumps(shown) if ' ' in shown or not shown else shown}")
        return " ".join(words)


class JsonLines(logging.Formatter):
    """A JSON object on each line."""

    def format(self, record: logging.LogRecord) -> str:
        about = {"time": stamp(record), "level": record.levelname.lower(), "message": record.getMessage()}
        return json.dumps(about | fields_of(record), default=str)


def stamp(record: logging.LogRecord) -> str:
    """The time of a record, in UTC (RFC 3339)."""
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The fields of a record, without empty ones."""
    found: dict[str, Any] = getattr(record, "fields", {})
    return {name: value for name, value in found.items() if value not in (None, "")}


class Log(Observer):
    """Logs the events of a server.

    Args:
        settings: decide whether texts are logged.
    """

    def __init__(self, settings: Settings) -> None:
        self._texts = settings.log_texts

    def request_ended(self, *, method: str, route: str, status: int, seconds: float, request_id: str) -> None:
        level = logging.DEBUG if route in QUIET else logging.INFO if status < 500 else logging.WARNING
        tenant = g.get("tenant", "") if has_request_context() else ""
        about = {"request": request_id, "method": method, "route": route or "none", "status": status, "key": tenant}
        log_line(level, "request", about | {"ms": round(1e3 * seconds, 1)})

    def answer_ended(self, run: Run, source: Source, kind: str) -> None:
        generation = generation_of(source)
        timings = generation.timings
        about: dict[str, Any] = {
            "request": run.request_id,
            "stream": run.id,
            "key": run.tenant,
            "model": run.model,
            "session": run.session_id,
            "end": generation.finish_reason or kind,
            "prompt_tokens": timings.prompt_tokens,
            "reused_tokens": timings.reused_tokens,
            "generated_tokens": timings.generated_tokens,
            "queued_ms": round(timings.queued_ms, 1),
            "first_token_ms": round(timings.first_token_ms, 1),
            "tokens_per_s": round(timings.tokens_per_s, 1),
        }
        if self._texts:
            about["text"] = generation.read_so_far()[1]
            if isinstance(source, Reply):
                about["prompt"] = source.draft().prompt
        log_line(logging.INFO, "answer", about)

    def failed(self, run: Run | None, error: BaseException) -> None:
        request = run.request_id if run is not None else g.get("request_id", "") if has_request_context() else ""
        about: dict[str, Any] = {"request": request, "error": type(error).__name__}
        if isinstance(error, EngineError):  # its message holds no user text
            about["about"] = error.message
        else:  # a foreign message may quote a user's text; the stack does not
            about["at"] = " < ".join(
                f"{frame.name} ({frame.filename.rpartition('/')[2]}:{frame.lineno})"
                for frame in reversed(traceback.extract_tb(error.__traceback__))
            )
            if self._texts:
                about["about"] = str(error)
        log_line(logging.ERROR, "failed", about)


def log_line(level: int, message: str, fields: dict[str, Any]) -> None:
    """Writes a line, if the log has that level."""
    if logger.isEnabledFor(level):
        logger.log(level, message, extra={"fields": fields})
