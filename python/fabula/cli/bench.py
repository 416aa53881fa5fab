"""`fabula bench`: benchmarks of operators, models, sessions, server and precisions."""

from __future__ import annotations

from pathlib import Path

import click

from fabula.choices import ISA_NAMES, Isa
from fabula.cli.bench_accuracy import perplexity
from fabula.cli.bench_sessions import serve, sessions
from fabula.cli.bench_speculation import speculation
from fabula.cli.bench_speed import load, model, ops
from fabula.cli.console import note

_IN_THIS_PROCESS = ("ops", "model", "sessions", "perplexity")  # commands whose engine runs in this process


@click.group(short_help="Measure speed, memory and accuracy on this machine.")
@click.option(
    "--isa", type=click.Choice(ISA_NAMES), metavar="NAME",
    help=f"Instruction set of ops, model, sessions and perplexity; default: the best of {', '.join(ISA_NAMES)}.",
)  # fmt: skip
@click.pass_context
def bench(context: click.Context, isa: Isa | None) -> None:
    """Measure speed, memory and accuracy on this machine.

    With --json every command prints one object a line, with the keys case, model, weights, kv, threads, unit, ours,
    peer, peer_name, peer_settings, ratio, limit, limit_share, and others. "ratio" is how many times better ours is than
    the peer, "limit_share" the share of the limit that it reaches.

    \b
    Examples:
      fabula bench ops
      fabula bench model --peers --weights f32 --weights f16 --plot model.png
      fabula bench speculation
      fabula bench sessions --peers
      fabula bench serve --clients 16 --seconds 60
      fabula bench load --weights q8_0
      fabula bench perplexity book.txt --weights f16 --compare f32
      fabula bench --isa avx2 model --weights q8_0
    """
    if isa is None:
        return
    if context.invoked_subcommand not in _IN_THIS_PROCESS:
        raise click.UsageError(f"--isa does not apply to {context.invoked_subcommand}, which measures other processes")
    from fabula._native import isa_forced

    context.with_resource(isa_forced(isa))


@click.command(short_help="Plot the output of a command with --json.")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
def plot(file: Path, out: Path) -> None:
    """Plot the JSON lines of FILE to the PNG file OUT: bars, and for operators and models a roofline.

    \b
    Examples:
      fabula bench model --json > model.jsonl
      fabula bench plot model.jsonl model.png
    """
    from fabula.bench.plot import check, draw
    from fabula.bench.row import read_rows

    check(out)
    draw(read_rows(file), out)
    note(f"{out}: written")


for _command in (ops, model, speculation, sessions, serve, load, perplexity, plot):
    bench.add_command(_command)
