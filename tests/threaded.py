"""Work in several threads at once, for tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def in_threads(*work: Callable[[], Any]) -> list[Any]:
    """Runs functions at the same time; what they return or raise."""
    results: list[Any] = [None] * len(work)

    def run(i: int) -> None:
        try:
            results[i] = work[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
