"""Options shared by commands, and their conversion: a loaded model, sampling settings."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from fabula.choices import (
    BF16_INPUTS,
    DEFAULT_MODEL,
    DEVICE_NAME,
    DEVICE_PRODUCTS,
    KV_NAMES,
    MAX_DEVICES,
    MAX_THREADS,
    SPECULATION_NAMES,
    WEIGHTS_NAMES,
    WINDOW_KV,
)
from fabula.cli.console import FetchProgress, bars

if TYPE_CHECKING:
    from fabula.choices import Bf16Inputs, SpeculationName, WeightsName, WindowKv
    from fabula.engine.sampling import SamplingParams
    from fabula.model import Model
    from fabula.sessions.policy import ContextPolicy
    from fabula.workspace import Workspace

_Function = TypeVar("_Function", bound=Callable[..., Any])

KV_CHOICE = click.Choice(KV_NAMES)


def _device_name(_context: click.Context, _option: click.Parameter, name: str) -> str:
    if not re.fullmatch(DEVICE_NAME, name):
        raise click.BadParameter(f"{name!r} is not one of cpu, auto, cuda, cuda:N.")
    return name


model_option = click.option(
    "-m", "--model", default=DEFAULT_MODEL, show_default=True, envvar="FABULA_MODEL", metavar="NAME",
    help="Folder, .gguf file, or name; see `fabula pull --help`.",
)  # fmt: skip
kv_option = click.option(
    "--kv", type=KV_CHOICE, default="f16", show_default=True, metavar="NAME",
    help="KV cache in memory: f16, f32, bf16, q8; or K:V, such as q8:f16.",
)  # fmt: skip
device_option = click.option(
    "--device", callback=_device_name, default="cpu", show_default=True, envvar="FABULA_DEVICE", metavar="NAME",
    help="Where the model runs: cpu; cuda or cuda:N, a GPU; auto, a GPU with enough memory, else the CPU.",
)  # fmt: skip
parallel_option = click.option(
    "--tensor-parallel", type=click.IntRange(1, MAX_DEVICES), default=1, show_default=True,
    envvar="FABULA_TENSOR_PARALLEL", metavar="N", help="Number of GPUs, from --device on, that run the model together.",
)  # fmt: skip

products_option = click.option(
    "--device-products", type=click.Choice(DEVICE_PRODUCTS), default="own", show_default=True, metavar="NAME",
    help="Matrix products on a GPU: own; library, cuBLASLt for long prompts, whose results depend on the batch.",
)  # fmt: skip

speculation_option = click.option(
    "--speculation", type=click.Choice(SPECULATION_NAMES), default="auto", show_default=True, metavar="NAME",
    help="Guess several tokens and verify them in one step, with the same results: auto, where it is faster; off.",
)  # fmt: skip
draft_option = click.option(
    "--draft-model", metavar="NAME", help="A smaller model with the same vocabulary that guesses, too; as --model."
)

pin_option = click.option(
    "--pin-threads", is_flag=True, envvar="FABULA_PIN_THREADS",
    help="Bind each thread to a CPU of its own: for machines of several sockets that run nothing else.",
)  # fmt: skip

_MODEL = (
    model_option,
    click.option(
        "--weights", type=click.Choice(WEIGHTS_NAMES), default="auto", show_default=True, metavar="NAME",
        help=f"Weights in memory: {', '.join(WEIGHTS_NAMES)}. auto: as in the file; others convert at load.",
    ),
    kv_option,
    click.option(
        "--window-kv", type=click.Choice(WINDOW_KV), default="keep", show_default=True,
        help="KV left of the windows of windowed layers: keep, until memory runs out; drop, at once.",
    ),
    click.option(
        "--state-memory", type=click.IntRange(1, 1 << 50), metavar="BYTES",
        help="Recurrent states of a hybrid model, each a place to go on from; default: 1 GiB.",
    ),
    click.option(
        "--bf16-inputs", type=click.Choice(BF16_INPUTS), default="auto", show_default=True,
        help="Inputs of products with BF16 weights: bf16, f32, or auto, what this CPU is faster with; "
        "results differ.",
    ),
    click.option(
        "-t", "--threads", type=click.IntRange(1, MAX_THREADS), metavar="N",
        help="Default: as many as this process may use.",
    ),
    pin_option,
    click.option(
        "-c", "--context", type=click.IntRange(1), metavar="N", help="Tokens; default: the model's own length."
    ),
    click.option(
        "--ignore-memory", is_flag=True, help="Load weights that do not fit the available memory, too."
    ),
    device_option,
    parallel_option,
    products_option,
    speculation_option,
    draft_option,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """A model and how to load it."""

    model: str
    weights: str
    kv: str
    threads: int | None
    context: int | None
    device: str = "cpu"
    pin_threads: bool = False
    tensor_parallel: int = 1
    device_products: str = "own"
    kv_memory: int | None = None
    state_memory: int | None = None
    window_kv: str = "keep"
    speculation: str = "auto"
    draft_model: str | None = None
    ignore_memory: bool = False
    bf16_inputs: str = "auto"

    @property
    def name(self) -> str:
        """The model's name in saved sessions; a path is made absolute."""
        return str(Path(self.model).resolve()) if Path(self.model).exists() else self.model

    def load(self, workspace: Workspace | None = None) -> Model:
        """Loads the model, into the workspace if given, with progress bars on stderr."""
        from fabula.model import Model

        load = Model.load if workspace is None else workspace.load
        with bars() as bar:
            return load(
                self.model if workspace is None else self.name,
                weights=cast("WeightsName", self.weights),
                kv=self.kv,
                threads=self.threads,
                pin_threads=self.pin_threads,
                context=self.context,
                kv_memory=self.kv_memory,
                state_memory=self.state_memory,
                window_kv=cast("WindowKv", self.window_kv),
                device=self.device,
                tensor_parallel=self.tensor_parallel,
                device_products=self.device_products,
                speculation=cast("SpeculationName", self.speculation),
                draft_model=self.draft_model,
                ignore_memory=self.ignore_memory,
                bf16_inputs=cast("Bf16Inputs", self.bf16_inputs),
                fetch_progress=FetchProgress(bar, f"fetching {self.model}"),
                load_progress=lambda done, total: bar.show("loading", done, total),
            )


