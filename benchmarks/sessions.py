"""What going back costs: rollback and fork by depth and by length, beside copying the KV cache.

    python benchmarks/sessions.py [--model NAME] [--json] [--peer]

One line a case: `depth` turns, `n_tokens` positions behind the head, p50 and p99 of many repeats in milliseconds,
tokens that the turn after it had to recompute, and the bytes that a snapshot holds of its own. "full copy" reads every
page out and writes it back, as an engine does that keeps a copy of the cache per turn; with --peer llama-cpp-python
saves and loads its state on a conversation of the same length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from fabula import EngineError, Model, SamplingParams, Session, Turn

DEPTHS = (1, 10, 100, 150)
LENGTHS = (512, 2048, 8000)
REPEATS = 200
TINY = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)


def times_ms(function: Callable[[], object], repeats: int = REPEATS) -> dict[str, float]:
    """p50 and p99 of repeated calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    seconds.sort()
    return {
        "p50_ms": 1e3 * statistics.median(seconds),
        "p99_ms": 1e3 * seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))],
    }


def own_bytes(turn: Turn) -> int:
    """Bytes a snapshot holds beside K and V: its ids and its list of pages, as Python keeps them."""
    pages = turn.kv.pages if turn.kv else []
    return sys.getsizeof(pages) + sys.getsizeof(turn.prompt_ids) + sys.getsizeof(turn.token_ids) + sys.getsizeof(turn)


def walk(session: Session, case: str) -> Iterator[dict[str, Any]]:
    """Rollback to the turn before the head and back, and fork at the head; then a turn, to see what it recomputes."""
    head, depth = session.head, session.head.number
    facts = {"depth": depth, "n_tokens": head.n_ids, "bytes": own_bytes(head)}

    def back_and_forth() -> None:
        session.rollback(depth - 1)
        session.redo()

    rollback, fork = times_ms(back_and_forth), times_ms(session.fork)
    session.rollback(depth - 1)
    session.tell(prompt=" So", params=TINY).text()
    yield {"case": f"rollback and redo, {case}", **facts, **rollback, "recomputed": session.head.recomputed}
    other = session.fork(head)
    other.tell(prompt=" So", params=TINY).text()
    yield {"case": f"fork, {case}", **facts, **fork, "recomputed": other.head.recomputed}
    session.rollback(head)


def by_depth(model: Model) -> Iterator[dict[str, Any]]:
    session = model.session()
    session.tell(prompt="The lighthouse keeper", params=TINY).text()
    for depth in DEPTHS:
        while session.head.number < depth:
            session.tell(params=TINY).text()
        yield from walk(session, "by depth")


def by_length(model: Model) -> Iterator[dict[str, Any]]:
    text = "The lighthouse keeper climbed the stairs every evening before the sun went down and lit the lamp. "
    words = model.tokenizer.encode(text * 600)
    for n_tokens in (n for n in LENGTHS if n + 64 < model.context):
        session = model.session()
        session.tell(prompt="It begins.", params=TINY).text()
        n_more = n_tokens - session.head.n_ids
        session.tell(prompt=model.tokenizer.decode(words[:n_more]), params=TINY).text()
        yield from walk(session, "by length")
        yield full_copy(model, session)


def full_copy(model: Model, session: Session) -> dict[str, Any]:
    """Reads every page of the head's K and V out of the pool and writes it back."""
    kv, pool = session.head.kv, model._runner.pool
    assert kv is not None
    pages = kv.pages
    copies = [pool.native.read(page) for page in pages]

    def save() -> None:
        for page, copy in zip(pages, copies, strict=True):
            copy[:] = pool.native.read(page)

    def load() -> None:
        for page, copy in zip(pages, copies, strict=True):
            pool.native.write(page, copy)

    saved, loaded = times_ms(save, 20), times_ms(load, 20)
    facts = {"depth": session.head.number, "n_tokens": session.head.n_ids, "bytes": len(pages) * pool.page_bytes}
    times = {key: saved[key] + loaded[key] for key in saved}
    return {"case": "full copy, save and load", **facts, **times, "recomputed": 0}


def peer(model: Model, n_tokens: int) -> dict[str, Any]:
    """llama-cpp-python's save_state and load_state, f16 KV, on the same number of tokens of the same file."""
    import llama_cpp

    llama = llama_cpp.Llama(str(model.path), n_ctx=model.context, n_threads=model.threads, verbose=False)
    tokens = model.tokenizer.encode("The lighthouse keeper climbed the stairs every evening. " * 1200)[:n_tokens]
    llama.eval(tokens)
    state = llama.save_state()
    saved, loaded = times_ms(llama.save_state, 5), times_ms(lambda: llama.load_state(state), 5)
    times = {key: saved[key] + loaded[key] for key in saved}
    facts = {"depth": 1, "n_tokens": n_tokens, "bytes": state.llama_state_size}
    return {"case": "llama-cpp-python, save and load", **facts, **times, "recomputed": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description="What rollback and fork cost, by depth and by length.")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="folder, .gguf file or name")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--peer", action="store_true", help="measure llama-cpp-python too; needs a .gguf file")
    options = parser.parse_args()
    with Model.load(options.model) as model:
        for row in rows(model, peer_too=options.peer):
            if options.json:
                print(json.dumps(row), flush=True)
            else:
                where = f"{row['case']:34} depth {row['depth']:4}  {row['n_tokens']:6} tokens"
                cost = f"p50 {row['p50_ms']:10.4f} ms  p99 {row['p99_ms']:10.4f} ms"
                print(f"{where}  {cost}  recomputed {row['recomputed']:4}  {row['bytes']:12,} bytes", flush=True)


def rows(model: Model, *, peer_too: bool) -> Iterator[dict[str, Any]]:
    yield from by_depth(model)
    yield from by_length(model)
    if peer_too:
        yield peer(model, min(LENGTHS[-1], model.context - 64))


if __name__ == "__main__":
    try:
        main()
    except EngineError as error:
        raise SystemExit(f"error: {error}") from None
