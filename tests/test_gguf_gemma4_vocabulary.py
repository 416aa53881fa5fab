"""Gemma 4's kind of vocabulary, BPE of characters, as llama.cpp reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fabula.formats.gguf import GgufFile
from fabula.formats.gguf_write import GgufWriter
from fabula.text.tokenizer import Tokenizer
from llama_peer import LlamaCpp

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MERGES = [
    "▁ t", "h e", "▁t he", "i n", "e r", "▁ a", "▁ ▁", "▁▁ ▁▁", "l l", "é e", "1 2", "▁ ▁a", "o n", "▁▁ x",
]  # fmt: skip
CHARACTERS = ["▁", "\n", "é", "日", *map(chr, range(0x21, 0x7F))]
LINES = ["\n\n", "\n\n\n"]
TOKENS = [*SPECIAL, *BYTES, *CHARACTERS, *LINES, *(merge.replace(" ", "") for merge in MERGES)]
KINDS = [3, 3, 3, 2, 3, 3] + [6] * len(BYTES) + [1] * (len(TOKENS) - len(SPECIAL) - len(BYTES))
TEXTS = [
    "the lion in the  den", "a    b     c", "line\nline\n\nend\n\n\n", "\n", " \n \n\n ",
    "ée日本 \U0001f600\u00ad\t\0x",
    "<|turn>user\nhi<turn|>\n", "▁ ▁the", "12 123 1212", "", " ", "x▁▁x  x",
]  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma4") / "vocabulary.gguf"
    metadata = {
        "general.architecture": "gemma4",
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": np.array(KINDS, np.int32),
        "tokenizer.ggml.scores": np.zeros(len(TOKENS), np.float32),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
    }
    with GgufWriter(path, metadata, []):
        pass
    return path


def read(path: Path) -> Tokenizer:
    with GgufFile(path) as file:
        return Tokenizer.from_gguf(file.metadata, path)


def test_texts_come_back(vocabulary: Path) -> None:
    tokenizer = read(vocabulary)
    assert tokenizer.add_bos and tokenizer.bos_id == 2 and 1 in tokenizer.eos_ids
    for text in TEXTS:
        ids = tokenizer.encode(text, add_bos=False)
        assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert tokenizer.encode("the", add_bos=False) == [TOKENS.index("t"), TOKENS.index("he")]
    assert tokenizer.encode(" the", add_bos=False) == [TOKENS.index("▁the")]
    assert tokenizer.encode("\n\n", add_bos=False) == [TOKENS.index("\n\n")]


def test_llama_cpp_reads_the_same_ids(llama_cpp: LlamaCpp, vocabulary: Path) -> None:
    tokenizer = read(vocabulary)
    for text in TEXTS:
        for special in (False, True):
            answer = llama_cpp.ask(vocabulary, text=text, special=special)
            assert answer["ids"] == tokenizer.encode(text, add_bos=False, special=special), text
