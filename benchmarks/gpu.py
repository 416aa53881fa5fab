"""A GPU, within ten minutes: correctness of results, limits of the hardware, and speed of Fabula.

python benchmarks/gpu.py [--minutes 9] [--json] [--tiny]

First the comparisons of tests/test_device.py run there; if one fails, nothing is timed. Then, one line each:

copy      bytes read and written a second by a copy on the GPU: the limit of memory-bound work
matmul    torch's product of bf16 matrices: the limit of compute-bound work; needs torch with CUDA
decode    tokens/s of 1, 4, 16 and 64 sequences together after a past of some length, greedy, as in the engine; also one
          sequence launched operator by operator instead of as a graph
prefill   tokens/s of prefill of one prompt, in chunks as in the engine; several prompts run one after the other, as
          fast as one; also with the products of cuBLASLt (device_products="library"), if it can be loaded

Models are Llamas in the shapes of SmolLM2-135M, Llama 3.2 1B and Llama 3.1 8B with random weights in bf16, q8_0 and
q4_0, KV cache in bf16; the past is pages of zeros, which take as long as any. `limit` follows from the two limits: each
step reads the weights once and the past of every sequence. The peer is transformers on the same GPU, in bf16, if torch
supports it; it prefills the prompts of all sequences together. Those rows come last, since it compiles for minutes.

Cases that do not fit the time or the memory are left out; stderr has notes on them and on progress. The GPU is the
first one; CUDA_VISIBLE_DEVICES chooses another.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fabula import _native, _program, _sampling
from fabula.bench import library
from fabula.bench.row import Row
from fabula.engine.device import Placement, library_path
from fabula.engine.runner import Runner
from fabula.errors import DeviceError, DeviceOutOfMemory, Unsupported
from fabula.formats.checkpoint import DType
from random_llama import LLAMA_1B, LLAMA_8B, SMOLLM2_135M, TINY, LlamaShape, RandomLlama

PROJECT = Path(__file__).resolve().parent.parent
KV = DType.BF16
WARM_STEPS = 3  # per size: launch, record, replay
ROUNDS = 3
COPIES = 10
ENOUGH_S = 5.0  # per case; no further round begins after it
LOAD_BYTES_PER_S = 0.3e9  # assumed until a large model was loaded; packing on a few cores
LARGE_BYTES = 1 << 30
SHARE_FOR_PAGES = 0.9  # of the memory left after the weights
TINY_CHECKS = "f32-f32 or same_bits"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: shapes, formats of weights, sequences together, pasts and prompts, steps of a round; bytes to
    copy, rows of torch's matrices, and the (sequences, prompt) that transformers takes part in, since it compiles for
    each."""

    shapes: Sequence[LlamaShape] = (SMOLLM2_135M, LLAMA_1B, LLAMA_8B)
    weights: Sequence[DType] = (DType.BF16, DType.Q8_0, DType.Q4_0)
    batches: Sequence[int] = (1, 4, 16, 64)
    prompts: Sequence[int] = (512, 4096)
    steps: int = 32
    copy_bytes: int = 4 << 30
    matrix: int = 8192
    peers: Sequence[tuple[int, int]] = ((1, 512), (16, 512))

    @property
    def context(self) -> int:
        return max(self.prompts) + self.steps + WARM_STEPS


TINY_PLAN = Plan((TINY,), batches=(1, 3), prompts=(8, 40), steps=3, copy_bytes=1 << 20, matrix=64, peers=((1, 8),))


class LeftOut(Exception):
    """A case that is not measured, with the reason."""


