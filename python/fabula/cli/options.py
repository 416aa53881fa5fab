"""Options that commands share, and what they become: a loaded model, sampling settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from fabula.cli.console import FetchProgress, bars

if TYPE_CHECKING:
    from fabula.engine.sampling import SamplingParams
    from fabula.model import KvName, Model, WeightsName

_Function = TypeVar("_Function", bound=Callable[..., Any])

DEFAULT_MODEL = "smollm2-135m-instruct"  # as in formats/download.py, which takes too long to import for --help

_MODEL = (
    click.option(
        "-m", "--model", default=DEFAULT_MODEL, show_default=True, envvar="FABULA_MODEL", metavar="NAME",
        help="Folder, .gguf file, or name; see `fabula pull --help`.",
    ),
    click.option(
        "--weights", type=click.Choice(["auto", "f32", "f16", "bf16"]), default="auto", show_default=True,
        help="Precision of the weights in memory; auto keeps the file's, quantised ones become f16.",
    ),
    click.option(
        "--kv", type=click.Choice(["f16", "f32"]), default="f16", show_default=True, help="Precision of the KV cache."
    ),
    click.option(
        "-t", "--threads", type=click.IntRange(1, 1024), metavar="N", help="Default: as many as this process may use."
    ),
    click.option(
        "-c", "--context", type=click.IntRange(1), metavar="N", help="Tokens; default: the model's own length."
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: str
    weights: str
    kv: str
    threads: int | None
    context: int | None

    def load(self) -> Model:
        """Loads the model behind progress bars on stderr."""
        from fabula.model import Model

        with bars() as bar:
            return Model.load(
                self.model,
                weights=cast("WeightsName", self.weights),
                kv=cast("KvName", self.kv),
                threads=self.threads,
                context=self.context,
                fetch_progress=FetchProgress(bar, f"fetching {self.model}"),
                load_progress=lambda done, total: bar.show("loading", done, total),
            )


def model_options(function: _Function) -> _Function:
    """Adds --model and its companions; the command gets them as `loading`, a ModelOptions."""

    @functools.wraps(function)
    def command(
        *args: Any, model: str, weights: str, kv: str, threads: int | None, context: int | None, **rest: Any
    ) -> Any:
        return function(*args, loading=ModelOptions(model, weights, kv, threads, context), **rest)

    for option in reversed(_MODEL):
        command = option(command)
    return cast(_Function, command)


def _number(name: str, field: str, default: float, text: str) -> Callable[[Any], Any]:
    return click.option(name, field, type=float, default=default, show_default=True, metavar="X", help=text)


def sampling_options(*, temperature: float, top_p: float, max_tokens: int) -> Callable[[_Function], _Function]:
    """Adds the sampling options with these defaults; the command gets them as `params`, a SamplingParams."""
    options = (
        _number("--temperature", "temperature", temperature, "Above 0 the higher the bolder; 0 takes the likeliest."),
        click.option(
            "--top-k", type=int, default=0, show_default=True, metavar="N", help="Keep the N likeliest; 0: off."
        ),
        _number("--top-p", "top_p", top_p, "Keep the likeliest that make up this probability; 1: off."),
        _number("--min-p", "min_p", 0.0, "Keep what is at least X times as likely as the likeliest; 0: off."),
        _number("--typical-p", "typical_p", 1.0, "Keep what is nearest to the expected surprise; 1: off."),
        _number("--repetition-penalty", "repetition_penalty", 1.0, "Above 1 makes repetition rarer."),
        _number("--frequency-penalty", "frequency_penalty", 0.0, "Subtracted for every time a token was used."),
        _number("--presence-penalty", "presence_penalty", 0.0, "Subtracted once from tokens that were used."),
        click.option("--seed", type=int, metavar="N", help="Makes the answer repeatable; default: random."),
        click.option(
            "-n", "--max-tokens", type=int, default=max_tokens, show_default=True, metavar="N", help="Tokens at most."
        ),
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times."),
    )  # fmt: skip

    def decorate(function: _Function) -> _Function:
        names = [
            *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty"),
            *("presence_penalty", "seed", "max_tokens", "stop"),
        ]

        @functools.wraps(function)
        def command(*args: Any, **given: Any) -> Any:
            params = sampling_params({name: given.pop(name) for name in names})
            return function(*args, params=params, **given)

        for option in reversed(options):
            command = option(command)
        return cast(_Function, command)

    return decorate


def sampling_params(settings: dict[str, Any]) -> SamplingParams:
    """SamplingParams of options; a value out of range is wrong usage."""
    from fabula.engine.sampling import SamplingParams
    from fabula.errors import InvalidArgument

    try:
        return SamplingParams(**settings)
    except InvalidArgument as error:
        raise click.UsageError(str(error)) from None
