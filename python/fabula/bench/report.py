"""The tables that `fabula bench` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fabula.bench.model import ModelRow
    from fabula.bench.ops import OpRow
    from fabula.bench.row import Row

_PIPE_WIDTH = 200  # without a terminal, avoid truncation


def ops_table(rows: Sequence[OpRow]) -> Table:
    """Operators: plain serial C against the optimized ones."""
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
    """Tokens a second, also of other engines if measured."""
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


def perplexity_table(rows: Sequence[Row]) -> Table:
    """Perplexity by precision, with distances from a reference and results of another engine if measured."""
    compare = any(row.more["compare"] for row in rows)
    peers = any(row.peer for row in rows)
    numbers = ["window", "tokens", "perplexity"]
    numbers += ["difference", "KL mean", "KL max", "same first"] if compare else []
    numbers += ["peer's", "ours to it", "± error"] if peers else []
    numbers += ["its difference", "its KL mean", "its KL max", "its same first"] if peers and compare else []
    table = _table(("weights", "kv", *(("peer",) if peers else ())), numbers)
    for row in rows:
        more = row.more
        cells = [row.weights or "", row.kv or "", *([row.peer_name or ""] if peers else [])]
        cells += [str(more["window"]), str(more["n_tokens"]), _format(row.ours, ".4f")]
        cells += _distances(more, "") if compare else []
        cells += (
            [
                _format(row.peer, ".4f"),
                _format(more["difference_to_peer"], "+.3%"),
                _format(more["difference_to_peer_error"], ".3%"),
            ]
            if peers
            else []
        )
        cells += _distances(more, "peer_") if peers and compare else []
        table.add_row(*cells)
    return table


def sessions_table(rows: Sequence[Row]) -> Table:
    """Cost of rollback and fork, compared with a peer."""
    peers = any(row.peer is not None for row in rows)
    table = _table(
        ("case",),
        ("depth", "tokens", "p50 ms", "p99 ms", "recomputed", "bytes", *(("peer's ms", "ratio") if peers else ())),
        ("settings",) if peers else (),
    )
    for row in rows:
        more = row.more
        cells = [row.case, str(more["depth"]), str(more["n_tokens"]), f"{more['p50_ms']:.4f}", f"{more['p99_ms']:.4f}"]
        cells += [str(more["recomputed"]), f"{more['bytes']:,}"]
        if peers:
            cells += [_format(row.peer, ".1f"), _format(row.ratio, ",.0f"), row.peer_settings or ""]
        table.add_row(*cells)
    return table


def speculation_table(rows: Sequence[Row]) -> Table:
    """Decoding with and without speculation."""
    numbers = ("tokens/s", "without", "ratio", "of CPU time", "tokens a step", "drafted", "accepted")
    table = _table(("case",), numbers)
    for row in rows:
        more = row.more
        table.add_row(
            row.case,
            _format(row.ours, ",.1f"),
            _format(row.peer, ",.1f"),
            _format(row.ratio, ".2f"),
            _format(more["cpu_ratio"], ".2f"),
            f"{more['tokens_per_step']:.2f}",
            str(more["drafted"]),
            str(more["accepted"]),
        )
    return table


def rows_table(rows: Sequence[Row]) -> Table:
    """Any rows: a value, the peer's, the ratio."""
    peers = any(row.peer_name is not None for row in rows)
    limits = any(row.limit is not None for row in rows)
    table = _table(
        ("case", "weights", "kv"),
        ("threads", "value", *(("limit", "of limit") if limits else ()), *(("peer's", "ratio") if peers else ())),
        ("peer", "settings") if peers else (),
    )
    for row in rows:
        cells = [row.case, row.weights or "", row.kv or "", str(row.threads or "")]
        cells += [f"{_format(row.ours, ',.1f')} {row.unit}"]
        cells += [_format(row.limit, ",.1f"), _format(row.limit_share, ".0%")] if limits else []
        if peers:
            cells += [
                _format(row.peer, ",.1f"),
                _format(row.ratio, ".2f"),
                row.peer_name or "",
                row.peer_settings or "",
            ]
        table.add_row(*cells)
    return table


def _distances(more: Mapping[str, Any], prefix: str) -> list[str]:
    forms = {"relative_difference": "+.3%", "kl_mean": ".6f", "kl_max": ".4f", "same_top": ".2%"}
    return [_format(more[prefix + name], form) for name, form in forms.items()]


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


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
