"""`fabula bench sessions` and `serve`: the cost of rollback and fork, and many concurrent clients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from fabula.cli.bench_options import (
    check_peers,
    check_plot,
    give,
    json_option,
    n_threads_of,
    peer_python_option,
    peers_option,
    plot_option,
    threads_option,
    weights_option,
)
from fabula.cli.console import note
from fabula.cli.options import ModelOptions, device_option, kv_option, model_option


def _numbers(name: str, field: str, default: tuple[int, ...], text: str) -> Callable[[Any], Any]:
    return click.option(
        name, field, type=click.IntRange(1), multiple=True, default=default, show_default=True, metavar="N",
        help=f"{text}; may be given several times.",
    )  # fmt: skip


@click.command(short_help="Rollback and fork, by depth and length, against copies of the KV cache.")
@model_option
@weights_option
@kv_option
@threads_option
@click.option("-c", "--context", type=click.IntRange(1), metavar="N", help="Tokens; default: the model's own length.")
@_numbers("--depth", "depths", (1, 10, 100, 150), "Turns to roll back, of two tokens each")
@_numbers("--length", "lengths", (512, 2048, 8000), "Tokens in the two turns to roll back")
@click.option(
    "--repeats", type=click.IntRange(1), default=200, show_default=True, metavar="N",
    help="Repetitions of each case; a tenth for copies.",
)  # fmt: skip
@peers_option("Measure llama-cpp-python's save_state and load_state in turns, at each length.")
@peer_python_option
@device_option
@plot_option
@json_option
def sessions(
    model: str,
    weights: str,
    kv: str,
    threads: int | None,
    context: int | None,
    depths: tuple[int, ...],
    lengths: tuple[int, ...],
    repeats: int,
    peers: bool,
    peer_python: str | None,
    device: str,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure the cost of rollback and redo, a fork, and a copy of the whole KV cache, in milliseconds.

    A turn after each shows how many tokens had to be recomputed. llama-cpp-python rolls back by saving and loading
    its state, which is compared with each case of the same length. "ratio" is its time divided by ours.

    \b
    Examples:
      fabula bench sessions
      fabula bench sessions --length 2048 --length 8000 --peers
      fabula bench sessions --depth 10 --depth 1000 --repeats 50 --json
    """
    from fabula.bench.machine import about
    from fabula.bench.peer_llama_cpp import LlamaStates, gguf_of
    from fabula.bench.report import sessions_table
    from fabula.bench.sessions import bench_sessions
    from fabula.errors import Unsupported

    check_peers(peers, peer_python)
    check_plot(plot)
    n_threads = n_threads_of(threads)
    with ExitStack() as stack:
        loaded = stack.enter_context(ModelOptions(model, weights, kv, n_threads, context, device).load())
        peer = None
        if peers:
            path = stack.enter_context(gguf_of(loaded, note))
            try:
                peer = LlamaStates(
                    path, threads=n_threads, kv=loaded.kv, n_positions=loaded.context, python=peer_python
                )
                stack.callback(peer.close)
            except Unsupported as error:
                note(f"llama-cpp-python is not measured: {error}")
        rows = bench_sessions(loaded, depths=depths, lengths=lengths, repeats=repeats, peer=peer, status=note)
    found = [row.to_json() for row in rows]
    first = rows[0]
    title = f"{first.model}, {first.weights}, KV {first.kv}, {n_threads} threads"
    give(found, about(n_threads), lambda: (title, sessions_table(rows)), as_json=as_json, plot=plot)


@click.command(short_help="A server with many clients, against llama-cpp-python's.")
@model_option
@weights_option
@kv_option
@threads_option
@_numbers("--clients", "clients", (1, 4, 16, 64), "Concurrent clients")
@click.option(
    "--seconds", type=click.FloatRange(0.1, 86_400), default=120.0, show_default=True, metavar="S",
    help="Duration of each measurement.",
)  # fmt: skip
@click.option(
    "--tokens", type=click.IntRange(2), default=48, show_default=True, metavar="N", help="Max tokens of a reply."
)
@click.option(
    "--overhead", type=click.IntRange(1), metavar="ROUNDS",
    help="Measure the overhead of HTTP instead: time per token of one stream, over HTTP and from the SDK.",
)  # fmt: skip
@peers_option("Measure llama-cpp-python's server in turns, on the same weights.")
@peer_python_option
@device_option
@plot_option
@json_option
def serve(
    model: str,
    weights: str,
    kv: str,
    threads: int | None,
    clients: tuple[int, ...],
    seconds: float,
    tokens: int,
    overhead: int | None,
    peers: bool,
    peer_python: str | None,
    device: str,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure `fabula serve` with many clients that chat in ten turns, each reading its stream.

    Starts a server on a free port for each number of clients, with a temporary data folder. The peer,
    `llama_cpp.server` of --peer-python (`pip install "llama-cpp-python[server]"`), gets a GGUF file of the same
    weights, and the whole conversation with each request. "ratio" is how many times better ours is:
    more tokens, less time, less memory.

    \b
    Examples:
      fabula bench serve --clients 1 --clients 16 --seconds 60
      fabula bench serve --peers --peer-python ./peers/bin/python --json > serve.jsonl
      fabula bench serve --overhead 9
    """
    import sys

    from fabula.bench.machine import about
    from fabula.bench.peer_llama_cpp import gguf_of
    from fabula.bench.report import rows_table
    from fabula.bench.serve import Served, bench_overhead, bench_serve

    check_peers(peers, peer_python)
    check_plot(plot)
    if overhead is not None and peers:
        raise click.UsageError("--overhead measures no peers")
    n_threads = n_threads_of(threads)
    with ExitStack() as stack:
        loaded = stack.enter_context(ModelOptions(model, weights, kv, n_threads, None, device).load())
        label = loaded.weights
        python = (peer_python or sys.executable) if peers else None
        peer_path = stack.enter_context(gguf_of(loaded, note)) if peers else None
        served = Served(loaded.path, weights, loaded.kv, n_threads, loaded.context, python, peer_path, device)
        if overhead is not None:
            rows = bench_overhead(served, loaded, overhead, n_tokens=max(tokens, 256), status=note)
        else:
            loaded.close()  # leave the memory to the server
            rows = list(bench_serve(served, label, clients=clients, seconds=seconds, n_tokens=tokens, status=note))
    found = [row.to_json() for row in rows]
    title = f"{served.path.name}, replies of up to {tokens} tokens, {seconds:g} s each"
    if overhead is not None:
        title = f"{served.path.name}: HTTP takes {rows[0].more['overhead']:.3f} times the SDK's time a token"
    give(found, about(n_threads), lambda: (title, rows_table(rows)), as_json=as_json, plot=plot)
