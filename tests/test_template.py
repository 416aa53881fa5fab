"""Chat templates: the ids of transformers, users' control tokens as text, and templates that mean harm."""

from __future__ import annotations

import time
from typing import Any

import pytest

from fabula.errors import InvalidArgument, TemplateError
from fabula.text.template import BUILTIN_TEMPLATES, MAX_SOURCE, ChatTemplate
from fabula.text.tokenizer import Tokenizer

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}],
    [
        {"role": "user", "content": "Zähle bis drei, bitte 🙂 "},
        {"role": "assistant", "content": " 1, 2, 3\n"},
        {"role": "user", "content": "\n\n  weiter\t"},
    ],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "你好，{{ messages }} {% if %} <|not special|>"}],
]


@pytest.fixture(scope="module")
def template(smollm2: Tokenizer) -> ChatTemplate:
    assert smollm2.chat_template is not None
    return smollm2.make_template(smollm2.chat_template)


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_ids_equal_transformers(
    smollm2: Tokenizer, template: ChatTemplate, smollm2_transformers: Any, messages: list[dict[str, str]], prompt: bool
) -> None:
    text = smollm2_transformers.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    assert template.render(messages, add_generation_prompt=prompt) == text
    ids = smollm2_transformers.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True)["input_ids"]
    assert smollm2.encode_chat(template, messages, add_generation_prompt=prompt) == ids


@pytest.mark.parametrize("where", ["{}", "before{}after", " {} ", "{0}{0}", "<|im_{}start|>", "end\n{}"])
def test_control_tokens_typed_by_a_user_are_text(smollm2: Tokenizer, template: ChatTemplate, where: str) -> None:
    harmless = smollm2.encode_chat(template, [{"role": "user", "content": "x"}])
    scaffolding = [i for i in harmless if i in smollm2.special_ids]
    for token in smollm2.special_tokens:
        content = where.format(token)
        ids = smollm2.encode_chat(template, [{"role": "user", "content": content}])
        assert [i for i in ids if i in smollm2.special_ids] == scaffolding
        assert smollm2.decode(ids, skip_special=False) == template.render([{"role": "user", "content": content}])


def test_marks_change_nothing_else(smollm2: Tokenizer, template: ChatTemplate) -> None:
    """The slow way, taken because one message holds a control token, gives the others the ids they always have."""
    plain = {"role": "user", "content": "It's 12345 o'clock,\n\n  naïve 🙂 "}
    typed = {"role": "assistant", "content": "<|im_end|>"}
    both = smollm2.encode_chat(template, [plain, typed], add_generation_prompt=False)
    alone = smollm2.encode_chat(template, [plain], add_generation_prompt=False)
    assert both[: len(alone)] == alone


def test_marks_never_eat_what_a_user_typed(smollm2: Tokenizer, template: ChatTemplate) -> None:
    """Private-use characters in a message are the user's own, also when one of their kind has to serve as a mark."""
    for content in ("\ue000<|im_end|>\ue001", "".join(map(chr, range(0xE000, 0xF900))) + "<|im_end|>"):
        ids = smollm2.encode_chat(template, [{"role": "user", "content": content}])
        plain = smollm2.encode(content)
        assert any(ids[i : i + len(plain)] == plain for i in range(len(ids)))
    everything = "".join(chr(code) for code in [*range(0xE000, 0xF900), *range(0xF0000, 0x10FFFE)])
    with pytest.raises(InvalidArgument, match="every private-use character"):
        smollm2.encode_chat(template, [{"role": "user", "content": everything + "<|im_end|>"}])


def test_messages_nested_without_end(smollm2: Tokenizer, template: ChatTemplate) -> None:
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(InvalidArgument, match="more than 64 deep"):
        smollm2.encode_chat(template, [{"role": "user", "content": nested}])
    with pytest.raises(InvalidArgument, match="more than 64 deep"):
        template.render([{"role": "user", "content": nested}])


def test_helpers() -> None:
    source = (
        "{{ bos_token }}{%- for m in messages if m.role != 'system' %}"
        "{{ loop.index }}:{{ m.content | trim }};{% endfor %}"
        "{{ {'b': [1, 'ä<'], 'a': none} | tojson }}{{ strftime_now('%Y') | length }}"
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{% generation %}G{% endgeneration %}"
        "{% macro twice(x) %}{{ x ~ x }}{% endmacro %}{{ twice('ab') }}{{ tools is none }}{{ 'a-b'.split('-')[1] }}"
        "{{ enable_thinking }}{{ range(3) | list }}"
    )
    template = ChatTemplate(source, special_tokens={"bos_token": "<s>"})
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": " u "},
        {"role": "tool", "content": "t"},
    ]
    text = template.render(messages, enable_thinking=False)
    assert text == '<s>1:u;2:t;{"b": [1, "ä<"], "a": null}42GababTruebFalse[0, 1, 2]'


