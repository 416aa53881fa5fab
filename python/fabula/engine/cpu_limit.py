"""Runs work in a thread of its own, limited by the CPU time the thread uses.

A limit of wall time would depend on other load: a busy machine would refuse valid input. A second, much longer limit
of wall time covers work that blocks without using the CPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

POLL_S = 0.05  # how often the clock of a running thread is read

Clock = Callable[[], float]  # seconds since any fixed moment


def thread_clock() -> Clock:
    """A clock of the calling thread's CPU time; other threads may read it while the calling thread lives.

    Platforms without one (macOS, Windows): the smaller of the process's CPU time and the wall time since this call.
    Both are upper bounds of the thread's CPU time.
    """
    if hasattr(time, "pthread_getcpuclockid"):
        clock = time.pthread_getcpuclockid(threading.get_ident())
        return lambda: time.clock_gettime(clock)
    cpu, wall = time.process_time(), time.monotonic()
    return lambda: min(time.process_time() - cpu, time.monotonic() - wall)


class LimitedThread:
    """A thread whose caller waits until it ends or has used up its time. It is not stopped: it ends by itself.

    Args:
        work: runs in the thread; must not raise.
        name: of the thread.
        cpu_clock: makes the thread's clock, called in the thread.
        wall_clock: read by the caller.
    """

    def __init__(
        self,
        work: Callable[[], object],
        name: str,
        *,
        cpu_clock: Callable[[], Clock] = thread_clock,
        wall_clock: Clock = time.monotonic,
    ) -> None:
        self._work, self._cpu_clock, self._wall_clock = work, cpu_clock, wall_clock
        self._clock: Clock | None = None  # None before the thread runs
        self._cpu_start = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            clock = self._cpu_clock()
            self._cpu_start = clock()
            self._clock = clock
            self._work()
        finally:
            self._done.set()

    def _cpu_seconds(self) -> float:
        """CPU seconds used so far; 0 before the thread runs and once it has ended."""
        try:
            return 0.0 if self._clock is None else self._clock() - self._cpu_start
        except OSError:  # the thread ended, and its clock with it
            return 0.0

    def wait(self, cpu_seconds: float, wall_seconds: float) -> bool:
        """Waits for the work.

        Args:
            cpu_seconds: of the thread.
            wall_seconds: since this call.

        Returns:
            Whether the work is done. False: a limit was reached first.
        """
        end = self._wall_clock() + wall_seconds
        while True:
            used = self._cpu_seconds()
            # The thread cannot reach its limit before that much time has passed: no need to poll earlier.
            if self._done.wait(min(POLL_S, max(0.001, cpu_seconds - used))):
                return True
            if self._cpu_seconds() >= cpu_seconds or self._wall_clock() >= end:
                return self._done.is_set()
