"""Builds a tokenizer from the vocabulary in a GGUF file.

The supported families have three kinds: byte-level BPE ("gpt2" with a named pre-tokenizer, see
`text/pretokenizers.py`), SentencePiece-like BPE with scores instead of merges ("llama"), and the same with merges
("gemma4"). Keys and values are those of the GGUF specification
and llama.cpp's converter; defaults of missing keys are llama.cpp's (src/llama-vocab.cpp of the source in
llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from fabula.errors import TokenizerError, Unsupported, shown
from fabula.text.end_tokens import END_TOKENS, GAP_ENDS, end_ids
from fabula.text.pretokenizers import DEFAULT, PRE_TOKENIZERS, REFUSED, PreTokenizer
from fabula.text.tokenizer import MAX_TOKEN_BYTES, Tokenizer, TokenizerWarning, build_backend, building

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_PIECES = (0, NORMAL, UNUSED)  # 0: unspecified
_ADDED = (CONTROL, USER_DEFINED, UNKNOWN)  # split off before merging

NORMALIZER = "fabula.tokenizer.normalizer"  # written by Fabula; the GGUF specification has no key for it
NO_TOKEN = 2**32 - 1  # -1: converters write it for "no such token"

# Unsupported kinds of vocabulary that llama.cpp reads.
_OTHER_MODELS = {
    "bert": "WordPiece",
    "t5": "Unigram",
    "rwkv": "RWKV's own",
    "plamo2": "PLaMo 2's own",
    "hybriddna": "BPE with DNA in it",
    "whitespace": "whole words",
    "no_vocab": "the file has none",
    "none": "the file has none",
}
_END_NAMES = frozenset(END_TOKENS).union(*GAP_ENDS.values())
_MERGES = "tokenizer.ggml.merges"
_TEMPLATE = "tokenizer.chat_template"
_SPECIAL = "tokenizer.ggml.{}_token_id"
# llama.cpp's defaults for a SentencePiece vocabulary without these keys. The ids are Llama's; they are used only if the
# token has that type.
_SENTENCEPIECE_IDS = {"bos": (1, CONTROL), "eos": (2, CONTROL), "unknown": (0, UNKNOWN)}
# Phi-3's control tokens absorb the whitespace after them, except these. Detected by the model's name, since GGUF has no
# flags for tokens.
_PHI3_NAMES = ("phi-3", "phi3")
_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LONGEST_PIECE = (
    512  # characters; SentencePiece itself stops at 16. Bounds the search for merges, which tries every split.
)


class _Keys:
    """Typed access to the tokenizer's keys; errors name file and key."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self._metadata, self.path = metadata, path

    def error(self, key: str, problem: str) -> TokenizerError:
        return TokenizerError(f"{self.path}: {key} {problem}", path=self.path, field=key)

    def texts(self, key: str, *, optional: bool = False) -> list[str] | None:
        value = self._metadata.get(key)
        if value is None and optional:
            return None
        if not isinstance(value, list) or not set(map(type, value)) <= {str}:
            raise self.error(key, "is missing" if value is None else "must be a list of strings")
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
            raise self.error(key, "must be a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def get(self, key: str) -> object:
        return self._metadata.get(key)

    def token_id(self, name: str, n_tokens: int, *, needed: bool = True) -> int | None:
        """The id of a special token; None if the file has none.

        Args:
            name: of the token, such as "bos".
            n_tokens: of the vocabulary.
            needed: whether a wrong id is an error; else it is ignored with a warning.
        """
        key = _SPECIAL.format(name)
        value = self._metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, bool) and isinstance(value, int) and 0 <= value < n_tokens:
            return value
        if value == NO_TOKEN or not needed:
            self.warn(f"{key} is {value!r:.40}, which is no id in 0 .. {n_tokens - 1}: taken as no token")
            return None
        raise self.error(key, f"is {value!r:.40}, must be an id in 0 .. {n_tokens - 1}")

    def templates(self) -> dict[str, str]:
        """Chat templates by name: `tokenizer.chat_template` is the one named "default"."""
        found = {}
        for key in self._metadata:
            if key == _TEMPLATE or key.startswith(_TEMPLATE + "."):
                name = key.removeprefix(_TEMPLATE).removeprefix(".") or "default"
                found[name] = self.text(key) or ""
        return found

    def warn(self, message: str) -> None:
        warnings.warn(f"{self.path}: {message}", TokenizerWarning, stacklevel=2)


