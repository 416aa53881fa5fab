"""The `fabula` command: its subcommands and the display of errors."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

import click

from fabula import __version__
from fabula.cli.console import complain, note
from fabula.errors import EngineError

# name -> (module, attribute, help), so that `fabula --help` imports none of them.
_COMMANDS = {
    "bench": ("fabula.cli.bench", "bench", "Measure speed, memory and accuracy on this machine."),
    "chat": ("fabula.cli.chat", "chat", "Chat with a model in the terminal."),
    "config": ("fabula.cli.serve", "config", "Check the settings of the server."),
    "inspect": ("fabula.cli.inspect", "inspect", "Describe a model without loading its weights."),
    "keys": ("fabula.cli.serve", "keys", "Create an API key for the server."),
    "launch": ("fabula.cli.launch", "launch", "Run a coding agent with a running server's model."),
    "pull": ("fabula.cli.pull", "pull", "Download a model."),
    "quantize": ("fabula.cli.quantize", "quantize", "Write a model as a smaller GGUF file."),
    "run": ("fabula.cli.run", "run", "Chat in a terminal; elsewhere write a short story."),
    "serve": ("fabula.cli.serve", "serve", "Serve models over HTTP, with an OpenAI-compatible API."),
    "sessions": (
        "fabula.cli.sessions",
        "sessions",
        "List, show, export, import, delete and check saved conversations.",
    ),
    "story": ("fabula.cli.story", "story", "Continue a text."),
}


class _Commands(click.Group):
    """A group that imports a command only when it is called."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[2]) for name, entry in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fabula")
@click.option("--debug", is_flag=True, help="Show Python's traceback when something fails.")
def cli(debug: bool) -> None:
    """Run language models on the machine you have.

    \b
    Examples:
      fabula chat
      fabula serve
      fabula story "Once upon a time, a lighthouse keeper"
      fabula inspect ./model.gguf
    """


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with 0, 1 (failure), 2 (wrong usage) or 130 (Ctrl-C)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = _show_warning
    try:
        code = cli.main(words, prog_name="fabula", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        code = end.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        note("stopped")
        code = 130
    except BrokenPipeError:
        # The reader of our pipe is gone; without this, Python's final flush would fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (EngineError, ImportError) as error:
        if "--debug" in words:
            raise
        complain(str(error))
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    note(f"warning: {message}", style="yellow")
