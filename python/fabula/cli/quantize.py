"""`fabula quantize`: writes a model as a smaller GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fabula.choices import FILE_TYPES, MAX_THREADS
from fabula.cli.console import FetchProgress, bars, note

if TYPE_CHECKING:
    from fabula.export.quantize import Report


@click.command(short_help="Write a model as a smaller GGUF file.")
@click.argument("model")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--type", "kind", type=click.Choice(FILE_TYPES, case_sensitive=False), required=True,
    help="Format of the matrices. q4_k_m and q5_k_m use six bits for the most important tensors.",
)  # fmt: skip
@click.option(
    "-t",
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    metavar="N",
    help="Default: as many as this process may use.",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def quantize(model: str, out: Path, kind: str, threads: int | None, force: bool, as_json: bool) -> None:
    """Write MODEL (a Hugging Face folder, a .gguf file, the first part of a split one, or a name) as the GGUF file OUT.
    Fabula, llama.cpp and others read it; notes list what other readers do differently. Prints sizes, bits per weight
    and the relative RMS error of the weights.

    Tensors whose rows are not multiples of 256 use the next larger format with blocks of 32. OUT appears only when
    complete.

    \b
    Examples:
      fabula quantize ./SmolLM2-360M-Instruct smol-q8.gguf --type q8_0
      fabula quantize HuggingFaceTB/SmolLM2-1.7B-Instruct smol-q4.gguf --type q4_k_m
      fabula quantize big-f16.gguf small.gguf --type q5_k --force --json
    """
    from fabula.errors import InvalidArgument
    from fabula.export.quantize import quantize_model
    from fabula.formats.locate import locate

    if out.exists() and not force:  # before a download
        raise InvalidArgument(f"{out}: exists already; --force replaces it")
    with bars() as bar:
        path = locate(model, progress=FetchProgress(bar, f"fetching {model}"))
        report = quantize_model(
            path,
            out,
            kind.lower(),
            threads=threads,
            overwrite=force,
            progress=lambda done, total: bar.show("quantizing", done, total),
        )
    if as_json:
        click.echo(json.dumps(_facts(report)))
    else:
        _print(report)


def _facts(report: Report) -> dict[str, object]:
    return {
        "path": str(report.path),
        "type": report.kind,
        "n_parameters": report.n_parameters,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "file_bytes": report.file_bytes,
        "bits_per_weight": report.bits_per_weight,
        "error": report.error,
        "fallbacks": report.fallbacks,
        "requantised": report.requantized,
        "notes": list(report.notes),
        "roles": [
            {
                "name": role.name,
                "formats": role.dtypes,
                "n_parameters": role.n_parameters,
                "bytes_before": role.bytes_before,
                "bytes_after": role.bytes_after,
                "bits_per_weight": role.bits_per_weight,
                "error": role.error,
            }
            for role in report.roles
        ],
    }


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    def percent(error: float) -> str:
        return f"{100 * error:.3f} %" if error else "none"

    table = Table("tensors", "formats", box=None, pad_edge=False, header_style="bold")
    for name in ("before", "after", "bits", "error"):
        table.add_column(name, justify="right")
    for role in report.roles:
        formats = ", ".join(f"{count} {dtype}" for dtype, count in sorted(role.dtypes.items()))
        before, after = f"{role.bytes_before / 1e6:,.2f} MB", f"{role.bytes_after / 1e6:,.2f} MB"
        table.add_row(role.name, formats, before, after, f"{role.bits_per_weight:.2f}", percent(role.error))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"{report.path}: {report.bytes_before / 1e6:,.1f} MB became {report.bytes_after / 1e6:,.1f} MB, "
        f"{report.bits_per_weight:.2f} bits per weight, error {percent(report.error)}"
    )
    for text in report.notes:
        note(f"note: {text}", style="yellow")
    if report.fallbacks:
        note(f"{report.fallbacks} tensors have rows that are not whole {report.kind} blocks; see their formats")
    if report.requantized:
        note("the source was quantized already, so errors add up; an f16 or bf16 source gives better files")
