"""Speed of prefill and decode, alone or in turns with other engines on the same weights.

A decode step reads every packed matrix once, so decode cannot be faster than memory bandwidth / weight bytes. Prefill
multiplies each token with every matrix of the layers, so it cannot be faster than multiply-adds per second / number of
those weights. Both ignore attention, so they are upper bounds of the speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

from fabula._native import PAGE_POSITIONS
from fabula.bench.machine import Machine
from fabula.bench.neighbors import neighbors
from fabula.bench.status import Status, silent
from fabula.bench.timing import Times, turns
from fabula.engine.generation import Generation
from fabula.engine.sampling import SamplingParams
from fabula.errors import InvalidArgument
from fabula.model import Model

AGREEMENT_TOKENS = 32
_PAUSE_S = 0.05  # between engines, so that spinning threads go to sleep
# The prompt of all engines, repeated to the requested length.
_TEXT = (
    "The lighthouse keeper climbed the stairs every evening before the sun went down. He carried oil for the lamp, a "
    "piece of bread and an old book about the stars. When the storm came, he counted the ships that passed the rocks, "
    "and he wrote their names down so that nobody would be forgotten. "
)


@dataclass(frozen=True, slots=True)
class Run:
    """One prefill and decode.

    Attributes:
        prefill_s: seconds of prefill, up to the first token.
        decode_s: seconds for the tokens after the first.
        tokens: greedy tokens, the first included.
    """

    prefill_s: float
    decode_s: float
    tokens: tuple[int, ...]


class Engine(Protocol):
    """An engine that generates greedily and never stops early.

    Attributes:
        name: for the table.
        settings: by case, "prefill" and "decode".
    """

    name: str
    settings: dict[str, str]

    def run(self, prompt: Sequence[int], n_tokens: int) -> Run:
        """Processes a prompt from an empty cache and generates `n_tokens` tokens."""
        ...

    def together(self, prompts: Sequence[Sequence[int]], shared: int, n_tokens: int) -> float | None:
        """Tokens a second of all prompts decoded together, `n_tokens` each, without prefill; they share their first
        `shared` ids. None if the engine does not support it."""
        ...

    def close(self) -> None: ...


# (model, positions, status) -> other engines for the model.
MakePeers = Callable[[Model, int, Status], list[Engine]]


class Fabula:
    """A loaded model through the SDK, including sampler and detokenizer; without speculation: each token is a step."""

    name = "fabula"

    def __init__(self, model: Model) -> None:
        self._model = model
        self._engine = replace(model._engine, speculation="off")
        self.settings = dict.fromkeys(("prefill", "decode"), f"{model.threads} threads")

    def run(self, prompt: Sequence[int], n_tokens: int) -> Run:
        params = SamplingParams(temperature=0.0, max_tokens=n_tokens, ignore_eos=True)
        self._model.clear_cache()
        with Generation(self._engine, prompt, params, continues=True) as generation:
            start = time.perf_counter()
            next(generation)
            first = time.perf_counter()
            for _ in generation:
                pass
            end = time.perf_counter()
            return Run(first - start, end - first, tuple(generation.token_ids))

    def together(self, prompts: Sequence[Sequence[int]], shared: int, n_tokens: int) -> float:
        del shared  # the prefix index finds it
        self._model.clear_cache()
        params = SamplingParams(temperature=0.0, max_tokens=n_tokens + 1, ignore_eos=True)
        for ids in prompts:  # prefill all first, or the first reply would end before the last prompt is processed
            Generation(self._engine, ids, replace(params, max_tokens=1), continues=True).text()
        times: list[list[float]] = [[] for _ in prompts]

        def drain(generation: Generation, out: list[float]) -> None:
            for _ in generation:
                out.append(generation.made_at)

        # Start all before reading any; each runs at most a few tokens ahead of its reader.
        with ExitStack() as stack, ThreadPoolExecutor(len(prompts)) as readers:
            generations = [
                stack.enter_context(Generation(self._engine, ids, params, continues=True)) for ids in prompts
            ]
            for _ in readers.map(drain, generations, times):
                pass
        begin, end = max(t[0] for t in times), min(t[-1] for t in times)
        if end <= begin:
            raise InvalidArgument(f"{n_tokens} tokens are over before all prompts are read; decode more")
        return sum(begin < t <= end for answer in times for t in answer) / (end - begin)

    def close(self) -> None:
        self._model.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """A row of results: a case, with at most one other engine. Speeds in `unit`, medians over the rounds.

    Attributes:
        ours_mean, peer_mean: the same as means. ours_spread, peer_spread: the slowest and the quickest round.
        ratio: ours / peer.
        limit: what this machine could reach; see above. limit_share: ours / limit.
        agreement: how many of the first 32 greedy tokens of a short prompt are the same in both, up to the first that
            is not.
        operations_per_byte, gop_per_s: of the multiply-adds that the limit counts, to the bytes that must be read.
    """

    case: str
    model: str
    weights: str
    kv: str
    threads: int
    device: str
    unit: str = "tokens/s"
    tokens: int
    rounds: int
    ours: float
    ours_mean: float
    ours_spread: tuple[float, float]
    peer: float | None = None
    peer_mean: float | None = None
    peer_spread: tuple[float, float] | None = None
    peer_name: str | None = None
    peer_settings: str | None = None
    ratio: float | None = None
    limit: float
    limit_share: float
    agreement: int | None = None
    operations_per_byte: float
    gop_per_s: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sizes of a measurement: prompt tokens, tokens decoded after the first, rounds; sequences decoded together (1: no
    such case), whose prompts share the first `shared` ids; busy neighbor processes."""

    prompt_tokens: int = 512
    tokens: int = 64
    rounds: int = 5
    sequences: int = 1
    shared: int = 0
    neighbors: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "tokens", "rounds", "sequences"):
            if not 1 <= getattr(self, name) <= 1 << 20:
                raise InvalidArgument(f"{name} is {getattr(self, name)}, must be 1 .. 2^20")
        if not 0 <= self.neighbors <= 1024:
            raise InvalidArgument(f"neighbors is {self.neighbors}, must be 0 .. 1024")
        if not 0 <= self.shared < self.prompt_tokens:
            raise InvalidArgument(
                f"shared is {self.shared}, must be 0 .. {self.prompt_tokens - 1}, shorter than the prompt"
            )

    @property
    def context(self) -> int:
        """Positions needed by a run, and by the comparison of tokens."""
        return max(self.prompt_tokens + self.tokens + 1, 3 * AGREEMENT_TOKENS)


