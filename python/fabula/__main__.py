"""`python -m fabula` is the `fabula` command."""

from fabula.cli import main

main()
