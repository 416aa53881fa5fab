"""GBNF: what is read, and that answers follow it character by character as a plain matcher does."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabula import Constraint, InvalidArgument
from fabula.engine.grammar import Guide
from fabula.text.tokenizer import Tokenizer
from gbnf_matcher import ALPHABET, GRAMMARS, TOKENS, Matcher, written

LONG = os.environ.get("FABULA_TEST_LONG") == "1"


def tokenizer_of(words: list[str]) -> Tokenizer:
    """A vocabulary of words, and of bytes for the rest."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(len(tokens), np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, *[6] * 256, *[1] * len(words)], np.int32),
        "tokenizer.ggml.eos_token_id": 2,
    }
    return Tokenizer.from_gguf(metadata, Path("model.gguf"))


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer_of(TOKENS)


# ---- Beside a plain matcher -----------------------------------------------------------------------------------------


def check_walk(tokenizer: Tokenizer, grammar: dict[str, Any], seed: int, n_steps: int = 5) -> None:
    """At every step of a random answer the same may follow, and end, as the matcher says."""
    source = written(grammar)
    if not Matcher(grammar, "").is_beginning:
        with pytest.raises(InvalidArgument, match="no text satisfies it"):
            Guide(tokenizer, tokenizer.vocab_size, Constraint.gbnf(source))
        return
    guide = Guide(tokenizer, tokenizer.vocab_size, Constraint.gbnf(source))
    rng, text, first = random.Random(seed), "", tokenizer.vocab_size - len(TOKENS)
    for _ in range(n_steps):
        allowed = [i for i, token in enumerate(TOKENS) if guide.allowed[first + i]]
        begins = {char: Matcher(grammar, text + char).is_beginning for char in ALPHABET}
        expected = [
            i
            for i, token in enumerate(TOKENS)
            if begins[token[0]] and (len(token) == 1 or Matcher(grammar, text + token).is_beginning)
        ]
        assert [TOKENS[i] for i in allowed] == [TOKENS[i] for i in expected], (source, text)
        whole = Matcher(grammar, text).is_whole
        assert (guide.may_end, bool(guide.allowed[2])) == (whole, whole), (source, text)
        if not allowed:
            return
        chosen = rng.choice(allowed)
        guide.advance(first + chosen)
        text += TOKENS[chosen]


@given(GRAMMARS, st.integers(0, 2**32))
@settings(max_examples=20_000 if LONG else 60, deadline=None)
def test_a_drawn_grammar(words: Tokenizer, grammar: dict[str, Any], seed: int) -> None:
    check_walk(words, grammar, seed)
