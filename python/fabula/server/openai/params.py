"""Sampling settings of a request to OpenAI's API. Settings that are left out are the model's defaults.

Each function raises ApiError if two fields exclude each other or one is not supported, and InvalidArgument for a value
out of its range.
"""

from __future__ import annotations

from dataclasses import replace

from fabula.engine.constraint import Constraint
from fabula.engine.sampling import MAX_LOGPROBS, SamplingParams
from fabula.server.failures import refuse
from fabula.server.openai.format import Json
from fabula.server.openai.schemas import ChatCompletionBody, CompletionBody, ResponseBody
from fabula.server.reasoning import Wish
from fabula.server.schemas import Sampling

MAX_TOKENS = 16  # of a completion that sets no limit; the default of OpenAI's API


def chat_params(data: ChatCompletionBody) -> SamplingParams:
    """Settings for `/v1/chat/completions`, without the constraint of tools."""
    if data.n_logprobs is not None:
        raise refuse("n_logprobs", "is called top_logprobs here", "unknown_field")
    params = _with_max_tokens(data, "max_completion_tokens", data.max_completion_tokens)
    if data.top_logprobs is not None:
        if not data.logprobs:
            raise refuse("top_logprobs", "needs logprobs: true")
        params = replace(params, n_logprobs=data.top_logprobs)
    wanted = data.response_format
    if wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None:
            _check_no_constraint(params, "response_format")
            raise refuse("response_format.json_schema", "is missing", "missing_field")
        schema, strict = wanted.json_schema.schema_, wanted.json_schema.strict
        params = _with_format(params, "response_format", schema, strict, "response_format.json_schema.schema")
    elif wanted is not None and wanted.type == "json_object":
        params = _with_format(params, "response_format", {"type": "object"}, False, "response_format")
    check_tool_choice(data)
    return params


def completion_params(data: CompletionBody, n: int) -> SamplingParams:
    """Settings for `/v1/completions` with n answers to a prompt."""
    if data.best_of not in (None, n):
        raise refuse("best_of", f"is {data.best_of}, must be n, {n}: every answer is returned", "unsupported")
    if data.n_logprobs is not None:
        raise refuse("n_logprobs", "is called logprobs here", "unknown_field")
    if data.logprobs is not None and not 0 <= data.logprobs <= MAX_LOGPROBS:
        raise refuse("logprobs", f"is {data.logprobs}, must be in 0 .. {MAX_LOGPROBS}")
    params = replace(data.params(SamplingParams()), n_logprobs=data.logprobs or 0)
    return params if params.max_tokens is not None else replace(params, max_tokens=max(MAX_TOKENS, params.min_tokens))


def response_params(data: ResponseBody) -> SamplingParams:
    """Settings for `/v1/responses`, without the constraint of tools. None come from the previous response."""
    if data.n_logprobs is not None or "message.output_text.logprobs" in (data.include or []):
        raise refuse("include", "cannot hold probabilities; use /v1/chat/completions", "unsupported")
    params = _with_max_tokens(data, "max_output_tokens", data.max_output_tokens)
    wanted = data.text.format if data.text is not None else None
    if wanted is not None and wanted.type != "text":
        schema = wanted.schema_ if wanted.type == "json_schema" else {"type": "object"}
        params = _with_format(params, "text.format", schema, wanted.strict, "text.format.schema")
    check_tool_choice(data)
    return params


def wish_of(data: ChatCompletionBody | ResponseBody) -> Wish:
    """What a request says about thinking."""
    return Wish(data.enable_thinking, data.reasoning_effort, data.thinking_budget)


def uses_tools(data: ChatCompletionBody | ResponseBody) -> bool:
    """Whether the answer may call tools. With the choice "none" the model does not see them."""
    return bool(data.tools) and data.tool_choice != "none"


def check_tool_choice(data: ChatCompletionBody | ResponseBody) -> None:
    if not uses_tools(data) and data.tool_choice not in (None, "none", "auto"):
        raise refuse("tool_choice", "needs tools")


def _with_max_tokens(data: Sampling, name: str, value: int | None) -> SamplingParams:
    """The settings of a body, with OpenAI's newer name for `max_tokens`."""
    params = data.params(SamplingParams())
    if value is None:
        return params
    if params.max_tokens is not None:
        raise refuse("max_tokens", f"and {name} are two names of one setting; give one of them")
    return replace(params, max_tokens=value)


def _with_format(
    params: SamplingParams, name: str, schema: Json | None, strict: bool | None, where: str
) -> SamplingParams:
    """Adds the constraint of a JSON schema; without `strict`, a keyword that cannot be enforced is ignored."""
    _check_no_constraint(params, name)
    if schema is None:
        raise refuse(where, "is missing", "missing_field")
    if not strict and "x-guidance" not in schema:
        schema = {**schema, "x-guidance": {"lenient": True}}
    return replace(params, constraint=Constraint.json_schema(schema))


def _check_no_constraint(params: SamplingParams, name: str) -> None:
    if params.constraint is not None:
        raise refuse("constraint", f"and {name} exclude each other")