@dataclass(slots=True)
class _Seconds:
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)


def bench_models(
    models: Sequence[Model],
    machine: Machine,
    lengths: Lengths,
    *,
    make_peers: MakePeers | None = None,
    status: Status = silent,
) -> list[ModelRow]:
    """Measures loaded models and, for each, other engines on the same weights, all in turns.

    Args:
        models: usually one model in several precisions; left open. Each context must hold `lengths.context` positions.
        machine: the measured limits.
        lengths: sizes of the measurement.
        make_peers: opens other engines for a model; None for none.
        status: callback for progress.

    Raises:
        InvalidArgument: a model's context is too short.
    """
    for model in models:
        if lengths.context > model.context:
            raise InvalidArgument(
                f"the measurement takes {lengths.context} positions, the context holds {model.context}"
            )
    groups: list[list[Engine]] = []
    try:
        for model in models:
            groups.append([Fabula(model)])
            groups[-1] += make_peers(model, lengths.context, status) if make_peers else []
        answers = [
            [engine.run(prompt_ids(model, AGREEMENT_TOKENS), AGREEMENT_TOKENS).tokens for engine in group]
            for model, group in zip(models, groups, strict=True)
        ]
        status(f"{lengths.rounds} rounds of {', '.join(engine.name for group in groups for engine in group)}")
        with neighbors(lengths.neighbors):  # peers have chosen their settings on an idle machine
            seconds = _measure(models, groups, lengths)
    finally:
        for group in groups:
            for peer in group[1:]:
                peer.close()
    rows = []
    cases = [("prefill", lengths.prompt_tokens), ("decode", lengths.tokens)]
    if lengths.sequences > 1:
        cases = [("together", lengths.sequences * lengths.tokens)]
    for case, n_tokens in cases:
        for model, group, said, measured in zip(models, groups, answers, seconds, strict=True):
            work = work_of(model, lengths.prompt_tokens, lengths.sequences, lengths.shared)[case]
            seconds_of = [getattr(values, case) for values in measured]
            times = [Times.of(values) for values in seconds_of if values]
            group = [engine for engine, values in zip(group, seconds_of, strict=True) if values]
            said = [answer for answer, values in zip(said, seconds_of, strict=True) if values]
            peers: list[int | None] = [*range(1, len(group))] or [None]
            rows += [_row(case, n_tokens, model, group, times, said, peer, work, machine) for peer in peers]
    return rows


def _measure(models: Sequence[Model], groups: list[list[Engine]], lengths: Lengths) -> list[list[_Seconds]]:
    """Seconds by model and engine."""
    prompts = [prompt_ids(model, lengths.prompt_tokens) for model in models]
    seconds = [[_Seconds() for _ in group] for group in groups]
    everyone = [(i, j) for i, group in enumerate(groups) for j in range(len(group))]
    if lengths.sequences > 1:
        many = [sequence_prompts(prompt_ids(m, lengths.prompt_tokens + lengths.sequences), lengths) for m in models]
        for r, (i, j) in enumerate(turns(everyone, lengths.rounds + 1)):
            time.sleep(_PAUSE_S)
            speed = groups[i][j].together(many[i], lengths.shared, lengths.tokens)
            if speed and r >= len(everyone):  # the first round is warm-up, and lets peers choose settings
                seconds[i][j].together.append(lengths.sequences * lengths.tokens / speed)
        return seconds
    for i, j in everyone:
        groups[i][j].run(prompts[i], min(lengths.tokens, 8) + 1)
    for i, j in turns(everyone, lengths.rounds):
        time.sleep(_PAUSE_S)
        run = groups[i][j].run(prompts[i], lengths.tokens + 1)
        seconds[i][j].prefill.append(run.prefill_s)
        seconds[i][j].decode.append(run.decode_s)
    return seconds


