"""The tables that `fabula bench` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fabula.bench.model import ModelRow
    from fabula.bench.ops import OpRow
    from fabula.bench.perplexity import Perplexity

_PIPE_WIDTH = 200  # without a terminal nothing is cut off


def ops_table(rows: Sequence[OpRow]) -> Table:
    """Operators: plain serial C against the optimised ones."""
    table = _table(
        ("operator", "weights", "size"), ("serial ms", "mean ms", "median ms", "x faster", "speed", "of limit")
    )
    for row in rows:
        table.add_row(
            row.op,
            row.weights,
            row.size,
            f"{1e3 * row.serial_median:.3f}",
            f"{1e3 * row.mean:.3f}",
            f"{1e3 * row.median:.3f}",
            f"{row.ratio:.1f}",
            f"{row.speed:.1f} {row.unit}",
            f"{row.share:.0%}",
        )
    return table


def model_table(rows: Sequence[ModelRow]) -> Table:
    """Tokens a second, and those of other engines where they were measured."""
    peers = any(row.peer is not None for row in rows)
    more = (("peer", "peer's tokens/s", "ratio", "same tokens"), ("settings",)) if peers else ((), ())
    table = _table(("case", "weights", "kv"), ("threads", "tokens/s", "of limit", *more[0]), more[1])
    for row in rows:
        cells = [
            row.case,
            row.weights,
            row.kv,
            str(row.threads),
            f"{row.ours:.1f}",
            f"{row.limit_share:.0%}",
        ]
        if peers:
            cells += [
                row.peer_name or "",
                "" if row.peer is None else f"{row.peer:.1f}",
                "" if row.ratio is None else f"{row.ratio:.2f}",
                "" if row.agreement is None else str(row.agreement),
                row.peer_settings or "",
            ]
        table.add_row(*cells)
    return table


def perplexity_table(results: Sequence[Perplexity]) -> Table:
    """Perplexity by precision."""
    table = _table(("weights", "kv"), ("window", "tokens", "perplexity"))
    for r in results:
        table.add_row(r.weights, r.kv, str(r.window), str(r.n_tokens), f"{r.perplexity:.4f}")
    return table


def show(*parts: Table | str) -> None:
    """Prints to stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPE_WIDTH)
    for part in parts:
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)


def _table(texts: Sequence[str], numbers: Sequence[str], last: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in texts:
        table.add_column(title, no_wrap=True)
    for title in numbers:
        table.add_column(title, justify="right")
    for title in last:
        table.add_column(title)
    return table
