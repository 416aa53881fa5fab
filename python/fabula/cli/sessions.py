"""`fabula sessions`: manages saved conversations; loads a model only where needed."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fabula.cli.console import clean, err, note
from fabula.cli.options import ModelOptions, data_option, device_option, parallel_option
from fabula.cli.session_source import explain_lock, find_record, listed, open_workspace, read_json, write_json

if TYPE_CHECKING:
    from fabula.sessions.session import Session
    from fabula.workspace import Workspace

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


_WAY_OUT = "end it first, or use another folder with --data FOLDER"


def _open(data: Path | None) -> AbstractContextManager[Workspace]:
    return open_workspace(data, way_out=_WAY_OUT)


@click.group(short_help="List, show, export, import, delete and check saved conversations.")
def sessions() -> None:
    """List, show, export, import, delete and check the conversations saved by `fabula chat` and `fabula story`.

    \b
    Examples:
      fabula sessions list
      fabula sessions show letters
      fabula sessions export letters letters.json
      fabula sessions import letters.json --name copy
      fabula sessions delete letters
    """


@sessions.command("list", short_help="List sessions, the last changed first.")
@data_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def list_(data: Path | None, as_json: bool) -> None:
    """List sessions, the last changed first.

    \b
    Examples:
      fabula sessions list
      fabula sessions list --json | jq -r .name
    """
    from rich.progress import track

    with _open(data) as workspace:
        items = list(track(listed(workspace), "reading", console=err(), transient=True, disable=not _watched()))
    if as_json:
        for item in items:
            click.echo(json.dumps(dataclasses.asdict(item)))
    elif items:
        from rich.console import Console

        from fabula.cli.drawing import sessions_table

        width = None if sys.stdout.isatty() else 200
        Console(highlight=False, width=width).print(sessions_table(items))
    else:
        note(f"no sessions in {workspace.folder}")
    for item in items:
        if item.problem and not as_json:
            note(f"{item.name} is damaged: {item.problem}", style="red")


def _watched() -> bool:
    return err().is_terminal


@sessions.command(short_help="Show the tree of a session and its text.")
@click.argument("name")
@data_option
@_json
def show(name: str, data: Path | None, as_json: bool) -> None:
    """Show the tree of the session NAME, and the text of its current path.

    \b
    Examples:
      fabula sessions show letters
      fabula sessions show letters --json
    """
    with _open(data) as workspace:
        session = workspace.open(name)
        if as_json:
            click.echo(json.dumps(_described(workspace, session)))
            return
        from rich.console import Console
        from rich.text import Text

        from fabula.cli.drawing import show_tree

        console = Console(highlight=False, soft_wrap=True)
        show_tree(session, console)
        if session.system:
            console.print(Text(f"\n{clean(session.system)}", style="dim"))
        story = Text("\n")
        for turn in session.path:
            story.append(f"> {clean(turn.prompt)}\n" if turn.chat else clean(turn.prompt), style="green")
            story.append(clean(turn.text) + ("\n" if turn.chat else ""))
        console.print(story)


def _described(workspace: Workspace, session: Session) -> dict[str, Any]:
    record = find_record(workspace, session.id)
    from fabula.cli.drawing import numbered

    turns = numbered(session)
    numbers = {turn: i for i, turn in enumerate(turns, 1)}
    return {
        "name": session.id,
        "model": record.model if record is not None else None,
        "system": session.system,
        "context_policy": session.policy.to_json(),
        "created_at": session.created_at,
        "head": numbers.get(session.head, 0),
        "path": [numbers[turn] for turn in session.path],
        "turns": [
            {
                "turn": numbers[turn],
                "parent": numbers.get(turn.parent, 0) if turn.parent is not None else 0,
                "chat": turn.chat,
                **turn.to_json(),
            }
            for turn in turns
        ],
    }


@sessions.command(short_help="Write a session as JSON.")
@click.argument("name")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option(
    "--kv",
    type=click.Path(path_type=Path),
    metavar="FILE.safetensors",
    help="Also write its KV cache; loads the model.",
)
@device_option
@parallel_option
@data_option
def export(name: str, file: Path | None, kv: Path | None, device: str, tensor_parallel: int, data: Path | None) -> None:
    """Write the session NAME as JSON to FILE, or to stdout. FILE is replaced atomically.

    --kv writes the keys and values that were saved on disk; the importer computes those that are missing.

    \b
    Examples:
      fabula sessions export letters > letters.json
      fabula sessions export letters letters.json --kv letters.safetensors
    """
    with _open(data) as workspace:
        if kv is not None:
            record = find_record(workspace, name)
            if record is not None:
                _load(workspace, record.model, device, tensor_parallel)
        content = workspace.open(name).export(kv=kv)
    if file is None:
        click.echo(json.dumps(content, ensure_ascii=False))
    else:
        write_json(file, content)
        note(f"{name}: {len(content['turns'])} turns written to {file}")


def _load(workspace: Workspace, model: str, device: str, tensor_parallel: int) -> None:
    ModelOptions(model, "auto", "f16", None, None, device, tensor_parallel=tensor_parallel).load(workspace)


@sessions.command("import", short_help="Import an exported session.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="Name of the imported session; default: its old name.")
@click.option("--kv", type=click.Path(path_type=Path), metavar="FILE", help="Its KV cache; loads the model.")
@device_option
@parallel_option
@data_option
def import_(
    file: Path, name: str | None, kv: Path | None, device: str, tensor_parallel: int, data: Path | None
) -> None:
    """Import a session from FILE, written by `fabula sessions export` or /save, and print its name.

    \b
    Examples:
      fabula sessions import letters.json
      fabula sessions import letters.json --name copy --kv letters.safetensors
    """
    content = read_json(file)
    with _open(data) as workspace:
        if kv is not None and isinstance(content, dict) and isinstance(content.get("model"), str):
            _load(workspace, content["model"], device, tensor_parallel)
        session = workspace.import_(content, id=name, kv=kv)
        click.echo(session.id)


@sessions.command(short_help="Delete a session.")
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@data_option
def delete(name: str, yes: bool, data: Path | None) -> None:
    """Delete the session NAME with all its turns, except those that forks need.

    \b
    Examples:
      fabula sessions delete letters
      fabula sessions delete letters --yes
    """
    with _open(data) as workspace:
        n_turns = len(workspace.open(name).turns)
        if not yes:
            if not sys.stdin.isatty():
                raise click.UsageError("without a terminal, deleting needs --yes")
            click.confirm(f"Delete {name} with its {n_turns} turns?", abort=True, err=True)
        workspace.delete(name)
    note(f"{name}: deleted")


@sessions.command(short_help="Check saved data for damage.")
@data_option
@_json
def check(data: Path | None, as_json: bool) -> None:
    """Read all saved data and print what is damaged. The exit code is 1 if anything is.

    \b
    Examples:
      fabula sessions check
      fabula sessions check --data ./backup --json
    """
    from fabula.store.store import Store
    from fabula.workspace import default_folder

    folder = data or default_folder()
    with explain_lock(_WAY_OUT):
        store = Store.open(folder)
    with store, err().status("reading"):  # shown on terminals only
        problems = store.check()
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "problems": problems}))
    else:
        for problem in problems:
            click.echo(clean(problem))
        if not problems:
            note(f"{folder}: no damage found")
    if problems:
        raise click.exceptions.Exit(1)
