"""A worker process that answers requests, one JSON object per line: llama.cpp, or a fresh Fabula."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fabula.errors import EngineError, Unsupported

_CLOSE_S = 10.0


class Killed(EngineError):
    """A signal ended a worker, such as SIGILL where it was built for another processor."""


class Worker:
    """A running worker process.

    Args:
        name: for errors.
        words: its command line.
        hint: added to the message if it ends unexpectedly.

    Raises:
        Unsupported: it cannot be started.
    """

    def __init__(self, name: str, words: Sequence[str], *, hint: str = "") -> None:
        self._name, self._hint = name, hint
        try:
            self._process = subprocess.Popen(list(words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise Unsupported(f"{words[0]} cannot be run: {error.strerror or error}") from None

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        """Sends a request and returns the answer.

        Raises:
            EngineError: the process failed, ended, or its output is not an answer.
            Killed: a signal ended it.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": what, **request}) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._ended() from None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise EngineError(f"{self._name}: its process printed {line.strip()[:80]!r} instead of an answer")
        if "error" in answer:
            raise EngineError(f"{self._name}: {answer['error']}")
        return answer

    @property
    def peak_bytes(self) -> int | None:
        """Peak resident memory so far; None if the system does not report it.

        getrusage is not used: for a child it includes the memory of its parent at the fork.
        """
        return memory_bytes(self._process.pid, "VmHWM")

    def close(self) -> None:
        """Ends the process. Idempotent."""
        if self._process.stdin and not self._process.stdin.closed:
            with suppress(BrokenPipeError):  # it has ended already
                self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def _ended(self) -> EngineError:
        with suppress(subprocess.TimeoutExpired):  # its pipe is closed, it may still run
            code = self._process.wait(_CLOSE_S)
            if code < 0:
                return Killed(f"{self._name}'s process was ended by {signal.Signals(-code).name}")
        return EngineError(f"{self._name}'s process has ended{self._hint}")


def memory_bytes(pid: int, what: str = "VmRSS") -> int | None:
    """Memory of a process on Linux: VmRSS is the resident size, VmHWM its peak. None on other systems."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
