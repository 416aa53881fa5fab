"""The grammar of an answer that may call tools, in a model's form of calls.

Arguments must match the schema of their tool. If a form writes them one by one, outside of JSON, they come in the order
of the schema, required ones always, and each value matches its own schema: strings as plain text, anything else as
JSON.

Tags of a form that are control tokens of the vocabulary are those tokens in the grammar, `<[id]>`; no text can replace
them. The text before a call is a lexeme that ends, lazily, with the first opening tag: an answer that starts a call
must complete it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fabula.engine.constraint import Constraint
from fabula.engine.json_schema import WHITESPACE, prepare_schema
from fabula.errors import InvalidArgument
from fabula.sessions.tool_call_parser import END_OF_THOUGHT, THINK, Thought
from fabula.sessions.tool_forms import HOLE, ID_PATTERN, ToolForm
from fabula.sessions.tool_values import kinds_of, resolved
from fabula.text.tokenizer import Tokenizer

_TEXT = "(?s:.*)"
_PYTHON_WORDS = (("boolean", "True"), ("boolean", "False"), ("null", "None"))  # as templates render values
_MAX_REFERENCES = 8  # in a row


@dataclass(frozen=True, slots=True)
class CallableTool:
    """A tool in a grammar.

    Attributes:
        name: of the function.
        schema: of its arguments.
        strict: whether a keyword that cannot be enforced is an error.
        where: path of the schema in the request, for error messages.
    """

    name: str
    schema: Mapping[str, Any]
    strict: bool
    where: str


def tool_grammar(
    form: ToolForm,
    tools: Sequence[CallableTool],
    tokenizer: Tokenizer | None,
    *,
    is_required: bool,
    is_parallel: bool,
    thought: Thought = "",
    marks: tuple[str, str] = (THINK, END_OF_THOUGHT),
    other: Constraint | None = None,
) -> Constraint:
    """The constraint of an answer that may call tools.

    Args:
        form: of the calls.
        tools: at least one.
        tokenizer: of the model; None if no tag of the form is a control token.
        is_required: whether the answer consists of calls only.
        is_parallel: whether there may be several calls.
        thought: as `ToolCallParser` takes it.
        marks: control tokens around a thought, of "tokens".
        other: constraint of an answer without calls; None for any text.

    Raises:
        InvalidArgument: a schema of a strict tool cannot be enforced, or `other` cannot be combined with calls.
    """
    grammar = _Grammar(form, tokenizer)
    for i, tool in enumerate(tools):
        grammar.add_tool(i, tool)
    if form.arguments == "harmony":
        start = grammar.harmony(len(tools), is_required=is_required, other=other)
    else:
        start = grammar.start(len(tools), is_required, is_parallel, thought, other)
        if thought == "tokens" and not is_required and other is None:
            start = grammar.after_tokens(start, marks)
    lines = [start, *grammar.rules.values(), r"WS: /[ \n]{1,8}/", f"HOLE: /{ID_PATTERN}/"]
    return Constraint("tools", "\n".join(lines), tuple(sorted(grammar.shown)))


def is_exclusive(constraint: Constraint | None) -> bool:
    """Whether a constraint of `tool_grammar` was made with `other`, so that an answer is calls or that."""
    return constraint is not None and constraint.kind == "tools" and "\nanswer: " in constraint.source


@dataclass(slots=True)
class _Grammar:
    """The rules of a grammar while it is built.

    Attributes:
        rules: by name, as text.
        shown: ids of control tokens in the grammar.
        names: of the tools.
    """

    form: ToolForm
    tokenizer: Tokenizer | None
    rules: dict[str, str] = field(default_factory=dict)
    shown: set[int] = field(default_factory=set)
    names: dict[int, str] = field(default_factory=dict)

    # ---- Answers ----------------------------------------------------------------------------------------------------

    def start(
        self, n_tools: int, is_required: bool, is_parallel: bool, thought: Thought, other: Constraint | None
    ) -> str:
        """Returns the rule `start` and adds those it needs."""
        form = self.form
        before, after = form.section
        more = self.literal(form.separator)
        if form.is_first:
            call, more_calls = "call", f"(WS? {more} call)*" if form.separator.strip() else "(WS? call)*"
            group = self.join(self.literal(before), call, more_calls if is_parallel else "", self.literal(after))
            if form.prefix and self.token(form.prefix) is not None:
                group = f"{self.literal(form.prefix)}? {group}"
            self.set("call", self.alternatives("call", n_tools, form.call[0]))
            if is_required:
                return f"start: WS? {group}"
            self.set("calls", f"WS? {group}")
            if other is not None:
                if form.arguments == "json" and other.kind in ("json_schema", "json_object"):
                    self.set("calls", " | ".join(f"object_{i}" for i in range(n_tools)))
                return f"start: calls | {self.answer(other)}"
            return self.loose_start(n_tools, is_parallel, thought)
        opening = form.opening
        is_section = bool(before or after)
        group_before = before[len(opening) :] if is_section and len(before) >= len(opening) else ""
        call_before = form.call[0] if len(before) >= len(opening) else (before + form.call[0])[len(opening) :]
        self.set("first", self.alternatives("first", n_tools, call_before))
        group = self.join(self.literal(group_before), "first")
        if is_section and is_parallel:
            self.set("call", self.alternatives("call", n_tools, form.call[0]))
            group += f" ({self.join(more, 'call')})*"
        self.set("group", self.join(group, self.literal(after)))
        mark = self.literal(opening)
        self.set("calls", f"{mark} group" + (f" (WS? {mark} group)*" if is_parallel and not is_section else ""))
        if is_required:
            return "start: WS? calls"
        if other is not None:
            return f"start: WS? calls | {self.answer(other)}"
        token = self.token(opening)
        if token is not None:
            self.set("text", "/(?s:.+)/")
            return f"start: text? ({mark} group text?)*" if is_parallel else f"start: text? | text? {mark} group"
        self.set("text", f"/{_TEXT}/")
        head = f"/{_TEXT}{_regex(opening)}/"
        self.rules["head[lazy]"] = f"head[lazy]: {head}"
        if thought not in ("tagged", "open"):
            return "start: (head group)* text" if is_parallel else "start: text | head group"
        # At the start a lexeme is either the head of a call or a thought, never both.
        if thought == "tagged":
            self.rules["HEAD"] = f"HEAD: {head} & ~/\\s*<think>{_TEXT}/"
            self.rules["THOUGHT"] = f"THOUGHT: /\\s*<think>{_TEXT}<\\/think>/"
        else:
            self.rules["HEAD"] = f"HEAD: /\\s*{_regex(opening)}/"
            self.rules["THOUGHT"] = f"THOUGHT: /{_TEXT}<\\/think>/ & ~/\\s*{_regex(opening)}{_TEXT}/"
        self.rules["first_head[lazy]"] = "first_head[lazy]: HEAD"
        self.rules["thought[lazy]"] = "thought[lazy]: THOUGHT"
        self.set("rest", "(head group)* text" if is_parallel else "text | head group")
        return "start: text | thought rest | first_head group" + (" rest" if is_parallel else "")

    def after_tokens(self, start: str, marks: tuple[str, str]) -> str:
        """The rule `start` after a thought between control tokens; the first of them may be in the prompt."""
        self.set("inner", f"/{_TEXT}/")
        self.set("thought", f"(<[{self.token(marks[0])}]>)? inner <[{self.token(marks[1])}]>")
        return f"start: thought? ({start.removeprefix('start: ')})"

    def loose_start(self, n_tools: int, is_parallel: bool, thought: Thought) -> str:
        """Calls that have no opening tag, or any text that does not start like one."""
        form = self.form
        before = form.section[0] + form.call[0]
        more = f"({self.join('WS?', self.literal(form.separator), 'call')})*" if is_parallel else ""
        prefix = self.literal(form.prefix) + "? " if form.prefix and self.token(form.prefix) is not None else ""
        begins = []
        for i in range(n_tools):
            # The name ends the lexeme: what starts otherwise is text.
            text = before + self.names[i] + form.call[1]
            self.rules[f"begin_{i}[lazy]"] = f"begin_{i}[lazy]: /\\s*{_regex(text)}/"
            begins.append(f"begin_{i} rest_{i}")
        self.set("calls", f"{prefix}({' | '.join(begins)}) {more} {self.literal(form.section[1])}")
        self.set("text", f"/{_TEXT}/")
        if thought != "tagged":
            return "start: calls | text"
        self.rules["thought[lazy]"] = f"thought[lazy]: /\\s*<think>{_TEXT}<\\/think>/"
        return "start: calls | text | thought (calls | text)"

    def answer(self, other: Constraint) -> str:
        """The rule of an answer without calls."""
        if other.kind == "lark" and self.token(self.form.opening) is None:
            raise InvalidArgument(
                "tools and a constraint of the kind lark exclude each other with this model, whose calls start with "
                "text: give a schema, a regular expression or a grammar in GBNF instead"
            )
        if other.kind == "regex" and not self.form.is_first and self.token(self.form.opening) is None:
            # Of two matching lexemes the longer one wins: the text must not start like a call.
            self.rules["ANSWER"] = (
                f"ANSWER: {other.to_lark(self.token).removeprefix('start: ')} & ~/{_regex(self.form.opening)}{_TEXT}/"
            )
            self.set("answer", "ANSWER")
            return "answer"
        lark = other.to_lark(self.token)
        nested = re.fullmatch(r"start: (%json .*)", lark)
        self.set("answer", nested[1] if nested is not None else f"%lark {{\n{lark}\n}}")
        return "answer"

    def harmony(self, n_tools: int, *, is_required: bool, other: Constraint | None) -> str:
        """The messages of an answer: thoughts, then one to the user or to a function."""
        channel, message, end, begin = (
            self.literal(text) for text in ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")
        )
        constrain = self.literal("<|constrain|>")
        self.set("text", f"/{_TEXT}/")
        between = f"{end} {begin} " + '"assistant"'
        for i in range(n_tools):
            name = self.names[i]
            early = f'{json.dumps(" to=functions." + name)} {channel} "commentary" WS? ({constrain})? "json"'
            late = f'{channel} {json.dumps("commentary to=functions." + name)} WS? (({constrain})? "json")?'
            self.set(f"call_{i}", f"({early} | {late}) {message} arguments_{i}")
        self.set("calls", " | ".join(f"call_{i}" for i in range(n_tools)))
        self.set("thoughts", f'({channel} ("analysis" | "commentary") {message} text {between})*')
        final = self.answer(other) if other is not None else "text"
        if is_required:
            return "start: thoughts calls"
        answers = f'calls | {channel} "final" {message} {final}'
        if other is None:
            answers += f' | {channel} ("analysis" | "commentary") {message} text'
        return f"start: thoughts ({answers})"

    # ---- Calls ------------------------------------------------------------------------------------------------------

    def add_tool(self, i: int, tool: CallableTool) -> None:
        """The rules of a tool's arguments."""
        self.names[i] = tool.name
        schema = prepare_schema(tool.schema, strict=tool.strict, where=tool.where)
        if self.form.arguments in ("json", "harmony"):
            self.set(f"arguments_{i}", f"%json {json.dumps(schema, ensure_ascii=False)}")
            if self.form.is_first:
                # A call must consist of the same lexemes as other JSON that may come instead.
                self.set(f"object_{i}", f"%json {json.dumps(_as_object(tool.name, schema), ensure_ascii=False)}")
        else:
            self.add_values(i, tool)
        self.set(f"rest_{i}", self.join(f"arguments_{i}", self.after_arguments()))

    def alternatives(self, rule: str, n_tools: int, before: str) -> str:
        """A call of any tool; `before` comes before its name."""
        for i in range(n_tools):
            self.set(f"{rule}_{i}", self.join(self.literal(before + self.names[i] + self.form.call[1]), f"rest_{i}"))
        return " | ".join(f"{rule}_{i}" for i in range(n_tools))

    def after_arguments(self) -> str:
        """The text after a call's arguments; an id is optional."""
        text = self.form.call[2]
        found = re.match(rf'(, "[^"]*": "{HOLE}")(.*)', text, re.DOTALL)
        if found is None:
            return self.literal(text)
        return f"({self.literal(found[1])})? {self.literal(found[2])}"

    def add_values(self, i: int, tool: CallableTool) -> None:
        """Arguments one by one. `open_k`: what may follow from the k-th on while there is none yet; `more_k`: if there
        is one already."""
        root = tool.schema
        properties = root.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        required = root.get("required")
        required = required if isinstance(required, list | tuple) else ()
        keys = [key for key in properties if isinstance(key, str) and re.fullmatch(r"[^<>\"\n\0]{1,128}", key)]
        if self.form.arguments == "python":
            keys = [key for key in keys if key.isidentifier()]
        if not keys and root.get("additionalProperties", True) is not False and "properties" not in root:
            self.set(f"arguments_{i}", self.free(i))
            return
        separator = '", "' if self.form.arguments == "python" else ""
        n = len(keys)
        names = (f"open_{i}_", f"more_{i}_")
        for name in names:
            self.set(f"{name}{n}", '""')
        for k in range(n - 1, -1, -1):
            value = self.value(f"value_{i}_{k}", keys[k], properties[keys[k]], tool)
            is_required = keys[k] in required
            for name in names:
                led = self.join(separator, value) if name == names[1] and separator else value
                skip = "" if is_required else f" | {name}{k + 1}"
                self.set(f"{name}{k}", f"{led} {names[1]}{k + 1}{skip}")
        self.set(f"arguments_{i}", f"{names[0]}0")

    def value(self, rule: str, key: str, schema: object, tool: CallableTool) -> str:
        """An argument with its name."""
        form, root = self.form, tool.schema
        kinds = kinds_of(schema, root)
        where = f"{tool.where}.properties.{key}"
        if (
            tool.strict
            and isinstance(schema, Mapping)
            and "pattern" in schema
            and _pattern_rule(schema["pattern"]) is None
        ):
            raise InvalidArgument(
                f"{where}.pattern: it cannot be enforced where a model writes arguments as plain text; use anchors at "
                "its ends only, or let it be ignored (strict false)"
            )
        if form.arguments == "python":
            self.set(rule, f"{json.dumps(key + '=')} ({self.python_value(schema, kinds, tool, where)})")
            return rule
        before, middle, after = form.parameter
        ways = []
        if "string" in kinds:
            head = self.literal(before + key + middle.rstrip("\n")) + (' "\\n"' if middle.endswith("\n") else "")
            ways.append(f"{head} {self.text_value(rule, schema, root, after)}")
        if kinds - {"string"}:
            other = form.other_middle if form.other_middle is not None else middle
            head = self.literal(before + key + other.rstrip("\n")) + (' "\\n"' if other.endswith("\n") else "")
            # If it may be a string as well, the alternative above matches it.
            inner = self.json_value(schema, kinds - {"string"} if "string" in kinds else None, tool, where)
            words = [json.dumps(word) for kind, word in _PYTHON_WORDS if kind in kinds]
            ways.append(f"{head} ({' | '.join([inner, *words])}) {self.value_end(after)}")
        self.set(rule, " | ".join(ways))
        return rule

    def json_value(self, schema: object, kinds: frozenset[str] | None, tool: CallableTool, where: str) -> str:
        """JSON of a schema; only of `kinds`, if given."""
        own: dict[str, Any] = dict(schema) if isinstance(schema, Mapping) else {}
        if kinds is not None:
            types = sorted(kinds - ({"integer"} if "number" in kinds else set()))
            own = {"allOf": [own, {"type": types}]} if own else {"type": types}
        shared = {key: tool.schema[key] for key in ("$defs", "definitions") if key in tool.schema}
        prepared = prepare_schema({**shared, **own}, strict=tool.strict, where=where)
        return f"%json {json.dumps(prepared, ensure_ascii=False)}"

    def text_value(self, rule: str, schema: object, root: Mapping[str, Any], after: str) -> str:
        """A string as plain text, with its closing tag."""
        found = _text_rules(schema, root)
        end = self.value_end(after)
        if isinstance(found, list):
            return f"({' | '.join(json.dumps(text, ensure_ascii=False) for text in found)}) {end}"
        close = after.rstrip("\n")
        if self.token(close.strip()) is not None:
            self.set(f"{rule}_text", f"/{found}/")
        else:
            self.rules[f"{rule}_text[lazy]"] = f"{rule}_text[lazy]: /{found}{_regex(close, exact=True)}/"
            end = "WS?" if after.endswith("\n") else ""
        return self.join(f"{rule}_text", end)

    def value_end(self, after: str) -> str:
        """The closing tag of a value, with the line break before it."""
        head = '"\\n" ' if after.startswith("\n") else ""
        return head + self.literal(after.removeprefix("\n"))

    def python_value(self, schema: object, kinds: frozenset[str], tool: CallableTool, where: str) -> str:
        """A value as JSON or as a Python literal."""
        ways = [self.json_value(schema, None, tool, where)]
        ways += [json.dumps(word) for kind, word in _PYTHON_WORDS if kind in kinds]
        if "string" in kinds:
            found = _text_rules(schema, tool.schema)
            if isinstance(found, list):
                ways += [json.dumps(repr(text), ensure_ascii=False) for text in found]
            elif found.startswith("(?s:.)"):
                bounds = found.removeprefix("(?s:.)")
                ways.append(rf"/'([^'\\\n]|\\['\"\\nt]){bounds}'/")
        return " | ".join(ways)

    def free(self, i: int) -> str:
        """Arguments of a tool without a schema of them."""
        form = self.form
        if form.arguments == "python":
            self.set(f"free_{i}", '/[A-Za-z_][A-Za-z0-9_]{0,63}=/ (%json {"x-guidance": ' + _options() + "})")
            return f'(free_{i} (", " free_{i})*)?'
        before, middle, after = form.parameter
        close = after.rstrip("\n")
        head = f"{self.literal(before)} /[A-Za-z_][A-Za-z0-9_]{{0,63}}/ {self.literal(middle.rstrip(chr(10)))}"
        head += ' "\\n"' if middle.endswith("\n") else ""
        if self.token(close.strip()) is not None:
            self.set(f"free_{i}", f"{head} /{_TEXT}/ {self.value_end(after)}")
        else:
            self.rules[f"free_{i}_text[lazy]"] = f"free_{i}_text[lazy]: /{_TEXT}{_regex(close, exact=True)}/"
            self.set(f"free_{i}", self.join(head, f"free_{i}_text", "WS?" if after.endswith("\n") else ""))
        return f"free_{i}*"

    # ---- Literals ---------------------------------------------------------------------------------------------------

    def set(self, name: str, body: str) -> None:
        """Adds a rule."""
        self.rules[name] = f"{name}: {body}"

    def token(self, text: str) -> int | None:
        """The id of a control token."""
        return self.tokenizer.special_tokens.get(text) if self.tokenizer is not None else None

    def literal(self, text: str) -> str:
        """A fixed text: control tokens as such, white space with a line break as any or none, an id for `HOLE`."""
        return " ".join(self._literal(text))

    def _literal(self, text: str) -> Iterator[str]:
        tokens = sorted(self.tokenizer.special_tokens, key=len, reverse=True) if self.tokenizer is not None else []
        tokens = [token for token in tokens if token and token in text]
        pattern = "|".join([HOLE, r"[ \n]*\n[ \n]*", *(re.escape(token) for token in tokens)])
        for piece in re.split(f"({pattern})", text):
            token = self.token(piece)
            if token is not None:
                self.shown.add(token)
                yield f"<[{token}]>"
            elif piece == HOLE:
                yield "HOLE"
            elif piece.isspace() and "\n" in piece:
                yield "WS?"
            elif piece:
                yield json.dumps(piece, ensure_ascii=False)

    def join(self, *parts: str) -> str:
        """Parts in sequence; at least an empty text."""
        return " ".join(part for part in parts if part) or '""'


