"""Small chat templates, one for each form in which models write tool calls, and vocabularies for them.

Each body renders the calls of one message, `calls`; `c` is a call's function. They follow what the makers of the models
publish, cut down to what matters for calls.
"""

from __future__ import annotations

import re
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fabula.sessions.tool_forms import FORMS
from fabula.text.stream import BYTE_OF_CHARACTER
from fabula.text.tokenizer import Tokenizer

END = "<|im_end|>"

_CONVERSATION = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif -%}"
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{%- if m.tool_calls %}{% set calls = m.tool_calls %}BODY{% endif -%}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\nOPENED{% endif %}"
)
_EACH = "{% for call in calls %}{% set c = call.function %}BODY{% endfor %}"
_PAIRS = "{% for k, v in c.arguments.items() %}BODY{% endfor %}"
_VALUE = "{{ v if v is string else v | tojson }}"
_OBJECT = '{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}'
_OBJECTS = _EACH.replace("BODY", _OBJECT + "{% if not loop.last %}, {% endif %}")
_DSML = _EACH.replace("BODY", (
    '<｜DSML｜invoke name="{{ c.name }}">\n' + _PAIRS.replace("BODY", (
        '<｜DSML｜parameter name="{{ k }}" string="{{ \'true\' if v is string else \'false\' }}">' + _VALUE +
        "</｜DSML｜parameter>\n"
    )) + "</｜DSML｜invoke>\n"
))  # fmt: skip

