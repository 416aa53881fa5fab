"""Busy neighbors: processes that compute all the time, as on a shared machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# It ends with its parent, even if that was killed: then the read from the pipe returns.
_BUSY = """
import os, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
while True:
    pass
"""


@contextmanager
def neighbors(n: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Runs n busy processes during the block."""
    busy: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(n):
            busy.append(subprocess.Popen([sys.executable, "-S", "-c", _BUSY], stdin=subprocess.PIPE))
        yield busy
    finally:
        for process in busy:
            process.kill()
            process.communicate()
