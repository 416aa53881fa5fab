"""`ContextPolicy`: what happens when a conversation no longer fits the context. Nothing is dropped silently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from fabula.errors import InvalidArgument
from fabula.kv.prefix import EVERYTHING, Window

if TYPE_CHECKING:
    from fabula.engine.runner import Runner

PolicyName = Literal["error", "slide", "drop_oldest_turns"]
_NAMES: tuple[str, ...] = get_args(PolicyName)
MAX_SINKS = 32


@dataclass(frozen=True, slots=True)
class ContextPolicy:
    """What a session does when the context is full.

    Attributes:
        name: "error" raises, with both numbers. "slide" lets tokens attend to the first `sinks` positions and the last
            `window` (StreamingLLM, Xiao et al. 2023): memory and time per token stop growing, and texts may have any
            length. "drop_oldest_turns" drops the oldest turns from the prompt, as few as make room for an answer, and
            recomputes the rest.
        window: positions, for "slide"; None for the rest of the context after the sinks.
        sinks: 0 .. 32 first positions that stay visible, for "slide".
    """

    name: PolicyName = "error"
    window: int | None = None
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.name not in _NAMES:
            raise InvalidArgument(f"context_policy is {self.name!r}, must be one of {', '.join(_NAMES)}")
        for what, value, least, most in (("window", self.window, 1, 1 << 24), ("sinks", self.sinks, 0, MAX_SINKS)):
            if value is not None and (type(value) is not int or not least <= value <= most):
                raise InvalidArgument(f"{what} is {value!r}, must be a whole number in {least} .. {most}")

    @classmethod
    def of(cls, value: ContextPolicy | str | None) -> ContextPolicy:
        """The policy, or that of a name; None for "error"."""
        if isinstance(value, ContextPolicy):
            return value
        return cls() if value is None else cls(value)  # type: ignore[arg-type]

    def visible(self, context: int) -> Window:
        """The attention window in a model with that context length.

        Raises:
            InvalidArgument: sinks and window are more than the context holds.
        """
        if self.name != "slide":
            return EVERYTHING
        size = context - self.sinks if self.window is None else self.window
        if size < 1 or size + self.sinks > context:
            raise InvalidArgument(
                f"{self.sinks} sinks and a window of {max(size, 1)} do not fit the context of {context}"
            )
        return Window(size, self.sinks)

    def visible_in(self, runner: Runner) -> Window:
        """The attention window in a loaded model.

        Raises:
            InvalidArgument: as `visible`; or the model's learned positions end where its context does, so that a text
                cannot slide past it.
        """
        if self.name == "slide" and runner.config.n_positions:
            raise InvalidArgument(
                f"context_policy is 'slide', but this model knows {runner.config.n_positions} learned positions only;"
                f" take 'error' or 'drop_oldest_turns'"
            )
        return self.visible(runner.context)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {"name": self.name, "window": self.window, "sinks": self.sinks}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ContextPolicy:
        """From JSON.

        Raises:
            InvalidArgument: it holds something else.
        """
        try:
            return cls(**value)
        except TypeError:
            raise InvalidArgument(f"context_policy holds unknown settings: {sorted(value)}") from None


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of the past that the model did not see when a turn was generated.

    Attributes:
        policy: the policy that hid it.
        n_tokens: hidden tokens: with "slide" from the last token of the turn, else from all of it.
        n_turns: number of whole turns dropped from the start.
    """

    policy: PolicyName
    n_tokens: int
    n_turns: int = 0

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {"policy": self.policy, "n_tokens": self.n_tokens, "n_turns": self.n_turns}
