"""`fabula bench ops`, `model` and `load`: speed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from fabula.cli.bench_options import (
    check_peers,
    check_plot,
    give,
    json_option,
    located,
    many_weights_option,
    measured_machine,
    n_threads_of,
    peer_python_option,
    peers_option,
    plot_option,
    threads_option,
    weights_option,
)
from fabula.cli.console import note
from fabula.cli.options import KV_CHOICE, ModelOptions, device_option, kv_option, model_option, parallel_option

if TYPE_CHECKING:
    from fabula.choices import WeightsName

_TEXTS = 4  # sequences of the full context that the default KV cache holds


@click.command(short_help="Operators against plain serial C.")
@click.option("--quick", is_flag=True, help="Sizes about 20 times smaller: a smoke test, not a measurement.")
@threads_option
@plot_option
@json_option
def ops(quick: bool, threads: int | None, plot: Path | None, as_json: bool) -> None:
    """Measure every operator against the same loop in plain serial C.

    Results are compared first; a difference above the operator's tolerance ends the measurement. Then both run in
    turns. Shares are of this machine's streaming reads or multiply-adds, measured beforehand; data that fits a cache
    can exceed 100%. In JSON and plots the serial loop is the peer, and both are speeds.

    \b
    Examples:
      fabula bench ops
      fabula bench ops --threads 1
      fabula bench ops --json > ops.jsonl
      fabula bench ops --plot ops.png
    """
    from fabula.bench.ops import bench_ops

    check_plot(plot)
    machine = measured_machine(threads, quick=quick)
    rows = bench_ops(machine, quick=quick, min_seconds=0.01 if quick else 1.0, status=note)

    from fabula.bench.report import ops_table

    found = [row.to_json() for row in rows]
    give(found, machine.to_json(), lambda: (str(machine), ops_table(rows)), as_json=as_json, plot=plot)


@click.command(short_help="Tokens a second, also of other engines.")
@model_option
@many_weights_option
@kv_option
@threads_option
@click.option(
    "--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="Length of the prompt."
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
    help="Length of the prefix shared by the prompts of --sequences.",
)
@click.option(
    "--neighbors",
    "--neighbours",  # the former spelling
    "neighbors",
    type=click.IntRange(0, 1024),
    default=0,
    show_default=True,
    metavar="N",
    help="Busy processes to run meanwhile, as on a shared machine.",
)
@peers_option("Measure llama.cpp and transformers in turns, on the same weights.")
@peer_python_option
@device_option
@parallel_option
@click.option("--peer-kv", type=KV_CHOICE, help="Precision of llama.cpp's KV cache; default: as --kv.")
@plot_option
@json_option
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
    neighbors: int,
    peers: bool,
    peer_python: str | None,
    device: str,
    tensor_parallel: int,
    peer_kv: str | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure prefill and greedy decode of a model, in tokens a second.

    All precisions and engines are in memory at once and run in turns. Shares are of the limits set by this machine's
    memory (decode) and multiply-adds (prefill). Other engines need
    `pip install llama-cpp-python torch transformers gguf`. llama.cpp reads the
    same GGUF file (or one with the same weights, written for it) with the threads, flash attention and batch it is
    fastest with; "same tokens" is how many of 32 greedy tokens agree. Decode runs after the prompt, so a long prompt
    measures decode at that context.

    \b
    Examples:
      fabula bench model
      fabula bench model --weights f32 --weights f16 --peers
      fabula bench model --model ./model-q8.gguf --peers --peer-python ./peers/bin/python
      fabula bench model --weights q8_0 --prompt-tokens 8000 --rounds 3 --peers --peer-kv q8
      fabula bench model --weights q4_0 --sequences 16 --prompt-tokens 1100 --shared 1024 --peers
      fabula bench model --weights q8_0 --neighbors 1 --peers
      fabula bench model --model ./model.gguf --threads 4 --json
      fabula bench model --weights f16 --weights q8_0 --peers --plot model.png
    """  # fmt: skip
    from contextlib import ExitStack
    from functools import partial

    from fabula.bench.model import Lengths, bench_models
    from fabula.bench.peers import make_peers

    check_peers(peers, peer_python)
    check_plot(plot)
    if shared and sequences == 1:
        raise click.UsageError("--shared needs --sequences")
    lengths = Lengths(prompt_tokens, tokens, rounds, sequences, shared, neighbors)
    kv_memory = kv_memory_of(model, kv, sequences, lengths.context) if sequences > _TEXTS else None
    make = partial(make_peers, llama={"n_sequences": sequences, "kv": peer_kv, "python": peer_python})
    machine = measured_machine(threads)
    with ExitStack() as stack:
        loaded = [
            stack.enter_context(
                ModelOptions(
                    model,
                    precision,
                    kv,
                    machine.threads,
                    lengths.context,
                    device,
                    tensor_parallel=tensor_parallel,
                    kv_memory=kv_memory,
                ).load()
            )
            for precision in weights
        ]
        rows = bench_models(loaded, machine, lengths, make_peers=make if peers else None, status=note)

    from fabula.bench.report import model_table

    title = f"{rows[0].model}: {prompt_tokens} tokens of prompt, {tokens} decoded, medians of {rounds} rounds"
    if neighbors:
        title += f", with {neighbors} busy processes"
    found = [row.to_json() for row in rows]
    give(found, machine.to_json(), lambda: (str(machine), title, model_table(rows)), as_json=as_json, plot=plot)


