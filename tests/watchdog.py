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
    """A thread that fails the test it is told of when nothing moves, or when it runs in circles.

    It interrupts the main thread, where tests run, by a signal. If that is stuck where no signal reaches it, the
    process is ended.

    Args:
        errors: file descriptor for last words.
    """

    SIGNAL = signal.SIGUSR1 if hasattr(signal, "SIGUSR1") else None

    def __init__(self, errors: int) -> None:
        self._errors = errors
        self._watched: tuple[str, float] | None = None
        self._news = threading.Condition()
        self._why = ""
        self.fired = False

    def start(self) -> None:
        if self.SIGNAL is not None:
            signal.signal(self.SIGNAL, self._interrupt)
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    @contextmanager
    def watching(self, name: str, may_take_s: float) -> Iterator[None]:
        """Watches what the block does."""
        with self._news:
            self._watched, self._why = (name, may_take_s), ""
            self._news.notify()
        try:
            yield
        finally:
            with self._news:
                self._watched = None

    def _interrupt(self, *_: object) -> None:
        why, self._why = self._why, ""
        if why:  # or it ended just now
            raise Hang(why)

    def _run(self) -> None:
        waiting.lookers.add(threading.get_native_id())
        while True:
            with self._news:
                self._news.wait_for(lambda: self._watched is not None)
                watched = self._watched
            assert watched is not None
            self._watch(watched)

    def _watch(self, watched: tuple[str, float]) -> None:
        patience, begun, n_told = Patience(), busy_s(), 0
        while self._watched is watched:
            time.sleep(min(1.0, waiting.PATIENCE_S / 10))
            took = busy_s() - begun
            if not patience.is_out and took < watched[1]:
                continue
            with self._news:
                if self._watched is not watched:
                    return
                why = (
                    f"nothing has moved for {waiting.PATIENCE_S:.0f} s"
                    if patience.is_out
                    else f"it ran for {took:.0f} s"
                )
                self._why, self.fired = f"{watched[0]}: {why}\n{stacks()}", True
            n_told += 1
            if n_told > 2:  # it does not listen
                os.write(self._errors, f"\n{self._why}\n".encode(errors="replace"))
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    if gc.get_freeze_count() == 0:
        _freeze()
    mark = item.get_closest_marker("busy")
    with item.config.stash[_WATCHDOG].watching(item.nodeid, mark.args[0] if mark else BUSY_S):
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
    if config.stash[_WATCHDOG].fired:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
