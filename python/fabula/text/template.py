"""Chat templates: Jinja from untrusted models, in a sandbox with limits on time and memory.

jinja2's ImmutableSandboxedEnvironment blocks attribute walks and changes to arguments. It has no limits on size and
time, so these are added wherever a template can use time or memory:

    source        64 KiB, 20,000 syntax nodes
    loops, calls  each iteration and call counts against one budget, which includes wall-clock time
    operators     * ** % + ~ are checked before they run: "x" * 10**9 fails instead of taking a gigabyte
    filters       a list of allowed ones; those that can enlarge text are checked before they run
    methods       string methods likewise
    output        counted while it is generated, blocks and macros included

A template that exceeds a limit, fails, or calls raise_exception gives a TemplateError with its line.
"""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes as nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fabula.errors import EngineError, InvalidArgument, TemplateError
from fabula.text.limits import (
    FILTERS,
    MAX_TEXT,
    Budget,
    LimitError,
    binary_size,
    call_size,
    concatenate,
)
from fabula.text.tokenizer import choose

MAX_SOURCE = 1 << 16  # characters; the largest known template has a third of that
MAX_NODES = 20_000
MAX_DEPTH = 64  # nesting of messages and options
ROLES = ("system", "user", "assistant", "tool", "developer")
RESERVED = (
    "messages", "add_generation_prompt", "continue_final_message", "chat_template", "bos_token", "eos_token",
    "raise_exception", "strftime_now",
)  # fmt: skip

BUILTIN_TEMPLATES: Mapping[str, str] = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


class _Refusal(Exception):
    """The template called raise_exception."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's text for training; here it just renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads a class attribute

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with the budget of the render in progress, one per thread."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation], autoescape=False
        )
        self.filters = {name: self.filters[name] for name in FILTERS if name in self.filters}
        for name in ("indent", "replace", "join"):
            self.filters[name] = self._guarded(name, self.filters[name])
        self.filters |= {"tojson": self._to_json, "fabula_join": self._join, "fabula_count": self._count}
        self.globals.pop("lipsum", None)
        self.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        self._local = threading.local()

    @property
    def budget(self) -> Budget:
        found: Budget = self._local.budget
        return found

    @budget.setter
    def budget(self, value: Budget) -> None:
        self._local.budget = value

    def concat(self, pieces: Iterable[str]) -> str:
        return concatenate(pieces, self.budget)

    def _join(self, parts: Iterable[Any]) -> str:
        return concatenate((str(part) for part in parts), self.budget)

    def _count(self, items: Iterable[Any]) -> Iterator[Any]:
        """Wraps the iterable of every loop in a template."""
        budget = self.budget
        for item in items:
            budget.spend()
            yield item

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.spend()
        self.budget.spend_text(binary_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # Named as in jinja2, so that a template's own keyword arguments cannot collide.
        __self.budget.spend()
        __self.budget.spend_text(call_size(__obj, args, kwargs))
        return super().call(__context, __obj, *args, **kwargs)

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a filter that can enlarge text with the check of the method of that name."""
        pass_context = getattr(function, "jinja_pass_arg", None)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            own = args[1:] if pass_context is not None else args
            self.budget.spend_text(call_size(name, own, kwargs))
            return function(*args, **kwargs)

        if pass_context is not None:
            guarded.jinja_pass_arg = pass_context  # type: ignore[attr-defined]
        return guarded

    def _to_json(self, value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
        """tojson as in transformers: no HTML escaping, non-ASCII letters kept."""
        if indent is not None and not 0 <= indent <= 16:
            raise LimitError(f"tojson's indent is {indent}, must be 0 .. 16")
        allowed = {key: options[key] for key in ("separators", "sort_keys") if key in options}
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **allowed)
        self.budget.spend_text(len(text))
        return text

    def limited(self, tree: nodes.Template) -> nodes.Template:
        """Rewrites the syntax tree so that loops count against the budget and `~` against the limit of text."""
        if sum(1 for _ in _walk(tree)) > MAX_NODES:
            raise LimitError(f"the template has more than {MAX_NODES} syntax nodes")
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered("fabula_count", loop.iter)
        for parent in _walk(tree):
            for name, value in parent.iter_fields():
                if isinstance(value, nodes.Concat):
                    setattr(parent, name, _joined(value))
                elif isinstance(value, list):
                    value[:] = [_joined(item) if isinstance(item, nodes.Concat) else item for item in value]
        return tree


def _walk(tree: nodes.Node) -> Iterator[nodes.Node]:
    """All nodes, parents first. Not recursive, so that a deep tree cannot overflow the stack."""
    waiting: list[nodes.Node] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.iter_child_nodes())