def model_options(function: _Function) -> _Function:
    """Adds --model and related options; the command gets `loading`, a ModelOptions."""

    @functools.wraps(function)
    def command(
        *args: Any,
        model: str,
        weights: str,
        kv: str,
        window_kv: str,
        state_memory: int | None,
        bf16_inputs: str,
        threads: int | None,
        pin_threads: bool,
        context: int | None,
        device: str,
        tensor_parallel: int,
        device_products: str,
        speculation: str,
        draft_model: str | None,
        ignore_memory: bool,
        **rest: Any,
    ) -> Any:
        loading = ModelOptions(
            model,
            weights,
            kv,
            threads,
            context,
            device=device,
            pin_threads=pin_threads,
            tensor_parallel=tensor_parallel,
            device_products=device_products,
            speculation=speculation,
            draft_model=draft_model,
            window_kv=window_kv,
            state_memory=state_memory,
            ignore_memory=ignore_memory,
            bf16_inputs=bf16_inputs,
        )
        return function(*args, loading=loading, **rest)

    for option in reversed(_MODEL):
        command = option(command)
    return cast(_Function, command)


def _number(name: str, field: str, text: str) -> Callable[[Any], Any]:
    return click.option(name, field, type=float, metavar="X", help=text)


_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty"),
    *("presence_penalty", "seed", "max_tokens", "stop"),
)


def is_given(name: str) -> bool:
    """Whether an option of the current command is on its command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def with_given(before: SamplingParams, params: SamplingParams) -> SamplingParams:
    """A session's settings, replaced by those of `params` that are on the command line."""
    return replace(before, **{name: getattr(params, name) for name in _SAMPLING if is_given(name)})


