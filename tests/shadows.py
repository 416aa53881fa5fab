"""Sessions as naively as can be, to compare real ones with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fabula import ContextPolicy, Reply


@dataclass(eq=False)
class Leaf:
    """A turn as its reader saw it."""

    id: str
    parent: Leaf | None
    prompt: str = ""
    text: str = ""
    ids: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    tags: set[str] = field(default_factory=set)

    @property
    def number(self) -> int:
        return 0 if self.parent is None else self.parent.number + 1

    def lineage(self) -> Iterator[Leaf]:
        leaf: Leaf | None = self
        while leaf is not None:
            yield leaf
            leaf = leaf.parent


ROOT = Leaf("", None)


@dataclass(eq=False)
class Shadow:
    """A session as naively as can be: lists."""

    id: str
    policy: ContextPolicy
    chat: bool
    base: Leaf
    head: Leaf
    own: list[Leaf] = field(default_factory=list)
    undone: list[Leaf] = field(default_factory=list)

    def known(self) -> list[Leaf]:
        return [*[leaf for leaf in self.base.lineage() if leaf.parent is not None][::-1], *self.own]

    def take_in(self, leaf: Leaf, selects: bool) -> None:
        self.own.append(leaf)
        if selects:
            self.head, self.undone = leaf, []

    def go_to(self, leaf: Leaf, prune: bool) -> None:
        if leaf is not self.head:
            self.undone.append(self.head)
        self.head = leaf
        if prune:
            self.own = [other for other in self.own if other is leaf or leaf not in other.lineage()]
            self.undone = []


@dataclass
class Live:
    """A running reply and the pieces that were read."""

    reply: Reply
    shadow: Shadow
    parent: Leaf
    prompt: str
    texts: list[str]

    @property
    def ids(self) -> list[int]:
        return self.reply.generation.token_ids
