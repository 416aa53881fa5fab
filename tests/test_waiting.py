"""How tests wait: for work as long as it takes; a hang fails, with the stack of every thread."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import waiting
from waiting import Hang, Patience, abort, run_program, wait_until
from watchdog import Watchdog

TESTS = Path(__file__).parent


@contextmanager
def blocked() -> Iterator[None]:
    """A thread that waits for what never comes."""
    never = threading.Event()

    def deadlocked() -> None:
        never.wait()

    thread = threading.Thread(target=deadlocked)
    thread.start()
    try:
        yield
    finally:
        never.set()
        thread.join()


@contextmanager
def working() -> Iterator[None]:
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            hashlib.sha256(bytes(1 << 20)).digest()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_hang_is_found_and_says_who_stands_where() -> None:
    never = threading.Event()
    with blocked(), pytest.raises(Hang, match=r"(?s)the answer does not come.*in deadlocked"):
        wait_until(never.is_set, "the answer does not come", seconds=0.5)


def test_who_works_is_waited_for() -> None:
    """However much longer it takes than nothing may move: threads, other processes, and what counts as progress."""
    with blocked(), working():
        patience = Patience(seconds=0.3)
        n_looks = 0

        def looked() -> bool:
            nonlocal n_looks
            n_looks += 1
            assert not patience.is_out
            return n_looks > 50

        wait_until(looked, pause=lambda: threading.Event().wait(0.02))
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        patience, n_looks = Patience(seconds=0.3), 0
        wait_until(looked, pause=lambda: threading.Event().wait(0.02))
        assert waiting.busy_s() > 0 and child.pid in waiting.descendants()
    finally:
        child.kill()
        child.wait()
    patience, n_looks = Patience(lambda: n_looks // 3, seconds=0.3), 0
    wait_until(looked, pause=lambda: threading.Event().wait(0.02))


def test_a_program_that_hangs_says_where() -> None:
    code = "import threading\ndef stuck():\n print('hello', flush=True)\n threading.Event().wait()\nstuck()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=waiting.with_stacks()
    )
    assert process.stdout is not None and process.stdout.readline() == b"hello\n"
    _, errors = abort(process)
    assert "in stuck" in errors and process.returncode < 0


def test_a_late_signal_hits_no_other_test() -> None:
    """What is told of one part of a test must not be raised in the next, nor between two, where pytest itself runs."""
    watchdog = Watchdog(errors=-1)
    first, second = ("first", 1.0), ("second", 1.0)
    for watched, told in ((second, first), (None, first), (second, None)):
        watchdog.watched, watchdog._fired = watched, told and (told, "it hangs")
        watchdog._interrupt()
    watchdog.watched, watchdog._fired = second, (second, "it hangs")
    with pytest.raises(Hang, match="it hangs"):
        watchdog._interrupt()


HANGS = """
import threading, time
import pytest, waiting

waiting.PATIENCE_S = 1.0
release = threading.Event()

def test_blocked():
    other = threading.Thread(target=release.wait, name="other")
    other.start()
    other.join()

def test_polled():
    waiting.wait_until(release.is_set, "it is not released")

def test_child():
    waiting.run_program([__import__("sys").executable, "-c", "def stuck(): input()\\nstuck()"], input=None)

@pytest.mark.busy(0.5)
def test_in_circles():
    while True:
        pass

def test_that_is_slow():
    end = time.process_time() + 2
    while time.process_time() < end:
        pass

def test_last():
    release.set()
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")  # noqa: PTH112
def test_the_watchdog_ends_tests_that_hang_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "test_hangs.py").write_text(HANGS.replace("input()", "__import__('threading').Event().wait()"))
    done = run_program(
        [sys.executable, "-m", "pytest", "-p", "watchdog", "-p", "no:cacheprovider", "-q", "test_hangs.py"],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        cwd=tmp_path,
    )
    assert done.returncode == 1 and "4 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    for name in ("blocked", "polled", "child", "in_circles"):
        assert f"FAILED test_hangs.py::test_{name}" in done.stdout
    assert "nothing has moved for 1 s" in done.stdout and "---- other" in done.stdout
    assert "it is not released" in done.stdout and "in stuck" in done.stdout and "it ran for" in done.stdout