@dataclass(slots=True)
class Budget:
    """The remaining time, and the cases left out."""

    ends: float
    left_out: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.ends - time.perf_counter()

    def need(self, seconds: float) -> None:
        """Raises LeftOut unless that much time is left."""
        if seconds > self.left:
            raise LeftOut(f"it needs about {seconds:.0f} s, {max(self.left, 0):.0f} s are left")

    def leave_out(self, what: str, why: object) -> None:
        self.left_out.append(what)
        tell(f"left out: {what}: {why}")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes a second, and operations a second of bf16 products, if measured."""

    bytes_per_s: float
    operations_per_s: float | None


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Ours:
    """A random model on the GPU, with its KV pages."""

    def __init__(self, shape: LlamaShape, dtype: DType, plan: Plan) -> None:
        self.shape, self.dtype = shape, dtype
        self._runner = Runner(
            RandomLlama(shape, dtype, plan.context),
            weights=dtype,
            kv=(KV, KV),
            n_threads=os.cpu_count() or 1,
            context=plan.context,
            kv_memory=1,
            placement=Placement("cuda"),
        )
        on = self._runner.device
        assert on is not None  # "cuda" is a GPU or an error
        page_bytes = self._runner.pool.native.page_bytes
        self._device = on
        self._by_library: _program.Program | None = None
        self._pages_each = -(-plan.context // _native.PAGE_POSITIONS)
        n_pages = min(max(plan.batches) * self._pages_each, int(SHARE_FOR_PAGES * on.memory()[1]) // page_bytes)
        self._pool = _native.PagePool((KV, KV), max(n_pages, 1), self._runner.config.kv_layers, on)
        self.position_bytes = page_bytes / _native.PAGE_POSITIONS
        self.n_bytes = self._runner.weight_bytes

    def set_graphs(self, is_on: bool) -> None:
        self._runner.program.set_graphs(is_on)

    def decode(self, batch: int, past: int, n_steps: int, budget: Budget) -> float:
        """Tokens a second of all sequences, the median of the rounds."""
        start = time.perf_counter()
        self._draw(batch, past, WARM_STEPS)
        step = (time.perf_counter() - start) / WARM_STEPS
        budget.need(step * n_steps)
        speeds = []
        start = time.perf_counter()
        while len(speeds) < ROUNDS and (not speeds or time.perf_counter() - start < min(ENOUGH_S, budget.left)):
            seconds = self._draw(batch, past, n_steps)
            speeds.append(batch * (n_steps - 1) / (seconds[-1] - seconds[0]))
        return statistics.median(speeds)

    def prefill(self, prompt: int, budget: Budget, *, by_library: bool = False) -> float:
        """Tokens a second, the median of the rounds."""
        program = self._library_program() if by_library else self._runner.program
        first = min(prompt, self._runner.max_tokens)
        self._read(program, first)  # warm-up
        start = time.perf_counter()
        self._read(program, first)
        budget.need((time.perf_counter() - start) * prompt / first)
        speeds = []
        begun = time.perf_counter()
        while len(speeds) < ROUNDS and (not speeds or time.perf_counter() - begun < min(ENOUGH_S, budget.left)):
            start = time.perf_counter()
            self._read(program, prompt)
            speeds.append(prompt / (time.perf_counter() - start))
        return statistics.median(speeds)

    def _pages(self, sequence: int, n: int) -> _native.I32:
        pages = np.arange(sequence * self._pages_each, sequence * self._pages_each + n, dtype=np.int32)
        if pages[-1] >= self._pool.n_pages:
            raise LeftOut(f"the GPU has memory for {self._pool.n_pages} pages")
        return pages

    def _draw(self, batch: int, past: int, n_steps: int) -> Any:
        """The end time of each step, in seconds."""
        none, settings = np.empty(0, np.int32), _sampling.sampling_struct(temperature=0.0)
        sampling = _program.Sampling(settings, none, np.empty(0, np.float32), none)
        draws = []
        for i in range(batch):
            share = _program.BatchSequence(self._pages(i, self._pages_each), past, np.zeros(1, np.int32), 0, 0)
            history = np.full(past + 1 + n_steps, 3, np.int32)
            draws.append(_program.Draw(share, n_steps, history, past + 1, none, sampling))
        _, seconds = self._runner.program.draw(self._pool, draws, n_steps, _native.Flag().memory)
        return seconds

    def _library_program(self) -> _program.Program:
        """A copy that uses cuBLASLt for products of many tokens."""
        if self._by_library is None:
            try:
                self._device.use_library(library_path())
            except Unsupported as error:
                raise LeftOut(str(error)) from None
            self._by_library = self._runner.another_program()
        return self._by_library

    def _read(self, program: _program.Program, prompt: int) -> None:
        chunk = self._runner.max_tokens
        for start in range(0, prompt, chunk):
            tokens = np.full(min(chunk, prompt - start), 3, np.int32)
            share = _program.BatchSequence(self._pages(0, self._pages_each), start, tokens, 0, 0)
            is_last = start + len(tokens) == prompt
            program.run(self._pool, [share], [len(tokens) - 1] if is_last else [])

    def decode_limit(self, limits: Limits, batch: int, past: int) -> float:
        every = sum(rows * columns for rows, columns in self.shape.matrices().values())
        read = self.n_bytes * self.shape.multiplied / every + batch * past * self.position_bytes
        by_memory = batch * limits.bytes_per_s / read
        if limits.operations_per_s is None:
            return by_memory
        return min(by_memory, limits.operations_per_s / (2.0 * self.shape.multiplied))

    def prefill_limit(self, limits: Limits, prompt: int) -> float | None:
        """Operations per prompt; the head is multiplied once."""
        if limits.operations_per_s is None:
            return None
        head = self.shape.vocab * self.shape.hidden
        return limits.operations_per_s / (2.0 * (self.shape.multiplied - head + head / prompt))

    def close(self) -> None:
        """Frees all memory, including that of the weights, which are reference-counted."""
        self._pool.close()
        self._runner.close()
        del self._runner, self._by_library
        gc.collect()


# ---- Cases ----------------------------------------------------------------------------------------------------------


def peer_module() -> Any | None:
    """gpu_peer where torch and transformers are installed and see a GPU, else None."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return None
    import gpu_peer

    return gpu_peer if gpu_peer.is_there() else None


