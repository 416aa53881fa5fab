"""Watches an event loop: fails where our code blocks it for longer than 100 ms. As a script, runs `fabula` so watched.

A timer ticks every 10 ms. A late tick alone says nothing: the machine may be busy. Two things do:
  - The loop's thread used more than LIMIT_S of processor time between two ticks. The limit is for a machine on which
    `calibration_s` takes REFERENCE_S, and grows with what it takes here.
  - A second thread saw the loop's thread sleep at one instruction for LIMIT_S: no processor time, and no context switch
    either. A thread that waits for the GIL wakes every 5 ms, so it is not mistaken for one that waits for another lock,
    a file or a database. Moments in which threads of this process queue for a processor do not count: the thread may
    wait for one of them. Nor do moments in which one waits for a page of memory, outside of any system call: another
    process made the machine drop that page.
"""

from __future__ import annotations

import asyncio
import runpy
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

LIMIT_S = 0.1
TICK_S = 0.01
REFERENCE_S = 0.004
SHARE = 0.2  # of a moment: if threads queue for a processor for longer, the moment does not count
STOOD = "the event loop stood"


def calibration_s() -> float:
    """Processor seconds that a fixed piece of Python takes here; the best of three."""

    def once() -> float:
        begin = time.thread_time()
        sum(i * i % 7 for i in range(50_000))
        return time.thread_time() - begin

    return min(once() for _ in range(3))


def cpu_limit_s() -> float:
    """LIMIT_S on this machine, as fast as it is now."""
    return LIMIT_S * max(1.0, calibration_s() / REFERENCE_S)


def is_page_fault(call: str) -> bool:
    """Whether a thread of which /proc/.../syscall tells this waits in the kernel, but in no system call."""
    return call.startswith("-1 ")


class Tasks:
    """The threads of this process, as they stood at the last look.

    Args:
        folder: of proc(5) that has them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before: dict[str, tuple[int, int]] = {}  # by thread: nanoseconds that it ran, and that it queued

    def queued_s(self, elapsed_s: float) -> float:
        """Seconds since the last look that threads were ready and had no processor.

        The kernel adds the time in its queue to a thread's count only when the thread leaves it. One that was ready all
        the time and did not run is still there.
        """
        total, now = 0.0, {}
        for task in self._folder.iterdir():
            with suppress(OSError, IndexError, ValueError):
                ran, queued = map(int, (task / "schedstat").read_text().split()[:2])
                state = (task / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                before = self._before.get(task.name, (0, 0))
                now[task.name] = (ran, queued)
                total += elapsed_s if state == "R" and before == (ran, queued) else (queued - before[1]) * 1e-9
        self._before = now
        return total

    def is_paging(self) -> bool:
        """Whether a thread waits for a page of memory."""
        for task in self._folder.iterdir():
            with suppress(OSError):
                if is_page_fault((task / "syscall").read_text()):
                    return True
        return False


class Watch:
    """Watches the running event loop until `stop`.

    Attributes:
        found: what blocked it: a sentence and a stack for each.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self._cpu_limit_s = cpu_limit_s()
        self._loop = asyncio.get_running_loop()
        self._ident, self._task = threading.get_ident(), Path(f"/proc/self/task/{threading.get_native_id()}")
        self._stopped = threading.Event()
        self._ticked, self._cpu = time.monotonic(), time.thread_time()
        self._stack = ""  # of the last look, since the last tick
        self._timer = self._loop.call_later(TICK_S, self._tick)
        self._thread = threading.Thread(target=self._look, name="loop watch", daemon=True)
        if (self._task / "status").exists():
            self._thread.start()

    def _tick(self) -> None:
        cpu = time.thread_time()
        if cpu - self._cpu > self._cpu_limit_s and cpu - self._cpu > cpu_limit_s():
            self._report(f"computed for {cpu - self._cpu:.3f} s (limit {self._cpu_limit_s:.3f} s)", self._stack)
        self._cpu, self._ticked, self._stack = time.thread_time(), time.monotonic(), ""
        self._timer = self._loop.call_later(TICK_S, self._tick)

    def _look(self) -> None:
        """The thread that samples the stack of the loop's thread."""
        before: Any = None
        waited_s, looked, tasks = 0.0, time.monotonic(), Tasks(self._task.parent)
        tasks.queued_s(0.0)
        while not self._stopped.wait(TICK_S):
            # When the loop has ended, its thread may wait: a server that stops saves everything then.
            if time.monotonic() - self._ticked < 2 * TICK_S or not self._loop.is_running():
                before = None
                continue
            frame = sys._current_frames().get(self._ident)
            if frame is None:
                return
            self._stack = "".join(traceback.format_stack(frame))
            where = (id(frame), frame.f_lasti, self._moves())
            now = time.monotonic()
            is_idle = tasks.queued_s(now - looked) < SHARE * (now - looked)
            is_idle = is_idle and not is_page_fault(self._call()) and not tasks.is_paging()
            if where != before or frame.f_code.co_filename.endswith("selectors.py"):
                before, waited_s = where, 0.0
            elif is_idle:  # or the thread it waits for queues for a processor
                waited_s += min(now - looked, 2 * TICK_S)
            looked = now
            if waited_s > LIMIT_S:
                self._report(f"waited in system call {self._call().split()[0]}", self._stack)
                before = None

    def _call(self) -> str:
        """Where the loop's thread is in the kernel, as proc(5) tells."""
        with suppress(OSError):
            return (self._task / "syscall").read_text()
        return "unknown"

    def _moves(self) -> list[str]:
        """Counters that change when the loop's thread runs, or tries to take the GIL."""
        status = (self._task / "status").read_text().splitlines()
        return [line for line in status if "ctxt_switches" in line] + [
            (self._task / "schedstat").read_text().split()[0]
        ]

    def _report(self, what: str, stack: str) -> None:
        self.found.append(f"{STOOD}: it {what}\n{stack}")

    def stop(self) -> None:
        """May be called twice."""
        self._timer.cancel()
        self._stopped.set()


@asynccontextmanager
async def watched() -> AsyncIterator[Watch]:
    """Watches the running loop during a block, and fails at its end if it stood."""
    watch = Watch()
    try:
        yield watch
    finally:
        watch.stop()
    assert not watch.found, "\n".join(watch.found)


def main() -> None:
    """Runs `fabula` with the arguments of the command line; reports a blocked loop on stderr."""
    from fabula.server.state import Server

    start = Server.start

    class Loud(Watch):
        def _report(self, what: str, stack: str) -> None:
            if not what.startswith("waited"):  # hostile requests of many clients may cost the host that much
                return
            super()._report(what, stack)
            print(self.found[-1], file=sys.stderr, flush=True)

    async def start_watched(self: Server) -> None:
        self.watch = Loud()  # type: ignore[attr-defined]
        await start(self)

    Server.start = start_watched  # type: ignore[method-assign]
    runpy.run_module("fabula", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
