"""A GGUF vocabulary as the tokenizer it was made from.

Two kinds exist in the families Fabula runs: byte-level BPE ("gpt2" with a pre-tokenizer by name) and
SentencePiece-like BPE with scores instead of merges ("llama"). Key names and values are those of the GGUF
specification and llama.cpp's converter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from fabula.errors import TokenizerError, Unsupported
from fabula.formats.gguf_keys import NO_TOKEN, warn
from fabula.formats.readfile import shown
from fabula.text.tokenizer import END_TOKENS, MAX_TOKEN_BYTES, Tokenizer, build_backend, building

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_ADDED = (CONTROL, USER_DEFINED, UNKNOWN)  # cut out of a text before it is merged

# How text is cut before merging, by tokenizer.ggml.pre. Patterns are those of the models' own tokenizer.json.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> list[dict[str, Any]]:
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS: Mapping[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    "llama-bpe": _split(_LLAMA3),
    "llama3": _split(_LLAMA3),
    "llama-v3": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
}
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3"}  # their tokenizer.json sets ignore_merges
_NORMALIZED = {"qwen2"}  # their tokenizer.json normalises to NFC

_MERGES = "tokenizer.ggml.merges"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LONGEST_PIECE = 512  # characters; SentencePiece itself stops at 16. Merges are found by cutting a piece everywhere.


class _Keys:
    """The tokenizer's key-values with checks that name file and key."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self._metadata, self.path = metadata, path

    def error(self, key: str, problem: str) -> TokenizerError:
        return TokenizerError(f"{self.path}: {key} {problem}", path=self.path, field=key)

    def texts(self, key: str, *, optional: bool = False) -> list[str] | None:
        value = self._metadata.get(key)
        if value is None and optional:
            return None
        if not isinstance(value, list) or not set(map(type, value)) <= {str}:
            raise self.error(key, "is missing" if value is None else "must be a list of texts")
        return value

    def numbers(self, key: str, kinds: str, length: int) -> np.ndarray[Any, Any] | None:
        value = self._metadata.get(key)
        if value is None:
            return None
        array = np.asarray(value)
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise self.error(key, "must be a list of numbers")
        if len(array) != length:
            raise self.error(key, f"has {len(array)} entries for {length} tokens")
        return array

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self._metadata.get(key, default)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "must be a text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def token_id(self, key: str, n_tokens: int, *, needed: bool = True) -> int | None:
        """An id; None where there is none. A wrong one that nothing depends on is passed over with a warning."""
        value = self._metadata.get(key)
        if value is None:
            return None
        beyond = isinstance(value, int) and not 0 <= value < n_tokens
        if beyond and (value == NO_TOKEN or not needed):
            warn(self.path, f"{key} is {value}, which is no id in 0 .. {n_tokens - 1}: taken as no token")
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n_tokens:
            raise self.error(key, f"is {value!r:.40}, must be an id in 0 .. {n_tokens - 1}")
        return value


def read_gguf(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """See `Tokenizer.from_gguf`."""
    keys = _Keys(metadata, path)
    tokens = keys.texts("tokenizer.ggml.tokens") or []
    ids = _ids_of(keys, tokens)
    types = keys.numbers("tokenizer.ggml.token_type", "iu", len(tokens))
    kinds: list[int] = [NORMAL] * len(tokens) if types is None else types.tolist()
    model = keys.text("tokenizer.ggml.model")
    if model == "gpt2":
        description = _byte_level(keys, ids)
    elif model == "llama":
        description = _sentencepiece(keys, tokens, ids, kinds)
    else:
        raise Unsupported(f"{path}: tokenizer.ggml.model is {shown(model)}; known are gpt2 and llama")
    added = [
        AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in _ADDED and token
    ]
    backend = _build(keys, description, added)
    bos_id = keys.token_id("tokenizer.ggml.bos_token_id", len(tokens))
    ends = [keys.token_id(f"tokenizer.ggml.{name}_token_id", len(tokens)) for name in ("eos", "eot", "eom")]
    bos_text = None if bos_id is None else tokens[bos_id]
    ends += [ids[t] for t in END_TOKENS if t in ids and kinds[ids[t]] == CONTROL and t != bos_text]
    named = {}
    for name, key in (("unk_token", "unknown"), ("pad_token", "padding"), ("eos_token", "eos"), ("bos_token", "bos")):
        token_id = keys.token_id(
            f"tokenizer.ggml.{key}_token_id", len(tokens), needed=name in ("bos_token", "eos_token")
        )
        if token_id is not None:
            named[name] = tokens[token_id]
    return Tokenizer(
        backend,
        path=path,
        bos_id=bos_id,
        eos_ids=[i for i in ends if i is not None],
        # llama.cpp's rule: SentencePiece vocabularies start with it unless the file says otherwise.
        add_bos=keys.flag("tokenizer.ggml.add_bos_token", model == "llama") and bos_id is not None,
        chat_template=keys.text("tokenizer.chat_template"),
        named_special=named,
        vocabulary=ids,
    )


def _build(keys: _Keys, description: Mapping[str, Any], added: list[AddedToken]) -> Backend:
    """What the library makes of a tokenizer.json of this content. Only its small parts go through JSON: tokens and
    merges in it, written, checked and read again, would take five times as long."""
    bpe = dict(description["model"])
    path = keys.path
    backend = build_backend(json.dumps({**description, "model": {"type": "BPE", "vocab": {}, "merges": []}}), path)
    try:
        with building(path):
            backend.model = models.BPE(**bpe)
            backend.add_tokens(added)
    except TokenizerError:
        _check_merges(keys, bpe["vocab"])  # says which entry it was
        raise
    return backend


def _ids_of(keys: _Keys, tokens: Sequence[str]) -> dict[str, int]:
    """The vocabulary: every token's id."""
    key = "tokenizer.ggml.tokens"
    if not tokens:
        raise keys.error(key, "is empty")
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) == len(tokens) and max(map(len, tokens)) <= MAX_TOKEN_BYTES:
        return ids
    seen: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if len(token) > MAX_TOKEN_BYTES:
            raise keys.error(key, f"entry {i} has {len(token)} characters, at most {MAX_TOKEN_BYTES}")
        if token in seen:
            raise keys.error(key, f"entries {seen[token]} and {i} are both {shown(token)}")
        seen[token] = i
    return ids


