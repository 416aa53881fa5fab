"""Options shared by the commands of `fabula bench`, and the output of their results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fabula.choices import MAX_THREADS, WEIGHTS_NAMES
from fabula.cli.console import FetchProgress, bars, note

if TYPE_CHECKING:
    from rich.table import Table

    from fabula.bench.machine import Machine

WEIGHTS_CHOICE = click.Choice(WEIGHTS_NAMES)

weights_option = click.option(
    "--weights", type=WEIGHTS_CHOICE, default="auto", show_default=True, help="Precision of the weights."
)
many_weights_option = click.option(
    "--weights", type=WEIGHTS_CHOICE, multiple=True, default=("auto",), show_default=True,
    help="Precision of the weights; may be given several times.",
)  # fmt: skip
threads_option = click.option(
    "-t",
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    metavar="N",
    help="Threads; default: what this process may use.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object a line on stdout and nothing else."
)
plot_option = click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Plot the results to a PNG file; needs `pip install matplotlib`.",
)  # fmt: skip
peer_python_option = click.option(
    "--peer-python", metavar="FILE",
    help="Python interpreter that has llama-cpp-python, and zentorch or ipex; default: the one that runs this.",
)  # fmt: skip


def peers_option(text: str) -> Callable[[Any], Any]:
    """--peers, with its help text."""
    return click.option("--peers", is_flag=True, help=text)


def check_peers(peers: bool, peer_python: str | None) -> None:
    """Raises UsageError for --peer-python without --peers."""
    if peer_python is not None and not peers:
        raise click.UsageError("--peer-python needs --peers")


def check_plot(plot: Path | None) -> None:
    """Raises before the measurement if the plot could not be drawn."""
    if plot is not None:
        from fabula.bench.plot import check

        check(plot)


def located(model: str) -> Path:
    """The path of a model, which is downloaded with a progress bar if needed."""
    from fabula.formats.locate import locate

    with bars() as bar:
        return locate(model, progress=FetchProgress(bar, f"fetching {model}"))


def measured_machine(threads: int | None, *, quick: bool = False) -> Machine:
    """Measures the limits of this machine."""
    from fabula.bench.machine import Machine

    note("measuring the machine")
    n_threads = n_threads_of(threads)
    return Machine.measure(n_threads, read_bytes=32 << 20, repeats=3) if quick else Machine.measure(n_threads)


def n_threads_of(threads: int | None) -> int:
    """`threads`, or else the engine's default."""
    from fabula.engine.threads import default_threads

    return threads or default_threads()


def give(
    rows: Sequence[dict[str, Any]],
    machine: dict[str, Any],
    shown: Callable[[], Sequence[Table | str]],
    *,
    as_json: bool,
    plot: Path | None = None,
) -> None:
    """Plots rows if `plot` is given, and prints them as JSON, with the machine in each, or as tables."""
    rows = [{**row, "machine": machine} for row in rows]
    if plot is not None:
        from fabula.bench.plot import draw

        draw(rows, plot)
        note(f"{plot}: written")
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    from fabula.bench.report import show

    show(*shown())
