"""Translates the dialects of OpenAI's API that clients and other servers have into the fields of `schemas.py`.

Fields of llama.cpp's server, vLLM, Ollama, Mistral, DeepSeek, Qwen and OpenRouter, as their own documentations name
them. Each function changes a copy of a request's JSON before it is validated. What it cannot make sense of stays as it
is, for validation to refuse.
"""

from __future__ import annotations

import json
import re
from typing import Any

from fabula.server.failures import refuse
from fabula.text.template import RESERVED

Json = dict[str, Any]

RENAMED = {
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "penalty_window",
    "n_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "stop_token_ids": "stop_tokens",
    "dry_sequence_breakers": "dry_breakers",
    "dry_penalty_last_n": "dry_window",
    "think": "thinking",
}
# Fields of llama.cpp's server without a meaning here: prefixes are always reused, and there are no slots.
NO_EFFECT = ("cache_prompt", "id_slot")
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_len")
OFF = {
    "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0,
    "presence_penalty": 0.0, "dry_multiplier": 0.0, "xtc_probability": 0.0,
}  # fmt: skip
LEAST_TOP_P = 1e-6  # keeps the likeliest token alone, as 0 means elsewhere
BUDGETS = (
    "thinking_budget_tokens", "reasoning_budget_tokens", "reasoning_budget", "thinking_token_budget",
    "max_thinking_tokens",
)  # fmt: skip
_SPECIAL = re.compile(r"[][\\.+*?(){}|^$/&~]")


def any_request(body: Json) -> None:
    """What all routes have in common: names, limits, sampling, constraints."""
    for old, new in RENAMED.items():
        if old in body:
            value = body.pop(old)
            body.setdefault(new, value)
    for name in NO_EFFECT:
        body.pop(name, None)
    for name in LIMITS:
        if body.get(name) in (-1, "inf"):
            del body[name]
    if "max_tokens" in body and "max_completion_tokens" in body:
        del body["max_tokens"]  # the older name, which many clients still send too
    for name, value in OFF.items():
        if body.get(name) == "off":
            body[name] = value
    if _is_number(body.get("top_k")) and body["top_k"] < 0:
        body["top_k"] = 0
    if _is_number(body.get("top_p")) and body["top_p"] == 0:
        body["top_p"] = LEAST_TOP_P
    _seed(body)
    _stop(body)
    _bias(body)
    _constraint(body)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _seed(body: Json) -> None:
    seed = body.get("seed")
    if seed in ("random", -1):
        del body["seed"]
    elif isinstance(seed, int | float) and not isinstance(seed, bool) and seed < 0 and seed == int(seed):
        body["seed"] = int(seed) % 2**64


def _stop(body: Json) -> None:
    stop = body.get("stop")
    if isinstance(stop, list):
        body["stop"] = [text for text in stop if text != ""]
    elif stop == "":
        del body["stop"]


def _bias(body: Json) -> None:
    """llama.cpp's list of pairs; false bans a token."""
    given = body.get("logit_bias")
    if isinstance(given, list):
        pairs = [one for one in given if isinstance(one, list) and len(one) == 2 and isinstance(one[0], int)]
        if len(pairs) == len(given):
            given = body["logit_bias"] = {str(token): bias for token, bias in pairs}
    if isinstance(given, dict):
        body["logit_bias"] = {token: float("-inf") if bias is False else bias for token, bias in given.items()}


# ---- Constraints ----------------------------------------------------------------------------------------------------


