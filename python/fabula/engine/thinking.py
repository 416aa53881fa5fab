"""Limits of a thought: after its budget of tokens the marks that close it are sampled by force.

`Thinking` is the setting, a part of `SamplingParams`; `Thought` is the state of one answer. A stop string does not end
a thought, and a constraint of an answer whose thought was opened by the prompt begins after the thought.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from fabula.errors import InvalidArgument
from fabula.lean_dataclasses import dataclass

if TYPE_CHECKING:
    from fabula.text.tokenizer import Tokenizer

MAX_BUDGET = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Thinking:
    """How an answer may think.

    Attributes:
        form: name of the marks, one of `fabula.text.reasoning.FORMS`.
        is_open: whether the prompt ends inside a thought.
        budget: tokens of thought at most, the marks not counted; None for no limit, 0 closes a thought at once.
        unless: text that starts something else in place of the open thought, such as a tool call; "" for none.

    Raises:
        InvalidArgument: an unknown form, or a budget out of its range.
    """

    form: str
    is_open: bool = False
    budget: int | None = None
    unless: str = ""

    def __post_init__(self) -> None:
        from fabula.text.reasoning import FORMS

        if self.form not in FORMS:
            raise InvalidArgument(f"thinking form is {self.form!r:.40}, must be one of {', '.join(FORMS)}")
        if not isinstance(self.is_open, bool):
            raise InvalidArgument(f"thinking is_open is {self.is_open!r:.40}, must be True or False")
        if not isinstance(self.unless, str):
            raise InvalidArgument(f"thinking unless is {self.unless!r:.40}, must be text")
        budget = self.budget
        if budget is not None and (
            not isinstance(budget, int) or isinstance(budget, bool) or not 0 <= budget <= MAX_BUDGET
        ):
            raise InvalidArgument(f"thinking budget is {budget!r:.40}, must be an integer in 0 .. {MAX_BUDGET}")


class Thought:
    """The thoughts of one answer as it is sampled.

    Args:
        thinking: the setting.
        tokenizer: of the model.

    Attributes:
        shown: control tokens that are part of the answer's text, since they mark a thought.
        delays: whether a constraint begins only after the thought.
        n_used: tokens of thought so far, without the marks.
    """

    def __init__(self, thinking: Thinking, tokenizer: Tokenizer) -> None:
        from fabula.text.reasoning import FORMS, ReasoningParser

        form = FORMS[thinking.form]
        self.shown = form.shown(tokenizer)
        self.delays = thinking.is_open
        self._parser = ReasoningParser(form, is_open=thinking.is_open, unless=thinking.unless)
        self._closing = form.closing_ids(tokenizer)
        self._budget = thinking.budget
        self.n_used = 0
        self._forced: deque[int] = deque()
        self._force_at_budget()

    @property
    def is_thinking(self) -> bool:
        """Whether the answer so far ends inside a thought."""
        return self._parser.is_thinking

    @property
    def forced(self) -> int | None:
        """The token that must come next; None for any."""
        return self._forced[0] if self._forced else None

    @property
    def n_free(self) -> int | None:
        """Tokens that may be sampled before one may have to be forced; None for any number."""
        if self._forced:
            return 0
        if self._budget is None or not self._parser.may_think:
            return None
        return self._budget - self.n_used + (not self._parser.is_thinking)

    def stop_forcing(self) -> None:
        """Drops the rest of the closing tokens, which a constraint forbids."""
        self._forced.clear()
        self._budget = None

    def take(self, token: int, text: str) -> None:
        """Notes a sampled token and the text that became certain with it."""
        was_thinking = self._parser.is_thinking
        self._parser.feed(text)
        if self._forced and self._forced[0] == token:
            self._forced.popleft()
            return
        self._forced.clear()
        self.n_used += was_thinking and self._parser.is_thinking
        self._force_at_budget()

    def _force_at_budget(self) -> None:
        if self._budget is not None and self._parser.is_thinking and self.n_used >= self._budget:
            self._forced.extend(self._closing)
