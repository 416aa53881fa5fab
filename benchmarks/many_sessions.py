"""Many concurrent sessions: throughput, prefix sharing, and latency while a long prompt arrives.

python benchmarks/many_sessions.py [--model NAME] [--json]

decode    tokens/s of 1, 4, 16 sessions together, in turns; ratio to one session
shared    KV pages and computed tokens of 16 sessions with one system message of about 1,000 tokens
arrival   time between tokens of decoding sessions, before and while a prompt of 4,000 tokens is prefilled
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from fabula import Model, Reply, SamplingParams

TEXT = "The lighthouse keeper climbed the stairs every evening before the sun went down and lit the lamp. "
MANY = 16


def drain(replies: list[Reply]) -> list[list[float]]:
    """Reads replies in parallel, each in its own thread; returns the arrival times of their pieces."""
    times: list[list[float]] = [[] for _ in replies]

    def read(reply: Reply, out: list[float]) -> None:
        for _ in reply:
            out.append(time.perf_counter())

    threads = [threading.Thread(target=read, args=pair) for pair in zip(replies, times, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def together(model: Model, n: int, n_tokens: int) -> float:
    """Tokens per second of n stories together, from the first token of the last one on."""
    params = SamplingParams(temperature=0.8, max_tokens=n_tokens, ignore_eos=True)
    sessions = [model.session() for _ in range(n)]
    times = drain([session.tell(prompt=f"{i}. {TEXT}", params=params) for i, session in enumerate(sessions)])
    begin, end = max(t[0] for t in times), min(t[-1] for t in times)
    n_between = sum(begin < t <= end for story in times for t in story)
    for session in sessions:
        session.delete()
    return n_between / (end - begin)


def decode(model: Model, rounds: int) -> Iterator[dict[str, Any]]:
    speeds: dict[int, list[float]] = {n: [] for n in (1, 4, MANY)}
    for _ in range(rounds):
        for n, measured in speeds.items():
            measured.append(together(model, n, 64))
    one = statistics.median(speeds[1])
    for n, measured in speeds.items():
        speed = statistics.median(measured)
        yield {"case": "decode", "sessions": n, "tokens_per_s": speed, "ratio": speed / one}


def shared(model: Model) -> Iterator[dict[str, Any]]:
    model.clear_cache()
    system = TEXT * (1000 // len(model.tokenizer.encode(TEXT)))
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    sessions = [model.session(system=system) for _ in range(MANY)]
    drain([session.say(f"What is the number {i}?", params) for i, session in enumerate(sessions)])
    computed = sum(s.head.timings.prompt_tokens - s.head.timings.reused_tokens for s in sessions if s.head.timings)
    usage = model.kv_usage
    alone = sum(-(-session.head.n_ids // 32) for session in sessions)
    n_prompt = sessions[0].head.timings.prompt_tokens if sessions[0].head.timings else 0
    yield {
        "case": "shared",
        "sessions": MANY,
        "prompt_tokens": n_prompt,
        "computed_tokens": computed,
        "computed_alone": sum(s.head.timings.prompt_tokens for s in sessions if s.head.timings),
        "pages": usage.n_used,
        "pages_shared": usage.n_shared,
        "pages_alone": alone,
    }
    for session in sessions:
        session.delete()


def arrival(model: Model, n_decoding: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Sessions decode; meanwhile a prompt of 4,000 tokens arrives and is prefilled."""
    before: list[float] = []
    during: list[float] = []
    first_ms: list[float] = []
    for attempt in range(rounds):
        model.clear_cache()
        params = SamplingParams(max_tokens=5000, ignore_eos=True)
        sessions = [model.session() for _ in range(n_decoding)]
        replies = [s.tell(prompt=f"{attempt}.{i}. {TEXT}", params=params) for i, s in enumerate(sessions)]
        times: list[list[float]] = [[] for _ in replies]

        def read(reply: Reply, out: list[float]) -> None:
            for _ in reply:  # until it is cancelled
                out.append(time.perf_counter())

        threads = [threading.Thread(target=read, args=pair) for pair in zip(replies, times, strict=True)]
        for thread in threads:
            thread.start()
        while min(len(t) for t in times) < 100:
            time.sleep(0.01)
        words = TEXT * (4000 // len(model.tokenizer.encode(TEXT)))
        begin = time.perf_counter()
        late = model.generate(f"{attempt}! {words}", SamplingParams(max_tokens=1, ignore_eos=True))
        late.text()
        end = time.perf_counter()
        first_ms.append(late.timings.first_token_ms)
        for reply in replies:
            reply.cancel()
        for thread in threads:
            thread.join()
        pairs = [(a, b) for t in times for a, b in itertools.pairwise(t[8:])]
        before += [b - a for a, b in pairs if b <= begin]
        during += [b - a for a, b in pairs if begin < b <= end]
        for session in sessions:
            session.delete()
    during.sort()
    alone, median, p99 = statistics.median(before), statistics.median(during), during[int(0.99 * len(during))]
    yield {
        "case": "arrival",
        "sessions": n_decoding,
        "alone_ms": 1e3 * alone,
        "median_ms": 1e3 * median,
        "p99_ms": 1e3 * p99,
        "max_ms": 1e3 * during[-1],
        "p99_to_median": p99 / median,
        "p99_to_alone": p99 / alone,
        "first_token_of_4k_ms": statistics.median(first_ms),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one object a line")
    arguments = parser.parse_args()
    with Model.load(arguments.model) as model:
        together(model, 2, 16)  # warm
        for cases in (
            decode(model, arguments.rounds),
            shared(model),
            arrival(model, 1, 3),
            arrival(model, 4, 3),
        ):
            for case in cases:
                rounded = {key: round(v, 3) if isinstance(v, float) else v for key, v in case.items()}
                print(json.dumps(rounded) if arguments.json else "  ".join(f"{k} {v}" for k, v in rounded.items()))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
