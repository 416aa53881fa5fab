"""Request bodies of Fabula's own API. Unknown fields are refused, and no value is converted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fabula.engine.constraint import Constraint
from fabula.engine.sampling import MAX_LOGPROBS, STEPS, SamplingParams
from fabula.errors import InvalidArgument
from fabula.sessions.planning import MAX_BRANCHES
from fabula.sessions.policy import ContextPolicy


class Strict(BaseModel):
    """A body with exactly the fields and types it declares."""

    model_config = ConfigDict(strict=True, extra="forbid")


def _within(low: float | None = None, high: float | None = None, above: float | None = None, text: str = "") -> Any:
    """Limits for the OpenAPI description only; SamplingParams enforces them."""
    limits = {"minimum": low, "maximum": high, "exclusiveMinimum": above}
    return Field(None, description=text, json_schema_extra={k: v for k, v in limits.items() if v is not None})


def _parse_special(what: str, default: str) -> Any:
    return Field(
        None,
        description=f"Whether control tokens written in {what} are parsed as control tokens; otherwise they are plain "
        f"text. Default: {default}.",
    )


SessionId = Annotated[str, Field(description="1 to 128 of `A-Za-z0-9._-`.")]
TurnRef = Annotated[
    int | str,
    Field(
        description="A turn: its number on the path (0 is the empty start; a negative one counts back from the head), "
        "its id, or a tag of it."
    ),
]


Policy = Literal["error", "slide", "drop_oldest_turns"]


class ConstraintBody(Strict):
    """A constraint on the answer; give exactly one field."""

    json_schema: dict[str, Any] | None = Field(None, description="JSON that satisfies this schema.")
    json_object: Literal[True] | None = Field(None, description="Any JSON object.")
    regex: str | None = Field(None, description="Text that this regular expression matches as a whole.")
    lark: str | None = Field(None, description="Text of this grammar, in Lark syntax.")
    gbnf: str | None = Field(None, description="Text of this grammar, in llama.cpp's GBNF.")

    def made(self) -> Constraint:
        """The constraint.

        Raises:
            InvalidArgument: no field is given, or several, or the source is too large.
        """
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise InvalidArgument(
                "constraint must have one of json_schema, json_object, regex, lark and gbnf; "
                f"it has {' and '.join(given) or 'none'}"
            )
        ((kind, source),) = given.items()
        if kind == "json_object":
            return Constraint.json_object()
        make = {
            "json_schema": Constraint.json_schema,
            "regex": Constraint.regex,
            "lark": Constraint.lark,
            "gbnf": Constraint.gbnf,
        }[kind]
        return make(source)


class Sampling(Strict):
    """Sampling settings, by the names of the SDK's `SamplingParams`. Settings that are left out are the
    session's; those the session does not set are the model's defaults, which /health shows."""

    temperature: float | None = _within(0, text="0 always takes the likeliest token.")
    top_k: int | None = _within(0, 2**31 - 1, text="Keep the k likeliest; 0 is off.")
    top_p: float | None = _within(high=1, above=0, text="Keep the likeliest that make up this probability.")
    min_p: float | None = _within(
        0, 1, text="Keep tokens whose probability is at least this fraction of the likeliest's."
    )
    typical_p: float | None = _within(
        high=1, above=0, text="Locally typical sampling: keep the tokens nearest to the expected surprise."
    )
    repetition_penalty: float | None = _within(above=0, text="Above 1 makes repetition rarer.")
    penalty_window: int | None = _within(-1, 2**31 - 1, text="Last tokens that penalties see; -1 all.")
    frequency_penalty: float | None = _within(text="Subtracted once per occurrence.")
    presence_penalty: float | None = _within(text="Subtracted once per token seen.")
    dry_multiplier: float | None = _within(0, text="DRY: 0 is off.")
    dry_base: float | None = _within(1)
    dry_allowed_length: int | None = _within(1, 2**31 - 1)
    dry_window: int | None = _within(-1, 2**31 - 1)
    dry_breakers: list[str] | None = Field(None, json_schema_extra={"maxItems": 16})
    xtc_probability: float | None = _within(0, 1, text="XTC: 0 is off.")
    xtc_threshold: float | None = _within(0, 1)
    logit_bias: dict[str, float] | None = Field(
        None, description="Value added to the logit, by token id; at most 1,024 entries."
    )
    banned_tokens: list[int] | None = Field(None, description="Token ids that are never sampled.")
    seed: int | None = _within(0, 2**64 - 1, text="Makes the answer repeatable.")
    chain: list[str] | None = Field(None, description=f"Order of the sampling steps, from {', '.join(STEPS)}.")
    max_len: int | None = _within(1, 2**31 - 1, text="Tokens to generate at most. `max_tokens` is another name for it.")
    max_tokens: int | None = _within(1, 2**31 - 1)
    min_tokens: int | None = _within(0, 2**31 - 1, text="The answer has at least this many tokens.")
    stop: list[str] | str | None = Field(None, description="Texts that end the answer; at most 16 of 256 bytes.")
    stop_tokens: list[int] | None = Field(None, description="Token ids that end the answer.")
    ignore_eos: bool | None = Field(None, description="The model's end tokens do not end the answer.")
    n_logprobs: int | None = _within(0, MAX_LOGPROBS, text="Number of likeliest tokens reported with each token.")
    constraint: ConstraintBody | None = None

    def params(self, base: SamplingParams) -> SamplingParams:
        """The settings given here over those of `base`.

        Raises:
            InvalidArgument: one is out of its range.
        """
        given: dict[str, Any] = {
            name: value
            for name in Sampling.model_fields
            if name != "max_len" and (value := getattr(self, name)) is not None
        }
        if self.max_len is not None:
            if self.max_tokens is not None:
                raise InvalidArgument("max_len and max_tokens are two names of one setting; give one of them")
            given["max_tokens"] = self.max_len
        if "logit_bias" in given:
            given["logit_bias"] = {_token(token): bias for token, bias in given["logit_bias"].items()}
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        if self.constraint is not None:
            given["constraint"] = self.constraint.made()
        return replace(base, **given) if given else base

    def changed(self, base: SamplingParams) -> SamplingParams:
        """As `params`; a setting given as null is reset to its default."""
        default = SamplingParams()
        nulls = {
            "max_tokens" if name == "max_len" else name for name in self.model_fields_set if getattr(self, name) is None
        }
        return self.params(replace(base, **{name: getattr(default, name) for name in nulls}))

    @property
    def is_empty(self) -> bool:
        """Whether nothing is given."""
        return all(getattr(self, name) is None for name in Sampling.model_fields)


def _token(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        raise InvalidArgument(f"logit_bias has the key {text[:40]!r}, must be a token id")
    return int(text)


class Answering(Sampling):
    """How an answer is sent."""

    def over(self, base: Callable[[], SamplingParams]) -> SamplingParams | None:
        """The settings given here over those of `base`; None if none are given."""
        return None if self.is_empty else self.params(base())

    stream: bool = Field(False, description="Send the answer as server-sent events while it is generated.")
    background: bool = Field(
        False,
        description="Keep generating when the client leaves. Without `stream` the response is sent at once (202).",
    )


class Opening(Answering):
    """A session that exists, or settings of a new one."""

    session_id: str | None = Field(
        None, description="A session; created if it does not exist. Default: a new one with a random id."
    )
    model: str | None = Field(None, description="Model of a new session.")
    system: str | None = Field(None, description="System message of a new session.")
    title: str | None = Field(None, description="Title of the session.")
    sampling: Sampling | None = Field(
        None,
        description="Settings of the session, for this turn and later ones that give none. In a session that exists, "
        "settings left out stay and null resets to the default.",
    )
    context_policy: Policy | None = Field(None, description="What a new session does when its context is full.")
    window: int | None = Field(None, description="Tokens that the policy `slide` keeps.")

    def policy(self) -> ContextPolicy | None:
        """The context policy; None if none is given."""
        return _policy(self.context_policy, self.window)


def _policy(name: Policy | None, window: int | None) -> ContextPolicy | None:
    if name is None and window is None:
        return None
    if window is not None and name != "slide":
        raise InvalidArgument("window needs the context_policy slide")
    return replace(ContextPolicy.of(name), window=window)


class ChatBody(Opening):
    """A message to answer."""

    message: str = Field(description="The user's message.")
    parse_special: bool | None = _parse_special("the message", "false")


class StoryBody(Opening):
    """A text to continue."""

    prompt: str | None = Field(None, description="Text to add before generating. A new story needs some.")
    parse_special: bool | None = _parse_special("the prompt", "as in the turn before; true in a new story")


class WriteBody(Strict):
    """Text that the author adds to a story."""

    session_id: str | None = Field(None, description="As for `/story`.")
    text: str = Field(description="The text.", json_schema_extra={"minLength": 1})
    frozen: bool = Field(False, description="A note: the model reads it, but it is not part of the story.")
    parse_special: bool | None = _parse_special("the text", "as in the turn before; true in a new story")
    model: str | None = Field(None, description="Model of a new session.")
    title: str | None = Field(None, description="Title of the session.", json_schema_extra={"maxLength": 200})
    sampling: Sampling | None = Field(None, description="Settings of the session, as for `/story`.")
    context_policy: Policy | None = Field(None, description="What a new session does when its context is full.")


class SessionBody(Strict):
    """A session that exists."""

    session_id: SessionId


class RollbackBody(SessionBody):
    """The turn to make the head."""

    turn: TurnRef = 1
    target_turn: TurnRef = Field(
        1, description="An older name of `turn`.", json_schema_extra={"deprecated": True}
    )  # pydantic's own `deprecated` warns every reader of the field, us too
    steps: int | None = Field(
        None, description="Turns to go back from the head, instead of `turn`.", json_schema_extra={"minimum": 1}
    )
    prune: bool = Field(False, description="Also delete the turns that follow it.")

    @property
    def target(self) -> int | str:
        """The turn, whichever way it was given.

        Raises:
            InvalidArgument: in two ways, or fewer than one step back.
        """
        given = {"turn", "target_turn", "steps"} & self.model_fields_set
        if given == {"turn", "target_turn"}:
            raise InvalidArgument("turn and target_turn are two names of one field; give one of them")
        if len(given) > 1:
            raise InvalidArgument("give either turn or steps")
        if self.steps is not None:
            if self.steps < 1:
                raise InvalidArgument(f"steps is {self.steps}, must be 1 or more")
            return -self.steps
        return self.target_turn if given == {"target_turn"} else self.turn


class ForkBody(SessionBody):
    """Where to fork a session."""

    turn: TurnRef | None = Field(None, description="Default: the head.")
    new_session_id: str | None = Field(None, description="Default: a random one.")


class AgainBody(Answering):
    """A session whose head is answered again or continued. Settings that are left out are the turn's. Another answer
    gets a new seed unless one is given; a continuation keeps the seed."""

    session_id: SessionId


class EditBody(AgainBody):
    """Another message in place of a turn's."""

    turn: TurnRef
    message: str
    parse_special: bool | None = _parse_special("the message", "as in the turn")