def _regex(text: str, *, exact: bool = False) -> str:
    """A fixed text as part of a regular expression; white space with a line break is any or none unless `exact`."""
    found = []
    for piece in re.split(r"([ \n]*\n[ \n]*)", text):
        if piece.isspace() and "\n" in piece:
            found.append(piece.replace("\n", r"\n") if exact else r"[ \n]*")
        else:
            found.append(re.sub(r"[][\\.+*?(){}|^$/&~]", lambda match: "\\" + match[0], piece))
    return "".join(found)


def _as_object(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a whole call of Llama 3's form."""
    shared = {key: schema[key] for key in ("$defs", "definitions", "x-guidance") if key in schema}
    own = {key: value for key, value in schema.items() if key not in shared}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": own},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    } | shared


def _options() -> str:
    return json.dumps({"whitespace_pattern": WHITESPACE})


def _text_rules(schema: object, root: Mapping[str, Any], depth: int = 0) -> list[str] | str:
    """The strings that a schema lists; or a regular expression of those it allows."""
    if not isinstance(schema, Mapping) or depth > _MAX_REFERENCES:
        return "(?s:.)*"
    if isinstance(schema.get("enum"), list):
        return [value for value in schema["enum"] if isinstance(value, str)]
    if isinstance(schema.get("const"), str):
        return [schema["const"]]
    if "$ref" in schema:
        return _text_rules(resolved(schema["$ref"], root), root, depth + 1)
    pattern = _pattern_rule(schema.get("pattern"))
    if pattern is not None:
        return pattern
    low, high = schema.get("minLength"), schema.get("maxLength")
    low, high = low if isinstance(low, int) else 0, high if isinstance(high, int) else ""
    return "(?s:.)*" if (low, high) == (0, "") else f"(?s:.){{{low},{high}}}"


def _pattern_rule(pattern: object) -> str | None:
    """A `pattern`, which may match anywhere, as a regular expression of the whole text; None if it cannot be enforced,
    or has anchors inside."""
    if not isinstance(pattern, str) or "pattern" not in prepare_schema(
        {"type": "string", "pattern": pattern}, strict=False, where="pattern"
    ):
        return None
    found = re.fullmatch(r"(\^?)(.*?)((?<!\\)\$)?", pattern, re.DOTALL)
    assert found is not None
    inner = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "", found[2], flags=re.DOTALL)  # without classes and escapes
    if re.search(r"[\^$]", inner) or ((found[1] or found[3]) and "|" in re.sub(r"\([^()]*\)", "", inner)):
        return None
    body = re.sub(r"(?<!\\)/", r"\\/", found[2])
    return f"{'' if found[1] else _TEXT}(?:{body}){'' if found[3] else _TEXT}"
