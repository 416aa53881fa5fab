"""How GGUF vocabularies split texts: ids of llama.cpp for every name it knows, recorded or computed.
FABULA_TEST_LONG=1 compares more texts; FABULA_TEST_LLAMA_CPP names an interpreter that has llama_cpp."""

from __future__ import annotations

import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_vocabulary
from fabula.errors import Unsupported
from fabula.text.pretokenizers import PRE_TOKENIZERS, REFUSED
from fabula.text.tokenizer import Tokenizer, TokenizerWarning

LONG = os.environ.get("FABULA_TEST_LONG") == "1"
RECORDED: dict[str, Any] = json.loads(llama_vocabulary.RECORDED.read_text(encoding="utf-8"))
TEXTS: list[str] = RECORDED["texts"]

# Every name in llama.cpp's source, src/llama-vocab.cpp of llama-cpp-python 0.3.36.
NAMES = [
    "default", "minicpm5", "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    "jina-v5-nano", "deepseek-llm", "deepseek-coder", "deepseek-v3", "spark2_5", "youtu", "falcon", "mpt",
    "starcoder", "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum",
    "modern-bert", "jais-2", "gemma4", "granite-embed-multi-311m", "sarvam-moe", "jina-v1-en", "jina-v2-code",
    "roberta-bpe", "whitespace", "refact", "command-r", "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "qwen35",
    "stablelm2", "olmo", "dbrx", "smaug-bpe", "poro-chat", "chatglm-bpe", "glm4", "glm5", "viking", "jais", "tekken",
    "smollm", "codeshell", "bloom", "gpt3-finnish", "exaone", "exaone4", "exaone-moe", "chameleon", "minerva-7b",
    "megrez", "gpt-4o", "llama4", "kanana2", "talkie", "granite-embed-multi-97m", "tiny_aya", "cohere2moe",
    "superbpe", "trillion", "granite-docling", "bailingmoe", "bailingmoe2", "llada-moe", "seed-coder", "hunyuan",
    "hunyuan-dense", "hy_v4", "joyai-llm", "kimi-k2", "ufakzeka", "grok-2", "afmoe", "laguna", "minimax-m2",
    "solar-open", "mellum2",
]  # fmt: skip
ALIKE = (("qwen2", "bailingmoe"), ("glm4", "minicpm5"))


def metadata(pre: str | None) -> dict[str, Any]:
    keys = llama_vocabulary.keys_of(RECORDED["merges"], pre)
    return keys | {"tokenizer.ggml.token_type": np.array(keys["tokenizer.ggml.token_type"], np.int32)}


def read(pre: str | None) -> Tokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TokenizerWarning)
        return Tokenizer.from_gguf(metadata(pre), Path("model.gguf"))


def test_every_name_is_read_or_refused_by_name() -> None:
    assert sorted([*PRE_TOKENIZERS, *REFUSED]) == sorted(NAMES)
    assert sorted(RECORDED["names"]) == sorted([*PRE_TOKENIZERS, ""])
    for name in REFUSED:
        with pytest.raises(Unsupported, match=f"'{name}', a vocabulary of characters"):
            read(name)
    with pytest.raises(Unsupported, match=r"'klingon'.*Hugging Face folder.*Known are a\.x-4\.0, afmoe"):
        read("klingon")


@pytest.mark.parametrize("name", sorted(RECORDED["names"]))
def test_ids_are_those_of_llama_cpp(name: str) -> None:
    tokenizer, recorded = read(name or None), RECORDED["names"][name]
    assert tokenizer.add_bos == recorded["add_bos"]
    for text, ways, way in zip(TEXTS, RECORDED["cuts"], recorded["cuts"], strict=True):
        assert tokenizer.encode(text, add_bos=False) == [int(i) for i in ways[way].split()], text


def test_the_texts_tell_the_rules_apart() -> None:
    """Else a wrong rule could pass. Two pairs are one rule in other words: where blanks before a line's end are taken
    greedily its end is too, and digits that were cut in threes are cut in threes by any number of them."""
    groups: dict[tuple[int, ...], set[tuple[str, ...]]] = {}
    for name, rule in PRE_TOKENIZERS.items():
        groups.setdefault(tuple(RECORDED["names"][name]["cuts"]), set()).add(rule.expressions)
    pairs = [{PRE_TOKENIZERS[name].expressions for name in pair} for pair in ALIKE]
    assert [rules for rules in groups.values() if len(rules) > 1 and rules not in pairs] == []


