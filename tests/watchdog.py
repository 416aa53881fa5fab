"""A plugin for pytest: fails a test in which nothing moves any more, instead of one that takes long. See waiting.py."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import waiting
from waiting import BUSY_S, Hang, Patience, busy_s, stacks


class Watchdog:
    """A thread that fails the part of a test it is told of when nothing moves, or when it runs in circles.

    It interrupts the main thread, where tests run, by a signal. If that is stuck where no signal reaches it, the
    process is ended.

    Args:
        errors: file descriptor for last words.

    Attributes:
        watched: what the main thread does now and the seconds of processor time that may take; None: nothing that may
            be interrupted.
    """

    SIGNAL = signal.SIGUSR1 if hasattr(signal, "SIGUSR1") else None

    def __init__(self, errors: int) -> None:
        self._errors = errors
        self.watched: tuple[str, float] | None = None
        self._fired: tuple[tuple[str, float], str] | None = None
        self.has_fired = False

    def start(self) -> None:
        if self.SIGNAL is not None:
            signal.signal(self.SIGNAL, self._interrupt)
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def _interrupt(self, *_: object) -> None:
        fired, self._fired = self._fired, None
        if fired is not None and fired[0] is self.watched:  # else that part of the test ended just now
            raise Hang(fired[1])

    def _run(self) -> None:
        waiting.lookers.add(threading.get_native_id())
        while True:
            time.sleep(min(1.0, waiting.PATIENCE_S / 10))
            if (watched := self.watched) is not None:
                self._watch(watched)

    def _watch(self, watched: tuple[str, float]) -> None:
        patience, begun, n_told = Patience(), busy_s(), 0
        while self.watched is watched:
            time.sleep(min(1.0, waiting.PATIENCE_S / 10))
            took = busy_s() - begun
            if not patience.is_out and took < watched[1]:
                continue
            if self.watched is not watched:
                return
            why = f"nothing has moved for {patience.seconds:.0f} s" if patience.is_out else f"it ran for {took:.0f} s"
            why = f"{watched[0]}: {why}\n{stacks()}"
            self._fired, self.has_fired = (watched, why), True
            n_told += 1
            if n_told > 2:  # it does not listen
                os.write(self._errors, f"\n{why}\n".encode(errors="replace"))
                os._exit(3)
            assert self.SIGNAL is not None
            signal.pthread_kill(threading.main_thread().ident or 0, self.SIGNAL)
            patience, begun = Patience(), busy_s()


# ---- For pytest ------------------------------------------------------------------------------------------------------

_WATCHDOG = pytest.StashKey[Watchdog]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "busy(seconds): of processor time that a test may take; no test has a limit of time"
    )
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        errors = os.dup(sys.__stderr__.fileno())
    config.stash[_WATCHDOG] = Watchdog(errors)
    config.stash[_WATCHDOG].start()


@contextmanager
def _watching(item: pytest.Item) -> Iterator[None]:
    """Watches what the block does: a part of a test, in which pytest takes an exception for that test's failure."""
    dog, mark = item.config.stash[_WATCHDOG], item.get_closest_marker("busy")
    dog.watched = (item.nodeid, mark.args[0] if mark else BUSY_S)
    try:
        yield
    finally:
        dog.watched = None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    if gc.get_freeze_count() == 0:
        _freeze()
    with _watching(item):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with _watching(item):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    with _watching(item):
        result = yield
    if nextitem is None or nextitem.path != item.path:
        _freeze()
    return result


def _freeze() -> None:
    """What is there now stays: imports, and fixtures of the session. Tests call the collector often, to see that nobody
    holds what was given up; it need not walk all of this each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Threads that hang would keep the process from ending."""
    if config.stash[_WATCHDOG].has_fired:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
