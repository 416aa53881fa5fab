"""Regular expressions that parse a form of tool calls, built from the literals of `tool_forms.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fabula.sessions.tool_forms import HOLE, ID_PATTERN, NAME, ToolForm


@dataclass(frozen=True, slots=True)
class Syntax:
    """Patterns of a form.

    Attributes:
        opening: text that starts a call, or a section of calls.
        mark: text that starts a further call of a section.
        is_object: whether a call is a JSON object with name and arguments.
        close: tag after a call that is an object; "" for none.
        first, next: from after the opening to the arguments, of the first call of a section and of a further one.
        first_name, next_name: the same up to the end of the name.
        parameter: of "tagged": up to a value; the group "other" matches if the value is not a string.
        value_close: of "tagged": tag after a value.
        value_ends: tags of which a part may stand at the end of an incomplete value.
        is_on_lines: whether a value is on lines of its own.
    """

    form: ToolForm
    opening: str
    mark: str
    is_object: bool
    close: str
    first: re.Pattern[str]
    next: re.Pattern[str]
    first_name: re.Pattern[str]
    next_name: re.Pattern[str]
    parameter: re.Pattern[str]
    value_close: str
    value_ends: tuple[str, ...]
    is_on_lines: bool

    @classmethod
    def of(cls, form: ToolForm) -> Syntax:
        before = (form.section[0] + form.call[0])[len(form.opening) :]
        start = ""
        if form.is_first:
            start, before = rf"\s*(?:{re.escape(form.prefix)})?\s*", form.section[0] + form.call[0]
        after = form.call[2].replace(HOLE, "").strip()
        is_object = form.arguments == "json" and "{" in form.call[0]
        close = after.lstrip("}").strip() if after.startswith("}") else ""
        middle = _pattern(form.call[1])
        if form.arguments == "json":
            middle += r"\s*(?=\{)"
        elif form.arguments == "tagged" and not form.call[1].strip():
            middle += f"(?={re.escape(form.parameter[0].strip())}|{re.escape(form.call[2].strip())})"
        heads = [start + _pattern(before), _pattern("\n" + form.call[0])]
        name = f"(?P<name>{NAME})"
        name_end = r"\s*" + re.escape(form.call[1].strip()[:1]) if form.call[1].strip() else r"[\s<]"
        key, text_middle, value_close = form.parameter
        other = r"(?!)" if form.other_middle is None else _pattern(form.other_middle)
        is_on_lines, tag = value_close.startswith("\n"), value_close.strip()
        mark = form.call[0].replace(HOLE, "")
        return cls(
            form=form,
            opening=form.opening,
            mark=found[0] if (found := re.match(r"<[^<>]*>|\{", mark)) is not None else mark,
            is_object=is_object,
            close=close if close.startswith("<") else "",
            first=re.compile(heads[0] + name + middle),
            next=re.compile(heads[1] + name + middle),
            first_name=re.compile(heads[0] + name + name_end),
            next_name=re.compile(heads[1] + name + name_end),
            parameter=re.compile(
                rf"\s*{_pattern(key)}(?P<key>[^<>\"\n]{{1,128}}?)"
                rf"(?:{_pattern(text_middle.rstrip(chr(10)))}|(?P<other>{other}))"
            ),
            value_close=tag,
            value_ends=(tag, "\n" + tag) if is_on_lines else (tag,),
            is_on_lines=is_on_lines,
        )

    def may_begin(self, text: str) -> bool:
        """Whether a text may be the start of a call that has no mark."""
        dense, prefix = "".join(text.split()), self.form.prefix
        if prefix.startswith(dense):
            return True
        dense = dense.removeprefix(prefix)
        begins = "".join((self.form.section[0] + self.form.call[0]).split())
        if len(dense) <= len(begins):
            return begins.startswith(dense)
        rest = dense.removeprefix(begins)
        name = re.match(NAME, rest)
        end = name.end() if name is not None else 0
        return dense.startswith(begins) and "".join(self.form.call[1].split()).startswith(rest[end:])


def _pattern(literal: str) -> str:
    """Pattern of a literal, with any white space where it has a line break or JSON allows it."""
    found = []
    for piece in re.findall(rf"{HOLE}|\s+|[\w/|<>=]+|.", literal, re.DOTALL):
        if piece == HOLE:
            found.append(ID_PATTERN)
        elif piece.isspace():
            found.append(r"\s*")
        elif piece in tuple("{}[],:"):
            found.append(rf"\s*{re.escape(piece)}\s*" if '"' in literal else re.escape(piece))
        else:
            found.append(re.escape(piece))
    return "".join(found)


def matched(text: str, literal: str) -> int | None:
    """Length of the prefix of a text that matches a literal, ignoring white space; -1 if more text is needed to decide,
    None if it does not match."""
    place = 0
    for piece in literal.split():
        while place < len(text) and text[place].isspace():
            place += 1
        rest = text[place : place + len(piece)]
        if rest != piece:
            return -1 if place + len(rest) == len(text) and piece.startswith(rest) else None
        place += len(piece)
    return place
