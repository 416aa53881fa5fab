"""Reasoning in an answer: the marks that a model puts around its thoughts, and a parser that separates the two.

Pure functions and one state machine over text. Marks that are control tokens must be part of the text
(`ReasoningForm.shown`); `engine/thinking.py` sees to that, and closes a thought that has used its budget.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from fabula.lean_dataclasses import dataclass

if TYPE_CHECKING:
    from fabula.text.tokenizer import Tokenizer

Kind = Literal["reasoning", "text"]
Part = tuple[Kind, str]

HEADER, MESSAGE = "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")  # of a message in the harmony format


@dataclass(frozen=True, slots=True)
class ReasoningForm:
    """Marks around a thought.

    Attributes:
        name: of the form.
        start, end: the marks.
        closing: text that ends a thought and starts the answer, for one that is cut off.
        is_harmony: thoughts are messages of the channel "analysis"; an answer may have several.
        leads: marks that may come before the answer, after the thought or without one.
        ends: marks that may come after it. One that is plain text counts only after a thought or a lead.
        known_by: texts by which a chat template is known to use the form; (): its two marks.
    """

    name: str
    start: str
    end: str
    closing: str
    is_harmony: bool = False
    leads: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    known_by: tuple[str, ...] = ()

    def shown(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids of the marks that are control tokens, which otherwise have no text."""
        marks: list[str] = [*ENDS, MESSAGE, "<|constrain|>"]
        if not self.is_harmony:
            given = (self.start, self.end, *self.leads, *self.ends)
            marks = [*given, *(token for mark in given for token in re.findall("<[^<>]*>", mark))]
        ids = (tokenizer.special_tokens.get(mark) for mark in dict.fromkeys(marks))
        return tuple(i for i in ids if i is not None and i not in tokenizer.eos_ids)

    def closing_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Token ids of `closing`."""
        return tuple(tokenizer.encode(self.closing, add_bos=False, special=True))

    def is_open(self, prompt: str) -> bool:
        """Whether an answer to a prompt starts inside a thought. A prompt that continues a reply is judged by
        `is_open_in`: its text is the model's, this one's end is the template's."""
        return not self.is_harmony and prompt.rstrip().endswith(self.start)

    def is_open_in(self, reply: str) -> bool:
        """Whether the text that a reply starts with ends inside a thought."""
        return not self.is_harmony and reply.rfind(self.start) > reply.rfind(self.end)


def _tags(
    name: str,
    start: str,
    end: str,
    *,
    leads: tuple[str, ...] = (),
    ends: tuple[str, ...] = (),
    known_by: tuple[str, ...] = (),
) -> ReasoningForm:
    return ReasoningForm(name, start, end, end, leads=leads, ends=ends, known_by=known_by)


# Sources: the chat templates that the models' makers publish, as collected in llama.cpp's models/templates; "OpenAI
# harmony response format". The first row whose marks a model has is taken, so that those of few models come first.
FORMS: Mapping[str, ReasoningForm] = {
    form.name: form
    for form in (
        ReasoningForm(
            "harmony", "<|channel|>analysis<|message|>", "<|end|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>", is_harmony=True,
            known_by=(HEADER, "analysis"),
        ),
        ReasoningForm(
            "solar", "<|think|>", "<|end|>", "<|end|><|begin|>assistant<|content|>",
            leads=("<|begin|>assistant", "<|content|>"), ends=("<|end|>",), known_by=("<|begin|>assistant<|think|>",),
        ),
        ReasoningForm(
            "kimi-k3", "<|open|>think<|sep|>", "<|close|>think<|sep|>",
            "<|close|>think<|sep|><|open|>response<|sep|>",
            leads=("<|open|>response<|sep|>",), ends=("<|close|>response<|sep|>", "<|close|>message<|sep|>"),
            known_by=("'<|open|>'", "open_tag('think')"),
        ),
        _tags("hy3", "<think:opensource>", "</think:opensource>", known_by=("'<think{}>'.format(", ":opensource")),
        _tags("gemma", "<|channel>thought", "<channel|>"),
        _tags("seed", "<seed:think>", "</seed:think>"),
        _tags("minimax", "<mm:think>", "</mm:think>"),
        _tags("mistral", "[THINK]", "[/THINK]"),
        _tags("command", "<|START_THINKING|>", "<|END_THINKING|>"),
        _tags(
            "apriel", "Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]",
            ends=("[END FINAL RESPONSE]",), known_by=("[BEGIN FINAL RESPONSE]",),
        ),
        _tags(
            "granite", "<think>", "</think>",
            leads=("<response>",), ends=("</response>",), known_by=("<think></think>", "<response></response>"),
        ),
        _tags("think", "<think>", "</think>", known_by=("</think>",)),
    )
}  # fmt: skip


