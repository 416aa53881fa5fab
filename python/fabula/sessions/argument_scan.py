"""Scanners that find where the arguments of a tool call end in text that arrives in pieces."""

from __future__ import annotations

import re

_JSON_SIGNS = re.compile(r'[{}"\\]')
_PYTHON_SIGNS = re.compile(r"""[\[\](){}"'\\,]""")


class ObjectScanner:
    """Finds the end of a JSON object.

    Args:
        depth: braces that are open where the text starts.

    Attributes:
        depth: braces that are open now; 0 after the object.
    """

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self._in_string, self._is_escaped = False, False

    def end(self, text: str) -> int:
        """Length of the part of the next text that belongs to the object."""
        start = 1 if self._is_escaped else 0
        self._is_escaped = False
        while (match := _JSON_SIGNS.search(text, start)) is not None:
            sign, start = match[0], match.end()
            if sign == "\\":
                self._is_escaped = start == len(text)
                start += 1
            elif sign == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self.depth += 1 if sign == "{" else -1
                if self.depth == 0:
                    return start
        return len(text)


class KeywordScanner:
    """Splits Python keyword arguments at their commas, up to the closing bracket."""

    def __init__(self) -> None:
        self._depth, self._quote = 0, ""
        self._n_scanned = 0

    def end(self, text: str) -> tuple[int, str] | None:
        """The end of the first argument.

        Args:
            text: starts where the last argument ended; the same text as in the last call, or more, if that found none.

        Returns:
            Its length and its last character, a comma or a bracket; None if more text is needed.
        """
        while (match := _PYTHON_SIGNS.search(text, self._n_scanned)) is not None:
            sign, self._n_scanned = match[0], match.end()
            if sign == "\\" and self._quote:
                self._n_scanned += 1
            elif sign in "\"'":
                self._quote = "" if self._quote == sign else self._quote or sign
            elif self._quote or sign == "\\":
                pass
            elif sign in "[({":
                self._depth += 1
            elif sign in "])}" and self._depth:
                self._depth -= 1
            elif not self._depth:
                end, self._n_scanned = self._n_scanned, 0
                return end, sign
        self._n_scanned = max(self._n_scanned, len(text))
        return None
