"""The watch over event loops: what it finds and what it does not take for a fault."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time

import pytest

from ticking import LIMIT_S, STOOD, Watch, is_page_fault, watched
from waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to see what a thread waits for")


def test_a_loop_that_waits_for_a_lock() -> None:
    async def work() -> None:
        lock = threading.Lock()
        lock.acquire()
        async with watched() as watch:

            def release() -> None:
                wait_until(lambda: watch.found, pause=lambda: time.sleep(0.01))
                lock.release()

            threading.Thread(target=release).start()
            with lock:
                pass

    with pytest.raises(AssertionError, match=f"(?s){STOOD}: it waited.*with lock:"):
        asyncio.run(work())


def test_a_page_that_is_read_back_is_no_fault_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_page_fault("-1 0x7ffc2c1b5d20 0x7f1d5a0c1e2b\n")
    assert not is_page_fault("202 0x1 0x0 0x0 0x0 0x0 0x0 0x7ffc 0x7f1d\n") and not is_page_fault("running\n")
    monkeypatch.setattr(Watch, "_call", lambda _: "-1 0x7ffc2c1b5d20 0x7f1d5a0c1e2b\n")

    async def work() -> None:
        async with watched():
            time.sleep(5 * LIMIT_S)

    asyncio.run(work())


@pytest.mark.heavy  # a processor stands still for it
@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="needs a thread that others push aside")
def test_a_loop_that_waits_for_a_thread_without_a_processor() -> None:
    """Such a thread's time in the queue is counted only when it leaves it."""
    (processor, *_) = os.sched_getaffinity(0)
    command = f"import os\nos.sched_setaffinity(0, {{{processor}}})\nprint(flush=True)\nwhile True: pass"
    spinning = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE)
    try:
        assert spinning.stdout is not None
        spinning.stdout.readline()

        def starve() -> None:
            own = threading.get_native_id()
            os.sched_setscheduler(own, os.SCHED_IDLE, os.sched_param(0))
            os.sched_setaffinity(own, {processor})
            begin = time.thread_time()
            while time.thread_time() - begin < 0.01:
                pass

        async def work() -> None:
            async with watched():
                thread = threading.Thread(target=starve)
                thread.start()
                thread.join()

        asyncio.run(work())
    finally:
        spinning.kill()
        spinning.communicate()


def test_a_thread_whose_loop_has_ended_may_wait() -> None:
    async def work() -> Watch:
        return Watch()

    watch = asyncio.run(work())
    time.sleep(5 * LIMIT_S)
    watch.stop()
    assert watch.found == []


def test_a_loop_that_sleeps_is_found() -> None:
    async def work() -> None:
        async with watched() as watch:
            for _ in range(100):  # a machine that is busy holds up the one who looks, too
                time.sleep(5 * LIMIT_S)
                if watch.found:
                    break

    with pytest.raises(AssertionError, match=f"{STOOD}: it waited in system call [0-9]+"):
        asyncio.run(work())


def test_a_loop_that_computes() -> None:
    async def work() -> None:
        async with watched() as watch:
            await asyncio.sleep(0.02)
            begin = time.thread_time()
            while time.thread_time() - begin < 2 * watch._cpu_limit_s:
                pass
            await asyncio.sleep(0.05)

    with pytest.raises(AssertionError, match=f"{STOOD}: it computed"):
        asyncio.run(work())


def test_a_loop_that_others_hold_up_is_not_at_fault() -> None:
    """Threads that compute keep the interpreter's lock from it."""

    async def work() -> None:
        ended = threading.Event()

        def compute() -> None:
            while not ended.is_set():
                sum(range(1000))

        threads = [threading.Thread(target=compute) for _ in range(6)]
        for thread in threads:
            thread.start()
        try:
            async with watched():
                for _ in range(20):
                    await asyncio.sleep(LIMIT_S / 10)
                    await asyncio.to_thread(time.sleep, 0.01)
        finally:
            ended.set()

    asyncio.run(work())
