"""Tokenizers of both file formats against the `tokenizers` library, streaming decode, and hostile vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fabula.errors import InvalidArgument, ModelFileError, TokenizerError, Unsupported
from fabula.text.stream import BYTE_OF_CHARACTER
from fabula.text.tokenizer import Tokenizer

BYTE_OF_CHARACTER_INVERSE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
TEXTS = [
    "",
    " ",
    "  two spaces, \t a tab\n\n and lines \r\n",
    "Hello, world! It's 12345 o'clock; we'll see... don't",
    "def f(x):\n    return x**2  # comment\n\n\n",
    "Der Fuß, l'été, naïve café, Ωμέγα, кот, עברית, العربية",
    "你好，世界。今天天气怎么样？ 日本語のテキスト 한국어",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 and combining e\u0301 a\u030a",
    "control \x00\x01\x7f \u200b\u202e \ufeff end",
    "ＦＵＬＬ ｗｉｄｔｈ ﬁ ligature ½ ² №",
    "a" * 300,
]


@pytest.fixture(scope="module")
def story(story_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(story_folder)


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    """A small byte-level vocabulary as GGUF metadata: all bytes and a few merges."""
    merges = ["t h", "th e", "Ġ the", "i n", "Ġ a", "Ø §", "ð Ł"]
    tokens = [*BYTE_OF_CHARACTER, *(merge.replace(" ", "") for merge in merges), "<|start|>", "<|im_end|>", "<think>"]
    types = [1] * (len(tokens) - 3) + [3, 3, 4]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        "tokenizer.ggml.add_bos_token": True,
    }


def sentencepiece_metadata(folder: Path) -> dict[str, Any]:
    """What a GGUF converter would write for a SentencePiece-like tokenizer.json: scores fall with the merge rank."""
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    special = {token["content"] for token in data["added_tokens"]}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([-float(ranks.get(token, 10**6)) for token in tokens], np.float32),
        "tokenizer.ggml.token_type": np.array([3 if token in special else 1 for token in tokens], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


# ---- Equal to the reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_folder_equals_the_library(story: Tokenizer, story_folder: Path, text: str) -> None:
    reference = tokenizers.Tokenizer.from_file(str(story_folder / "tokenizer.json"))
    assert story.encode(text) == reference.encode(text).ids
    assert story.encode(text, add_bos=False) == reference.encode(text, add_special_tokens=False).ids
    ids = reference.encode(text).ids
    if 0 not in ids:  # the unknown token replaces what the vocabulary lacks
        assert story.decode(ids) == text == reference.decode(ids[1:])


def test_what_the_story_model_says_of_itself(story: Tokenizer) -> None:
    assert (story.bos_id, story.eos_ids, story.add_bos, story.kind) == (1, (2,), True, "sentencepiece")
    assert story.vocab_size == 2048
    assert story.chat_template is None


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_equals_transformers(smollm2: Tokenizer, smollm2_transformers: Any, text: str) -> None:
    reference = smollm2_transformers.backend_tokenizer
    assert smollm2.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert smollm2.decode(smollm2.encode(text)) == text == reference.decode(reference.encode(text).ids)


def test_smollm2_control_tokens(smollm2: Tokenizer) -> None:
    assert (smollm2.bos_id, smollm2.eos_ids[0], smollm2.add_bos, smollm2.kind) == (1, 2, False, "byte-level")
    assert smollm2.encode("<|im_end|>", special=True) == [2]
    plain = smollm2.encode("<|im_end|>")
    assert len(plain) > 3 and not set(plain) & smollm2.special_ids
    assert smollm2.decode(plain) == "<|im_end|>"
    assert smollm2.decode([1, 2]) == ""
    assert smollm2.decode([1, 2], skip_special=False) == "<|im_start|><|im_end|>"


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=60))
def test_any_text_comes_back(text: str, smollm2: Tokenizer, smollm2_transformers: Any) -> None:
    reference = smollm2_transformers.backend_tokenizer
    ids = smollm2.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False).ids or "<|" in text
    assert smollm2.decode(ids) == reference.decode(ids)
    # SmolLM2's vocabulary lacks a few bytes that no text it was trained on has; like the reference, it drops them.
    known = reference.get_vocab()
    if all(BYTE_OF_CHARACTER_INVERSE[byte] in known for byte in text.encode()):
        assert smollm2.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_scores_give_the_merges(story: Tokenizer, story_folder: Path, text: str) -> None:
    built = Tokenizer.from_gguf(sentencepiece_metadata(story_folder), story_folder / "model.gguf")
    assert built.encode(text) == story.encode(text)
    assert built.decode(built.encode(text)) == story.decode(story.encode(text))
    assert (built.bos_id, built.eos_ids, built.add_bos) == (1, (2,), True)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_gguf_vocabulary_is_what_its_json_would_be(byte_level: dict[str, Any], pre: str) -> None:
    """It does not go through JSON, and is the same tokenizer, from the order of merges to the flags of added tokens."""
    built = Tokenizer.from_gguf({**byte_level, "tokenizer.ggml.pre": pre}, Path("model.gguf"))
    tokens, merges = byte_level["tokenizer.ggml.tokens"], byte_level["tokenizer.ggml.merges"]
    description = dict(built.description())
    assert description["model"]["vocab"] == {token: i for i, token in enumerate(tokens)}
    assert [tuple(merge) for merge in description["model"]["merges"]] == [tuple(m.split(" ")) for m in merges]
    assert description["model"]["ignore_merges"] == (pre == "llama-bpe")
    added = [(token["id"], token["content"], token["special"]) for token in description["added_tokens"]]
    n = len(tokens)
    assert added == [(n - 3, "<|start|>", True), (n - 2, "<|im_end|>", True), (n - 1, "<think>", False)]
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    assert not any(token[flag] for token in description["added_tokens"] for flag in flags)
    assert built._backend.get_vocab(with_added_tokens=True) == {built.token_text(i): i for i in range(n)}
    again = tokenizers.Tokenizer.from_str(json.dumps(description))
    assert again.to_str() == built._backend.to_str()
    for text in TEXTS:
        assert built.encode(text, add_bos=False) == again.encode(text, add_special_tokens=False).ids or "<|" in text


def test_smollm2_is_what_its_json_would_be(smollm2: Tokenizer) -> None:
    written = smollm2._backend.to_str()
    assert tokenizers.Tokenizer.from_str(written).to_str() == written
    assert smollm2._backend.get_vocab(with_added_tokens=True) == {
        smollm2.token_text(i): i for i in range(smollm2.vocab_size)
    }


# ---- Streaming ---------------------------------------------------------------------------------------------


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream_decoder()
    return [decoder.push(i) for i in ids] + [decoder.flush()]


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_streaming_equals_decoding(data: st.DataObject, byte_level: dict[str, Any]) -> None:
    """Any ids, sense or nonsense: the pieces joined are the whole, and equal the library's decode."""
    tokenizer = Tokenizer.from_gguf(byte_level, Path("model.gguf"))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == tokenizer._backend.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", ["🙂", "👩‍👩‍👧", "日本語", "é" * 5, "a🙂b"])