def limits_of(device: _native.Device, plan: Plan, peers: Any | None) -> tuple[Limits, list[Row]]:
    """The GPU's limits."""
    copied = library.measure_copy(device, plan.copy_bytes, COPIES)
    rows = [Row(case=f"copy {plan.copy_bytes >> 20} MiB", unit="GB/s", ours=copied / 1e9)]
    if peers is None:
        tell("no limit for products: torch with CUDA is not installed")
        return Limits(copied, None), rows
    peak = peers.matrix_peak(plan.matrix)
    case, speed = f"matmul {plan.matrix}", peak / 1e12
    rows.append(Row(case=case, unit="TFLOP/s", ours=None, weights="bf16", peer=speed, peer_name="torch"))
    return Limits(copied, peak), rows


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def peer_speeds(
    shape: LlamaShape, plan: Plan, peers: Any, budget: Budget
) -> tuple[str, dict[tuple[str, int, int], float]]:
    """transformers' settings, and its tokens a second by case, sequences and prompt."""
    speeds: dict[tuple[str, int, int], float] = {}
    what = f"transformers, {shape.name}"
    tell(what)
    try:
        budget.need(60)  # about the time to compile
        peer = peers.Transformers(shape.config(plan.context))
    except Exception as error:  # any failure of torch must not end our own measurement
        budget.leave_out(what, first_line(error))
        return "", speeds
    for batch, prompt in plan.peers:
        try:
            budget.need(45)
            prefill, decode = peer.run(batch, prompt, plan.steps)
            speeds["prefill", batch, prompt], speeds["decode", batch, prompt] = prefill, decode
        except Exception as error:
            budget.leave_out(f"{what}, {batch} x {prompt}", first_line(error))
    peer.close()
    return peer.settings, speeds


def model_rows(ours: Ours, plan: Plan, limits: Limits, budget: Budget) -> Iterator[tuple[tuple[str, int, int], Row]]:
    """Fabula's tokens a second by case, sequences and prompt."""
    about = {"model": ours.shape.name, "weights": ours.dtype.name.lower(), "kv": KV.name.lower(), "unit": "tokens/s"}

    def row(case: str, batch: int, prompt: int) -> Row:
        if case in ("prefill", "library"):
            speed = ours.prefill(prompt, budget, by_library=case == "library")
            name = f"prefill {prompt}" + (", cuBLASLt" if case == "library" else "")
            return Row(case=name, ours=speed, limit=ours.prefill_limit(limits, prompt), **about)
        ours.set_graphs(case == "decode")
        speed = ours.decode(batch, prompt, plan.steps, budget)
        name = f"decode {batch} x {prompt}" + ("" if case == "decode" else ", by operators")
        return Row(case=name, ours=speed, limit=ours.decode_limit(limits, batch, prompt), **about)

    cases = [("decode", batch, prompt) for prompt in plan.prompts for batch in plan.batches]
    cases += [("operators", 1, plan.prompts[0])]
    cases += [(case, 1, prompt) for case in ("prefill", "library") for prompt in plan.prompts]
    for key in cases:
        try:
            budget.need(0)
            yield key, row(*key)
        except (LeftOut, DeviceOutOfMemory) as error:
            budget.leave_out(f"{about['model']} {about['weights']} {key[0]} {key[1]} x {key[2]}", error)


