"""KV of turns: retained after an answer, shared with other turns, freed when turns are deleted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from fabula.engine.generation import Engine
from fabula.sessions.prompts import common_length
from fabula.sessions.turn import WRITTEN, Turn


def keep_kv(turn: Turn, engine: Engine) -> None:
    """Retains the KV of a finished turn in the engine's cache, and shares it with the handwritten turns right before
    it, which were prefilled as part of its prompt."""
    if turn.kv is None:
        return
    cache = engine.cache
    cache.keep(turn.kv)
    kept = turn.kept
    with cache.lock:  # nothing is evicted between the check and the fork
        for past in islice(turn.lineage(), 1, None):
            usable = turn.kv.usable(past.n_ids)
            # A hybrid has the state before the last id of a prompt, whose logits are needed again anyway.
            if past.finish_reason != WRITTEN or kept < past.n_ids or usable < past.n_ids - (turn.kv.trail is not None):
                break
            if past.n_ids and (past.kv is None or past.kv.usable(usable) < usable):
                past.kv = turn.kv.fork(usable)
                cache.keep(past.kv)
            kept = min(kept, past.kept)


def share_kv(source: Turn, turn: Turn, engine: Engine) -> None:
    """Gives a turn without KV that of the leading ids it has in common with `source`."""
    turn.kv = source.fork_kv(common_length(source.ids(), turn.ids()), engine.cache)
    if turn.kv is not None:
        engine.cache.keep(turn.kv)


def free_kv(turns: Sequence[Turn]) -> int:
    """Releases the KV of deleted turns, except those on the path to a fork; returns the bytes freed."""
    needed = {past for turn in turns if turn.forks for past in turn.lineage()}
    n_bytes = 0
    for turn in turns:
        if turn not in needed and turn.kv is not None:
            pool = turn.kv.pool
            with pool.lock:  # other threads must not reserve or release pages while these are counted
                n_before = pool.n_bytes_held
                turn.kv.close()
                n_bytes += n_before - pool.n_bytes_held
    return n_bytes
