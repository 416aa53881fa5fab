"""K and V of the turns of a model's sessions, and which are given up first when pages run out.

The tokens are the truth: a turn whose K and V were given up is as good as before, only that going on from it computes
them again, from the nearest turn before it that still has some.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict

from fabula.kv.pages import PagePool, Sequence
from fabula.sessions.turn import Turn


class Snapshots:
    """Finished turns by last use. Thread-safe by the pool's lock.

    Args:
        pool: of the model; asks here when it has too few free pages.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._turns: OrderedDict[int, weakref.ref[Turn]] = OrderedDict()
        # The pool must not keep what keeps the pool.
        method = weakref.WeakMethod(self._reclaim)
        pool.reclaim = lambda n: call(n) if (call := method()) else None

    def add(self, turn: Turn) -> None:
        """Takes charge of a finished turn, as the one used last."""
        with self._pool.lock:
            key, turns = id(turn), self._turns  # the callback must not keep the pool alive
            turns[key] = weakref.ref(turn, lambda _: turns.pop(key, None))

    def fork(self, turn: Turn, n_tokens: int) -> Sequence | None:
        """The longest beginning of a turn's ids whose K and V are there, `n_tokens` at most; None if there are none."""
        with self._pool.lock:
            for past in turn.lineage():
                usable = min(n_tokens, past.kv.n_tokens) if past.kv is not None else 0
                if usable > 0 and past.kv is not None:
                    if id(past) in self._turns:
                        self._turns.move_to_end(id(past))
                    return past.kv.fork(usable)
                n_tokens = min(n_tokens, past.kept)
            return None

    def _reclaim(self, n_free: int) -> None:
        """Gives up K and V, the longest unused first, until `n_free` pages are free or nothing is left."""
        for ref in list(self._turns.values()):
            if self._pool.n_free >= n_free:
                return
            turn = ref()
            if turn is not None and turn.kv is not None:
                turn.kv.close()
