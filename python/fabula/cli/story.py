"""`fabula story`: continues a text."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from fabula.cli.console import emit, note
from fabula.cli.options import Keeping, ModelOptions, keeping_options, model_options, sampling_options, special_option

if TYPE_CHECKING:
    from fabula.engine.generation import Generation, Timings
    from fabula.engine.sampling import SamplingParams


@click.command(short_help="Continue a text.")
@click.argument("prompt", required=False)
@model_options
@sampling_options(max_tokens=256)
@special_option("the text", True)
@click.option("--once", is_flag=True, help="In a terminal too: write one piece and exit; nothing is saved.")
@keeping_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when done instead of streaming.")
def story(
    prompt: str | None,
    loading: ModelOptions,
    params: SamplingParams,
    parse_special: bool | None,
    once: bool,
    keeping: Keeping,
    as_json: bool,
) -> None:
    """Continue the text PROMPT and stream the result. Without PROMPT the text is read from stdin.

    In a terminal the story is written piece by piece: Enter continues, and typed text is added first; /help lists
    commands. Every piece is saved. Ctrl-C stops a piece.

    \b
    Examples:
      fabula story "Once upon a time, a lighthouse keeper"
      fabula story --session lighthouse --max-tokens 80
      fabula story --resume
      fabula story --once --seed 7 --max-tokens 100 --temperature 0.6 "The last train"
      fabula story --json "It was" < /dev/null
      cat beginning.txt | fabula story
    """
    if sys.stdin.isatty() and sys.stdout.isatty() and not once and not as_json:
        from fabula.cli.repl import converse

        converse(loading, params, keeping, kind="story", prompt=prompt, parse_special=parse_special)
        return
    keeping.refuse()
    if prompt is None:
        if sys.stdin.isatty():
            raise click.UsageError("give the beginning of a story, in quotes, or pipe it in")
        prompt = sys.stdin.read()
    tell(prompt, loading, params, as_json=as_json, parse_special=parse_special is not False)


def tell(
    prompt: str,
    loading: ModelOptions,
    params: SamplingParams,
    *,
    as_json: bool,
    kind: str = "story",
    parse_special: bool = True,
) -> None:
    """Loads the model and writes the continuation of `prompt` to stdout, with the sampling defaults of `kind`."""
    with (
        loading.load() as model,
        model.generate(prompt, model.defaults.in_terminal(params, kind), parse_special=parse_special) as generation,
    ):
        if not as_json:
            emit(prompt)
        text = follow(generation, show=not as_json)
        if as_json:
            click.echo(json.dumps({"prompt": prompt, "text": text, **report(generation), "model": str(loading.model)}))
            return
        emit("\n")
        if sys.stderr.isatty():
            note(summary(generation.timings, generation.finish_reason, generation.seed))


def follow(generation: Generation, *, show: bool) -> str:
    """Runs a generation to its end or to Ctrl-C, and returns its text."""
    texts: list[str] = []
    try:
        for piece in generation:
            texts.append(piece.text)
            if show:
                emit(piece.text)
    except KeyboardInterrupt:
        generation.cancel()
    return "".join(texts)


def report(generation: Generation) -> dict[str, Any]:
    """The fields of --json besides the text."""
    return {
        "token_ids": generation.token_ids,
        "prompt_ids": generation.prompt_ids,
        "finish_reason": generation.finish_reason,
        "seed": generation.seed,
        "timings": dataclasses.asdict(generation.timings),
    }


def summary(t: Timings, finish_reason: str | None, seed: int | None) -> str:
    """The line of statistics after a reply."""
    parts = [
        f"{t.generated_tokens} tokens",
        f"{t.tokens_per_s:.0f} tokens/s",
        f"first after {t.first_token_ms / 1e3:.2f} s",
        f"prompt {t.prompt_tokens} tokens" + (f", {t.reused_tokens} reused" if t.reused_tokens else ""),
        f"seed {seed}",
    ]
    ends = {"length": "truncated by --max-tokens or the context", "cancelled": "stopped"}
    if finish_reason in ends:
        parts.append(ends[finish_reason])
    return " · ".join(parts)