def _constraint(body: Json) -> None:
    """The constraint in any of its dialects, as the field `constraint`."""
    found: list[tuple[str, Json]] = []
    for name in ("grammar", "json_schema", "guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        value = body.pop(name, None)
        if value not in (None, ""):
            found.append((name, _constraint_of(name, value)))
    whole = body.pop("structured_outputs", None)
    if isinstance(whole, dict):
        for name in ("json", "regex", "choice", "grammar", "json_object"):
            value = whole.get(name)
            if value not in (None, "", False):
                found.append((f"structured_outputs.{name}", _constraint_of(name, value)))
    elif whole is not None:
        raise refuse("structured_outputs", "must be a JSON object")
    names = [name for name, _ in found] + [name for name in ("constraint",) if body.get(name) is not None]
    if len(names) > 1:
        raise refuse(names[0], f"and {names[1]} exclude each other")
    if found:
        body["constraint"] = found[0][1]


def _constraint_of(name: str, value: Any) -> Json:
    kind = name.removeprefix("guided_")
    if isinstance(value, dict) and value.get("type") in ("json", "regex") and "value" in value and kind == "grammar":
        kind, value = value["type"], value["value"]  # TGI's
    if kind == "json_object":
        return {"json_object": True}
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
            raise refuse(name, "must be a list of texts, none of them empty")
        return {"regex": "|".join(_SPECIAL.sub(lambda match: "\\" + match[0], one) for one in value)}
    if kind in ("json", "json_schema"):
        return {"json_schema": lenient(_parsed(value, name))}
    if not isinstance(value, str):
        raise refuse(name, "must be text")
    return {"gbnf" if kind == "grammar" else "regex": value}


def _parsed(value: Any, name: str) -> Json:
    """A schema as an object, also if it is JSON in a text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise refuse(name, "is not JSON") from None
    if not isinstance(value, dict):
        raise refuse(name, "must be a JSON schema")
    return value


def lenient(schema: Json) -> Json:
    """A schema of which keywords that cannot be enforced are ignored."""
    return schema if "x-guidance" in schema else {**schema, "x-guidance": {"lenient": True}}


def _format(body: Json, *, as_constraint: bool) -> None:
    """`response_format` with its schema in another place, or with a grammar."""
    wanted = body.get("response_format")
    if not isinstance(wanted, dict):
        return
    kind, schema = wanted.get("type"), wanted.get("schema")
    inner = wanted.get("json_schema")
    if kind in ("json_object", "json_schema") and schema is not None and inner is None:
        inner = {"schema": _parsed(schema, "response_format.schema")}
        body["response_format"] = {"type": "json_schema", "json_schema": inner}
    elif kind == "grammar" and isinstance(wanted.get("grammar"), str):
        del body["response_format"]
        body["grammar"] = wanted["grammar"]
    if not as_constraint or "response_format" not in body:
        return
    del body["response_format"]
    if isinstance(inner, dict) and isinstance(inner.get("schema"), dict):
        body["json_schema"] = inner["schema"]
    elif kind == "json_object":
        body["structured_outputs"] = {"json_object": True}


# ---- Routes ---------------------------------------------------------------------------------------------------------


def completion(body: Json) -> None:
    """`/v1/completions`."""
    _format(body, as_constraint=True)
    any_request(body)
    if isinstance(body.get("logprobs"), bool):
        body["logprobs"] = int(body["logprobs"])
        if not body["logprobs"]:
            del body["logprobs"]


def embedding(body: Json) -> None:
    """`/v1/embeddings`, of which there are no dialects."""


def response(body: Json) -> None:
    """`/v1/responses`."""
    any_request(body)
    _thinking(body)
    _tool_choice(body)


def chat(body: Json) -> None:
    """`/v1/chat/completions`."""
    _format(body, as_constraint=False)
    any_request(body)
    _thinking(body)
    if _is_number(body.get("logprobs")):
        n = body["logprobs"]
        body["logprobs"] = n > 0
        body.setdefault("top_logprobs", n)
    if body.get("top_logprobs") == 0 and not body.get("logprobs"):
        del body["top_logprobs"]
    if "functions" in body and "tools" not in body:
        functions = body["functions"]
        if isinstance(functions, list):
            body["tools"] = [{"type": "function", "function": one} for one in functions]
    if "function_call" in body and "tool_choice" not in body:
        choice = body.pop("function_call")
        body["tool_choice"] = {"type": "function", "function": choice} if isinstance(choice, dict) else choice
    if isinstance(body.get("tools"), list):
        body["tools"] = [_tool(one) for one in body["tools"]]
    _tool_choice(body)
    if isinstance(body.get("messages"), list):
        body["messages"] = [_message(one) if isinstance(one, dict) else one for one in body["messages"]]


def _thinking(body: Json) -> None:
    """Everything about thoughts as `enable_thinking`, `reasoning_effort` and `thinking_budget`."""
    options = body.get("chat_template_kwargs")
    if isinstance(options, dict):
        options = dict(options)
        for name in ("add_generation_prompt", "continue_final_message"):
            if name in options:
                body.setdefault(name, options.pop(name))
        for name in ("enable_thinking", "thinking", "reasoning_effort", "thinking_budget"):
            if options.get(name) is not None:
                body.setdefault(name, options[name])
        body["chat_template_kwargs"] = {name: value for name, value in options.items() if name not in RESERVED}
    for name in BUDGETS:
        if name in body:
            value = body.pop(name)
            body.setdefault("thinking_budget", value)
    thinking, reasoning = body.pop("thinking", None), body.get("reasoning")
    if isinstance(thinking, bool):
        body.setdefault("enable_thinking", thinking)
    elif isinstance(thinking, str):
        body.setdefault("reasoning_effort", thinking)
    elif isinstance(thinking, dict):  # Anthropic's
        if thinking.get("type") in ("enabled", "disabled"):
            body.setdefault("enable_thinking", thinking["type"] == "enabled")
        if thinking.get("budget_tokens") is not None:
            body.setdefault("thinking_budget", thinking["budget_tokens"])
    if isinstance(reasoning, dict):  # OpenRouter's, and that of /v1/responses
        for name, own in (("effort", "reasoning_effort"), ("max_tokens", "thinking_budget")):
            if reasoning.get(name) is not None:
                body.setdefault(own, reasoning[name])
        if isinstance(reasoning.get("enabled"), bool):
            body.setdefault("enable_thinking", reasoning["enabled"])
    if _is_number(body.get("thinking_budget")) and body["thinking_budget"] < 0:
        del body["thinking_budget"]


def _tool(given: Any) -> Any:
    """A definition, also without its wrapper."""
    if not isinstance(given, dict):
        return given
    if "function" not in given and "name" in given and given.get("type", "function") == "function":
        given = {"type": "function", "function": {key: value for key, value in given.items() if key != "type"}}
    function = given.get("function")
    if isinstance(function, dict):
        given = {"type": "function", **given, "function": {k: v for k, v in function.items() if v is not None}}
    return given


def _tool_choice(body: Json) -> None:
    choice = body.get("tool_choice")
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind == "any":  # Mistral's and Anthropic's
        body["tool_choice"] = "required"
    elif isinstance(choice, dict) and kind in ("auto", "none", "required"):
        body["tool_choice"] = kind
    elif isinstance(choice, dict) and kind == "tool":
        body["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif isinstance(choice, dict) and kind == "allowed_tools":
        _allowed(body, choice)


def _allowed(body: Json, choice: Json) -> None:
    """OpenAI's choice among some of the tools."""
    inner = choice.get("allowed_tools", choice)
    tools, given = inner.get("tools") if isinstance(inner, dict) else None, body.get("tools")
    if not isinstance(tools, list) or not isinstance(given, list):
        return
    names = {_name_of(one) for one in tools}
    body["tools"] = [one for one in given if _name_of(one) in names]
    body["tool_choice"] = inner.get("mode", "auto")


def _name_of(tool: Any) -> Any:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _message(given: Json) -> Json:
    """A message, with the content of null as no text, and thoughts and calls under one name."""
    message = dict(given)
    if "content" in message and message["content"] is None:
        message["content"] = ""
    if message.get("role") == "function":
        message |= {"role": "tool", "tool_call_id": message.get("tool_call_id") or str(message.get("name"))}
    call = message.pop("function_call", None)
    if isinstance(call, dict) and not message.get("tool_calls"):
        message["tool_calls"] = [{"id": str(call.get("name")), "type": "function", "function": call}]
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_call(one) for one in message["tool_calls"]]
    if message.get("role") != "assistant":
        return message
    message.setdefault("content", "")
    for name in ("reasoning", "thinking"):
        value = message.pop(name, None)
        if isinstance(value, str) and not message.get("reasoning_content"):
            message["reasoning_content"] = value
    if isinstance(message["content"], list):
        message["content"] = [part for part in message["content"] if not _is_thought(part, message)]
    return message


def _call(given: Any) -> Any:
    """A call of the history, whose arguments may be an object or missing."""
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
        return given
    arguments = function.get("arguments")
    text = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return {**given, "function": {**function, "arguments": text}}


def _is_thought(part: Any, message: Json) -> bool:
    """Whether a part of a content is a thought, which is moved to `reasoning_content`."""
    if not isinstance(part, dict) or part.get("type") not in ("thinking", "reasoning"):
        return False
    text = part.get(part["type"], part.get("text"))
    if isinstance(text, list):
        text = "".join(str(one.get("text", "")) for one in text if isinstance(one, dict))
    if isinstance(text, str):
        message["reasoning_content"] = (message.get("reasoning_content") or "") + text
    return True
