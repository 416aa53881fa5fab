"""Converts a tokenizer.json to GGUF key-values: the inverse of text/gguf_tokenizer.py.

GGUF does not contain the pre-tokenizer; it names one that readers know. So each name is tried, and the first is used
whose tokenizer, built from the key-values, encodes sample texts like the original. If there is none, the model is
refused: it would read and write gibberish.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fabula.errors import EngineError, TokenizerError, Unsupported, shown
from fabula.formats.gguf_write import Value
from fabula.text.gguf_tokenizer import BYTE, CONTROL, NORMAL, NORMALIZER, UNKNOWN, UNUSED, USER_DEFINED
from fabula.text.pretokenizers import CONTRACTIONS, PRE_TOKENIZERS
from fabula.text.tokenizer import Tokenizer

# Names with different rules, tried first; PRE_TOKENIZERS also has synonyms.
_NAMES = ("smollm", "gpt-2", "llama-bpe", "qwen2")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

# Texts that distinguish pre-tokenizers: runs of digits, contractions, runs of spaces and lines, other scripts,
# combining marks, symbols, code.
SAMPLES = (
    "Hello, world! It's 1234567890 o'clock; we'll see, they'VE said.",
    "  two  spaces   three\tand\ttabs \n\n\n lines \r\n end  ",
    "Grüße aus Köln, cafe\u0301 und café, naïve — “quotes” … 3.14159e-10 €99,95",
    "日本語のテキスト、漢字とかな。 한국어 텍스트. Русский текст, ещё раз. العربية ١٢٣ हिन्दी १२३",
    "👩‍👩‍👧 emoji 🙂🙂 ℝ² ½ ① ﬁ ａｂｃ１２３",
    "for (int i = 0; i < 100; ++i) { printf(\"%d\\n\", a[i] * b[i]); } // x_y-z\n    return;\n",
    "A don't DON'T I'M i'm 's'S 12 345 6 7890 v1.2.3 2026-01-31T23:59:59Z \u00a0nbsp\u3000wide",
    "",
    " ",
    "\n",
)  # fmt: skip


def vocabulary_keys(tokenizer: Tokenizer, vocab_size: int) -> tuple[dict[str, Value], list[str]]:
    """The key-values of a tokenizer, and a sentence for each thing that GGUF cannot express.

    Args:
        tokenizer: read from a Hugging Face folder.
        vocab_size: rows of the embedding; ids without a token get a filler that no text contains.

    Raises:
        TokenizerError: more tokens than rows.
        Unsupported: GGUF has no name for the vocabulary or pre-tokenizer.
    """
    description = tokenizer.description()
    model = description["model"]
    if model.get("type") != "BPE":
        raise Unsupported(f"{tokenizer.path}: a tokenizer of type {shown(model.get('type'))}; GGUF is written for BPE")
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{tokenizer.path}: {tokenizer.vocab_size} tokens, but the embedding has {vocab_size} rows",
            path=tokenizer.path,
            field="vocab",
        )
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    tokens, types = _tokens(description, vocab_size)
    shared: dict[str, Value] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.asarray(types, np.int32),
        **_special_ids(tokenizer),
    }
    for name, source in tokenizer.chat_templates.items():
        shared["tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"] = source
    if tokenizer.kind == "byte-level":
        candidates = _byte_level(description, merges, tokenizer.path)
    else:
        candidates = _sentencepiece(tokens, types, merges)
    for candidate in candidates:
        keys = {**candidate, **shared}
        if _encodes_alike(tokenizer, keys):
            return keys, _name_ends(tokenizer, keys)
    raise Unsupported(
        f"{tokenizer.path}: GGUF readers have no name for this pre-tokenizer; known are {', '.join(_NAMES)} "
        "and SentencePiece's"
    )


def _tokens(description: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Token and type of each id."""
    by_id: dict[int, str] = {token_id: token for token, token_id in description["model"]["vocab"].items()}
    types = dict.fromkeys(by_id, NORMAL)
    for token_id, token in by_id.items():
        if description["model"].get("byte_fallback") and _BYTE_TOKEN.fullmatch(token):
            types[token_id] = BYTE
    for added in description.get("added_tokens", []):
        by_id[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = description["model"].get("unk_token")
    taken = set(by_id.values())
    for token_id in range(vocab_size):
        if token_id not in by_id:
            filler = f"[PAD{token_id}]"
            by_id[token_id] = filler if filler not in taken else f"[PAD{token_id}-unused]"
            types[token_id] = UNUSED
        elif by_id[token_id] == unknown:
            types[token_id] = UNKNOWN
    return [by_id[i] for i in range(vocab_size)], [types[i] for i in range(vocab_size)]


def _special_ids(tokenizer: Tokenizer) -> dict[str, Value]:
    ids: dict[str, Value] = {"tokenizer.ggml.add_bos_token": tokenizer.add_bos}
    if tokenizer.bos_id is not None:
        ids["tokenizer.ggml.bos_token_id"] = tokenizer.bos_id
    ends = [*tokenizer.suffix, *tokenizer.eos_ids] if len(tokenizer.suffix) == 1 else tokenizer.eos_ids
    if len(tokenizer.suffix) == 1:  # the suffix is the first end token
        ids["tokenizer.ggml.add_eos_token"] = True
    if ends:
        ids["tokenizer.ggml.eos_token_id"] = ends[0]
    for name, key in (("unk_token", "unknown"), ("pad_token", "padding")):
        text = tokenizer.named_special.get(name)
        if text is not None and (found := tokenizer.id_of(text)) is not None:
            ids[f"tokenizer.ggml.{key}_token_id"] = found
    return ids


def _name_ends(tokenizer: Tokenizer, keys: dict[str, Value]) -> list[str]:
    """Adds keys for end tokens that readers would not know by their text; there is room for two besides eos."""
    known = Tokenizer.from_gguf(keys, tokenizer.path).eos_ids
    others = [token_id for token_id in tokenizer.eos_ids if token_id not in known]
    for key, token_id in zip(("eot", "eom"), others, strict=False):
        keys[f"tokenizer.ggml.{key}_token_id"] = token_id
    lost = ", ".join(shown(tokenizer.token_text(token_id)) for token_id in others[2:])
    return [f"GGUF has no keys for so many end tokens; these are left out: {lost}"] if lost else []


def _byte_level(
    description: Mapping[str, Any], merges: Sequence[Sequence[str]], path: Path
) -> Iterable[dict[str, Value]]:
    for i, merge in enumerate(merges):
        if len(merge) != 2 or any(" " in part or not part for part in merge):
            raise Unsupported(f"{path}: merge {i} is {shown(merge)}, GGUF holds two tokens with a space between")
    joined = [" ".join(merge) for merge in merges]
    # Rules with the same steps come first: with a small vocabulary several may give the same ids.
    looks = _steps(description.get("pre_tokenizer"))
    names = dict.fromkeys((*_NAMES, *PRE_TOKENIZERS))
    shared: dict[str, Value] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": joined}
    if (description.get("normalizer") or {}).get("type") == "NFC":
        shared[NORMALIZER] = "NFC"
    for name in sorted(names, key=lambda name: _steps(PRE_TOKENIZERS[name].steps) != looks):
        yield {**shared, "tokenizer.ggml.pre": name}


def _steps(described: Any) -> list[str]:
    """A pre-tokenizer as a flat list of its steps, without options that do not change the tokens."""
    if isinstance(described, Mapping) and described.get("type") == "Sequence":
        described = described.get("pretokenizers", [])
    steps = described if isinstance(described, list) else [described] if described else []
    kept = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    found = [json.dumps(step, sort_keys=True) for step in kept]
    return [step.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", CONTRACTIONS) for step in found]


def _sentencepiece(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[Sequence[str]]
) -> Iterable[dict[str, Value]]:
    """Scores encode the order of merges: the earlier a piece is merged, the higher."""
    order: dict[str, int] = {}
    for merge in merges:
        order.setdefault("".join(merge), len(order))
    last = len(order)
    scores = [
        -float(order.get(token, last)) if kind == NORMAL else 0.0 for token, kind in zip(tokens, types, strict=True)
    ]
    for prefix in (True, False):
        yield {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": np.asarray(scores, np.float32),
            "tokenizer.ggml.add_space_prefix": prefix,
        }


def _encodes_alike(tokenizer: Tokenizer, keys: Mapping[str, Value]) -> bool:
    try:
        made = Tokenizer.from_gguf(keys, tokenizer.path)
    except EngineError:
        return False
    # SentencePiece models differ in the space next to a control token, so there it is tested alone.
    around = "a{} b" if tokenizer.kind == "byte-level" else "{}"
    return all(
        made.encode(text, add_bos=False, special=special) == tokenizer.encode(text, add_bos=False, special=special)
        for text in (*SAMPLES, *(around.format(token) for token in tokenizer.special_tokens))
        for special in (False, True)
    )
