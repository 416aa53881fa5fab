"""Kills a child at a moment that is counted in its own work: on a slow or busy machine it comes as far as elsewhere."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from waiting import Hang, Patience

MAX_OPEN_S = 30.0  # of processor time to open a store that a kill left; it takes a tenth of a second at most


def cpu_s(pid: int) -> float:
    """Processor time that a process has taken so far, in seconds."""
    return time.clock_gettime((~pid << 3) | 2)  # CPUCLOCK_SCHED of a process; see clock_getcpuclockid(3)


def kill_after(child: int, seconds: float) -> None:
    """Kills a child when it has taken so much processor time, unless it ends before.

    Raises:
        Hang: it takes none any more; it is aborted, which shows its stacks if it has enabled faulthandler.
    """
    patience = Patience(lambda: cpu_s(child))
    with suppress(ProcessLookupError, OSError):  # it has ended
        while cpu_s(child) < seconds:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return
            if patience.is_out:
                os.kill(child, signal.SIGABRT)
                raise Hang(f"process {child} does nothing any more")
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
