"""Speculation: several tokens of an answer in one step, with the same results.

A step computes the next token of an answer and a draft behind it (`drafts.py`), and gives logits for every one of them.
Then tokens are sampled row by row, as long as each is the one that the draft has there:

    history        ... a b          b is computed next
    step           b x y z          x y z are the draft; each row's logits are those of decoding one by one
    sampled        x y w            three tokens instead of one; the row of z is for a text that does not exist
    rolled back    ... a b x y w    keys and values of z are removed, and w is computed next

Each token is sampled by `Decoding.accept`, from the logits, history, position and constraint that it would have without
speculation, so it is the same token: at any temperature, with penalties, constraints and stop strings.

A draft costs time whether it is right or not. `policy.draft_rows` gives each request of a step as many draft tokens as
pay, from their chances and the measured cost of steps, which may be none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fabula.engine.drafts import NO_DRAFT, Draft, DraftSource, DraftTexts, LookupDrafts, Rate

if TYPE_CHECKING:
    from fabula.engine.decoding import Decoding, Piece

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

MAX_DRAFT = 15  # tokens: steps of up to 16 rows are where a row costs less than a step
WARM_TOKENS = 24  # after an accepted draft, in which the next one is looked for every WARM_STEPS steps
WARM_STEPS = 2
COLD_STEPS = 32
SOURCE_STEPS = 4  # where a source other than lookup has no draft yet, or none that pays


class Speculation:
    """Speculation of one answer. For the scheduler's thread.

    Args:
        decoding: of the answer.
        texts: texts of its session; None for none.
        source: asked where lookup finds nothing; None for nobody.

    Attributes:
        draft: for the next step; `propose` sets it.
        n_drafted: draft tokens that were computed.
        n_accepted: those of them that were sampled.
    """

    def __init__(self, decoding: Decoding, texts: DraftTexts | None = None, source: DraftSource | None = None) -> None:
        self._decoding, self._lookup, self._source = decoding, LookupDrafts(texts), source
        self._from: DraftSource = self._lookup  # the source of `draft`
        self._forced = Rate(0.9)
        self._is_forced = False
        self._is_off = False
        self._warm_until = 0
        self.draft = NO_DRAFT
        self.n_drafted = self.n_accepted = 0

    # ---- Drafts -----------------------------------------------------------------------------------------------------

    def propose(self, most: int, n_decoding: int) -> None:
        """Sets `draft` to what may follow the history, at most so many tokens; `n_decoding` as `DraftSource.propose`.

        What the answer's constraint forces comes first, then lookup, then the other source. Nothing goes beyond the
        end of the answer, and nothing that its constraint forbids.
        """
        decoding = self._decoding
        most = min(most, decoding.n_left - 1, MAX_DRAFT)
        history = decoding.history.ids
        draft, self._from, self._is_forced = NO_DRAFT, self._lookup, False
        if not self._is_off:
            self._lookup.observe(history)
            if most > 0:
                draft = self._proposed(history, most, n_decoding)
        self.draft = draft

    def _proposed(self, history: I32, most: int, n_decoding: int) -> Draft:
        decoding = self._decoding
        forced = decoding.forced_tokens(most)
        forced = forced[: decoding.n_possible(forced)]
        if forced:
            self._is_forced = True
            rate = self._forced.value
            return Draft(forced, [rate ** (i + 1) for i in range(len(forced))])
        draft = self._lookup.propose(history, most)
        if not draft.tokens and self._source is not None:
            draft, self._from = self._source.propose(history, most, n_decoding), self._source
        n = decoding.n_possible(draft.tokens)
        return draft if n == len(draft.tokens) else Draft(draft.tokens[:n], draft.chances[:n])

    def drop(self) -> None:
        """The next step is without a draft."""
        self.draft = NO_DRAFT

    def stop(self) -> None:
        """No more drafts for this answer."""
        self._is_off = True
        self.close()

    def close(self) -> None:
        """The answer has ended, or lost its KV."""
        self.drop()
        self._lookup.close()
        if self._source is not None:
            self._source.close()

    @property
    def blind_steps(self) -> int:
        """Decode steps that may run before drafts are looked for again. While drafts are accepted, each token may be
        where the next one begins."""
        if self._is_off:
            return COLD_STEPS
        is_warm = len(self._decoding.history) < self._warm_until
        return WARM_STEPS if is_warm else COLD_STEPS if self._source is None else SOURCE_STEPS

    # ---- After a step -----------------------------------------------------------------------------------------------

    def verified(self, n_drafted: int, n_accepted: int) -> None:
        """Counts the draft tokens that a step computed and those of them that were sampled."""
        self.n_drafted += n_drafted
        self.n_accepted += n_accepted
        if n_accepted:
            self._warm_until = len(self._decoding.history) + WARM_TOKENS
        if self._is_forced:
            for i in range(min(n_accepted + 1, n_drafted)):
                self._forced.count(i < n_accepted)
        else:
            self._from.verified(n_drafted, n_accepted)
        self.drop()


def sampled_rows(decoding: Decoding, logits: F32, draft: Sequence[int]) -> tuple[list[Piece], BaseException | None]:
    """Samples the tokens of a step, row by row, as long as they are those of the draft.

    Args:
        decoding: of the answer.
        logits: float32 [1 + len(draft), vocab_size], of the last token of the history and of each draft token.
        draft: tokens that were computed behind the history.

    Returns:
        One piece or more; and the error that ended the answer after them, if one did.
    """
    pieces: list[Piece] = []
    for i, row in enumerate(logits):
        try:
            piece = decoding.accept(row)
        except Exception as error:
            return pieces, error
        pieces.append(piece)
        if piece.finish_reason or i == len(draft) or piece.token_id != draft[i]:
            break
    return pieces, None
