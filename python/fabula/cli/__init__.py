"""The command line: `fabula COMMAND`. One file a command, imported when it is called."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `fabula` command."""
    from fabula.cli.main import run

    run()