@click.command(short_help="Time from process start to the first token, and memory.")
@model_option
@weights_option
@kv_option
@threads_option
@click.option(
    "--rounds", type=click.IntRange(1, 1000), default=5, show_default=True, metavar="N", help="Medians over N rounds."
)
@peers_option("Measure llama.cpp in turns, on the same GGUF file.")
@peer_python_option
@device_option
@plot_option
@json_option
def load(
    model: str,
    weights: str,
    kv: str,
    threads: int | None,
    rounds: int,
    peers: bool,
    peer_python: str | None,
    device: str,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure time to the first token of a short prompt in a new process, and its memory.

    Each run is a new Python process: imports, loading and packing the weights, a prompt, a token. The file is in the
    page cache. Memory is the peak resident size; its lower limit is the packed weights. With --peers both engines read
    one GGUF file, which is written first if the model is not one of that precision.

    \b
    Examples:
      fabula bench load
      fabula bench load --weights q8_0 --peers
      fabula bench load --model ./model.gguf --rounds 9 --json
    """
    from fabula.bench.load import bench_load
    from fabula.bench.machine import about
    from fabula.bench.report import rows_table

    check_peers(peers, peer_python)
    check_plot(plot)
    n_threads = n_threads_of(threads)
    rows = bench_load(
        located(model),
        weights=cast("WeightsName", weights),
        kv=kv,
        threads=n_threads,
        rounds=rounds,
        peers=peers,
        python=peer_python,
        device=device,
        status=note,
    )
    found = [row.to_json() for row in rows]
    title = f"{rows[0].model}: medians of {rounds} rounds"
    give(found, about(n_threads), lambda: (title, rows_table(rows)), as_json=as_json, plot=plot)


def kv_memory_of(model: str, kv: str, n_texts: int, n_positions: int) -> int:
    """Bytes of a KV cache for n_texts sequences of n_positions each."""
    from fabula._native import PAGE_POSITIONS, page_bytes
    from fabula.formats.locate import locate
    from fabula.kv.format import kv_dtypes
    from fabula.models.opening import open_model

    checkpoint, config = open_model(locate(model))
    checkpoint.close()
    n_pages = n_texts * -(-n_positions // PAGE_POSITIONS)
    return n_pages * page_bytes(kv_dtypes(kv), config.kv_layers)