def test_a_missing_name_warns_and_works() -> None:
    for missing in (None, ""):
        with pytest.warns(TokenizerWarning, match=r'model.gguf: tokenizer.ggml.pre is missing.*"default"'):
            tokenizer = Tokenizer.from_gguf(metadata(missing), Path("model.gguf"))
        for text in TEXTS:
            assert tokenizer.encode(text) == read("default").encode(text)


@pytest.mark.parametrize("name", ["qwen2", "gpt-4o", "tiny_aya", "superbpe", "deepseek-v3", "bloom"])
@pytest.mark.parametrize("text", [" " * 4000, "1" * 4000, "a" * 4000, "\n" * 4000, "e\u0301" * 2000, "'s" * 2000])
def test_long_runs_come_back(name: str, text: str) -> None:
    tokenizer = read(name)
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


# ---- Asked ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter that has llama_cpp."""
    found = llama_vocabulary.python_with_llama_cpp()
    if found is None:
        pytest.skip("llama_cpp is not at hand (FABULA_TEST_LLAMA_CPP names an interpreter that has it)")
    return found


def drawn_texts(n: int, seed: int) -> list[str]:
    """Texts of the recorded ones' characters and pieces, in any order."""
    rng = random.Random(seed)
    pieces = [
        *{character for text in TEXTS for character in text},
        *(text[i : i + 5] for text in TEXTS for i in (0, 9)),
    ]
    return ["".join(rng.choices(sorted(pieces), k=rng.randint(1, 50))) for _ in range(n)]


def test_drawn_texts_give_the_ids_of_llama_cpp(python: str, tmp_path: Path) -> None:
    names = [*sorted(PRE_TOKENIZERS), None]
    texts = drawn_texts(2000 if LONG else 60, seed=5)
    keys = [llama_vocabulary.keys_of(RECORDED["merges"], name) for name in names]
    paths = [llama_vocabulary.write(tmp_path / f"{i}.gguf", one) for i, one in enumerate(keys)]
    for name, theirs in zip(names, llama_vocabulary.ask(python, paths, texts), strict=True):
        assert theirs is not None
        ours = read(name)
        for text, ids in zip(texts, theirs["ids"], strict=True):
            assert ours.encode(text, add_bos=False) == ids, (name, text)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_gives_the_ids_of_llama_cpp(prefix: bool, python: str, tmp_path: Path) -> None:
    """Pieces that overlap, unused ones, tokens that users may write, bytes for what has no piece."""
    words = ["the", "then", "hen", "en", "lion", "on", "li", "and", "an", "nd", "▁▁", "▁▁▁", "12", "23", "日本"]
    parts = sorted({word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, len(word) + 1)})
    pieces = sorted({*parts, *("▁" + part for part in parts), "▁"}, key=lambda piece: (-len(piece), piece))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<tool>", "  ", *pieces]
    kinds = [2, 3, 3] + [6] * 256 + [4, 4] + [5 if i % 9 == 0 and len(p) > 1 else 1 for i, p in enumerate(pieces)]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 261 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    rng = random.Random(7)
    bits = [*words, " ", "  ", "the ", " lion", "<tool>", "日", "é", "🙂", "\n", "\t", "▁", "e", "n"]
    texts = ["".join(rng.choices(bits, k=rng.randint(0, 12))) for _ in range(3000 if LONG else 400)]
    (theirs,) = llama_vocabulary.ask(python, [llama_vocabulary.write(tmp_path / "s.gguf", keys)], texts)
    assert theirs is not None
    arrays = {name: np.array(value) for name, value in keys.items() if name.endswith(("scores", "type"))}
    ours = Tokenizer.from_gguf(keys | arrays, tmp_path / "s.gguf")
    assert (ours.bos_id, ours.add_bos, sorted(ours.eos_ids)) == (1, theirs["add_bos"], theirs["ends"])
    for text, ids in zip(texts, theirs["ids"], strict=True):
        assert ours.encode(text, add_bos=False) == ids, text
