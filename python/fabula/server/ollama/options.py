"""Sampling settings of a request to Ollama's API, from its own names."""

from __future__ import annotations

from typing import Any

from fabula.engine.constraint import Constraint
from fabula.engine.sampling import SamplingParams
from fabula.server.failures import refuse
from fabula.server.ollama.schemas import Answered, OptionsIn
from fabula.server.reasoning import EFFORTS, Wish

# Ollama's name -> ours, where the values mean the same.
_SAME = {
    "temperature": "temperature",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "penalty_window",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
# The smallest share of probability that is told from 0: it keeps the likeliest token alone, as 0 does in Ollama.
_LIKELIEST_ALONE = 1e-6


def params_of(data: Answered) -> SamplingParams:
    """Sampling settings of a request, without the constraint of tools.

    Raises:
        ApiError, InvalidArgument: a setting is out of its range; names it.
    """
    options = OptionsIn.model_validate({}) if data.options is None else data.options
    given: dict[str, Any] = {
        ours: value for name, ours in _SAME.items() if (value := getattr(options, name)) is not None
    }
    if options.top_k is not None:
        given["top_k"] = max(0, options.top_k)
    for name in ("top_p", "typical_p"):
        value = getattr(options, name)
        if value is not None:
            given[name] = value if value else _LIKELIEST_ALONE
    if options.num_predict is not None and options.num_predict not in (-1, -2):
        given["max_tokens"] = options.num_predict
    if options.seed is not None and options.seed >= 0:
        given["seed"] = options.seed
    if options.stop:
        given["stop"] = (options.stop,) if isinstance(options.stop, str) else tuple(options.stop)
    if data.logprobs and data.top_logprobs is not None:
        given["n_logprobs"] = data.top_logprobs
    constraint = _constraint(data.format)
    if constraint is not None:
        given["constraint"] = constraint
    return SamplingParams(**given)


def _constraint(format: object) -> Constraint | None:
    if format is None or format == "":
        return None
    if format == "json":
        return Constraint.json_object()
    if not isinstance(format, dict):
        raise refuse("format", f'is {format!r:.40}, must be "json" or a JSON schema')
    # A keyword that cannot be enforced is ignored, as Ollama does.
    return Constraint.json_schema(format if "x-guidance" in format else {**format, "x-guidance": {"lenient": True}})


def wish_of(think: bool | str | None) -> Wish:
    """What a request says about thinking; without `think` the model does as it does by itself.

    Raises:
        ApiError: it is a word that is no level.
    """
    if think is None or isinstance(think, bool):
        return Wish(think)
    if think not in EFFORTS:
        raise refuse("think", f"is {think!r:.40}, must be a boolean or one of {', '.join(EFFORTS)}")
    return Wish(effort=think)