def form_of(templates: Iterable[str], tokenizer: Tokenizer) -> ReasoningForm | None:
    """The form of a model's thoughts; None for a model without any.

    Args:
        templates: sources of its chat templates.
        tokenizer: of the model; a vocabulary that has both marks is enough.
    """
    sources = list(templates)
    for form in FORMS.values():
        marks = form.known_by or (form.start, form.end)
        if any(all(mark in source for mark in marks) for source in sources):
            return form
        if not form.is_harmony and {form.start, form.end, *form.leads} <= tokenizer.added_tokens.keys():
            return form
    return None


def n_half(text: str, mark: str) -> int:
    """Length of the longest suffix of a text that is a proper prefix of a mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


class ReasoningParser:
    """Separates thoughts from the answer in text that arrives in pieces, which may break anywhere.

    A thought is at the start of an answer. Blanks at both ends of it, and between it and the answer, belong to neither.
    A text without a thought passes unchanged.

    Args:
        form: of the model; None: everything is text.
        is_open: whether the text starts inside a thought, as the prompt ends with the mark.
        unless: text that starts something else, such as a call, in place of the open thought; "" for none.
        is_raw: whether marks outside of thoughts stay in the text, for a parser of tool calls; for harmony alone.

    Example:
        >>> parser = ReasoningParser(FORMS["think"])
        >>> parser.feed("<think>Two and two.</th")
        [('reasoning', 'Two and two.')]
        >>> parser.feed("ink>Four.")
        [('text', 'Four.')]
    """

    def __init__(
        self, form: ReasoningForm | None, *, is_open: bool = False, unless: str = "", is_raw: bool = False
    ) -> None:
        self._form, self._unless, self._is_raw = form, unless, is_raw
        self._held = ""  # text that is not decided yet
        self._has_begun = False  # the current thought has text
        self._is_thought = self._is_final = False  # harmony: the current message is a thought, is the answer
        self._is_answer = False  # a thought or a lead came before
        self._opened = is_open  # the thought's first mark is in the prompt, and may come once more
        self._state = self._text if form is None else self._header if form.is_harmony else self._before

    @property
    def is_thinking(self) -> bool:
        """Whether the text so far ends inside a thought."""
        return self._state == self._thought or (self._state == self._before and self._opened) or self._is_thought

    @property
    def may_think(self) -> bool:
        """Whether it ends inside a thought, or one may still begin."""
        return self._state not in (self._lead, self._text) and not self._is_final

    def feed(self, text: str) -> list[Part]:
        """Parses the next piece of text; returns the parts that are certain."""
        self._held += text
        parts: list[Part] = []
        while self._held and self._state(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """At the end of the text: the parts that were held back."""
        held, self._held = self._held, ""
        if not held or (self._state == self._lead and self._is_answer and held.isspace()):
            return []
        if self._state == self._header:
            return [("text", held)] if self._is_raw else []
        if self.is_thinking:
            parts: list[Part] = []
            self._think(held.rstrip(), parts)
            return parts
        return [("text", held)]

    # ---- Marks in the text ------------------------------------------------------------------------------------------

    def _before(self, _: list[Part]) -> bool:
        """Where a thought may begin."""
        assert self._form is not None
        start, text = self._form.start, self._held.lstrip()
        unless = self._unless if self._opened else ""
        if any(len(text) < len(mark) and mark.startswith(text) for mark in (start, unless)):
            return False
        if text.startswith(start):
            self._held, self._state = text[len(start) :], self._thought
        else:
            self._opened = self._opened and not (unless and text.startswith(unless))
            self._state = self._thought if self._opened else self._lead
        return True

    def _thought(self, parts: list[Part]) -> bool:
        assert self._form is not None
        place = self._held.find(self._form.end)
        if place >= 0:
            self._think(self._held[:place].rstrip(), parts)
            self._held, self._state = self._held[place + len(self._form.end) :], self._lead
            self._is_answer = True
            return True
        certain = self._held[: len(self._held) - n_half(self._held, self._form.end)].rstrip()
        self._held = self._held[len(certain) :]
        self._think(certain, parts)
        return False

    def _lead(self, _: list[Part]) -> bool:
        """Before the answer: marks, and blanks behind a thought or a mark."""
        assert self._form is not None
        text = self._held.lstrip()
        if self._is_answer:
            self._held = text
        leads = self._form.leads if text or self._is_answer else ()
        if any(len(text) < len(lead) and lead.startswith(text) for lead in leads) or not self._held:
            return False
        lead = next((lead for lead in leads if text.startswith(lead)), None)
        if lead is None:
            self._state = self._text
        else:
            self._held, self._is_answer = text[len(lead) :], True
        return bool(self._held)

    def _text(self, parts: list[Part]) -> bool:
        given = self._form.ends if self._form is not None else ()
        ends = [end for end in given if self._is_answer or end.startswith("<|")]
        found = min(((place, end) for end in ends if (place := self._held.find(end)) >= 0), default=None)
        if found is not None:
            text, rest = self._held[: found[0]].rstrip(), self._held[found[0] + len(found[1]) :]
        elif ends:
            text = self._held[: len(self._held) - max(n_half(self._held, end) for end in ends)].rstrip()
            rest = self._held[len(text) :]
        else:
            text, rest = self._held, ""
        if text:
            parts.append(("text", text))
        self._held = rest
        return found is not None

    def _think(self, text: str, parts: list[Part]) -> None:
        text = text if self._has_begun else text.lstrip()
        if text:
            self._has_begun = True
            parts.append(("reasoning", text))

    # ---- Harmony ----------------------------------------------------------------------------------------------------

    def _header(self, parts: list[Part]) -> bool:
        """Before a message: its role, channel and recipient. An answer may lack it."""
        text = self._held.lstrip()
        marks = (HEADER, "<|start|>", "to=")
        if not text.startswith(marks):
            if any(mark.startswith(text) for mark in marks):
                return False
            self._state = self._message
            return True
        place = self._held.find(MESSAGE)
        if place < 0:
            return False
        header = self._held[: place + len(MESSAGE)]
        self._held = self._held[len(header) :]
        self._is_thought = HEADER + "analysis" in header and "to=" not in header
        if self._is_thought:
            if self._has_begun:
                parts.append(("reasoning", "\n\n"))
            self._has_begun = False
        elif self._is_raw:
            parts.append(("text", header))
        self._is_final, self._state = HEADER + "final" in header, self._message
        return True

    def _message(self, parts: list[Part]) -> bool:
        found = [(place, end) for end in ENDS if (place := self._held.find(end)) >= 0]
        place, end = min(found) if found else (len(self._held) - max(n_half(self._held, end) for end in ENDS), "")
        text = self._held[:place]
        if not self._is_thought:
            text += end if self._is_raw and end in ENDS[:3] else ""
            if text:
                parts.append(("text", text))
            self._held = self._held[place:]
        else:
            certain = text.rstrip()
            self._think(certain, parts)
            self._held = self._held[len(certain) if not found else place :]
        if not found:
            return False
        self._held = self._held[len(end) :] if end in ENDS[:3] else self._held
        self._is_thought = self._is_final = False
        self._state = self._header
        return True


def split_reasoning(text: str, form: ReasoningForm | None, *, is_open: bool = False) -> tuple[str, str]:
    """The thoughts and the answer of a complete text; arguments as for `ReasoningParser`."""
    parser = ReasoningParser(form, is_open=is_open)
    parts = [*parser.feed(text), *parser.finish()]
    thought, answer = ("".join(text for kind, text in parts if kind == wanted) for wanted in ("reasoning", "text"))
    return thought, answer
