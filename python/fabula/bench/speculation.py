"""Decode speed with and without speculation, in turns, on texts that repeat and on one that does not.

    edit    a text of the model's own is copied with a word replaced: the word is banned, the rest follows the text
    code    a program with parts that are alike
    story   a text at temperature 1, where there is little to guess: it must not become slower

Both give the same tokens, which is checked.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fabula.bench.row import Row
from fabula.bench.status import Status, silent
from fabula.bench.timing import turns
from fabula.engine.generation import Generation, Timings
from fabula.engine.sampling import SamplingParams
from fabula.errors import EngineError, InvalidArgument
from fabula.model import Model

CASES = ("edit", "code", "story")
_BEGIN = 32  # tokens of the copy that the prompt has
_OPENING = "Once upon a time, in a small town between the mountains and the sea, there lived"
_CODE = """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        return self.balance

    def withdraw(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        if amount > self.balance:
            raise ValueError("insufficient funds")
        self.balance -= amount
        return self.balance


class SavingsAccount:
"""


@dataclass(frozen=True, slots=True)
class _Run:
    """One answer: its tokens, its counts and times, processor seconds from its start to its end."""

    tokens: tuple[int, ...]
    timings: Timings
    cpu_s: float


def bench_speculation(
    model: Model,
    *,
    cases: Sequence[str] = CASES,
    n_tokens: int = 1000,
    rounds: int = 5,
    status: Status = silent,
) -> list[Row]:
    """Measures a loaded model that speculates; "peer" is the same model without.

    Args:
        cases: of CASES.
        n_tokens: length of the text and of every answer.
        rounds: medians over so many.
        status: callback for progress.

    Raises:
        InvalidArgument: a number or a case is out of range, the context is too short, or speculation is off.
        EngineError: an answer differs from the one without speculation.
    """
    if unknown := [case for case in cases if case not in CASES]:
        raise InvalidArgument(f"case is {unknown[0]!r}, must be one of {', '.join(CASES)}")
    if not 64 <= n_tokens <= 1 << 20 or not 1 <= rounds <= 1 << 20:
        raise InvalidArgument(f"tokens is {n_tokens}, rounds {rounds}; must be 64 .. 2^20 and 1 .. 2^20")
    if model.speculation == "off" or model.device != "cpu":
        raise InvalidArgument("speculation is off: load the model on the CPU, with speculation auto")
    rows = []
    for case in cases:
        status(f"{case}: {rounds} rounds with and without speculation")
        prompt, params = _asked(model, case, n_tokens)
        if (needed := len(prompt) + n_tokens) > model.context:
            raise InvalidArgument(
                f"{case} needs {needed} positions, the context holds {model.context}: measure fewer tokens"
            )
        runs: dict[str, list[_Run]] = {"auto": [], "off": []}
        for name in runs:
            _run(model, name, prompt, params)
        for name in turns(list(runs), rounds):
            runs[name].append(_run(model, name, prompt, params))
        rows.append(_row(model, case, runs["auto"], runs["off"]))
    return rows


def _asked(model: Model, case: str, n_tokens: int) -> tuple[list[int], SamplingParams]:
    """Prompt and parameters of a case."""
    encode = model.tokenizer.encode
    greedy = SamplingParams(temperature=0.0, max_tokens=n_tokens, ignore_eos=True)
    warm = replace(greedy, temperature=1.0, seed=1)
    if case == "code":
        return encode(_CODE), greedy
    if case == "story":
        return encode(_OPENING), warm
    opening = encode(_OPENING)
    with model.generate(opening, warm) as generation:
        text = [*opening, *(piece.token_id for piece in generation)][:n_tokens]
    word = Counter(text).most_common(12)[-1][0]
    prompt = [*text, *encode("\n\n", add_bos=False), *text[:_BEGIN]]
    return prompt, replace(greedy, banned_tokens=(word,))


def _run(model: Model, speculation: str, prompt: list[int], params: SamplingParams) -> _Run:
    engine = replace(model._engine, speculation="off") if speculation == "off" else model._engine
    with Generation(engine, prompt, params, continues=True) as generation:
        next(generation)  # after the prompt
        cpu = time.process_time()
        for _ in generation:
            pass
        return _Run(tuple(generation.token_ids), generation.timings, time.process_time() - cpu)


def _row(model: Model, case: str, ours: list[_Run], plain: list[_Run]) -> Row:
    if len({run.tokens for run in (*ours, *plain)}) != 1:
        raise EngineError(f"{case}: speculation changed the answer; please report this, with the model and the machine")
    timings = ours[-1].timings
    cpu, plain_cpu = (statistics.median(run.cpu_s for run in runs) for runs in (ours, plain))
    return Row(
        case=case,
        unit="tokens/s",
        ours=statistics.median(run.timings.tokens_per_s for run in ours),
        model=model.path.name,
        weights=model.weights,
        kv=model.kv,
        threads=model.threads,
        peer=statistics.median(run.timings.tokens_per_s for run in plain),
        peer_name="without speculation",
        peer_settings="the same model",
        more={
            "tokens": timings.generated_tokens,
            "rounds": len(ours),
            "drafted": timings.drafted,
            "accepted": timings.accepted,
            "tokens_per_step": timings.generated_tokens / (timings.generated_tokens - timings.accepted),
            "cpu_ratio": plain_cpu / cpu if cpu > 0 else None,
        },
    )
