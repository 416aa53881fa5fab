"""Prefix index: full KV pages by a hash of all tokens up to their end.

Keys and values of a position depend on the tokens up to it, and on what each of them could see. So the hash of a full
page covers the hash of the page before it, its own 32 tokens, and the window, from where a sliding window hides
something. Two texts with a common prefix have the same hashes for its pages and find each other's KV by them.

The chain starts with a salt. Sequences of different salts never share a hash, so one owner cannot learn by timing what
another has asked (prompt stealing by cache hits, e.g. arXiv 2409.20002).
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from fabula._native import PAGE_POSITIONS
from fabula.lean_dataclasses import dataclass

KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class Window:
    """What a token sees: the first `n_sinks` positions and the last `size`; see struct fb_sequence.

    Attributes:
        size: positions, the token's own included; 0 for everything.
        n_sinks: 0 .. 32.
    """

    size: int = 0
    n_sinks: int = 0

    @property
    def slides(self) -> bool:
        return self.size > 0

    def first_visible(self, position: int) -> int:
        """The lowest position of the window of a token at `position`."""
        return position - self.size + 1 if self.slides and position >= self.n_sinks + self.size else 0

    def first_page(self, n_tokens: int) -> int:
        """The first page, after that of the sinks, that a token after `n_tokens` others sees some of."""
        return self.first_visible(n_tokens) // PAGE_POSITIONS


EVERYTHING = Window()


class KeyChain:
    """Prefix hashes of the full pages of one growing text.

    Args:
        salt: of its owner.
        window: what its tokens see.
    """

    def __init__(self, salt: str, window: Window = EVERYTHING) -> None:
        self._start = blake2b(salt.encode(), digest_size=KEY_BYTES, person=b"fabula prefix").digest()
        self._window = window
        self._keys: list[bytes] = []

    def keys(self, ids: npt.NDArray[np.int32]) -> list[bytes]:
        """The prefix hashes of all full pages, KEY_BYTES each, of a text that extends those given before.

        Args:
            ids: int32 [n_tokens].
        """
        for page in range(len(self._keys), len(ids) // PAGE_POSITIONS):
            before = self._keys[-1] if self._keys else self._start
            name = blake2b(before, digest_size=KEY_BYTES)
            name.update(ids[page * PAGE_POSITIONS : (page + 1) * PAGE_POSITIONS].astype("<i4").tobytes())
            if self._window.first_visible((page + 1) * PAGE_POSITIONS - 1):
                name.update(b"%d %d" % (self._window.size, self._window.n_sinks))
            self._keys.append(name.digest())
        return self._keys


class PrefixIndex:
    """Pages by prefix hash, and the reverse. Not thread-safe: the pool's lock guards it."""

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    def add(self, key: bytes, page: int) -> None:
        """Publishes a full page, unless the hash or the page is in the index."""
        if key not in self._pages and page not in self._keys:
            self._pages[key], self._keys[page] = page, key

    def page(self, key: bytes) -> int | None:
        return self._pages.get(key)

    def key(self, page: int) -> bytes | None:
        return self._keys.get(page)

    def forget(self, page: int) -> None:
        """Removes a page that is free or will be overwritten."""
        key = self._keys.pop(page, None)
        if key is not None:
            del self._pages[key]

    def pages(self) -> list[int]:
        """Every published page."""
        return list(self._keys)