def measure(device: _native.Device, plan: Plan, budget: Budget) -> Iterator[Row]:
    """Rows as they are measured; those with a peer come last."""
    peers = peer_module()
    limits, rows = limits_of(device, plan, peers)
    yield from rows
    load_rate = LOAD_BYTES_PER_S
    waiting: list[tuple[LlamaShape, tuple[str, int, int], Row]] = []  # for the peer, which runs last, since it compiles
    for dtype in plan.weights:
        for shape in plan.shapes:
            what = f"{shape.name} {dtype.name.lower()}"
            tell(what)
            try:
                elements, n_bytes = _native.dtype_block(dtype)
                size = sum(rows * columns for rows, columns in shape.matrices().values()) / elements * n_bytes
                budget.need(size / load_rate)
                start = time.perf_counter()
                ours = Ours(shape, dtype, plan)
                if ours.n_bytes > LARGE_BYTES:
                    load_rate = ours.n_bytes / (time.perf_counter() - start)
            except (LeftOut, DeviceOutOfMemory) as error:
                budget.leave_out(what, error)
                continue
            for key, row in model_rows(ours, plan, limits, budget):
                if peers is not None and dtype is DType.BF16 and key[0] != "operators" and key[1:] in plan.peers:
                    waiting.append((shape, key, row))
                else:
                    yield row
            ours.close()
    for shape, of_shape in itertools.groupby(waiting, key=lambda row: row[0]):
        settings, speeds = peer_speeds(shape, plan, peers, budget)
        for _, (case, batch, prompt), row in of_shape:
            yield beside(row, speeds.get(("prefill" if case == "library" else case, batch, prompt)), settings)


def beside(row: Row, peer: float | None, settings: str) -> Row:
    if peer is None:
        return row
    return Row(
        case=row.case, unit=row.unit, ours=row.ours, model=row.model, weights=row.weights, kv=row.kv, limit=row.limit,
        peer=peer, peer_name="transformers", peer_settings=settings,
    )  # fmt: skip


# ---- Command --------------------------------------------------------------------------------------------------------


def check(is_tiny: bool, budget: Budget) -> bool:
    """Whether the comparisons with the CPU pass."""
    tell("comparing with the CPU")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_device.py"]
    if is_tiny:
        command += ["-k", TINY_CHECKS]
    try:
        done = subprocess.run(command, cwd=PROJECT, stdout=sys.stderr, timeout=max(budget.left, 1))
    except subprocess.TimeoutExpired:
        return False
    if done.returncode > 1:  # 1: a comparison failed
        sys.exit(f"nothing is measured: the comparisons did not run (pytest ended with {done.returncode})")
    return done.returncode == 0


def text_of(row: Row) -> str:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    cells = [
        f"{row.model or '':14}", f"{row.weights or '':5}", f"{row.case:28}", f"{number(row.ours, '.1f'):>10}",
        f"{row.unit:9}", f"{number(row.limit_share, '.0%'):>5} of limit", f"{number(row.peer, '.1f'):>10}",
        f"{row.peer_name or '':12}", f"{number(row.ratio, '.2f'):>6}",
    ]  # fmt: skip
    return " ".join(cells).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="what does not fit is left out")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes: that everything works, on an emulated GPU too"
    )
    arguments = parser.parse_args()
    budget = Budget(time.perf_counter() + 60 * arguments.minutes)
    try:
        device = _native.Device(0)
    except (Unsupported, DeviceError) as error:
        sys.exit(f"nothing is measured: {error}")
    about = {"device": device.info.name}
    if not check(arguments.tiny, budget):
        sys.exit("nothing is measured: the GPU's results are not right, or were not there in time")
    if not arguments.json:
        print(f"{device.name}: {device.info.name}, {device.info.memory_bytes / 2**30:.1f} GiB")
    for row in measure(device, TINY_PLAN if arguments.tiny else Plan(), budget):
        print(json.dumps(row.to_json() | about) if arguments.json else text_of(row), flush=True)
    tell(f"{len(budget.left_out)} left out")


if __name__ == "__main__":
    main()
