"""Settings of a session: immutable, so that a change is one assignment and a failed change needs no undo."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fabula.engine.sampling import SamplingParams
from fabula.sessions.names import checked_tags, checked_title
from fabula.sessions.policy import ContextPolicy


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a session.

    Attributes:
        params: sampling parameters of turns that are given none.
        system: system message of a chat.
        policy: what happens when the context is full.
        title: one line for people to read.
        tags: at most 16, each of 1 .. 60 characters; as `checked_tags` returns them.

    Raises:
        InvalidArgument: the title is malformed.
    """

    params: SamplingParams = field(default_factory=SamplingParams)
    system: str | None = None
    policy: ContextPolicy = field(default_factory=ContextPolicy)
    title: str = ""
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked_title(self.title)

    def updated(
        self,
        *,
        params: SamplingParams | None = None,
        system: str | None = None,
        title: str | None = None,
        tags: Iterable[str] | None = None,
    ) -> Settings:
        """A copy with other settings; None keeps one as it is.

        Raises:
            InvalidArgument: title or tags are malformed.
        """
        return replace(
            self,
            params=self.params if params is None else params,
            system=self.system if system is None else system,
            title=self.title if title is None else title,
            tags=self.tags if tags is None else checked_tags(tags),
        )

    def is_same(self, other: Settings) -> bool:
        """Whether both mean the same, also in which sampling parameters were given."""
        return self == other and self.params.given == other.params.given
