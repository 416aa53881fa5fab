"""`Turn`: one node of a session's tree, and the snapshot that a rollback to it restores.

A turn has the ids that it added, those of its prompt and of its answer, and a KV sequence (a page table). The past is
not copied: it is the parent. So a turn costs its own tokens and a list of page numbers, however long its path is.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakSet

from fabula.engine.generation import FinishReason, Timings
from fabula.engine.sampling import SamplingParams
from fabula.kv.cache import KvEvictionList
from fabula.kv.pages import Sequence
from fabula.sessions.policy import Cut
from fabula.sessions.user_input import UserInput

End = FinishReason | Literal["written"]
WRITTEN: Literal["written"] = "written"  # finish reason of a handwritten turn: none of its tokens was sampled


@dataclass(eq=False, slots=True, kw_only=True, weakref_slot=True)
class Turn:
    """One exchange, or one piece of a story. Does not change once it is in the tree, except for its tags.

    Attributes:
        id: unique, the same in forks and in the store.
        parent: the previous turn; None for the empty start.
        number: distance from the start: 1 is the first exchange.
        chat: whether prompt and answer went through the chat template.
        said: the user input, or the text appended to a story.
        text: the answer.
        kept: number of leading ids shared with the parent: all of the parent's, unless the template rendered the past
            differently.
        prompt_ids: ids after those, up to the answer.
        token_ids: ids of the answer as they were sampled, end token included.
        n_begun: number of leading answer ids that were given, not sampled: chosen by hand, or copied from another turn.
        params: sampling parameters, with the seed that was used.
        finish_reason: as in `Piece`; "cancelled", "timeout" and "interrupted" (the process ended) mark a partial turn;
            "written" marks a handwritten one.
        timings: counts and times; prompt tokens reused and computed.
        cut: the part of the past that the model did not see; None for nothing.
        why_recomputed: why KV of its past had to be recomputed; "" if it had not.
        created_at: seconds since 1970.
        frozen: whether it is a note: the model reads it, but it is not part of the story.
        prompt_unread: whether its prompt is handwritten like its answer, so that KV of neither was computed for it.
        tags: set by the user.
        kv: KV of its ids except the last; shares pages with the turns around it. A cache: it may be empty.
        forks: sessions in use that were forked here.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    parent: Turn | None
    number: int
    chat: bool = False
    said: UserInput = UserInput("")  # noqa: RUF009 - it is immutable
    text: str = ""
    kept: int = 0
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    n_begun: int = 0
    params: SamplingParams | None = None
    finish_reason: End | None = None
    timings: Timings | None = None
    cut: Cut | None = None
    why_recomputed: str = ""
    created_at: float = field(default_factory=time.time)
    frozen: bool = False
    prompt_unread: bool = False
    tags: set[str] = field(default_factory=set)
    kv: Sequence | None = None
    forks: WeakSet[Any] = field(default_factory=WeakSet)

    @property
    def prompt(self) -> str:
        """The user input as text for display."""
        return self.said.text

    @property
    def is_unanswered(self) -> bool:
        """Whether it is a message of a chat written by hand, without an answer: the next turn answers it too. It has no
        ids of its own; those of the next prompt have its text."""
        return self.chat and self.finish_reason == WRITTEN and not self.token_ids

    @property
    def reused(self) -> int:
        """Tokens of the prompt whose KV was reused."""
        return self.timings.reused_tokens if self.timings else 0

    @property
    def recomputed(self) -> int:
        """Tokens of the past whose KV had to be recomputed. New input does not count, nor handwritten text that no
        answer follows yet, nor the last token of an answer: its KV was never computed."""
        if self.timings is None or self.parent is None:
            return 0
        prompt = self.kept + len(self.prompt_ids)
        known = prompt + self.n_begun if self.n_begun else min(prompt, self.parent.n_ids - self.parent.n_unread)
        return max(0, known - 1 - self.timings.reused_tokens)

    @property
    def n_ids(self) -> int:
        """Number of ids from the start to this turn's end."""
        return self.kept + len(self.prompt_ids) + len(self.token_ids)

    @property
    def n_unread(self) -> int:
        """Number of handwritten ids at its end: their KV was not computed when the turn was added."""
        n = 0
        for turn in self.lineage():
            if turn.finish_reason != WRITTEN:
                break
            n += len(turn.token_ids or turn.prompt_ids)
            if turn.prompt_unread:
                n += len(turn.prompt_ids)
            elif turn.token_ids:  # the prompt before them was answered once
                break
        return n

    def ids(self) -> list[int]:
        """Every id from the start to this turn's end."""
        pieces: list[tuple[int, ...]] = []
        end = self.n_ids  # ids still missing
        for turn in self.lineage():
            own = (*turn.prompt_ids, *turn.token_ids)
            if end > turn.kept:
                pieces.append(own[: end - turn.kept])
                end = turn.kept
        return [token for piece in reversed(pieces) for token in piece]

    def fork_kv(self, n_tokens: int, cache: KvEvictionList) -> Sequence | None:
        """A new sequence with the KV of the longest prefix of its ids that a turn on its path has, at most `n_tokens`
        long; None if there is none."""
        with cache.lock:  # nothing is evicted between the search and the fork
            best, most = self._longest_kv(n_tokens, cache)
            if best is None:
                return None
            cache.touch(best)
            return best.fork(most)

    def n_held(self, n_tokens: int, cache: KvEvictionList) -> int:
        """Number of ids whose KV `fork_kv` would give."""
        with cache.lock:
            return self._longest_kv(n_tokens, cache)[1]

    def _longest_kv(self, n_tokens: int, cache: KvEvictionList) -> tuple[Sequence | None, int]:
        best: Sequence | None = None
        most = 0
        for past in self.lineage():
            if most >= n_tokens:  # earlier turns hold less
                break
            usable = past.kv.usable(n_tokens) if past.kv is not None and cache.owns(past.kv) else 0
            if usable > most:
                best, most = past.kv, usable
            n_tokens = min(n_tokens, past.kept)
        return best, most

    def lineage(self) -> Iterator[Turn]:
        """This turn, its parent, and so on to the empty start."""
        turn: Turn | None = self
        while turn is not None:
            yield turn
            turn = turn.parent

    def __repr__(self) -> str:
        return f"<Turn {self.number} {self.finish_reason or 'start'} {self.prompt[:30]!r} -> {self.text[:30]!r}>"

    def to_json(self) -> dict[str, Any]:
        """As JSON, without token ids. `messages` is null where the input is nothing but `prompt`."""
        timings = self.timings
        return {
            "number": self.number,
            "prompt": self.prompt,
            "messages": None if self.said.given is None else self.said.messages,
            "template_options": self.said.own_options,
            "parse_special": self.said.parse_special,
            "text": self.text,
            "id": self.id,
            "finish_reason": self.finish_reason,
            "seed": self.params.seed if self.params else None,
            "prompt_tokens": timings.prompt_tokens if timings else 0,
            "reused": self.reused,
            "recomputed": self.recomputed,
            "why_recomputed": self.why_recomputed,
            "generated": len(self.token_ids) - self.n_begun,
            "cut": self.cut.to_json() if self.cut else None,
            "first_token_ms": timings.first_token_ms if timings else 0.0,
            "tokens_per_s": timings.tokens_per_s if timings else 0.0,
            "frozen": self.frozen,
            "tags": sorted(self.tags),
            "created_at": self.created_at,
        }


START = Turn(id="", parent=None, number=0)  # the empty start of every tree