BODIES: dict[str, str] = {
    "hermes": _EACH.replace("BODY", "<tool_call>\n" + _OBJECT + "\n</tool_call>\n"),
    "qwen3-coder": _EACH.replace("BODY", (
        "<tool_call>\n<function={{ c.name }}>\n"
        + _PAIRS.replace("BODY", "<parameter={{ k }}>\n" + _VALUE + "\n</parameter>\n")
        + "</function>\n</tool_call>\n"
    )),
    "seed-oss": _EACH.replace("BODY", (
        "<seed:tool_call>\n<function={{ c.name }}>\n"
        + _PAIRS.replace("BODY", "<parameter={{ k }}>{{ v }}</parameter>\n")
        + "</function>\n</seed:tool_call>"
    )),
    "glm": _EACH.replace("BODY", (
        "<tool_call>{{ c.name }}\n"
        + _PAIRS.replace("BODY", "<arg_key>{{ k }}</arg_key>\n<arg_value>" + _VALUE + "</arg_value>\n")
        + "</tool_call>"
    )),
    "hunyuan": "<tool_calls:opensource>\n" + _EACH.replace("BODY", (
        "<tool_call:opensource>{{ c.name }}<tool_sep:opensource>\n" + _PAIRS.replace("BODY", (
            "<arg_key:opensource>{{ k }}</arg_key:opensource>\n"
            "<arg_value:opensource>" + _VALUE + "</arg_value:opensource>\n"
        )) + "</tool_call:opensource>\n"
    )) + "</tool_calls:opensource>",
    "minimax-m2": "<minimax:tool_call>\n" + _EACH.replace("BODY", (
        '<invoke name="{{ c.name }}">\n'
        + _PAIRS.replace("BODY", '<parameter name="{{ k }}">' + _VALUE + "</parameter>\n") + "</invoke>\n"
    )) + "</minimax:tool_call>",
    "deepseek-v3.2": "\n\n<｜DSML｜function_calls>\n" + _DSML + "</｜DSML｜function_calls>",
    "deepseek-v4": "\n\n<｜DSML｜tool_calls>\n" + _DSML + "</｜DSML｜tool_calls>",
    "minicpm5": _EACH.replace("BODY", (
        '<function name="{{ c.name }}">'
        + _PAIRS.replace("BODY", '<param name="{{ k }}">{{ v }}</param>') + "</function>"
    )),
    "mistral-ids": "[TOOL_CALLS] [" + _EACH.replace("BODY", (
        '{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}, "id": "{{ call.id }}"}'
        "{% if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
        "{% if not loop.last %}, {% endif %}"
    )) + "]",
    "mistral": "[TOOL_CALLS][" + _OBJECTS + "]",
    "mistral-args": _EACH.replace("BODY", "[TOOL_CALLS]{{ c.name }}[ARGS]{{ c.arguments | tojson }}"),
    "mistral-call-id": _EACH.replace(
        "BODY", "[TOOL_CALLS]{{ c.name }}[CALL_ID]{{ call.id }}[ARGS]{{ c.arguments | tojson }}"
    ),
    "deepseek-v3": "<｜tool▁calls▁begin｜>" + _EACH.replace("BODY", (
        "{% if not loop.first %}\n{% endif %}<｜tool▁call▁begin｜>{{ call.type }}<｜tool▁sep｜>{{ c.name }}\n```json\n"
        "{{ '' + c.arguments }}\n```<｜tool▁call▁end｜>"
    )) + "<｜tool▁calls▁end｜>",
    "deepseek-v3.1": "<｜tool▁calls▁begin｜>" + _EACH.replace("BODY", (
        "<｜tool▁call▁begin｜>{{ c.name }}<｜tool▁sep｜>{{ c.arguments | tojson }}<｜tool▁call▁end｜>"
    )) + "<｜tool▁calls▁end｜>",
    "kimi-k2": "<|tool_calls_section_begin|>" + _EACH.replace("BODY", (
        "<|tool_call_begin|>functions.{{ c.name }}:{{ loop.index0 }}<|tool_call_argument_begin|>"
        "{{ c.arguments | tojson }}<|tool_call_end|>"
    )) + "<|tool_calls_section_end|>",
    "solar": "<|tool_calls|>" + _EACH.replace("BODY", (
        "<|tool_call:begin|>{{ call.id }}<|tool_call:name|>{{ c.name }}<|tool_call:args|>{{ c.arguments | tojson }}"
        "<|tool_call:end|>"
    )),
    "command-r7b": "<|START_ACTION|>[\n" + _EACH.replace("BODY", (
        '    {"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ c.name }}", '
        '"parameters": {{ c.arguments | tojson }}}'
        "{% if not loop.last %},{% endif %}\n"
    )) + "]<|END_ACTION|>",
    "nemotron": "<TOOLCALL>[" + _OBJECTS + "]</TOOLCALL>",
    "apriel": "<tool_calls>[" + _OBJECTS + "]</tool_calls>",
    "minimax-m1": "<tool_calls>\n" + _EACH.replace("BODY", _OBJECT + "\n") + "</tool_calls>",
    "granite": "<|tool_call|>[" + _OBJECTS + "]",
    "apertus": "<|tools_prefix|>[" + _EACH.replace(
        "BODY", '{"{{ c.name }}": {{ c.arguments | tojson }}}{% if not loop.last %}, {% endif %}'
    ) + "]<|tools_suffix|>",
    "gigachat": _EACH.replace("BODY", "<|function_call|>" + _OBJECT),
    "functionary": _EACH.replace("BODY", "<function={{ c.name }}>{{ c.arguments | tojson }}</function>"),
    "lfm2": "<|tool_call_start|>[" + _EACH.replace("BODY", (
        "{{ c.name }}("
        + _PAIRS.replace(
            "BODY",
            "{{ k }}={% if v is string %}'{{ v }}'{% else %}{{ v | tojson }}{% endif %}"
            "{% if not loop.last %}, {% endif %}",
        ) + "){% if not loop.last %}, {% endif %}"
    )) + "]<|tool_call_end|>",
    "llama3": _EACH.replace(
        "BODY", '{% if loop.first %}{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}{% endif %}'
    ),
    "pythonic": "[" + _EACH.replace("BODY", (
        "{{ c.name }}("
        + _PAIRS.replace(
            "BODY",
            "{{ k }}={% if v is string %}'{{ v }}'{% else %}{{ v | tojson }}{% endif %}"
            "{% if not loop.last %}, {% endif %}",
        ) + "){% if not loop.last %}, {% endif %}"
    )) + "]",
}  # fmt: skip

HARMONY = (
    "{%- if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif -%}"
    "{%- for m in messages -%}"
    "{%- if m.tool_calls -%}{% set c = m.tool_calls[0].function %}<|start|>assistant to=functions.{{ c.name }}"
    "<|channel|>commentary json<|message|>{{ c.arguments | tojson }}<|call|>"
    "{%- elif m.role == 'assistant' -%}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>"
    "{%- else -%}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt %}<|start|>assistant{% endif -%}"
)


def template_of(name: str, opened: str = "") -> str:
    """A template whose calls have the form of that name; answers start after `opened`."""
    if name == "harmony":
        return HARMONY
    return _CONVERSATION.replace("BODY", BODIES[name]).replace("OPENED", opened)


_MARKS = sorted(
    {tag for form in FORMS for text in form.literals for tag in re.findall(r"<[|｜][^<>]*[|｜]>|\[[A-Z_]+\]", text)}
    | {"<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>"}
)


def tokenizer_of(*, has_marks: bool, more: tuple[str, ...] = ()) -> Tokenizer:
    """A vocabulary of bytes; with the marks of all forms as control tokens, or without."""
    vocabulary = {character: i for i, character in enumerate(BYTE_OF_CHARACTER)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END, *(_MARKS if has_marks else ()), *more])
    return Tokenizer(backend, path=Path("bytes"), eos_ids=[len(vocabulary)])