class ReplayBody(AgainBody):
    """A turn to generate again."""

    turn: TurnRef


class ForkAtBody(AgainBody):
    """Another token at a position of an answer."""

    turn: TurnRef
    position: int = Field(description="Of the token in the answer, from 0.", json_schema_extra={"minimum": 0})
    token_id: int = Field(json_schema_extra={"minimum": 0})


class BranchBody(AgainBody):
    """Several alternative answers."""

    n: int = Field(description="How many.", json_schema_extra={"minimum": 1, "maximum": MAX_BRANCHES})
    message: str | None = Field(None, description="The message they answer. Default: the head's message again.")
    parse_special: bool | None = _parse_special("the message", "as for /chat or /story")


class RewriteBody(SessionBody):
    """Other text in place of an answer."""

    turn: TurnRef
    text: str = Field(json_schema_extra={"minLength": 1})
    parse_special: bool | None = _parse_special("the text", "as in the turn's prompt in a story, false in a chat")


class TurnBody(SessionBody):
    """A turn."""

    turn: TurnRef


class AlternativesBody(SessionBody):
    """A position of an answer."""

    turn: TurnRef
    position: int = Field(json_schema_extra={"minimum": 0})
    n: int = Field(10, json_schema_extra={"minimum": 1, "maximum": MAX_LOGPROBS})


