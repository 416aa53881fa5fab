"""`fabula run`: chat, or a short story without a terminal. A new user's first command."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from fabula.cli.options import Keeping, ModelOptions, model_options, sampling_options

if TYPE_CHECKING:
    from fabula.engine.sampling import SamplingParams

STORY_TOKENS = 120  # default of --max-tokens for the story
OPENING = "Once upon a time, in a lighthouse at the edge of the sea, there lived an old keeper who"


@click.command(short_help="Chat in a terminal; elsewhere write a short story.")
@model_options
@sampling_options(max_tokens=512)
def run(loading: ModelOptions, params: SamplingParams) -> None:
    """Start a chat, saved like `fabula chat`. Without a terminal on stdin or stdout, write a short story and exit.

    \b
    Examples:
      fabula run
      fabula run --model ./my-model
      fabula run < /dev/null
    """
    if sys.stdin.isatty() and sys.stdout.isatty():
        from fabula.cli.repl import converse

        converse(loading, params, Keeping())
        return
    from dataclasses import replace

    from fabula.cli.story import tell

    source = click.get_current_context().get_parameter_source("max_tokens")
    if source is click.core.ParameterSource.DEFAULT:
        params = replace(params, max_tokens=STORY_TOKENS)
    tell(OPENING, loading, params, as_json=False, kind="chat")