def _row(
    case: str,
    n_tokens: int,
    model: Model,
    group: list[Engine],
    times: list[Times],
    answers: list[tuple[int, ...]],
    peer: int | None,
    work: Work,
    machine: Machine,
) -> ModelRow:
    """The row for one peer of a model, by index; None for the model alone."""
    ours, theirs = times[0], times[peer] if peer else None
    limit = work.limit(machine)
    return ModelRow(
        case=case,
        model=model.path.name,
        weights=model.weights,
        kv=model.kv,
        threads=model.threads,
        device=model.device,
        tokens=n_tokens,
        rounds=ours.n,
        ours=n_tokens / ours.median,
        ours_mean=n_tokens / ours.mean,
        ours_spread=(n_tokens / ours.high, n_tokens / ours.low),
        peer=n_tokens / theirs.median if theirs else None,
        peer_mean=n_tokens / theirs.mean if theirs else None,
        peer_spread=(n_tokens / theirs.high, n_tokens / theirs.low) if theirs else None,
        peer_name=group[peer].name if peer else None,
        peer_settings=group[peer].settings[case] if peer else None,
        ratio=theirs.median / ours.median if theirs else None,
        limit=limit,
        limit_share=n_tokens / ours.median / limit,
        agreement=agreement(answers[0], answers[peer]) if peer else None,
        operations_per_byte=work.operations / work.n_bytes,
        gop_per_s=n_tokens / ours.median * work.operations / 1e9,
    )


@dataclass(frozen=True, slots=True)
class Work:
    """Minimal work per token.

    Attributes:
        operations: multiply-adds with the weights, one counting as two. n_bytes: read from memory.
        bound: which of both the case waits for. weights: their precision.
    """

    operations: float
    n_bytes: float
    bound: Literal["memory", "compute"]
    weights: str

    def limit(self, machine: Machine) -> float:
        """Upper bound of tokens a second."""
        if self.bound == "memory":
            return machine.read_bytes_per_s / self.n_bytes
        return machine.peak(self.weights) / self.operations


def limits(model: Model, machine: Machine, prompt_tokens: int, sequences: int = 1, shared: int = 0) -> dict[str, float]:
    """Upper bound of tokens a second, by case."""
    work = work_of(model, prompt_tokens, sequences, shared)
    return {case: each.limit(machine) for case, each in work.items()}


def work_of(model: Model, prompt_tokens: int, sequences: int = 1, shared: int = 0) -> dict[str, Work]:
    """Work per token, by case.

    An untied embedding does not count, since its rows are looked up, not multiplied. The head is multiplied once per
    prompt, with its last token. Decode reads keys and values of the prompt; sequences together read the weights, and
    the keys and values they share, once. For quantized weights the peak is that of the int8 kernel.
    """
    c = model.config
    table = c.vocab_size * c.hidden_size
    attention = 2 * c.hidden_size * c.head_dim * (c.n_heads + c.n_kv_heads)
    layers = c.n_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    # An untied embedding is as large as the head.
    everything = layers + table * (1 if c.tied else 2)
    read = model.weight_bytes * (1 - (0 if c.tied else table / everything))
    position = model.kv_usage.page_bytes / PAGE_POSITIONS
    every = read + position * (shared + sequences * (prompt_tokens - shared))
    decoded = 2.0 * (layers + table)
    return {
        "prefill": Work(2 * (layers + table / prompt_tokens), read / prompt_tokens, "compute", model.weights),
        "decode": Work(decoded, read + position * prompt_tokens, "memory", model.weights),
        "together": Work(decoded, every / sequences, "memory", model.weights),
    }


def sequence_prompts(ids: Sequence[int], lengths: Lengths) -> list[list[int]]:
    """One prompt per sequence: the shared ids, then text from different offsets."""
    own = lengths.prompt_tokens - lengths.shared
    start = lengths.shared
    return [[*ids[:start], *ids[start + s : start + s + own]] for s in range(lengths.sequences)]


def prompt_ids(model: Model, n_tokens: int) -> list[int]:
    """`n_tokens` ids of a repeated text, with the start token if the model uses one."""
    ids = model.tokenizer.encode(_TEXT)
    more = model.tokenizer.encode(_TEXT, add_bos=False)
    while len(ids) < n_tokens:
        ids += more
    return ids[:n_tokens]


def agreement(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Length of the common prefix."""
    for i, (left, right) in enumerate(zip(ours, theirs, strict=False)):
        if left != right:
            return i
    return min(len(ours), len(theirs))