def sampling_options(*, max_tokens: int) -> Callable[[_Function], _Function]:
    """Adds the sampling options; the command gets `params`, a SamplingParams. Options that are not on the command line
    are unset there, for the model's defaults; see `SamplingDefaults.in_terminal`."""
    options = (
        _number(
            "--temperature",
            "temperature",
            "Higher is more random; 0 is greedy. Default of this and the next five: what the model recommends, see "
            "`fabula inspect`.",
        ),
        click.option("--top-k", type=int, metavar="N", help="Keep the N most likely tokens; 0: off."),
        _number("--top-p", "top_p", "Keep the most likely tokens up to this total probability; 1: off."),
        _number("--min-p", "min_p", "Keep tokens at least X times as likely as the most likely; 0: off."),
        _number("--typical-p", "typical_p", "Locally typical sampling up to this total probability; 1: off."),
        _number("--repetition-penalty", "repetition_penalty", "Penalty on repeated tokens; 1: off."),
        _number("--frequency-penalty", "frequency_penalty", "Subtracted from a logit for each use of the token."),
        _number("--presence-penalty", "presence_penalty", "Subtracted once from logits of used tokens."),
        click.option("--seed", type=int, metavar="N", help="Makes replies reproducible; default: random."),
        click.option(
            "-n", "--max-tokens", type=int, default=max_tokens, show_default=True, metavar="N", help="Max tokens."
        ),
        click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be repeated."),
    )  # fmt: skip

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def command(*args: Any, **given: Any) -> Any:
            params = sampling_params({name: given.pop(name) for name in _SAMPLING})
            return function(*args, params=params, **given)

        for option in reversed(options):
            command = option(command)
        return cast(_Function, command)

    return decorate


def sampling_params(settings: dict[str, Any]) -> SamplingParams:
    """SamplingParams from options; a value out of range is a UsageError."""
    from fabula.engine.sampling import SamplingParams
    from fabula.errors import InvalidArgument

    try:
        return SamplingParams(**{name: value for name, value in settings.items() if value is not None})
    except InvalidArgument as error:
        raise click.UsageError(str(error)) from None


def special_option(what: str, default: bool) -> Callable[[_Function], _Function]:
    """Adds --parse-special; the command gets `parse_special`, None if it is not on the command line."""
    return click.option(
        "--parse-special/--no-parse-special", default=None,
        help=f"Parse control tokens in {what}, or treat them as text; default: "
        f"{'--parse-special' if default else '--no-parse-special'}.",
    )  # fmt: skip


data_option = click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
    help="Folder of saved conversations; default: $FABULA_DATA, or the user's data folder.",
)  # fmt: skip

_KEEPING = (
    data_option,
    click.option("--no-save", is_flag=True, help="Do not save the conversation."),
    click.option("--session", metavar="NAME", help="Open this session, or create it."),
    click.option("--resume", is_flag=True, help="Open the session that was changed last."),
    click.option(
        "--context-policy", type=click.Choice(["error", "slide", "drop_oldest_turns"]),
        help="When the context is full: error (default), slide over the latest tokens, or drop the oldest turns.",
    ),
    click.option("--window", type=int, metavar="N", help="Tokens of --context-policy slide."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Keeping:
    """Session options of a conversation in the terminal.

    Attributes:
        data: folder; None for the user's.
        save: whether to save the conversation.
        session: its name; None for a new one.
        resume: whether to open the session that was changed last.
        policy: context policy; None for that of the session, or the default.
    """

    data: Path | None = None
    save: bool = True
    session: str | None = None
    resume: bool = False
    policy: ContextPolicy | None = None

    def refuse(self) -> None:
        """Raises UsageError if session options are used with a single reply."""
        if self.session is not None or self.resume or self.policy is not None:
            raise click.UsageError(
                "--session, --resume, --context-policy and --window are for a conversation in a terminal"
            )


def keeping_options(function: _Function) -> _Function:
    """Adds --data, --session and related options; the command gets `keeping`, a Keeping."""

    @functools.wraps(function)
    def command(
        *args: Any,
        data: Path | None,
        no_save: bool,
        session: str | None,
        resume: bool,
        context_policy: str | None,
        window: int | None,
        **rest: Any,
    ) -> Any:
        if resume and session is not None:
            raise click.UsageError("--resume and --session each name a session; give one of them")
        if no_save and (resume or data is not None):
            raise click.UsageError("--no-save uses no saved sessions; leave out --resume and --data")
        policy = _policy(context_policy, window)
        return function(*args, keeping=Keeping(data, not no_save, session, resume, policy), **rest)

    for option in reversed(_KEEPING):
        command = option(command)
    return cast(_Function, command)


def _policy(name: str | None, window: int | None) -> ContextPolicy | None:
    if window is not None and name != "slide":
        raise click.UsageError("--window needs --context-policy slide")
    if name is None:
        return None
    from fabula.errors import InvalidArgument
    from fabula.sessions.policy import ContextPolicy

    try:
        return replace(ContextPolicy.of(name), window=window)
    except InvalidArgument as error:
        raise click.UsageError(str(error)) from None
