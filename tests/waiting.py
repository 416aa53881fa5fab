"""How tests wait: a hang is told from slowness by progress, never by a total.

A wait goes on for as long as something moves. What moves wants a processor: `demand_s` adds up, over the threads of
this process and over all of its descendants, the time they ran and the time they stood in line for a processor. A
machine that is slow, or busy with others, keeps that sum growing as fast as the clock; a deadlock stops it. Who waits
for a slow disk is told by what goes to it and comes from it. Less than SHARE of a processor for PATIENCE_S seconds is a
hang; a browser without work takes 1 % of one.

Two things look:
  - watchdog.py, which runs beside every test. It ends the blocking call that the test stands in, so helpers may simply
    join, wait or read, without a limit of their own.
  - `wait_until`, for conditions that must be polled: its own polling is no progress, so it looks at everybody else's.
Both say where every thread stands and which processes there are. A test that runs in circles wants a processor all the
time: that is found by the processor time it may take (BUSY_S), which does not depend on who else is on the machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0  # nobody moved for so long: it hangs
SHARE = 0.05  # of a processor; who wants less does not move
DISK_BYTES_PER_S = 350_000.0  # as much disk traffic as counts like a second of processor: a megabyte a minute is enough
BUSY_S = 1800.0  # of processor time in one test, then it runs in circles; `@pytest.mark.busy` names another
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01

lookers: set[int] = set()  # native ids of threads that only look whether others move
heard: dict[int, Callable[[], str]] = {}  # by process id: what a running child wrote on stderr, for `stacks`
_TOLD = "faulthandler.register(signal.SIGUSR2, all_threads=True)"
_BEGIN = f"""
import faulthandler, runpy, signal, sys
{_TOLD}
del sys.argv[0]
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


class Hang(AssertionError):
    """Nothing moved any more; the message says where everybody stands."""


def n_open_files() -> int:
    """Files this process holds open, without those in /proc, which the watchdog looks into meanwhile."""
    n = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed since
            n += entry.readlink().parts[:2] != ("/", "proc")  # /proc itself, too
    return n


# ---- What moves -----------------------------------------------------------------------------------------------------


