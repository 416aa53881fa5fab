"""An n-gram index: where the end of a text occurred before, and what came after it there.

Texts lie one after the other in one array of token ids, with GAP between two of them. `NgramIndex` hashes the N tokens
before every position:

    ids      7 4 9 2 8 . 4 9 2 5      position 9 follows "4 9 2", and so does position 4
    last     hash of N tokens -> the last position that follows them
    before   position -> the position before it that follows N tokens of the same hash, or NONE

Adding a token and finding a match take constant time; many tokens at once are added by NumPy. Memory is bounded: an
index that is full forgets the older half of its tokens. Positions are absolute: they count forgotten tokens, too.

Prompt lookup (Saxena, 2023, "Prompt Lookup Decoding"; Yang et al., 2023, arXiv 2304.04487) drafts the tokens that came
after the match. See `drafts.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]

N = 3  # tokens of an n-gram: two are in every other sentence, and four miss the place after an edit for longer
MAX_MATCH = 32  # tokens that are compared: longer matches are all alike
MAX_CANDIDATES = 8  # places that are compared, the latest first
MAX_TOKENS = 1 << 16  # of one index: 16 bytes each
GAP = -1  # between two texts
NONE = -1
_FACTORS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)  # odd numbers whose bits are spread: primes of xxHash (Collet)


class NgramIndex:
    """N-grams of one or several texts, the last of which grows. Not thread-safe.

    Args:
        most: tokens it holds, gaps included, 64 or more; when it is full, it forgets the older half.
    """

    def __init__(self, most: int = MAX_TOKENS) -> None:
        self._most = most
        self._n = 0  # tokens in the arrays
        self._first = 0  # position of the first of them
        self._ids: I32 = np.empty(0, np.int32)
        self._allocate(64)

    def _allocate(self, room: int) -> None:
        """Arrays for `room` tokens, with the tokens there are."""
        ids = np.empty(room, np.int32)
        ids[: self._n] = self._ids[: self._n]
        self._ids = ids
        self._before = np.full(room, NONE, np.int32)
        self._last = np.full(2 << (room - 1).bit_length(), NONE, np.int32)
        # For single numbers, which memoryview reads several times faster than NumPy.
        self._id_at, self._before_at, self._last_at = _view(self._ids), _view(self._before), _view(self._last)
        self._index(0)

    def __len__(self) -> int:
        return self._n

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self._first + self._n

    @property
    def n_bytes(self) -> int:
        """Bytes of its arrays."""
        return self._ids.nbytes + self._before.nbytes + self._last.nbytes

    # ---- Adding -----------------------------------------------------------------------------------------------------

    def append(self, token: int) -> None:
        """Adds the next token of the last text."""
        if self._n == len(self._id_at):
            self._make_room(1)
        n = self._n
        self._id_at[n] = token
        self._n = n + 1
        if n + 1 >= N:
            slot = self._slot(self._id_at, n + 1)
            self._before_at[n] = self._last_at[slot]
            self._last_at[slot] = n + 1

    def extend(self, ids: npt.ArrayLike) -> None:
        """Adds the next tokens of the last text, int32 [n]; the last ones if there are more than it holds."""
        new = np.asarray(ids, np.int32)[-(self._most // 2) :]
        if self._n + len(new) > len(self._ids):
            self._make_room(len(new))
        start, self._n = self._n, self._n + len(new)
        self._ids[start : self._n] = new
        self._index(start)

    def begin(self) -> None:
        """What is added next is another text."""
        if self._n and self._id_at[self._n - 1] != GAP:
            self.append(GAP)

    def _make_room(self, n: int) -> None:
        """Makes the arrays larger, or forgets the older half of the tokens."""
        if self._n + n > self._most:
            n_kept = min(self._n, self._most - max(n, self._most // 2))
            self._first += self._n - n_kept
            self._ids[:n_kept] = self._ids[self._n - n_kept : self._n].copy()
            self._n = n_kept
        self._allocate(min(1 << max(6, (self._n + n - 1).bit_length()), self._most))

    def _slot(self, ids: Sequence[int] | memoryview[int], end: int) -> int:
        """Where `last` has the N tokens before `end`."""
        a, b, c = ids[end - 3], ids[end - 2], ids[end - 1]
        mixed = a * _FACTORS[0] + b * _FACTORS[1] + c * _FACTORS[2] & 0xFFFFFFFF
        return (mixed ^ mixed >> 15) & len(self._last) - 1

    def _index(self, start: int) -> None:
        """Adds the n-grams that end after the tokens from `start` on."""
        first = max(start - N + 1, 0)
        if self._n - first < N:
            return
        ids = self._ids[first : self._n].astype(np.int64)
        a, b, c = ids[:-2], ids[1:-1], ids[2:]
        mixed = a * _FACTORS[0] + b * _FACTORS[1] + c * _FACTORS[2] & 0xFFFFFFFF
        slots = (mixed ^ mixed >> 15) & len(self._last) - 1
        ends = np.arange(first + N, self._n + 1, dtype=np.int32)
        order = np.argsort(slots, kind="stable")
        slots, ends = slots[order], ends[order]
        is_first = np.ones(len(slots), np.bool_)
        is_first[1:] = slots[1:] != slots[:-1]
        before = np.empty_like(ends)
        before[1:] = ends[:-1]
        before[is_first] = self._last[slots[is_first]]
        self._before[ends - 1] = before
        is_last = np.ones(len(slots), np.bool_)
        is_last[:-1] = is_first[1:]
        self._last[slots[is_last]] = ends[is_last]

    # ---- Finding ----------------------------------------------------------------------------------------------------

    def find(self, tail: Sequence[int]) -> tuple[int, int]:
        """The place where a text ended like `tail` before.

        Args:
            tail: the last tokens of the text, MAX_MATCH of them or fewer.

        Returns:
            The position that follows the longest match, the latest of equal ones, and the number of tokens that match,
            N .. MAX_MATCH; (NONE, 0) if there is none.
        """
        n_tail = len(tail)
        if n_tail < N:
            return NONE, 0
        ids, end, best, longest = self._id_at, self._last_at[self._slot(tail, n_tail)], NONE, N - 1
        for _ in range(MAX_CANDIDATES):
            if end == NONE:
                break
            if end < self._n and ids[end] != GAP:
                n, most = 0, min(n_tail, end)
                while n < most and ids[end - 1 - n] == tail[n_tail - 1 - n]:
                    n += 1
                if n > longest:
                    best, longest = end, n
                    if n == n_tail:
                        break
            end = self._before_at[end - 1]
        return (NONE, 0) if best == NONE else (self._first + best, longest)

    def token(self, position: int) -> int:
        """The token at a position; GAP at the end of a text and where it is forgotten."""
        at = position - self._first
        return self._id_at[at] if 0 <= at < self._n else GAP

    def tokens(self, position: int, most: int) -> list[int]:
        """The tokens from a position to the end of their text, at most so many."""
        at = position - self._first
        if not 0 <= at < self._n:
            return []
        found: list[int] = self._ids[at : min(at + most, self._n)].tolist()
        return found[: found.index(GAP)] if GAP in found else found


def _view(numbers: I32) -> memoryview[int]:
    return memoryview(numbers)  # type: ignore[arg-type]
