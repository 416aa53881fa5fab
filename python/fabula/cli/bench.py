"""`fabula bench`: measures operators, models and perplexity on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fabula.cli.console import note
from fabula.cli.options import DEFAULT_MODEL, KV_NAMES, WEIGHTS, ModelOptions

if TYPE_CHECKING:
    from fabula.bench.machine import Machine

_WEIGHTS = click.Choice(WEIGHTS)
_TEXTS = 4  # texts of the whole context that a model's KV cache holds
_model = click.option(
    "-m", "--model", default=DEFAULT_MODEL, show_default=True, envvar="FABULA_MODEL", metavar="NAME",
    help="Folder, .gguf file, or name; see `fabula pull --help`.",
)  # fmt: skip
_kv = click.option(
    "--kv",
    type=click.Choice(KV_NAMES),
    default="f16",
    show_default=True,
    metavar="NAME",
    help="KV cache: f16, f32, bf16, q8; or K:V, such as q8:f16.",
)
_threads = click.option(
    "-t", "--threads", type=click.IntRange(1, 1024), metavar="N", help="Threads; default: what this process may use."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout and nothing else.")


@click.group(short_help="Measure operators, models and perplexity on this machine.")
def bench() -> None:
    """Measure operators, models and perplexity on this machine.

    \b
    Examples:
      fabula bench ops
      fabula bench model --peers --weights f32 --weights f16
      fabula bench perplexity book.txt --weights f16 --compare f32
    """


@bench.command(short_help="Operators against plain serial C.")
@click.option("--quick", is_flag=True, help="Sizes about 20 times smaller: shows that it works, not how fast.")
@_threads
@_json
def ops(quick: bool, threads: int | None, as_json: bool) -> None:
    """Measure every operator against the same loop in plain serial C.

    Results are compared first; a difference above the operator's tolerance ends the measurement. Then both take turns.
    Shares are of this machine's streaming reads or multiply-adds, measured beforehand; data that fits a cache can
    pass 100%.

    \b
    Examples:
      fabula bench ops
      fabula bench ops --threads 1
      fabula bench ops --json > ops.json
    """
    from fabula.bench.ops import bench_ops

    machine = _machine(threads, quick=quick)
    rows = bench_ops(machine, quick=quick, min_seconds=0.01 if quick else 1.0, status=note)
    if as_json:
        _print_json({"machine": machine.to_json(), "rows": [row.to_json() for row in rows]})
        return
    from fabula.bench.report import ops_table, show

    show(str(machine), ops_table(rows))


@bench.command(short_help="Tokens a second, alone or beside other engines.")
@_model
@click.option(
    "--weights",
    type=_WEIGHTS,
    multiple=True,
    default=("auto",),
    show_default=True,
    help="Precision of the weights; may be given several times.",
)
@_kv
@_threads
@click.option(
    "--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="Prompt read."
)
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, metavar="N", help="Tokens decoded.")
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Medians over N rounds."
)
@click.option(
    "--sequences",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Decode N prompts at the same time instead of one.",
)
@click.option(
    "--shared",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Tokens at their beginning that the prompts of --sequences have in common.",
)
@click.option("--peers", is_flag=True, help="Measure llama.cpp and transformers in turns, on the same weights.")
@click.option(
    "--peer-python",
    metavar="FILE",
    help="Python interpreter that has llama-cpp-python; default: the one that runs this.",
)
@click.option("--peer-kv", type=click.Choice(KV_NAMES), help="Precision of llama.cpp's KV cache; default: as --kv.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line on stdout and nothing else.")
def model(
    model: str,
    weights: tuple[str, ...],
    kv: str,
    threads: int | None,
    prompt_tokens: int,
    tokens: int,
    rounds: int,
    sequences: int,
    shared: int,
    peers: bool,
    peer_python: str | None,
    peer_kv: str | None,
    as_json: bool,
) -> None:
    """Measure how fast a model reads a prompt (prefill) and writes greedily (decode), in tokens a second.

    Everything that is compared, precisions and engines, is in memory at once and takes turns. Shares are of what this
    machine's memory (decode) and multiply-adds (prefill) allow. Other engines need
    `pip install "fabula[peers]"`; llama.cpp reads the same GGUF file (or one of the same weights, written for it), gets
    the threads, flash attention and batch it is fastest with, and "same tokens" tells how many of 32 greedy tokens
    agree. Decoding happens behind the prompt, so a long one measures decoding at that context.

    \b
    Examples:
      fabula bench model
      fabula bench model --weights f32 --weights f16 --peers
      fabula bench model --model ./model-q8.gguf --peers --peer-python ./peers/bin/python
      fabula bench model --weights q8_0 --prompt-tokens 8000 --rounds 3 --peers --peer-kv q8
      fabula bench model --weights q4_0 --sequences 16 --prompt-tokens 1100 --shared 1024 --peers
      fabula bench model --model ./model.gguf --threads 4 --json
    """  # fmt: skip
    from contextlib import ExitStack
    from functools import partial

    from fabula.bench.model import Lengths, bench_models
    from fabula.bench.peers import make_peers

    if peer_python is not None and not peers:
        raise click.UsageError("--peer-python needs --peers")
    if shared and sequences == 1:
        raise click.UsageError("--shared needs --sequences")
    lengths = Lengths(prompt_tokens, tokens, rounds, sequences, shared)
    context = lengths.context * max(1, -(-sequences // _TEXTS))
    make = partial(make_peers, llama={"n_sequences": sequences, "kv": peer_kv, "python": peer_python})
    machine = _machine(threads)
    with ExitStack() as stack:
        loaded = [
            stack.enter_context(ModelOptions(model, precision, kv, machine.threads, context).load())
            for precision in weights
        ]
        rows = bench_models(loaded, machine, lengths, make_peers=make if peers else None, status=note)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row.to_json()))
        return
    from fabula.bench.report import model_table, show

    title = f"{rows[0].model}: {prompt_tokens} tokens of prompt, {tokens} decoded, medians of {rounds} rounds"
    show(str(machine), title, model_table(rows))


@bench.command(short_help="Perplexity of a text file.")
@click.argument("file", type=click.Path(path_type=Path))
@_model
@click.option("--weights", type=_WEIGHTS, default="f16", show_default=True, help="Precision of the weights.")
@_kv
@click.option("--compare", type=_WEIGHTS, help="Measure this precision as well and tell the relative difference.")
@_threads
@click.option(
    "--window", type=click.IntRange(2), default=512, show_default=True, metavar="N", help="Tokens of a window."
)
@_json
def perplexity(
    file: Path,
    model: str,
    weights: str,
    kv: str,
    compare: str | None,
    threads: int | None,
    window: int,
    as_json: bool,
) -> None:
    """Measure the perplexity of FILE, a text in UTF-8, in windows that do not overlap.

    \b
    Examples:
      fabula bench perplexity book.txt
      fabula bench perplexity book.txt --weights f16 --compare f32
    """
    from fabula.bench.perplexity import perplexity as measure
    from fabula.bench.perplexity import read_text

    text = read_text(file)
    results = []
    for precision in [weights] if compare is None else [weights, compare]:
        with ModelOptions(model, precision, kv, threads, None).load() as loaded:
            results.append(measure(loaded, text, window=window, status=note))
    difference = None if compare is None else results[0].perplexity / results[1].perplexity - 1
    if as_json:
        out: dict[str, Any] = {"file": str(file), "model": model, **results[0].to_json()}
        if compare is not None:
            out |= {"compare": results[1].to_json(), "relative_difference": difference}
        _print_json(out)
        return
    from fabula.bench.report import perplexity_table, show

    show(perplexity_table(results))
    if difference is not None:
        show(f"relative difference: {difference:+.4%}")


def _machine(threads: int | None, *, quick: bool = False) -> Machine:
    from fabula.bench.machine import Machine
    from fabula.engine.threads import default_threads

    note("measuring the machine")
    n_threads = threads or default_threads()
    return Machine.measure(n_threads, read_bytes=32 << 20, repeats=3) if quick else Machine.measure(n_threads)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))