def descendants() -> list[int]:
    """Process ids of children, their children, and so on; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:  # noqa: PTH208, PTH112
        if name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                fields = Path("/proc", name, "stat").read_text(errors="replace").rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(name))
    found = list(children.get(os.getpid(), []))
    for pid in found:  # it grows meanwhile
        found.extend(children.get(pid, []))
    return found


def _demand_of(pid: int, without: set[int]) -> float:
    """Seconds that threads of a process, but for some, ran or waited for a processor; disk traffic counts as such."""
    total = 0.0
    with suppress(OSError, ValueError):
        moved = dict(line.split(": ") for line in Path("/proc", str(pid), "io").read_text().splitlines())
        total += (int(moved["read_bytes"]) + int(moved["write_bytes"])) / DISK_BYTES_PER_S
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            if int(task) in without:
                continue
            with suppress(OSError, ValueError):
                ran, waited = Path("/proc", str(pid), "task", task, "schedstat").read_text().split()[:2]
                total += (int(ran) + int(waited)) * 1e-9
    return total


def demand_s() -> float:
    """Seconds of processor that everybody but the calling thread has had or wanted so far; may fall as threads end."""
    mine = _demand_of(os.getpid(), lookers | {threading.get_native_id()})
    if not Path("/proc/self/schedstat").exists():  # what was had, then
        mine += time.process_time() - time.thread_time()
    return mine + sum(_demand_of(pid, set()) for pid in descendants())


def busy_s() -> float:
    """Seconds of processor time that this process and its descendants have taken so far."""
    total, times = time.process_time(), os.times()
    total += times.children_user + times.children_system
    for pid in descendants():
        with suppress(OSError, ValueError, IndexError):
            fields = Path("/proc", str(pid), "stat").read_text(errors="replace").rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) * _TICK_S
    return total


class Patience:
    """Runs out when nothing has moved for a while. To be asked again and again, by the thread that waits.

    Args:
        counters: whatever else is progress, such as bytes that were read; each change of what they return is.
        seconds: without progress; `PATIENCE_S` where nothing is said.
    """

    def __init__(self, *counters: Callable[[], object], seconds: float | None = None) -> None:
        self._counters = counters
        self.seconds = PATIENCE_S if seconds is None else seconds
        self._demand, self._counts = demand_s(), [counter() for counter in counters]
        self._at = self._looked = time.monotonic()
        self._still_s = self._window_s = 0.0

    @property
    def is_out(self) -> bool:
        now = time.monotonic()
        # A thread that comes to look seldom is held up itself: then the others were, too.
        self._window_s += min(now - self._at, 1.0, self.seconds / 10)
        self._at = now
        counts = [counter() for counter in self._counters]
        if counts != self._counts:
            self._counts, self._window_s = counts, 0.0
            self._demand = demand_s()
        elif now - self._looked >= min(1.0, self.seconds / 4):
            self._looked, demand = now, demand_s()
            if abs(demand - self._demand) >= SHARE * self.seconds:
                self._demand, self._window_s = demand, 0.0
        return self._window_s >= self.seconds


# ---- Waiting --------------------------------------------------------------------------------------------------------


def wait_until(
    condition: Callable[[], object],
    what: str | Callable[[], object] = "it does not come to be",
    *counters: Callable[[], object],
    pause: Callable[[], object] = lambda: time.sleep(0.001),
    seconds: float | None = None,
) -> None:
    """Polls until the condition holds.

    Args:
        condition: asked again and again.
        what: is wrong if it never holds; a function is called only then.
        counters: further signs of progress, as for `Patience`.
        pause: between two looks.
        seconds: without progress, as for `Patience`.

    Raises:
        Hang: nobody moves, and it does not hold.
    """
    patience = Patience(*counters, seconds=seconds)
    while not condition():
        if patience.is_out:
            raise Hang(f"{what() if callable(what) else what}\n{stacks()}")
        pause()


def run_program(
    command: list[Any], *, env: dict[str, str] | None = None, input: str | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, as subprocess.run(capture_output=True, text=True) does.

    Raises:
        Hang: it moves no more; the message has what it wrote and, from Python, its stacks.
    """
    process = subprocess.Popen(
        [str(word) for word in command],
        env=with_stacks(env),
        cwd=cwd,
        text=True,
        stdin=None if input is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with ended_on_error(process):
        out, err = process.communicate(input)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def python(program: str, *words: object) -> list[str]:
    """The command that runs a module or a script; whoever runs it is asked where he stands when something hangs."""
    return [sys.executable, "-c", _BEGIN, program, *map(str, words)]


def with_stacks(env: dict[str, str] | None = None) -> dict[str, str]:
    """An environment in which a Python program that is aborted says where its threads stand."""
    return {**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"}


@contextmanager
def ended_on_error(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Ends a process when waiting for it fails, and adds what it wrote and where it stood."""
    try:
        yield
    except BaseException as error:
        out, err = abort(process)
        error.add_note(f"{process.args}\n{out}\n{err}")
        raise


def abort(process: subprocess.Popen[Any]) -> tuple[str, str]:
    """Ends a process and returns what came on its pipes, with its stacks where it was begun `with_stacks`."""
    if process.poll() is None:
        process.send_signal(signal.SIGABRT)
    try:
        out, err = process.communicate(timeout=10)
    except (subprocess.TimeoutExpired, ValueError):  # children of its own hold the pipes, or somebody reads them
        process.kill()
        process.wait()
        return "", ""
    return _text(out), _text(err)


def _text(data: str | bytes | None) -> str:
    return data.decode(errors="replace") if isinstance(data, bytes) else data or ""


def stacks() -> str:
    """Where all threads of this process stand, which processes it has begun, and where those of `heard` stand."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"---- {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}")
    for pid in descendants():
        with suppress(OSError):
            words = Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = Path("/proc", str(pid), "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            lines.append(f"---- process {pid} ({state}): {words.replace(_BEGIN, '')[:200]}")
            if pid in heard and _TOLD in words:
                os.kill(pid, signal.SIGUSR2)
                time.sleep(0.5)  # whoever reads its pipe needs a moment
                lines.append(heard[pid]())
    return "\n".join(lines)
