"""A turn: one node of a session's tree, and the snapshot that going back to it restores.

A turn keeps what it added: the ids of its prompt and of its answer, and the page numbers of K and V behind them.
Nothing of its past is copied; the past is its parent. So a turn costs its own tokens and a list of page numbers,
whatever came before.
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
from fabula.sessions.said import Said

End = FinishReason | Literal["written"]
WRITTEN: Literal["written"] = "written"  # by hand, no part of it drawn


@dataclass(eq=False, slots=True, kw_only=True, weakref_slot=True)
class Turn:
    """One exchange, or one piece of a story. Never changes once it is in the tree, its tags aside.

    Attributes:
        id: its name, the same wherever the turn is known.
        parent: the turn before; None for the empty start.
        number: distance from the start: 1 is the first exchange.
        chat: whether prompt and answer went through the chat template.
        said: what the user said, or the text given to a story.
        text: the answer.
        kept: how many ids of the parent's past this turn goes on from: all, unless the template worded the past anew.
        prompt_ids: ids behind those, up to the answer.
        token_ids: ids of the answer as they were drawn, its end token included.
        n_begun: how many of them were given, not drawn: chosen by hand, or taken over from a partial turn.
        params: sampling settings, with the seed that was used.
        finish_reason: as in `Piece`; "cancelled", "timeout" and "interrupted" (the process ended) mark a partial turn;
            "written" one that a person wrote.
        timings: counts and times; prompt tokens reused and computed.
        cut: what of the past the model did not see; None for nothing.
        why_recomputed: why K and V of its past were not there; "" if they were.
        created_at: seconds since 1970.
        frozen: whether it is a note: what the model reads, but no part of the story.
        tags: names the user gave it.
        kv: K and V of its ids, but for the last; shared with the turns around it. A cache: it may be empty.
        forks: sessions that were forked here and are in use.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    parent: Turn | None
    number: int
    chat: bool = False
    said: Said = Said("")  # noqa: RUF009 - it never changes
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
    tags: set[str] = field(default_factory=set)
    kv: Sequence | None = None
    forks: WeakSet[Any] = field(default_factory=WeakSet)

    @property
    def prompt(self) -> str:
        """What was said before the answer, as a person reads it."""
        return self.said.text

    @property
    def reused(self) -> int:
        """Tokens of the prompt whose K and V were there already."""
        return self.timings.reused_tokens if self.timings else 0

    @property
    def recomputed(self) -> int:
        """Tokens of the past whose K and V had to be computed again; new words do not count, nor those written by hand
        that no answer stands behind yet, nor the last token of an answer, which was drawn but never read."""
        if self.timings is None or self.parent is None:
            return 0
        prompt = self.kept + len(self.prompt_ids)
        known = prompt + self.n_begun if self.n_begun else min(prompt, self.parent.n_ids - self.parent.n_unread)
        return max(0, known - 1 - self.timings.reused_tokens)

    @property
    def n_ids(self) -> int:
        """Ids from the start to this turn's end."""
        return self.kept + len(self.prompt_ids) + len(self.token_ids)

    @property
    def n_unread(self) -> int:
        """Ids at its end that were written by hand: when it was, no answer had made the model read them."""
        n = 0
        for turn in self.lineage():
            if turn.finish_reason != WRITTEN:
                break
            n += len(turn.token_ids or turn.prompt_ids)
            if turn.token_ids:  # the prompt before them was answered once
                break
        return n

    def ids(self) -> list[int]:
        """Every id from the start to this turn's end."""
        pieces: list[tuple[int, ...]] = []
        end = self.n_ids  # ids that are wanted of what this turn and its past hold
        for turn in self.lineage():
            own = (*turn.prompt_ids, *turn.token_ids)
            if end > turn.kept:
                pieces.append(own[: end - turn.kept])
                end = turn.kept
        return [token for piece in reversed(pieces) for token in piece]

    def fork_kv(self, n_tokens: int, cache: KvEvictionList) -> Sequence | None:
        """The longest beginning of its ids whose K and V a turn of its past holds, `n_tokens` at most; None if there
        is none."""
        with cache.lock:  # or they are given up between looking and taking
            best, most = self._longest_kv(n_tokens, cache)
            if best is None:
                return None
            cache.touch(best)
            return best.fork(most)

    def n_held(self, n_tokens: int, cache: KvEvictionList) -> int:
        """How many ids `fork_kv` would give K and V of."""
        with cache.lock:
            return self._longest_kv(n_tokens, cache)[1]

    def _longest_kv(self, n_tokens: int, cache: KvEvictionList) -> tuple[Sequence | None, int]:
        best: Sequence | None = None
        most = 0
        for past in self.lineage():
            if most >= n_tokens:  # what lies before is shorter
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
        """What a person or a script wants to know of it; no token ids. `messages` is null where `prompt` says all."""
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
