"""GBNF: the parser, and answers that follow a grammar exactly as a plain matcher does."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabula import Constraint, InvalidArgument
from fabula.engine.grammar import Guide
from fabula.engine.lexemes import gbnf_to_lark
from fabula.text.tokenizer import Tokenizer
from gbnf_matcher import (
    ALPHABET,
    GRAMMARS,
    TOKENS,
    AnyChar,
    Choice,
    Class,
    Literal,
    Matcher,
    Row,
    Rule,
    Times,
    written,
)

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


def check_walk(tokenizer: Tokenizer, grammar: dict[str, Any], seed: int, n_steps: int = 4) -> None:
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
@settings(max_examples=5000 if LONG else 50, deadline=None)
def test_a_drawn_grammar(words: Tokenizer, grammar: dict[str, Any], seed: int) -> None:
    check_walk(words, grammar, seed)


@pytest.mark.parametrize(
    "grammar",
    [
        {"root": Row((Literal("Answer: "), Times(Class("abcdehlo ,.", False), 1, None, "+"), Literal(".")))},
        {"root": Choice((Row((Literal("<"), Rule("root"), Literal(">"))), Times(Class("<>", True), 0, None, "*")))},
        {"root": Choice((Row((Rule("word"), Rule("root"))), Literal("."))), "word": Choice((Literal("a"), AnyChar()))},
    ],
)
def test_the_tokens_of_a_real_vocabulary(grammar: dict[str, Any], smollm2: Tokenizer) -> None:
    """Of some hundred tokens the same may come as the matcher says."""
    guide, rng = Guide(smollm2, smollm2.vocab_size, Constraint.gbnf(written(grammar))), random.Random(3)
    text = ""
    for _ in range(3):
        allowed = np.flatnonzero(guide.allowed).tolist()
        others = np.flatnonzero(~guide.allowed).tolist()
        for token in [*rng.sample(allowed, min(len(allowed), 60)), *rng.sample(others, min(len(others), 60))]:
            raw = smollm2.token_bytes(token)
            if token not in smollm2.special_ids and (word := raw.decode("utf-8", "replace")).encode() == raw:
                assert bool(guide.allowed[token]) == Matcher(grammar, text + word).is_beginning, (text, word)
        whole = [token for token in allowed if smollm2.token_bytes(token).isascii() and smollm2.token_bytes(token)]
        token = rng.choice(whole)
        guide.advance(token)
        text += smollm2.token_bytes(token).decode()


# ---- Parsing --------------------------------------------------------------------------------------------------------


def accepts(tokenizer: Tokenizer, source: str, text: str) -> bool:
    """Whether an answer may be this text, byte by byte, and end there."""
    guide = Guide(tokenizer, tokenizer.vocab_size, Constraint.gbnf(source))
    for byte in text.encode():
        if not guide.allowed[3 + byte]:
            return False
        guide.advance(3 + byte)
    return guide.may_end


@pytest.mark.parametrize(
    ("source", "texts", "others"),
    [
        ('root ::= "Answer: " text "."\ntext ::= [a-zA-Z ,.]+', ["Answer: a.", "Answer: a. b..", "Answer: .."], ["."]),
        ('root ::= name "x"\nname ::= [a-z]+', ["abx", "axxx", "xx"], ["x", "ab"]),
        ('root ::= ("list" | "listen") "ed"', ["listed", "listened"], ["list", "listen"]),
        (
            'root ::= "<think>" t "</think>" answer\nt ::= .*\nanswer ::= "yes" | "no"',
            ["<think></think>yes", "<think>a</think>\n\u6f22</think>no"],
            ["<think>yes"],
        ),
        # The same within a recursion, where a part cannot be one with what follows it.
        ('root ::= "(" root ")" | name "x"\nname ::= [a-z]+', ["abx", "((axx))"], ["(x)", "(ab)"]),
        ('root ::= "[" root "]" root | ("list" | "listen") "ed" | ""', ["[listed]listened", "[]"], ["[list]"]),
        ('root ::= ("a" root)? | "é"+ "ê"', ["ééê", "aaéê", ""], ["é", "aê"]),
        ('root ::= root "+" root | num\nnum ::= [0-9]+ | "1+1"', ["1+1+1", "12"], ["+", "1+"]),
        ('root ::= ([^<>] | "-" | "<" root ">")+', ["ab<c->d", "<<x>>"], ["", "<>", "a<"]),
        # Names.
        ('root ::= start\nstart ::= "x"', ["x"], [""]),
        ('root ::= Item item ITEM\nItem ::= "a"\nitem ::= "b"\nITEM ::= "c"', ["abc"], ["aaa"]),
        ('root ::= 1st 2 -x a_b\n1st ::= "1"\n2 ::= "2"\n-x ::= "3"\na_b ::= "4"', ["1234"], [""]),
        ('root ::= a-b a_b\na-b ::= "x"\na_b ::= "y"', ["xy"], ["xx"]),
        ('root ::= a\na ::= "x"\na ::= "y"', ["y"], ["x"]),
        ('root ::= "a"\nother ::= other "b"', ["a"], [""]),
        # Repetitions.
        ('root ::= ([a-z]+)* "."', [".", "ab."], ["ab"]),
        ('root ::= (x*)?\nx ::= "x"', ["", "xxx"], ["y"]),
        ('root ::= "a"{0} "b" ("a" "c"){0,0}', ["b"], ["ab"]),
        ('root ::= "ab"{2} "c"{1,} "d"{ 0 , 2 }', ["ababc", "ababccdd"], ["abc", "ababcddd"]),
        ('root ::= ("a"? "b"?){2,3} "c"', ["c", "abc", "bbbc", "ababc"], ["bbbbc"]),
        ('root ::= "a"+? "b"??', ["", "a", "aab"], ["bb"]),
        ('root ::= "x" | (("a"*)*)+ r\nr ::= r r | "b" |', ["x", "", "aabbb"], ["ba"]),
        # Classes and characters.
        ('root ::= .+ "\\n"', ["a\nb\n", "\n\n"], ["\n", "a"]),
        ("root ::= [^a]", ["\n", "b", "\u6f22", "\U0001f600"], ["a", ""]),
        ('root ::= [a\\-z] [-a] [a-] [+--] "\\x41\\u00e9\\U0001F600\\t\\r\\n\\\\\\"\\[\\]"',
         ['--a,Aé\U0001f600\t\r\n\\"[]', 'za--Aé\U0001f600\t\r\n\\"[]'], ["b"]),
        ("root ::= [\\]\\[\\\\^\"]+", ['][\\^"'], ["a"]),
        ("root ::= [\\uD800-\\uDFFFa] | [^\\uD800-\\uDFFF]", ["a", "\u6f22"], [""]),
        ("root ::= [漢é-ü]", ["漢", "é", "ü", "ï"], ["à"]),
        # Blanks, newlines and comments.
        ('# one\r\nroot ::= # two\r\n  "a" |\r\n  ( "b"\r\n\r\n "c" # c\r\n )\r\n\r\nx ::= "#"', ["a", "bc"], ["b"]),
        ('\n\n  \troot\t::=\n\n"a"\t"b" # ends', ["ab"], ["a"]),
        ('root ::= "a" |\n"b" | ""', ["a", "b", ""], ["ab"]),
        ('root ::= | "a"', ["", "a"], ["b"]),
    ],
)  # fmt: skip
def test_texts(source: str, texts: list[str], others: list[str], words: Tokenizer) -> None:
    assert [text for text in texts if not accepts(words, source, text)] == []
    assert [text for text in others if accepts(words, source, text)] == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "there is no rule root"),
        ('foo ::= "a"', "there is no rule root"),
        ('root ::= "a"\n\n  item "b"', "line 3, column 8: expected ::= after the name 'item'"),
        ('root ::= "a"\r\nroot ::= a b', "line 2, column 10: there is no rule 'a'"),
        ('root ::= "a"\n| "b"', "line 2, column 1: expected the name of a rule, not '|'"),
        ('root ::= "a', 'line 1, column 10: unexpected end of input: the text in quotes has no closing "'),
        ("root ::= [a-", "line 1, column 10: unexpected end of input: the class has no closing ]"),
        ('root ::= ("a"\nb ::= "b"', "unexpected ':' in a group"),
        ('root ::= ("a"', "line 1, column 10: unexpected end of input: the group"),
        ("root ::= <[1x]>", "expected the id of a token"),
        ("root ::= <nope>", "line 1, column 10: the vocabulary has no token '<nope>'"),
        ("root ::= <[99999]>", "the vocabulary has no token '99999'"),
        ("root ::= !x", "expected a token after !"),
        ("root ::= <a", "the token has no closing >"),
        ("root ::= * \"a\"", "line 1, column 10: there is nothing before \\* to repeat"),
        ('root ::= "a"{2', "line 1, column 13: expected {n}, {n,} or {n,m}"),
        ('root ::= "a"{x}', "line 1, column 14: expected a number"),
        ('root ::= "a"{3,2}', "3 is more than 2"),
        ('root ::= "a"{9999999999999}', "at most 100000 repetitions"),
        ("root ::= []", "a class needs a character"),
        ("root ::= [z-a]", "line 1, column 11: the range goes backwards"),
        ('root ::= "\\q"', "line 1, column 11: unknown escape \\\\q"),
        ('root ::= "\\x4g"', "the escape \\\\x needs 2 hexadecimal digits"),
        ('root ::= "\\U00110000"', "is beyond the last character"),
        ('root ::= "é\\ud83d"', "line 1, column 12: a surrogate is no character"),
        ('root ::= "a" $', "line 1, column 14: unexpected '\\$'"),
        ("root ::= root", "no text satisfies it"),
        ('root ::= "a" b\nb ::= [\\uD800-\\uDFFF] b', "no text satisfies it"),
    ],
)  # fmt: skip
def test_messages_speak_of_the_user_s_text(source: str, message: str, words: Tokenizer) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        Guide(words, words.vocab_size, Constraint.gbnf(source))
    assert str(caught.value).startswith("gbnf: ")
    assert not any(word in str(caught.value) for word in ("start", "lark", "Lark", "T0", "r0"))


def test_what_can_never_be_completed_is_not_begun(words: Tokenizer) -> None:
    guide = Guide(words, words.vocab_size, Constraint.gbnf('root ::= "a" dead | "b"\ndead ::= "a" dead'))
    assert np.flatnonzero(guide.allowed).tolist() == [3 + ord("b"), words.encode("b", add_bos=False)[-1]]


def test_tokens() -> None:
    tokenizer = tokenizer_of(["<think>", "</think>", "a", "b"])
    think, end, a, b = range(259, 263)
    by_name = Constraint.gbnf('root ::= <think> !</think>* </think> ("a" | root)')
    by_id = Constraint.gbnf(f'root ::= <[{think}]> !<[{end}]>* <[{end}]> ("a" | root)')
    for constraint in (by_name, by_id):
        guide = Guide(tokenizer, tokenizer.vocab_size, constraint)
        assert np.flatnonzero(guide.allowed).tolist() == [think]
        for token in (think, b, b, think):
            guide.advance(token)
            assert guide.allowed[[think, end, a, b]].all()
            assert not guide.may_end
        guide.advance(end)
        assert np.flatnonzero(guide.allowed).tolist() == [3 + ord("a"), think, a]
        guide.advance(a)
        assert guide.is_complete


# ---- Lexemes --------------------------------------------------------------------------------------------------------

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,15})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""


def lexemes_of(source: str) -> list[str]:
    lines = gbnf_to_lark(source, lambda _: None).splitlines()
    return [line.partition(": ")[2] for line in lines if line.startswith("T")]


@pytest.mark.parametrize(
    ("source", "n_lexemes", "long"),
    [
        ('root ::= "Answer: " text "."\ntext ::= [a-zA-Z ,.]+', 1, "A-Za-z]+"),  # no recursion: all at once
        (JSON, 10, r"\x{22}(?:"),  # strings and numbers stay whole
        ('root ::= "(" root ")" | word\nword ::= [a-z]+', 3, "[a-z]+"),
        ('root ::= "(" root ")" | word "é" root?\nword ::= [a-zü]+', 4, None),  # two that begin with the same byte
        ('root ::= "(" root ")" | word root?\nword ::= [a-z]+', 3, None),  # a word may follow a word
        ('root ::= ([^<>] | "<" root ">")*', 3, "]+"),  # runs of what is regular
        ('root ::= "a"{6001}', 1, None),  # too long to be one
    ],
)
def test_only_what_the_lexer_ends_rightly_is_a_lexeme(source: str, n_lexemes: int, long: str | None) -> None:
    """A mask takes 7 ms if a text is parsed character by character, 10 us if it is one lexeme."""
    found = lexemes_of(source)
    assert len(found) == n_lexemes
    assert any(long in lexeme for lexeme in found) if long else not any(re.search(r"[+*{]/", one) for one in found)


def test_json_by_the_grammar(words: Tokenizer) -> None:
    for text in ('{"a": [1, -2.5e3,"\\u00e9\\n"],"b":{"c":null,\n\t"d":true }}', "{}"):
        assert accepts(words, JSON, text)
    for text in ('{"a":1,}', '{"a" :01}', "[]", '{"a":"\n"}'):
        assert not accepts(words, JSON, text)