class TagBody(SessionBody):
    """A tag to add to a turn, or to remove."""

    turn: TurnRef
    tag: str = Field(json_schema_extra={"minLength": 1})
    remove: bool = False


class CreateBody(Strict):
    """Settings of a new session."""

    session_id: str | None = Field(None, description="1 to 128 of `A-Za-z0-9._-`. Default: a random one.")
    model: str | None = None
    system: str | None = Field(None, description="System message.")
    title: str | None = Field(None, json_schema_extra={"maxLength": 200})
    tags: list[str] | None = Field(None, json_schema_extra={"maxItems": 16})
    sampling: Sampling | None = Field(None, description="Settings of its turns that give none.")
    context_policy: Policy | None = Field(None, description="What it does when its context is full.")
    window: int | None = Field(None, description="Tokens that the policy `slide` keeps.")

    def policy(self) -> ContextPolicy | None:
        """The context policy; None if none is given."""
        return _policy(self.context_policy, self.window)


class StopBody(Strict):
    """What to stop; give one of the two."""

    session_id: str | None = None
    stream_id: str | None = None


class SettingsBody(Strict):
    """Settings to change; those left out stay."""

    title: str | None = Field(None, json_schema_extra={"maxLength": 200})
    system: str | None = Field(None, description="Only before the first turn.")
    sampling: Sampling | None = Field(
        None, description="Settings of later turns. Those left out stay; null resets to the default."
    )
    tags: list[str] | None = Field(
        None,
        description="Tags of the session; they replace the old ones.",
        json_schema_extra={"maxItems": 16},
    )


class TextBody(Strict):
    """A text for a model's tokenizer; `content` and what follows it are llama.cpp's names."""

    text: str | None = None
    model: str | None = None
    parse_special: bool | None = _parse_special("the text", "false")
    special: bool = Field(False, description="An older name of `parse_special`.")
    add_bos: bool = Field(False, description="Whether to put the model's start token in front.")
    content: str | None = Field(None, description="Another name of `text`; control tokens are parsed by default.")
    add_special: bool = Field(False, description="Another name of `add_bos`.")
    with_pieces: bool = Field(False, description="Whether each token comes with its text.")


class TokensBody(Strict):
    """Token ids."""

    tokens: list[int]
    model: str | None = None
    skip_special: bool = Field(True, description="Leave control tokens out of the text.")


class CountBody(Strict):
    """A message whose tokens to count."""

    session_id: str | None = None
    message: str = ""
    story: bool = Field(False, description="Whether the message is a text to continue.")
    parse_special: bool | None = _parse_special("the message", "as for /chat or /story")
    system: str | None = None
    model: str | None = None