class _Pairs(Sequence[tuple[str, ...]]):
    """Merges as the library takes them, each cut in two when it is asked for: as many tuples at once took 3 MB more at
    SmolLM2's peak, and a third of a tokenizer's time, since Python looks through them for cycles."""

    def __init__(self, merges: Sequence[str]) -> None:
        self._merges = merges

    def __len__(self) -> int:
        return len(self._merges)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self._merges[index].split(" ", 1))

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return (tuple(merge.split(" ", 1)) for merge in self._merges)


def _byte_level(keys: _Keys, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """Byte-level BPE: merges are in the file."""
    pre = keys.text("tokenizer.ggml.pre", "gpt-2")
    if pre is None or pre not in PRE_TOKENIZERS:
        raise Unsupported(
            f"{keys.path}: tokenizer.ggml.pre is {shown(pre)}; known are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    merges = _Pairs(keys.texts(_MERGES) or [])
    if "" in vocabulary:  # the library would take a merge with nothing
        _check_merges(keys, vocabulary)
    return {
        "version": "1.0",
        "normalizer": {"type": "NFC"} if pre in _NORMALIZED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "vocab": vocabulary,
            "merges": merges,
            "ignore_merges": pre in _WHOLE_WORDS_FIRST,
        },
    }


def _check_merges(keys: _Keys, vocabulary: Mapping[str, int]) -> None:
    """Raises TokenizerError for the first merge that is none. The library looks for the same and is faster, but does
    not tell the entry."""
    for i, merge in enumerate(keys.texts(_MERGES, optional=True) or []):
        left, separator, right = merge.partition(" ")
        if not separator or not left or not right:
            raise keys.error(_MERGES, f"entry {i} is {shown(merge)}, must be two tokens with a space between")
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise keys.error(_MERGES, f"entry {i} names {shown(token)}, which is not in the vocabulary")


def _sentencepiece(
    keys: _Keys, tokens: Sequence[str], vocabulary: Mapping[str, int], kinds: Sequence[int]
) -> dict[str, Any]:
    """SentencePiece's BPE keeps a score a piece: the merge that makes the piece of the highest score goes first.
    Every way to cut a piece into two known ones is a merge of that piece's rank."""
    scores = keys.numbers("tokenizer.ggml.scores", "fiu", len(tokens))
    if scores is None:
        raise keys.error("tokenizer.ggml.scores", "is missing")
    if not np.isfinite(scores.astype(np.float64)).all():
        raise keys.error("tokenizer.ggml.scores", "holds NaN or infinity")
    order = (-scores.astype(np.float64)).tolist()
    for i, kind in enumerate(kinds):
        if kind == BYTE and not _BYTE_TOKEN.fullmatch(tokens[i]):
            raise keys.error(
                "tokenizer.ggml.tokens", f"entry {i} is {shown(tokens[i])}, a byte token is <0x00> .. <0xFF>"
            )
    merges: list[tuple[float, int, int, int]] = []
    for i, token in enumerate(tokens):
        if kinds[i] != NORMAL or len(token) < 2:
            continue
        if len(token) > _LONGEST_PIECE:
            raise keys.error(
                "tokenizer.ggml.tokens", f"entry {i} has {len(token)} characters, at most {_LONGEST_PIECE}"
            )
        for cut in range(1, len(token)):
            left = vocabulary.get(token[:cut])
            if left is not None and (right := vocabulary.get(token[cut:])) is not None:
                merges.append((order[i], i, left, right))
    merges.sort()
    unknown = keys.token_id("tokenizer.ggml.unknown_token_id", len(tokens), needed=False)
    normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if keys.flag("tokenizer.ggml.add_space_prefix", True):
        normalizers.insert(0, {"type": "Prepend", "prepend": "▁"})
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": [(tokens[left], tokens[right]) for *_, left, right in merges],
        },
    }
