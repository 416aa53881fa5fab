"""Finding stop strings in text that arrives in pieces.

Text is given out as soon as it is certain that no stop string begins in it; only the longest end that could
still become one is held back. Pieces may break anywhere, also inside a stop string: the result is that of a
search in the whole.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches a text for stop strings.

    The stop string that is complete first wins, as if the text came character by character; of two that are
    complete at the same character the longer one, which began earlier. So no further token is ever needed to
    decide. The text is cut where the match begins.

    Example:
        >>> matcher = StopMatcher(["\\nUser:"])
        >>> matcher.feed("Hello\\nUs")
        ('Hello', None)
        >>> matcher.feed("er: hi")
        ('', '\\nUser:')

    Attributes:
        matched: the stop string that was found, None before.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Args: stops: non-empty strings, as SamplingParams checks them; none at all lets every text pass."""
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> tuple[str, str | None]:
        """Takes the next piece of text.

        Args:
            piece: any text, may be empty.

        Returns:
            The text that is now certain, and the stop string if one is complete. After a match nothing more
            is given out.
        """
        if self.matched is not None:
            return "", self.matched
        text = self._held + piece
        # A match cannot begin before the held text: then more would have been held.
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start], self.matched
        n_held = self._held_back(text)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held], None

    def flush(self) -> str:
        """Gives out what is still held back, at the end of the text; "" after a match."""
        text, self._held = self._held, ""
        return text

    def _held_back(self, text: str) -> int:
        """Length of the longest end of the text that is a proper beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:n]):
                    longest = n
                    break
        return longest
