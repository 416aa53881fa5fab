"""`fabula chat`: a conversation in the terminal, or one message from a pipe."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from fabula.cli.console import emit
from fabula.cli.options import Keeping, ModelOptions, keeping_options, model_options, sampling_options, special_option
from fabula.cli.story import follow, report

if TYPE_CHECKING:
    from fabula.engine.sampling import SamplingParams


@click.command(short_help="Chat with a model in the terminal.")
@model_options
@sampling_options(max_tokens=1024)
@special_option("messages", False)
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("-p", "--prompt", metavar="TEXT", help="Send this message, print the reply and exit; nothing is saved.")
@keeping_options
@click.option("--json", "as_json", is_flag=True, help="With --prompt or a pipe: print one JSON object.")
def chat(
    loading: ModelOptions,
    params: SamplingParams,
    parse_special: bool | None,
    keeping: Keeping,
    system: str | None,
    prompt: str | None,
    as_json: bool,
) -> None:
    """Chat with a model. Input from a pipe is one message; the reply goes to stdout.

    In a terminal every reply is saved, and the conversation is a tree: /undo, /regen, /branches, /tree and others
    navigate it; /help lists them. Ctrl-C stops a reply, not the program. Options that are not given keep the settings
    of the session.

    \b
    Examples:
      fabula chat
      fabula chat --resume
      fabula chat --session letters --system "Answer like a pirate." --temperature 0.9
      fabula chat --no-save --context-policy slide --window 1000
      fabula chat --prompt "Name three rivers in France." --json
      git diff | fabula chat --system "Write a commit message for this change."
    """
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    if prompt is None:
        if as_json:
            raise click.UsageError("--json needs --prompt or a message from a pipe")
        from fabula.cli.repl import converse

        converse(loading, params, keeping, system=system, parse_special=parse_special)
        return
    keeping.refuse()
    if not prompt:
        raise click.UsageError("the message is empty")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    with (
        loading.load() as model,
        model.chat(
            messages, model.defaults.in_terminal(params, "chat"), parse_special=bool(parse_special)
        ) as generation,
    ):
        text = follow(generation, show=not as_json)
        if not as_json:
            emit("\n")
            return
        messages.append({"role": "assistant", "content": text})
        click.echo(
            json.dumps(
                {
                    "messages": messages,
                    "text": text,
                    **report(generation),
                    "model": loading.model,
                }
            )
        )
