"""`ReplyQueue`: one reply at a time, or the several of one `branch`; callers that wait are served in order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from weakref import WeakSet

from fabula.sessions.reply import Reply

_POLL_S = 0.05  # how often a caller that waits looks for replies that were forgotten


class ReplyQueue:
    """The running replies of a session, and the callers that wait for their end.

    Args:
        lock: of the session; held by the caller of every method.

    Attributes:
        running: replies that have not ended. Weak, so that a reply that its caller forgets can end.
        waiting: callers, in the order in which they came.
        forgotten: replies without references that have not ended; appended to by destructors.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self.running: WeakSet[Reply] = WeakSet()
        self.waiting: deque[object] = deque()
        self.forgotten: deque[Reply] = deque()
        self._changed = threading.Condition(lock)

    def acquire(self, wait: bool | float, check: Callable[[], None]) -> bool:
        """Waits until no reply is running and no caller is before this one.

        Args:
            wait: True for as long as it takes, False for not at all, or seconds.
            check: called after each wait; what it raises ends the waiting.

        Returns:
            False if it would take longer than `wait`.
        """
        end = None if wait is True else time.monotonic() + float(wait)
        ticket = object()
        self.waiting.append(ticket)
        try:
            while True:
                self.collect()
                check()
                if self.waiting[0] is ticket and not self.running:
                    return True
                left = _POLL_S if end is None else min(_POLL_S, end - time.monotonic())
                if left <= 0:
                    return False
                self._changed.wait(left)
        finally:
            self.waiting.remove(ticket)
            self._changed.notify_all()

    def discard(self, reply: Reply) -> None:
        """Removes a reply that has ended."""
        self.running.discard(reply)
        self._changed.notify_all()

    def collect(self) -> None:
        """Ends the replies that were forgotten."""
        while self.forgotten:
            self.forgotten.popleft().cancel()

    def stop(self) -> None:
        """Ends every reply."""
        self.collect()
        for reply in list(self.running):
            reply.cancel()