def _filtered(name: str, value: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _joined(node: nodes.Concat) -> nodes.Filter:
    return _filtered("fabula_join", nodes.List(node.nodes, lineno=node.lineno))


def _refuse(message: object) -> None:
    raise _Refusal(str(message)[:500])


def _strftime_now(form: str) -> str:
    if len(form) > 200:
        raise LimitError("strftime_now's format is longer than 200 characters")
    return datetime.datetime.now().strftime(form)


class ChatTemplate:
    """A compiled chat template, or several of which one is chosen per conversation. Thread-safe.

    Args:
        source: Jinja text.
        path: for error messages.
        special_tokens: variables bos_token, eos_token, ... of the template.
        named: sources by name, including `source`. A conversation with tools uses "tool_use", as in transformers,
            unless it asks for another name.
        max_output: limit of a rendered conversation in characters.
        max_seconds: limit of one render in seconds of CPU time.

    Raises:
        TemplateError: the source is too long or not valid Jinja; carries the line.
    """

    def __init__(
        self,
        source: str,
        *,
        path: Path | str = "",
        special_tokens: Mapping[str, str] | None = None,
        named: Mapping[str, str] | None = None,
        max_output: int = MAX_TEXT,
        max_seconds: float = 2.0,
    ) -> None:
        self.source, self.path = source, path
        self.named = dict(named or {})
        self._compiled: dict[str, ChatTemplate] = {}  # other named templates, by source
        self._special = dict(special_tokens or {})
        self._variables: frozenset[str] | None = None  # computed on first use
        self._max_output, self._max_seconds = max_output, max_seconds
        if len(source) > MAX_SOURCE:
            raise self._error(f"it has {len(source)} characters, at most {MAX_SOURCE} are read", None)
        self._environment = _Environment()
        try:
            tree = self._environment.limited(self._environment.parse(source))
            code = self._environment.compile(tree, filename="<template>")
            self._template = jinja2.Template.from_code(self._environment, code, self._environment.globals)
        except jinja2.TemplateSyntaxError as error:
            raise self._error(error.message or "syntax error", error.lineno) from None
        except (LimitError, RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise self._error(str(error) or type(error).__name__, None) from None

    def variant(self, *, tools: bool, name: str | None = None) -> ChatTemplate:
        """The template for a conversation with or without tools, or the one with a name.

        Raises:
            InvalidArgument: no template has that name.
            TemplateError: it cannot be compiled.
        """
        source = choose(self.named, tools=tools, name=name) if self.named or name is not None else self.source
        if source is None or source == self.source:
            return self
        if source not in self._compiled:
            self._compiled[source] = ChatTemplate(
                source,
                path=self.path,
                special_tokens=self._special,
                max_output=self._max_output,
                max_seconds=self._max_seconds,
            )
        return self._compiled[source]

    def reads(self, name: str) -> bool:
        """Whether this template, or the one for conversations with tools, uses a variable such as `tools`."""
        if self._variables is None:
            self._variables = frozenset(jinja2.meta.find_undeclared_variables(self._environment.parse(self.source)))
        if name in self._variables:
            return True
        other = self.variant(tools=True)
        return other is not self and other.reads(name)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **options: Any,
    ) -> str:
        """Renders a conversation.

        Args:
            messages: each with a role from `ROLES` and the fields that the template reads (usually "content").
            add_generation_prompt: whether to add the start of the assistant's turn.
            chat_template: name of the template, such as "rag"; None for the one named "tool_use" where `tools` are
                given, else the one named "default".
            options: further variables of the template (`tools`, `enable_thinking`, ...); plain data only.

        Raises:
            InvalidArgument: a message is malformed, an option is not plain data or has a reserved name, or no template
                has that name.
            TemplateError: the template fails or refuses; carries the line.
        """
        other = self.variant(tools=bool(options.get("tools")), name=chat_template)
        if other is not self:
            return other.render(messages, add_generation_prompt=add_generation_prompt, **options)
        taken = [name for name in options if name in RESERVED]
        if taken:
            raise InvalidArgument(f"template option {taken[0]!r} is set by Fabula itself")
        variables = {name: _plain(value, name) for name, value in options.items()}
        variables = {**self._special, "tools": None, "documents": None, **variables}
        variables["messages"] = [_message(message, i) for i, message in enumerate(messages)]
        variables["add_generation_prompt"] = add_generation_prompt
        if not variables["messages"]:
            raise InvalidArgument("a conversation needs at least one message")
        self._environment.budget = Budget(time.thread_time() + self._max_seconds)
        pieces, length = [], 0
        try:
            for piece in self._template.generate(variables):
                length += len(piece)
                if length > self._max_output:
                    raise LimitError(f"the rendered conversation has more than {self._max_output} characters")
                pieces.append(piece)
        except _Refusal as error:
            raise self._error(str(error), _line_of(error)) from None
        except EngineError:
            raise
        except RecursionError:
            raise self._error("it recurses without end", None) from None
        except Exception as error:
            raise self._error(f"{type(error).__name__}: {str(error)[:300]}", _line_of(error)) from None
        return "".join(pieces)

    def _error(self, problem: str, line: int | None) -> TemplateError:
        where = f"{self.path}: " if self.path else ""
        at = "" if line is None else f" line {line}"
        return TemplateError(f"{where}chat template{at}: {problem}", path=self.path, line=line)


def _line_of(error: BaseException) -> int | None:
    """The innermost template line of a traceback, which jinja2 rewrites to the template's own lines."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _message(message: object, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidArgument(f"messages[{index}] must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise InvalidArgument(f"messages[{index}].role is {str(role)[:40]!r}, must be one of {', '.join(ROLES)}")
    if "content" not in message and "tool_calls" not in message:
        raise InvalidArgument(f"messages[{index}] has no content")
    plain = _plain(message, f"messages[{index}]")
    assert isinstance(plain, dict)
    return plain


def _plain(value: object, name: str, depth: int = 0) -> Any:
    """A copy of dicts, lists, strings, numbers, booleans and None, so that templates get no live objects."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth > MAX_DEPTH:
        raise InvalidArgument(f"{name} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name, depth + 1) for item in value]
    raise InvalidArgument(f"{name} holds a {type(value).__name__}; only plain JSON data can go into a chat template")