def read_gguf(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """See `Tokenizer.from_gguf`."""
    keys = _Keys(metadata, path)
    tokens = keys.texts("tokenizer.ggml.tokens") or []
    ids = _ids_of(keys, tokens)
    types = keys.numbers("tokenizer.ggml.token_type", "iu", len(tokens))
    kinds: list[int] = [NORMAL] * len(tokens) if types is None else types.tolist()
    model = keys.text("tokenizer.ggml.model")
    special = _special_ids(keys, kinds, model)
    named = [i for name in ("eos", "eot", "eom") if (i := special[name]) is not None]
    ends = end_ids(ids, named, {name: special[name] for name in GAP_ENDS})
    words = _words(keys, ids, kinds)
    for i in ends:  # old converters typed some as text, so that users could write them
        if tokens[i] in _END_NAMES and tokens[i] not in words:
            kinds[i] = CONTROL
    add_bos = model in ("llama", "gemma4")
    if model == "gemma4":
        description = _characters(keys, ids, tokens, special["unknown"])
        for i, token in enumerate(tokens):  # runs of lines are tokens without merges
            if kinds[i] == NORMAL and len(token) > 1 and not token.strip("\n"):
                kinds[i] = USER_DEFINED
    elif model == "gpt2":
        rule = _rule(keys)
        add_bos = rule.add_bos
        description = _byte_level(keys, ids, rule)
    elif model == "llama":
        description = _sentencepiece(keys, tokens, ids, kinds, special["unknown"])
    else:
        about = f" ({_OTHER_MODELS[model]})" if model in _OTHER_MODELS else ""
        raise Unsupported(
            f"{path}: tokenizer.ggml.model is {shown(model)}{about}; known are gpt2, llama and gemma4, which the "
            "families that run here have"
        )
    backend = _build(keys, description, _added(keys, tokens, kinds))
    bos, eos = special["bos"], special["eos"]
    names = {"unk_token": "unknown", "pad_token": "padding", "eos_token": "eos", "bos_token": "bos"}
    return Tokenizer(
        backend,
        path=path,
        bos_id=bos,
        eos_ids=ends,
        prefix=[bos] if keys.flag("tokenizer.ggml.add_bos_token", add_bos) and bos is not None else [],
        suffix=[eos] if keys.flag("tokenizer.ggml.add_eos_token", False) and eos is not None else [],
        chat_templates=keys.templates(),
        named_special={name: tokens[i] for name, key in names.items() if (i := special[key]) is not None},
        vocabulary=ids,
    )


def _special_ids(keys: _Keys, kinds: Sequence[int], model: str | None) -> dict[str, int | None]:
    """Ids of special tokens, by their names in keys."""
    found = {name: keys.token_id(name, len(kinds)) for name in ("bos", "eos")}
    others = ("eot", "eom", "unknown", "padding", *GAP_ENDS)
    found |= {name: keys.token_id(name, len(kinds), needed=False) for name in others}
    if model == "llama":
        for name, (i, kind) in _SENTENCEPIECE_IDS.items():
            if found[name] is None and keys.get(_SPECIAL.format(name)) is None and i < len(kinds) and kinds[i] == kind:
                found[name] = i
    return found


def _words(keys: _Keys, ids: Mapping[str, int], kinds: Sequence[int]) -> set[str]:
    """End tokens that merges can also produce, such as "</s>" in Qwen's vocabulary. They end a reply, as in llama.cpp,
    but in user input they are text, as in HTML."""
    plain = {name for name in _END_NAMES if name in ids and kinds[ids[name]] == NORMAL}
    if not plain:
        return plain
    return {word for merge in keys.texts(_MERGES, optional=True) or [] if (word := merge.replace(" ", "", 1)) in plain}


def _added(keys: _Keys, tokens: Sequence[str], kinds: Sequence[int]) -> list[AddedToken]:
    """Tokens that are split off a text before merging."""
    model = str(keys.get("general.name")).lower()
    is_phi3 = any(name in model for name in _PHI3_NAMES)
    return [
        AddedToken(token, normalized=False, special=kind != USER_DEFINED, rstrip=is_phi3 and token not in _PHI3_PLAIN)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in _ADDED and token
    ]


def _rule(keys: _Keys) -> PreTokenizer:
    """The pre-tokenizer named by the file."""
    name = keys.text("tokenizer.ggml.pre")
    if not name:
        keys.warn(
            "tokenizer.ggml.pre is missing, so nothing says how texts are cut: taken as llama.cpp takes it, by the "
            f'rule "{DEFAULT}". Answers may be worse than the model\'s; a file of a newer converter has the key'
        )
        name = DEFAULT
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    if name in REFUSED:
        raise Unsupported(
            f"{keys.path}: tokenizer.ggml.pre is {shown(name)}, a vocabulary of characters instead of bytes, which no "
            "family that runs here has"
        )
    raise Unsupported(
        f"{keys.path}: tokenizer.ggml.pre is {shown(name)}, and how it cuts texts is not known here. Load the model's "
        f"Hugging Face folder, which spells it out. Known are {', '.join(sorted(PRE_TOKENIZERS))}"
    )


def _build(keys: _Keys, description: Mapping[str, Any], added: list[AddedToken]) -> Backend:
    """Builds the library's tokenizer from the content of a tokenizer.json. Tokens and merges bypass JSON: writing,
    checking and parsing them would take five times as long."""
    bpe = dict(description["model"])
    path = keys.path
    backend = build_backend(json.dumps({**description, "model": {"type": "BPE", "vocab": {}, "merges": []}}), path)
    try:
        with building(path):
            backend.model = models.BPE(**bpe)
            backend.add_tokens(added)
    except TokenizerError:
        _check_merges(keys, bpe["vocab"])  # raises an error that names the entry
        raise
    return backend


def _ids_of(keys: _Keys, tokens: Sequence[str]) -> dict[str, int]:
    """The vocabulary: token -> id."""
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
    """Merges as pairs, split lazily. A list of tuples took 3 MB more at the peak for SmolLM2, and a third of the time
    to build the tokenizer, because Python's garbage collector scans them."""

    def __init__(self, merges: Sequence[str]) -> None:
        self._merges = merges

    def __len__(self) -> int:
        return len(self._merges)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self._merges[index].split(" ", 1))

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return (tuple(merge.split(" ", 1)) for merge in self._merges)


