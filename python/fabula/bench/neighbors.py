"""Busy neighbours: processes that compute all the time, as on a machine that others use, too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# It ends with its parent, even one that was killed: reading from the pipe it holds then comes back.
_BUSY = """
import os, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
while True:
    pass
"""


@contextmanager
def neighbors(n: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many busy processes while the block runs."""
    busy: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(n):
            busy.append(subprocess.Popen([sys.executable, "-S", "-c", _BUSY], stdin=subprocess.PIPE))
        yield busy
    finally:
        for process in busy:
            process.kill()
            process.communicate()
