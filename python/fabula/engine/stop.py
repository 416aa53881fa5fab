"""Finds stop strings in text that arrives in pieces.

Text is emitted as soon as it is certain that no stop string starts in it; only the longest suffix that could still
become one is held back. Pieces may break anywhere, also inside a stop string: the result is that of a search in the
whole text.

Control tokens are hidden from the text, but a stop string may name them ("<|im_start|>", "<|im_end|>\\n"). So the
matcher also gets the control tokens, and searches twice: in the text with them, and in the shown text, where the words
before and after a control token are adjacent. Positions count characters of the former.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches a text for stop strings.

    The stop string that is complete first wins, as if the text came character by character; of two that are complete
    at the same character the longer one, which started earlier. So no further token is ever needed to decide. The text
    is truncated at the start of the match.

    Example:
        >>> matcher = StopMatcher(["\\nUser:"])
        >>> matcher.feed("Hello\\nUs")
        ('Hello', None)
        >>> matcher.feed("er: hi")
        ('', '\\nUser:')

    Attributes:
        matched: the stop string that was found; None before.
        n_fed: characters that were fed, hidden ones included.
        n_certain: number of leading characters in which no stop string can start any more; after a match, the length of
            the truncated text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Args: stops: non-empty strings, checked by SamplingParams; without any, all text passes."""
        self._stops = tuple(stops)
        self._held, self._shown = "", b""  # held back text, and for each of its characters 1 if it is shown
        self.matched: str | None = None
        self.n_fed = self.n_certain = 0

    def feed(self, piece: str, hidden: str = "") -> tuple[str, str | None]:
        """Adds the next piece of text.

        Args:
            piece: any text, may be empty.
            hidden: text of the control token after it, which is not shown.

        Returns:
            The text that is now certain, and the stop string if one is complete. After a match no more text is
            returned.
        """
        if not self._stops:  # nothing is ever held back
            self.n_fed += len(piece) + len(hidden)
            self.n_certain = self.n_fed
            return piece, None
        if self.matched is not None:
            return "", self.matched
        text, shown = self._take(piece, hidden)
        # A match cannot start before the held text: otherwise more would be held.
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        seen: list[int] = []  # positions of the characters that are shown, where some are not
        visible = ""
        if 0 in shown:
            seen = [i for i, flag in enumerate(shown) if flag]
            visible = "".join(text[i] for i in seen)
            for stop in self._stops:
                if (at := visible.find(stop)) >= 0:
                    found.append((seen[at + len(stop) - 1] + 1, seen[at], stop))
        if found:
            _, cut, self.matched = min(found)
            return self._release(text, shown, cut, keep=False), self.matched
        cut = len(text) - self._held_back(text)
        if seen and (n_held := self._held_back(visible)):
            cut = min(cut, seen[-n_held])
        return self._release(text, shown, cut), None

    def let_pass(self, piece: str, hidden: str = "") -> str:
        """Adds a piece without searching it; returns it after the text that was held back."""
        text, shown = self._take(piece, hidden)
        return self._release(text, shown, len(text))

    def flush(self) -> str:
        """At the end of the text: returns the text that is held back; "" after a match."""
        return self.let_pass("")

    def _take(self, piece: str, hidden: str) -> tuple[str, bytes]:
        self.n_fed += len(piece) + len(hidden)
        return self._held + piece + hidden, self._shown + b"\1" * len(piece) + b"\0" * len(hidden)

    def _release(self, text: str, shown: bytes, n: int, *, keep: bool = True) -> str:
        """Returns the shown ones of the first n characters; holds back the others, or drops them after a match."""
        self.n_certain = self.n_fed - len(text) + n
        self._held, self._shown = (text[n:], shown[n:]) if keep else ("", b"")
        if 0 not in shown[:n]:
            return text[:n]
        return "".join(character for character, flag in zip(text[:n], shown, strict=False) if flag)

    def _held_back(self, text: str) -> int:
        """Length of the longest suffix of the text that is a proper prefix of a stop string."""
        longest = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:n]):
                    longest = n
                    break
        return longest
