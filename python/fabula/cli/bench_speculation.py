"""`fabula bench speculation`: the same answers with and without drafts."""

from __future__ import annotations

from pathlib import Path

import click

from fabula.cli.bench_options import (
    check_plot,
    give,
    json_option,
    n_threads_of,
    plot_option,
    threads_option,
    weights_option,
)
from fabula.cli.console import note
from fabula.cli.options import ModelOptions, draft_option, kv_option, model_option


@click.command(short_help="The same answers with and without drafts of several tokens.")
@model_option
@weights_option
@kv_option
@threads_option
@draft_option
@click.option(
    "--case", "cases", type=click.Choice(("edit", "code", "story")), multiple=True,
    default=("edit", "code", "story"), show_default=True, metavar="NAME",
    help="edit, code or story; may be given several times.",
)  # fmt: skip
@click.option(
    "--tokens", type=click.IntRange(64), default=1000, show_default=True, metavar="N", help="Tokens of an answer."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Medians over N rounds."
)
@plot_option
@json_option
def speculation(
    model: str,
    weights: str,
    kv: str,
    threads: int | None,
    draft_model: str | None,
    cases: tuple[str, ...],
    tokens: int,
    rounds: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure decoding with and without speculation, in turns: a text that is copied with a word replaced, a program,
    and a story, where there is little to guess.

    Both give the same tokens; if not, the measurement fails. "peer" is the same model without speculation.

    \b
    Examples:
      fabula bench speculation
      fabula bench speculation --case edit --tokens 500 --rounds 3
      fabula bench speculation --model large.gguf --draft-model small.gguf --json
    """
    from fabula.bench.machine import about
    from fabula.bench.report import speculation_table
    from fabula.bench.speculation import bench_speculation

    check_plot(plot)
    n_threads = n_threads_of(threads)
    with ModelOptions(model, weights, kv, n_threads, None, draft_model=draft_model).load() as loaded:
        rows = bench_speculation(loaded, cases=cases, n_tokens=tokens, rounds=rounds, status=note)
    title = f"{rows[0].model}, {rows[0].weights}, KV {kv}, {n_threads} threads"
    give(
        [row.to_json() for row in rows], about(n_threads), lambda: (title, speculation_table(rows)),
        as_json=as_json, plot=plot,
    )  # fmt: skip