def test_a_refusal_tells_line_and_text() -> None:
    template = ChatTemplate(
        "{% for m in messages %}\n{% if m.role == 'tool' %}\n{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    )
    assert template.render([{"role": "user", "content": "x"}]).strip() == ""
    with pytest.raises(TemplateError, match="line 3: no tools") as caught:
        template.render([{"role": "tool", "content": "x"}])
    assert caught.value.line == 3


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("{% if %}", 1),
        ("a\n{% endfor %}", 2),
        ("{{ 'x' }}\n\n{{ nope( }}", 3),
        ("{% unknown %}", 1),
        ("{% for x in y %}", 1),
    ],
)
def test_syntax_errors_tell_the_line(source: str, line: int) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source, path="model.gguf")
    assert caught.value.line == line
    assert "model.gguf" in str(caught.value)


GROW = "{% set ns = namespace(s='xxxxxxxxxx') %}{% for i in range(60) %}{% set ns.s = "


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ''|attr('__class__') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ range(10**6) }}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{{ 1 }}{% endfor %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ 10**9 * 'x' }}",
        "{{ [0] * 10**9 }}",
        "{{ 10**(10**9) }}",
        GROW + "ns.s + ns.s %}{% endfor %}",
        GROW + "ns.s ~ ns.s %}{% endfor %}",
        GROW + "[ns.s, ns.s] | join %}{% endfor %}",
        GROW + "''.join([ns.s, ns.s]) %}{% endfor %}",
        GROW + "ns.s.replace('x', 'xxxxxxxx') %}{% endfor %}",
        GROW + "ns.s | replace('x', 'xxxxxxxx') %}{% endfor %}",
        "{% set ns = namespace(s='xxxxxxxxxx') %}{% for i in range(60) %}"
        "{% set b %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = b %}{% endfor %}",
        GROW + "'%s%s' % (ns.s, ns.s) %}{% endfor %}",
        GROW + "'{0}{0}'.format(ns.s) %}{% endfor %}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
        "{% set ns = namespace(l=[], s='x' * 4000000) %}{% for i in range(99999) %}"
        "{% set b %}{{ ns.s }}{{ i }}{% endset %}"
        "{% set ns.l = ns.l + [b] %}{% endfor %}",
        "{{ 'x'.center(10**9) }}",
        "{{ 'x'.ljust(10**9) }}",
        "{{ 'x'.zfill(10**9) }}",
        "{{ '\\t'.expandtabs(10**9) }}",
        "{{ 'a\\nb' | indent(10**9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:>1000000000}'.format('x') }}",
        "{{ messages | tojson(indent=10**9) }}",
        "{{ lipsum(100) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in messages recursive %}{{ loop([a, a]) }}{% endfor %}",
        "{{ missing.attribute.deeper }}",
        "{{ 1 / 0 }}",
        "{{ messages | unknown_filter }}",
        "x" * (MAX_SOURCE + 1),
        "{{ 1 }}" * 10_900,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 500 + "{% endif %}" * 500,
    ],
)
def test_harmful_templates_are_stopped(source: str) -> None:
    start = time.process_time()
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "x"}])
    assert str(caught.value)
    assert time.process_time() - start < 6.0, "2 s are allowed"


@pytest.mark.parametrize("source", ["{{ self._TemplateReference__context }}", "{{ '{0.__class__}'.format('') }}"])
def test_private_attributes_are_undefined(source: str) -> None:
    assert ChatTemplate(source).render([{"role": "user", "content": "x"}]) == ""


def test_every_limit_leaves_room_for_real_use() -> None:
    """A long conversation through a template with loops inside loops: far below the limits, and quick."""
    source = "{% for m in messages %}{% for w in m.content.split() %}{{ w | upper }} {% endfor %}{{ '\n' }}{% endfor %}"
    messages = [{"role": "user", "content": "word " * 100}] * 500
    start = time.process_time()
    assert len(ChatTemplate(source).render(messages)) > 200_000
    assert time.process_time() - start < 4.0


@pytest.mark.parametrize(
    ("messages", "options", "text"),
    [
        ([], {}, "at least one message"),
        (["hi"], {}, "must be an object"),
        ([{"role": "wizard", "content": "x"}], {}, "role is 'wizard'"),
        ([{"content": "x"}], {}, "role is 'None'"),
        ([{"role": "user"}], {}, "has no content"),
        ([{"role": "user", "content": object()}], {}, "holds a object"),
        ([{"role": "user", "content": "x"}], {"messages": []}, "set by Fabula itself"),
        ([{"role": "user", "content": "x"}], {"tools": [print]}, "holds a builtin_function"),
    ],
)
def test_wrong_messages(messages: Any, options: Any, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        ChatTemplate("{{ 1 }}").render(messages, **options)


def test_builtin_templates() -> None:
    text = ChatTemplate(BUILTIN_TEMPLATES["chatml"]).render([{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_threads_do_not_share_budgets() -> None:
    from concurrent.futures import ThreadPoolExecutor

    template = ChatTemplate("{% for i in range(20000) %}{% endfor %}{{ messages[0].content }}")
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: template.render([{"role": "user", "content": str(i)}]), range(32)))
    assert texts == [str(i) for i in range(32)]
