"""Streaming detokenizer: token ids to text, one token at a time, without partial characters.

In both kinds of vocabulary a token is a byte string: in a byte-level one each character stands for a byte (GPT-2's
table); in a SentencePiece-like one a token is UTF-8 with "▁" for a space, or a single byte written <0xE2>. An
incremental UTF-8 decoder holds back incomplete characters and turns invalid bytes into U+FFFD. The cost per token does
not depend on the length of the text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_table() -> dict[str, int]:
    """GPT-2's map from the character that stands for a byte to the byte (Radford et al. 2019, encoder.py's rule):
    printable bytes stand for themselves, the others take the code points from 256 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in printable)
    return table | {chr(256 + i): byte for i, byte in enumerate(rest)}


BYTE_OF_CHARACTER: Mapping[str, int] = _byte_table()


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; a token outside the table (an added one) is its own UTF-8."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode("utf-8", "replace")


def sentencepiece_bytes(token: str) -> bytes:
    """The bytes of a SentencePiece-like token: <0xE2> is one byte, "▁" a space."""
    match = _BYTE_TOKEN.fullmatch(token)
    if match:
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode("utf-8", "replace")


class TokenBytes(dict[int, bytes]):
    """Bytes of each id, computed on first use: a text uses only a small part of a vocabulary.

    Args:
        tokens: as written in the vocabulary, by id.
        bytes_of: computes the bytes of a token.
        known: ids with given bytes.
    """

    def __init__(self, tokens: Mapping[int, str], bytes_of: Callable[[str], bytes], known: Mapping[int, bytes]) -> None:
        super().__init__(known)
        self._tokens, self._bytes_of = tokens, bytes_of

    def __missing__(self, token_id: int) -> bytes:
        """Raises KeyError for an unknown id."""
        found = self[token_id] = self._bytes_of(self._tokens[token_id])
        return found


class IncrementalDecoder:
    """Turns ids into text piece by piece; made by `Tokenizer.stream_decoder`.

    Args:
        bytes_of: bytes of each id; b"" for skipped ones.
        strip_space: whether to drop a space at the very beginning, which SentencePiece adds.
    """

    def __init__(self, bytes_of: Mapping[int, bytes], strip_space: bool) -> None:
        self._bytes_of = bytes_of
        self._strip = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text completed by this token; "" inside a character of several tokens."""
        return self._clean(self._decoder.decode(self._bytes_of[token_id]))

    def breaks(self, token_id: int) -> bool:
        """Whether this token cannot complete the held-back character, which then becomes U+FFFD before it."""
        held, first = self._decoder.getstate()[0], self._bytes_of[token_id][:1]
        if not held or not first:
            return False
        try:
            codecs.getincrementaldecoder("utf-8")("strict").decode(held + first)
        except UnicodeDecodeError:
            return True
        return False

    def flush(self) -> str:
        """The rest at the end: U+FFFD for an incomplete character."""
        return self._clean(self._decoder.decode(b"", True))

    def _clean(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
