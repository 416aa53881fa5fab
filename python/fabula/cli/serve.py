"""`fabula serve`, `fabula config` and `fabula keys`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import click

from fabula.cli.console import note

if TYPE_CHECKING:
    from fabula.server.settings import Settings


def settings_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option for each server setting; the command gets those that were given."""
    from dataclasses import MISSING, fields

    from fabula.server.settings import Settings

    kinds = get_type_hints(Settings)
    command = function
    for row in reversed(fields(Settings)):
        kind, about = kinds[row.name], row.metadata
        flag = "--" + row.name.replace("_", "-")
        plain = kind if get_origin(kind) is tuple else (get_args(kind) or (kind,))[0]
        options: dict[str, Any] = {"default": None, "help": _help(about["text"], row.default, MISSING)}
        if plain is bool:
            command = click.option(f"{flag}/--no-{flag[2:]}", **options)(command)
            continue
        if get_origin(plain) is tuple:
            options |= {"multiple": True, "default": ()}
        elif about["choices"]:
            options["type"] = click.Choice(about["choices"])
        elif plain is Path:
            options["type"] = click.Path(path_type=Path)
        else:
            options["type"] = plain
        if not about["choices"]:
            options["metavar"] = about["metavar"] or {int: "N", float: "X"}.get(plain, "TEXT")
        command = click.option(*(("-m",) if row.name == "model" else ()), flag, **options)(command)
    return command


def _help(text: str, default: Any, missing: object) -> str:
    if default in (None, (), missing) or isinstance(default, bool):
        shown = {True: "on", False: "off"}.get(default) if isinstance(default, bool) else None
    else:
        shown = ", ".join(default) if isinstance(default, tuple) else str(default)
    return text if shown is None else f"{text}  [{shown}]"


def gathered(config: Path | None, given: dict[str, Any]) -> tuple[Settings, dict[str, str]]:
    """The settings from options, environment and file, and the source of each."""
    from fabula.server.settings import gather

    return gather({name: value for name, value in given.items() if value not in (None, ())}, config)


_CONFIG = click.option(
    "--config", type=click.Path(path_type=Path), metavar="FILE", help="TOML file of settings; default: $FABULA_CONFIG."
)


@click.command(
    epilog=(
        "Every option is also a variable (--max-streams: FABULA_MAX_STREAMS) and a line of the file (max_streams = 8)."
    )
)
@_CONFIG
@settings_options
def serve(config: Path | None, **given: Any) -> None:
    """Serve models over HTTP: sessions with Fabula's own API, and the APIs of OpenAI, Anthropic and Ollama.

    \b
    Examples:
      fabula serve
      fabula serve --port 9000 --model ./model.gguf --data ./data
      fabula serve --host 0.0.0.0 --keys keys.txt
      fabula serve --ollama-port 11434
    """
    settings, _ = gathered(config, given)
    from fabula.server.serve import run

    def ready(address: str) -> None:
        click.echo(f"Fabula serves {', '.join(name for name, _ in settings.models)} at {address}")
        if settings.ollama_port is not None:
            note(f"Ollama's clients find it at port {settings.ollama_port}, too")
        note(f"the API: {address}/docs; Ctrl-C stops it")

    run(settings, ready=ready)
    note("stopped; all conversations are saved")


@click.group()
def config() -> None:
    """Check the settings of `fabula serve`."""


@config.command()
@_CONFIG
@settings_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(config: Path | None, as_json: bool, **given: Any) -> None:
    """Check and print the settings that `fabula serve` would use with the same options.

    \b
    Examples:
      fabula config check
      fabula config check --config fabula.toml --json
    """
    settings, sources = gathered(config, given)
    from fabula.server.gate import Keys
    from fabula.server.serve import check

    found = check(settings)
    n_keys = len(Keys.read(settings.keys).names) if settings.keys is not None else 0
    if as_json:
        click.echo(json.dumps({"settings": settings.shown(), "from": sources, "n_keys": n_keys, "models": found}))
        return
    for name, value in settings.shown().items():
        shown = ", ".join(value) if isinstance(value, (list, tuple)) else "" if value is None else value
        click.echo(f"{name:<18} {shown!s:<28} {sources.get(name, '')}".rstrip())
    for name, place in found.items():
        note(f"model {name}: {place}")
    note(f"the settings are good; {n_keys} keys" if n_keys else "the settings are good; no keys")


@click.command()
@click.argument("name")
@click.option("--hash", "hashed", is_flag=True, help="Print the line with the key's hash, and the key on stderr.")
def keys(name: str, hashed: bool) -> None:
    """Create an API key; append its line to the file given by --keys.

    \b
    Examples:
      fabula keys alice >> keys.txt
      fabula keys alice --hash >> keys.txt
    """
    import hashlib

    from fabula.server.gate import is_key_name, new_key

    if not is_key_name(name):
        raise click.UsageError(f"name {name!r} must be 1 to 64 of A-Za-z0-9._-")
    key = new_key()
    if hashed:
        click.echo(f"{name}:sha256:{hashlib.sha256(key.encode()).hexdigest()}")
        note(f"the key: {key}", style="bold")
    else:
        click.echo(f"{name}:{key}")
