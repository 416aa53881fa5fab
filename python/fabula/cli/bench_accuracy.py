"""`fabula bench perplexity`: the accuracy of each precision."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fabula.cli.bench_options import (
    WEIGHTS_CHOICE,
    check_peers,
    give,
    json_option,
    n_threads_of,
    peer_python_option,
    peers_option,
    threads_option,
)
from fabula.cli.console import complain, note
from fabula.cli.options import ModelOptions, device_option, kv_option, model_option

if TYPE_CHECKING:
    from fabula.bench.accuracy import MakeReader, Reader
    from fabula.model import Model


@click.command(short_help="Perplexity of a text file, by precision; a gate of accuracy.")
@click.argument("file", type=click.Path(path_type=Path))
@model_option
@click.option(
    "--weights", type=WEIGHTS_CHOICE, multiple=True, default=("f16",), show_default=True,
    help="Precision of the weights; may be given several times.",
)  # fmt: skip
@kv_option
@click.option(
    "--compare", type=WEIGHTS_CHOICE,
    help="Also measure this precision, and the difference of the others from it.",
)  # fmt: skip
@threads_option
@click.option(
    "--window", type=click.IntRange(2), default=512, show_default=True, metavar="N", help="Tokens per window."
)
@peers_option("Measure llama.cpp on the same weights, with the same ids.")
@peer_python_option
@device_option
@click.option(
    "--gate", type=click.FloatRange(0), metavar="PERCENT",
    help="Exit with 1 if a perplexity differs more than this from llama.cpp's; needs --peers.",
)  # fmt: skip
@json_option
def perplexity(
    file: Path,
    model: str,
    weights: tuple[str, ...],
    kv: str,
    compare: str | None,
    threads: int | None,
    window: int,
    peers: bool,
    peer_python: str | None,
    device: str,
    gate: float | None,
    as_json: bool,
) -> None:
    """Measure the perplexity of FILE, UTF-8 text, in windows that do not overlap.

    With --compare also, over every predicted token: the relative difference of the perplexity, mean and largest
    Kullback-Leibler divergence KL(compare || format) of the next token's distribution in nats, and how often the most
    likely token is the same. With --peers the same for llama.cpp, on a GGUF file of the same weights, against the same
    reference. With --gate the exit status is 1 if a format's perplexity differs more from llama.cpp's, or cannot be
    compared with it. All formats are in memory at once.

    \b
    Examples:
      fabula bench perplexity book.txt
      fabula bench perplexity book.txt --weights f16 --weights q8_0 --weights q4_k_m --compare f32
      fabula bench perplexity book.txt --weights q4_0 --compare f32 --peers --gate 0.3
    """
    from fabula.bench.accuracy import bench_accuracy, beyond
    from fabula.bench.machine import about
    from fabula.bench.perplexity import read_text
    from fabula.bench.report import perplexity_table

    check_peers(peers, peer_python)
    if gate is not None and not peers:
        raise click.UsageError("--gate needs --peers")
    text = read_text(file)
    n_threads = n_threads_of(threads)
    names = [*dict.fromkeys(weights), *([compare] if compare is not None and compare not in weights else [])]
    with ExitStack() as stack:
        options = [ModelOptions(model, name, kv, n_threads, None, device) for name in names]
        models = [stack.enter_context(each.load()) for each in options]
        rows = bench_accuracy(
            models,
            text,
            window=window,
            reference=None if compare is None else names.index(compare),
            make_peer=_peers(peer_python, required=gate is not None) if peers else None,
            file=str(file),
            status=note,
        )
    title = (
        f"{rows[0].model}, {file.name}: KL in nats, of {compare} and the row's"
        if compare
        else f"{rows[0].model}, {file.name}"
    )
    found = [row.to_json() for row in rows]
    give(found, about(n_threads), lambda: (title, perplexity_table(rows)), as_json=as_json)
    if gate is not None and (lines := beyond(rows, gate)):
        for line in lines:
            complain(line)
        raise click.exceptions.Exit(1)


def _peers(python: str | None, *, required: bool) -> MakeReader:
    """Returns a function that opens llama.cpp for a model; a failure is a note, or an error if `required`."""

    def make(model: Model, n_positions: int) -> Reader | None:
        from fabula.bench.peer_llama_cpp import LlamaCpp
        from fabula.errors import Unsupported

        try:
            return LlamaCpp.of(model, n_positions, note, python=python, choose=False)
        except Unsupported as error:
            if required:
                raise
            note(f"llama.cpp is not measured: {error}")
            return None

    return make