def _byte_level(keys: _Keys, vocabulary: Mapping[str, int], rule: PreTokenizer) -> dict[str, Any]:
    """Description of a byte-level BPE tokenizer, with the merges of the file."""
    merges = _Pairs(keys.texts(_MERGES) or [])
    if "" in vocabulary:  # the library would accept a merge with an empty token
        _check_merges(keys, vocabulary)
    return {
        "version": "1.0",
        "normalizer": {"type": "NFC"} if keys.text(NORMALIZER) == "NFC" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": rule.steps},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "vocab": vocabulary,
            "merges": merges,
            "ignore_merges": rule.whole_words,
        },
    }


def _characters(
    keys: _Keys, vocabulary: Mapping[str, int], tokens: Sequence[str], unknown: int | None
) -> dict[str, Any]:
    """Description of a BPE tokenizer of characters, with the merges of the file: spaces are written as "▁", nothing is
    merged across the end of a line, and characters that are no token become bytes."""
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {
        "version": "1.0",
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "\n+"}, "behavior": "Isolated", "invert": False
        },
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": _Pairs(keys.texts(_MERGES) or []),
        },
    }  # fmt: skip


def _check_merges(keys: _Keys, vocabulary: Mapping[str, int]) -> None:
    """Raises TokenizerError for the first invalid merge. The library's own check is faster, but does not name the
    entry."""
    for i, merge in enumerate(keys.texts(_MERGES, optional=True) or []):
        left, separator, right = merge.partition(" ")
        if not separator or not left or not right:
            raise keys.error(_MERGES, f"entry {i} is {shown(merge)}, must be two tokens with a space between")
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise keys.error(_MERGES, f"entry {i} names {shown(token)}, which is not in the vocabulary")


def _sentencepiece(
    keys: _Keys, tokens: Sequence[str], vocabulary: Mapping[str, int], kinds: Sequence[int], unknown: int | None
) -> dict[str, Any]:
    """Description of a SentencePiece BPE tokenizer. SentencePiece has a score per piece, and the merge that gives the
    piece with the highest score goes first. So every split of a piece into two known ones is a merge with that piece's
    rank. Unused tokens are pieces too, as in llama.cpp. Of pieces with equal scores, which no trained vocabulary has,
    the lower id goes first; llama.cpp takes the leftmost in the text."""
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
        if kinds[i] not in _PIECES or len(token) < 2:
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
