"""Time of a step of n tokens of one sequence, beside a step of one: what verifying n - 1 drafted tokens costs.

    python benchmarks/step_tokens.py [--model NAME] [--weights NAME]... [--isa NAME] [--threads N] [--json]
    python benchmarks/step_tokens.py --random 1b --weights q4_k       random weights, so that no file is needed

Each step appends n tokens behind the same prompt, computes the logits of all, and is undone. Steps of all lengths and
formats take turns; times are medians. With one thread they are processor time, which other processes change less.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack, nullcontext

import numpy as np

from fabula import Model, _native
from fabula.choices import ISA_NAMES
from fabula.engine.runner import Runner
from fabula.formats.checkpoint import DType
from random_llama import LLAMA_1B, LLAMA_8B, SMOLLM2_135M, RandomLlama

SHAPES = {"135m": SMOLLM2_135M, "1b": LLAMA_1B, "8b": LLAMA_8B}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--random", choices=SHAPES, help="instead of a model: one of this shape, every matrix in --weights"
    )
    parser.add_argument("--weights", action="append")
    parser.add_argument("--isa", choices=ISA_NAMES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64, help="tokens before the step")
    parser.add_argument("--most", type=int, default=16, help="tokens of the longest step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one object a line")
    arguments = parser.parse_args()
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    names = arguments.weights or ["q8_0", "q4_0", "q4_k_m"]
    lengths = range(1, arguments.most + 1)
    with ExitStack() as stack:
        stack.enter_context(_native.isa_forced(arguments.isa) if arguments.isa else nullcontext())
        runners = [stack.enter_context(_Opened(arguments, name)) for name in names]
        times: dict[tuple[str, int], list[float]] = {(name, n): [] for name in names for n in lengths}
        for r in range(arguments.rounds + 1):
            for name, (runner, sequence) in zip(names, runners, strict=True):
                for n in lengths:
                    tokens, before = np.arange(100, 100 + n, dtype=np.int32), sequence.n_tokens
                    start = clock()
                    runner.step([(sequence, tokens)], np.arange(n))
                    seconds = clock() - start
                    sequence.truncate(before)
                    if r:  # the first round is warm-up
                        times[name, n].append(seconds)
    for name in names:
        median = {n: float(np.median(times[name, n])) for n in lengths}
        for n in lengths:
            row = {"weights": name, "isa": arguments.isa or "best", "threads": arguments.threads, "tokens": n}
            row |= {"ms": round(1e3 * median[n], 2), "ratio": round(median[n] / median[1], 2)}
            row |= {"least_ms": round(1e3 * min(times[name, n]), 2)}
            if arguments.json:
                print(json.dumps(row))
            else:
                print(f"{name:7} {n:2} tokens  {row['ms']:8} ms  least {row['least_ms']:8}  {row['ratio']:5} of one")


class _Opened(ExitStack):
    """A model's runner, and a sequence with a prompt; closed at the end."""

    def __init__(self, arguments: argparse.Namespace, weights: str) -> None:
        super().__init__()
        self._arguments, self._weights = arguments, weights

    def __enter__(self):  # type: ignore[no-untyped-def]
        super().__enter__()
        context = self._arguments.prompt + self._arguments.most
        if self._arguments.random:
            dtype = DType[self._weights.upper()]
            checkpoint = RandomLlama(SHAPES[self._arguments.random], dtype, context)
            runner = Runner(checkpoint, weights=dtype, kv=(DType.F16, DType.F16), n_threads=self._arguments.threads)
            self.callback(runner.close)
        else:
            model = Model.load(
                self._arguments.model, weights=self._weights, threads=self._arguments.threads, context=context
            )
            self.callback(model.close)
            runner = model._runner
        sequence = self.enter_context(runner.sequence())
        runner.prefill(sequence, np.arange(1, 1 + self._arguments.prompt, dtype=np.int32))
        return runner, sequence


if __name__ == "__main__":
    main()
