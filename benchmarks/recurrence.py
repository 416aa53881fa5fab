"""Time of recurrent operators alone: microseconds a token and layer, and gigabytes of state a second.

    python benchmarks/recurrence.py [--op NAME]... [--tokens N]... [--sequences N] [--isa NAME] [--threads N] [--json]

A program of 18 such layers, as Qwen3.5-0.8B has (LFM2-700M and Granite 4 H Tiny for the others), and one without them
take turns; the result is the difference of their medians. A step of one token reads and writes every state once; with
more tokens a state stays in the caches. With one thread times are processor time, which other processes change less.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from fabula import _native, ops
from fabula._native import KvLayer, PagePool, StatePool
from fabula._program import BatchSequence, Heads, Op, Program, Shape, conv_floats, head_floats
from fabula.choices import ISA_NAMES
from fabula.formats.checkpoint import DType
from fabula.models import builder as kinds

N_LAYERS, N_ROWS = 18, 64
RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Case:
    """An operator, the widths of its inputs and its result, the numbers of its state, and multiply-adds a token."""

    op: Op
    widths: tuple[int, ...]
    width: int
    floats: int
    work: int


def cases() -> dict[str, Case]:
    def numbers(n: int) -> np.ndarray:
        return RNG.standard_normal(n).astype(np.float32)

    def conv(width: int, taps: int, **fields: int) -> Case:
        op = Op(kind=kinds.SHORT_CONV, input=0, width=width, vector=numbers(taps * width), **fields)
        n_read = 3 * width if fields.get("flags") else width
        return Case(op, (n_read,), width, conv_floats(width, taps), taps * width)

    def delta(n_heads: int, n_groups: int, k_dim: int, v_dim: int) -> Case:
        op = Op(
            kind=kinds.DELTA_RULE, input=0, factors=1, n_heads=n_heads, n_groups=n_groups, k_dim=k_dim, v_dim=v_dim,
            vector=-np.exp(numbers(n_heads)), vector2=numbers(n_heads), scale=k_dim**-0.5, eps=1e-6,
        )  # fmt: skip
        floats = head_floats(n_heads, k_dim, v_dim)
        return Case(op, (2 * n_groups * k_dim + n_heads * v_dim, 2 * n_heads), n_heads * v_dim, floats, 4 * floats)

    def ssm(n_heads: int, n_groups: int, state_dim: int, head_dim: int) -> Case:
        op = Op(
            kind=kinds.SSM, input=0, factors=1, n_heads=n_heads, n_groups=n_groups, k_dim=state_dim, v_dim=head_dim,
            vector=np.concatenate([-np.exp(numbers(n_heads)), numbers(n_heads)]), vector2=numbers(n_heads),
        )  # fmt: skip
        floats = head_floats(n_heads, state_dim, head_dim)
        return Case(
            op, (n_heads * head_dim + 2 * n_groups * state_dim, n_heads), n_heads * head_dim, floats, 3 * floats
        )

    silu = kinds.ACTIVATIONS["silu"]
    return {
        "conv": conv(6144, 4, activation=silu),
        "conv_gated": conv(1536, 3, flags=kinds.CONV_GATED),
        "delta_rule": delta(16, 16, 128, 128),
        "delta_rule_2": delta(32, 16, 128, 128),
        "ssm": ssm(48, 1, 128, 64),
    }


def program(case: Case, n_layers: int, n_tokens: int, n_threads: int) -> Program:
    n = len(case.widths)
    tables = [RNG.standard_normal((N_ROWS, width)).astype(np.float32) for width in case.widths]
    embeds = [Op(kind=kinds.EMBED, out=i, weight=ops.pack(table)) for i, table in enumerate(tables)]
    fields = {name: getattr(case.op, name) for name in case.op.__dataclass_fields__ if name not in ("out", "layer")}
    layers = [Op(**fields, out=n + i % 2, layer=i) for i in range(n_layers)]
    ends = [
        Op(kind=kinds.GATHER_OUTPUTS, input=n - 1, out=n + 2),
        Op(kind=kinds.LOGITS, input=n + 2, weight=ops.pack(np.zeros((1, case.widths[-1]), np.float32))),
    ]
    widths = [*case.widths, case.width, case.width, case.widths[-1]]
    heads = (Heads(1, 1, 8, 8, -1),)
    shape = Shape(
        n_layers=1, vocab_size=N_ROWS, max_tokens=n_tokens, heads=heads, ropes=(), n_state_layers=n_layers
    )  # fmt: skip
    return Program(shape, widths, [*embeds, *layers, *ends], n_threads=n_threads)


def main() -> None:
    known = cases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=known)
    parser.add_argument("--tokens", action="append", type=int, help="of each sequence in a step")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--isa", choices=ISA_NAMES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one object a line")
    arguments = parser.parse_args()
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    for name in arguments.op or known:
        for n_tokens in arguments.tokens or [1, 16, 512]:
            with _native.isa_forced(arguments.isa) if arguments.isa else nullcontext():
                seconds = measure(known[name], n_tokens, arguments, clock)
            case, n_sequences = known[name], arguments.sequences
            per_token = seconds / N_LAYERS / n_tokens / n_sequences
            moved = 2 * 4 * case.floats * N_LAYERS * n_sequences  # once a step
            row = {"op": name, "tokens": n_tokens, "sequences": n_sequences, "threads": arguments.threads}
            row |= {"isa": arguments.isa or _native.isa_best(), "us_per_token_and_layer": round(1e6 * per_token, 2)}
            row |= {"ms_per_step": round(1e3 * seconds, 3), "state_gb_per_s": round(moved / seconds / 1e9, 2)}
            row |= {"gflop_per_s": round(2 * case.work / per_token / 1e9, 1)}
            if arguments.json:
                print(json.dumps(row))
            else:
                print(
                    f"{name:12} {n_tokens:4} tokens x {n_sequences}  {row['ms_per_step']:9} ms a step"
                    f"  {row['us_per_token_and_layer']:8} us a token and layer  {row['state_gb_per_s']:6} GB/s of state"
                    f"  {row['gflop_per_s']:6} GFLOP/s"
                )


def measure(case: Case, n_tokens: int, arguments: argparse.Namespace, clock) -> float:  # type: ignore[no-untyped-def]
    """Seconds of a step's recurrent layers: the median with them minus that without."""
    n_sequences = arguments.sequences
    programs = [program(case, n, n_tokens * n_sequences, arguments.threads) for n in (0, N_LAYERS)]
    n_pages = -(-n_tokens // 32)
    pages = PagePool(DType.F16, n_pages * n_sequences, [KvLayer(1, 8, 8)])
    states = StatePool([case.floats] * N_LAYERS, n_sequences)
    tokens = RNG.integers(0, N_ROWS, n_tokens).astype(np.int32)
    batch = [
        BatchSequence(np.arange(n_pages, dtype=np.int32) + i * n_pages, 0, tokens, state_in=i, state_out=i)
        for i in range(n_sequences)
    ]
    times: list[list[float]] = [[], []]
    for r in range(arguments.rounds + 1):
        for i, each in enumerate(programs):
            start = clock()
            each.run(pages, batch, [0], states=states)
            if r:  # the first round is warm-up
                times[i].append(clock() - start)
    without, with_them = (float(np.median(each)) for each in times)
    return with_them - without


if __name__ == "__main__":
    main()