def test_no_half_characters(smollm2: Tokenizer, text: str) -> None:
    pieces = stream(smollm2, smollm2.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    cut = smollm2.encode("🙂")[:-1]
    assert stream(smollm2, cut)[-1] == "\ufffd", "bytes that never became a character show at the end only"


def test_byte_fallback_and_leading_space() -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁hi", "hi"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0.0] * 259 + [-9, -9, -9, -1, -2], np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * 5, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = Tokenizer.from_gguf(metadata, Path("model.gguf"))
    for text in ("hi", " hi", "hi 🙂 hi", "日", ""):
        ids = tokenizer.encode(text)
        assert ids[0] == 1
        assert tokenizer.decode(ids) == text
        assert "".join(stream(tokenizer, ids)) == text
    assert tokenizer.encode("🙂")[2:] == [3 + byte for byte in "🙂".encode()]
    assert tokenizer.token_bytes(3 + 0xE2) == b"\xe2"


def test_long_streams_cost_the_same_per_token(byte_level: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level, Path("model.gguf"))
    decoder = tokenizer.stream_decoder()
    emoji = tokenizer.encode("🙂", add_bos=False)
    for _ in range(20_000):
        for i in emoji:
            decoder.push(i)
    assert not decoder._decoder.getstate()[0], "nothing is kept but an unfinished character"


# ---- Wrong input -------------------------------------------------------------------------------------------


def test_wrong_text_and_ids(byte_level: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level, Path("model.gguf"))
    with pytest.raises(InvalidArgument, match="lone surrogate at position 2"):
        tokenizer.encode("ab\ud800")
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(InvalidArgument, match="not in the vocabulary"):
            tokenizer.decode([bad])
    assert tokenizer.encode("") == [tokenizer.bos_id]
    del byte_level["tokenizer.ggml.bos_token_id"]
    with pytest.raises(InvalidArgument, match="no start token"):
        Tokenizer.from_gguf(byte_level, Path("model.gguf")).encode("a", add_bos=True)


def test_nothing_cannot_be_merged(byte_level: dict[str, Any]) -> None:
    """Not even where the vocabulary has a token without text."""
    metadata = byte_level | {"tokenizer.ggml.tokens": [*byte_level["tokenizer.ggml.tokens"], ""]}
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer.from_gguf(metadata, Path("model.gguf"))
    assert tokenizer.token_bytes(tokenizer.vocab_size - 1) == b""
    metadata["tokenizer.ggml.merges"] = [*metadata["tokenizer.ggml.merges"], " h"]
    with pytest.raises(TokenizerError, match="two tokens with a space"):
        Tokenizer.from_gguf(metadata, Path("model.gguf"))


SP = {"tokenizer.ggml.model": "llama"}


def sentencepiece(tokens: list[str], scores: Any, kinds: list[int]) -> dict[str, Any]:
    return SP | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": np.array(kinds),
    }


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"tokenizer.ggml.tokens": None}, TokenizerError, "tokens is missing"),
        ({"tokenizer.ggml.tokens": []}, TokenizerError, "is empty"),
        ({"tokenizer.ggml.tokens": [1, 2]}, TokenizerError, "list of strings"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, TokenizerError, "entries 0 and 2 are both"),
        ({"tokenizer.ggml.tokens": ["a", "b" * 2**20]}, TokenizerError, "entry 1 has 1048576 characters"),
        ({"tokenizer.ggml.token_type": np.ones(3, np.int32)}, TokenizerError, "has 3 entries"),
        ({"tokenizer.ggml.token_type": "x"}, TokenizerError, "list of numbers"),
        ({"tokenizer.ggml.model": None}, Unsupported, "known are gpt2, llama and gemma4"),
        ({"tokenizer.ggml.model": "bert"}, Unsupported, "bert"),
        ({"tokenizer.ggml.model": 3}, TokenizerError, "must be a string"),
        ({"tokenizer.ggml.pre": "klingon"}, Unsupported, "klingon"),
        ({"tokenizer.ggml.merges": ["th"]}, TokenizerError, "two tokens with a space"),
        ({"tokenizer.ggml.merges": ["t zebra"]}, TokenizerError, "names 'zebra'"),
        ({"tokenizer.ggml.merges": [" "]}, TokenizerError, "two tokens"),
        ({"tokenizer.ggml.merges": ["t h", "x"]}, TokenizerError, "entry 1 is 'x'"),
        ({"tokenizer.ggml.merges": ["t h", "t h e"]}, TokenizerError, "entry 1 names 'h e'"),
        ({"tokenizer.ggml.merges": ["t h", "h t"]}, TokenizerError, "entry 1 names 'ht'"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, TokenizerError, "bos_token_id is 1000000"),
        ({"tokenizer.ggml.eos_token_id": -1}, TokenizerError, "eos_token_id is -1"),
        ({"tokenizer.ggml.eos_token_id": True}, TokenizerError, "eos_token_id is True"),
        ({"tokenizer.ggml.add_bos_token": 1}, TokenizerError, "true or false"),
        ({"tokenizer.chat_template": 5}, TokenizerError, "must be a string"),
        (SP, TokenizerError, "scores is missing"),
        (SP | {"tokenizer.ggml.scores": np.zeros(2)}, TokenizerError, "has 2 entries"),
        (sentencepiece(["a", "<0x-1>"], np.zeros(2), [1, 6]), TokenizerError, "<0x-1>"),
        (sentencepiece(["a", "<0xZZ>"], np.zeros(2), [1, 6]), TokenizerError, "<0xZZ>"),
        (sentencepiece(["a", "b"], np.array([0, np.nan]), [1, 1]), TokenizerError, "NaN"),
        (sentencepiece(["a", "b" * 600], np.zeros(2), [1, 1]), TokenizerError, "600 characters"),
    ],
)  # fmt: skip
def test_hostile_gguf_vocabularies(
    byte_level: dict[str, Any], change: dict[str, Any], error: type[Exception], text: str
) -> None:
    metadata = {key: value for key, value in (byte_level | change).items() if value is not None}
    for key in ("bos_token_id", "eos_token_id"):
        if f"tokenizer.ggml.{key}" not in change and "tokenizer.ggml.tokens" in change:
            metadata.pop(f"tokenizer.ggml.{key}", None)
    if "tokenizer.ggml.tokens" in change and "tokenizer.ggml.token_type" not in change:
        metadata.pop("tokenizer.ggml.token_type")
    with pytest.raises(error, match=text) as caught:
        Tokenizer.from_gguf(metadata, Path("somewhere/model.gguf"))
    assert "model.gguf" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"model": {"type": "BPE"}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 99999999}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
        b'{"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}}',
        b"\xff\xfe",
        b'{"a": ' * 50_000,
    ],
)
def test_hostile_tokenizer_files(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises((ModelFileError, Unsupported)) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path)
