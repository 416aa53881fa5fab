"""The offset of every token in its text, the end of the text, and stop strings that name control tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from fabula import Model, SamplingParams
from fabula.engine.decoding import Decoding, Piece
from fabula.engine.stop import StopMatcher
from fabula.text.tokenizer import Tokenizer
from test_openai_inside import Inside, inside

BOS, EOS, IM_START, IM_END = range(4)
# Blank, newline, the bytes of "é" and of "😀", the letters a to d, "the", and the control tokens.
TOKENS = (*range(12), *(len(tiny.SPECIAL) + tiny.PIECES.index(letter) for letter in "abcd"), 109)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


def decode(tokenizer: Tokenizer, tokens: list[int], **changes: Any) -> list[Piece]:
    """The pieces of an answer whose tokens are known before."""
    params = SamplingParams(**{"max_tokens": max(1, len(tokens)), "temperature": 0.0} | changes)
    decoding = Decoding(tokenizer, tokenizer.vocab_size, np.array([5], np.int32), params, room=100, continues=True)
    pieces: list[Piece] = []
    for token in tokens:
        pieces.append(decoding.take(token, -1.0))
        if pieces[-1].finish_reason is not None:
            break
    return pieces


# ---- Against tokens decoded one after the other ---------------------------------------------------------------------


@dataclass
class Wanted:
    """An answer as a plain search says it must be."""

    text: str
    offsets: list[int]
    n_listed: int
    n_read: int


def breaks(before: bytes, byte: int) -> bool:
    """Whether bytes end inside a character that `byte` is no part of."""
    lengths = {0b110: 2, 0b1110: 3, 0b11110: 4}
    for n in range(1, min(4, len(before) + 1)):
        if before[-n] & 0xC0 == 0xC0:  # where the last character of several bytes begins
            whole = next((length for bits, length in lengths.items() if before[-n] >> (7 - length) == bits), 1)
            return n < whole and _is_beginning(before[-n:]) and not _is_beginning(before[-n:] + bytes([byte]))
    return False


def _is_beginning(data: bytes) -> bool:
    """Whether some bytes more would make this one character."""
    rests = (b"", b"\x80", b"\x90", b"\xa0", b"\x80\x80", b"\x90\x80", b"\xa0\x80", b"\x80\x80\x80", b"\x90\x80\x80")
    for rest in rests:
        try:
            if len((data + rest).decode()) == 1:
                return True
        except UnicodeDecodeError:
            pass
    return False


def search(tokenizer: Tokenizer, tokens: list[int], stops: list[str], ends: set[int]) -> Wanted:
    """Decodes the tokens one after the other, and searches stop strings after every character: in the text with its
    control tokens written out, and in the text as it is shown."""
    decoder = tokenizer.stream_decoder(continues=True)
    written: list[str] = []  # characters, with those of control tokens
    shown: list[int] = []  # positions in `written` of what is shown
    offsets, starts = [], []

    def add(text: str, is_shown: bool) -> int | None:
        """Where the text is cut, if a stop string is complete."""
        for character in text:
            shown.extend([len(written)] if is_shown else [])
            written.append(character)
            both = "".join(written), "".join(written[i] for i in shown)
            cuts = [len(written) - len(stop) for stop in stops if both[0].endswith(stop)]
            if is_shown:
                cuts += [shown[len(shown) - len(stop)] for stop in stops if both[1].endswith(stop)]
            if cuts:
                return min(cuts)
        return None

    def answer(cut: int, n_listed: int) -> Wanted:
        return Wanted("".join(written[i] for i in shown if i < cut), offsets, n_listed, len(offsets))

    for i, token in enumerate(tokens):
        ended = token in ends
        own = b"" if token in tokenizer.special_ids else tokenizer.token_bytes(token)
        before = b"".join(b"" if t in tokenizer.special_ids else tokenizer.token_bytes(t) for t in tokens[:i])
        n_broken = int(bool(own) and not ended and breaks(before, own[0]))
        offsets.append(len(shown) + n_broken)
        starts.append(len(written) + n_broken)
        texts = [(decoder.flush(), True)] if ended else [(decoder.push(token), True)]
        if token in tokenizer.special_ids or ended:
            texts.append((tokenizer.token_bytes(token).decode("utf-8", "replace"), False))
        if i == len(tokens) - 1 and not ended:
            texts.append((decoder.flush(), True))
        for text, is_shown in texts:
            if (cut := add(text, is_shown)) is not None:
                return answer(cut, sum(start < cut for start in starts))
        if ended:
            return answer(len(written), i)
    return answer(len(written), len(tokens))


stop_strings = st.one_of(
    st.text(alphabet="abcd é😀\n\ufffd", min_size=1, max_size=4),
    st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "</s>", "a", "b", " ", "\n", "é"]), min_size=1, max_size=4)
    .map("".join),
    st.sampled_from(["<|im", "|>a", "_end|>"]),
)  # fmt: skip


@given(st.lists(st.sampled_from(TOKENS), min_size=1, max_size=24), st.lists(stop_strings, max_size=3), st.booleans())
@settings(max_examples=300, deadline=None)
def test_offsets_are_those_of_tokens_decoded_one_after_the_other(
    tokenizer: Tokenizer, tokens: list[int], stops: list[str], ignore_eos: bool
) -> None:
    ends = set() if ignore_eos else set(tokenizer.eos_ids)
    wanted = search(tokenizer, tokens, stops, ends)
    pieces = decode(tokenizer, tokens, stop=stops, ignore_eos=ignore_eos)
    assert "".join(piece.text for piece in pieces) == wanted.text
    assert [piece.offset for piece in pieces] == wanted.offsets
    assert len(pieces) == wanted.n_read
    # What was called certain while the answer was made is so in the end, and nothing else.
    certain = [piece.n_certain for piece in pieces]
    assert certain == sorted(certain) and certain[-1] == wanted.n_listed
    assert all(offset <= len(wanted.text) for offset in wanted.offsets[: wanted.n_listed])


@given(st.lists(st.sampled_from(TOKENS), min_size=1, max_size=24), st.lists(stop_strings, max_size=3))
@settings(max_examples=150, deadline=None)
def test_a_token_is_told_with_the_text_it_begins_in(tokenizer: Tokenizer, tokens: list[int], stops: list[str]) -> None:
    told, pieces = "", decode(tokenizer, tokens, stop=stops, ignore_eos=True)
    for i, piece in enumerate(pieces):
        told += piece.text
        assert piece.n_certain <= i + 1
        assert all(one.offset <= len(told) for one in pieces[: piece.n_certain])
        if not stops:
            assert piece.n_certain == i + 1  # nothing is held back, so nothing waits


# ---- Stop strings that name control tokens --------------------------------------------------------------------------

A, B = TOKENS[12], TOKENS[13]
NEWLINE = 5


@pytest.mark.parametrize(
    ("tokens", "stop", "text"),
    [
        ([A, IM_START, B], "<|im_start|>", "a"),
        ([A, IM_START, B], "<|im_start|>b", "a"),
        ([A, IM_START, A], "<|im_start|>b", "aa"),
        ([A, IM_END, NEWLINE, B], "<|im_end|>\n", "a"),
        ([A, B, IM_START, A, B], "b<|im_start|>a", "a"),
        ([A, B, IM_START, A, B], "b<|im_st", "a"),
        ([A, IM_START, IM_END, B], "<|im_start|><|im_end|>", "a"),
        ([A, IM_START, B, A], "ab", ""),  # as it is shown
        ([A, EOS], "a</s>", ""),
        ([A, EOS], "</s>", "a"),
        ([A, IM_START, B, B], "zz", "abb"),
    ],
)
def test_stop_strings_with_control_tokens(tokenizer: Tokenizer, tokens: list[int], stop: str, text: str) -> None:
    ends = EOS in tokens
    pieces = decode(tokenizer, tokens, stop=[stop], ignore_eos=not ends)
    assert "".join(piece.text for piece in pieces) == text
    assert (pieces[-1].finish_reason == "stop") is (text not in ("aa", "abb"))


def test_control_tokens_stop_only_once_they_may(tokenizer: Tokenizer) -> None:
    pieces = decode(tokenizer, [IM_START, A, IM_START, B], stop=["<|im_start|>"], ignore_eos=True, min_tokens=2)
    assert [piece.finish_reason for piece in pieces] == [None, None, "stop"]
    assert pieces[-1].n_certain == 2 and "".join(piece.text for piece in pieces) == "a"


def test_a_matcher_without_hidden_text_searches_what_it_is_fed() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.feed("xa", "<c>") == ("x", None) and matcher.n_certain == 1
    assert matcher.feed("c") == ("ac", None) and matcher.n_certain == matcher.n_fed == 6
    assert matcher.feed("ab") == ("", "ab") and matcher.n_certain == 6 and matcher.flush() == ""


# ---- OpenAI's API ---------------------------------------------------------------------------------------------------


def chunks_of(body: bytes) -> list[Any]:
    lines = [line.removeprefix(b"data: ") for line in body.splitlines() if line.startswith(b"data: ")]
    return [json.loads(line)["choices"][0] for line in lines if line != b"[DONE]"]


async def streamed(client: Inside, path: str, **body: Any) -> list[Any]:
    answer = await client.app.test_client().post(path, json=body | {"stream": True}, headers={"Host": "localhost"})
    return chunks_of(await answer.get_data())


def test_completions_and_chat_list_the_tokens_of_the_text(tiny_folder: Path, tmp_path: Path) -> None:
    completion = {"prompt": "the cat", "max_tokens": 24, "temperature": 1, "seed": 3, "logprobs": 1, "ignore_eos": True}
    conversation = {
        "messages": [{"role": "user", "content": "hi"}], "max_tokens": 24, "temperature": 1, "seed": 3,
        "logprobs": True, "top_logprobs": 1, "ignore_eos": True,
    }  # fmt: skip

    async def work(client: Inside) -> None:
        _, plain = await client.ask("POST", "/v1/completions", **completion)
        text, listed = plain["choices"][0]["text"], plain["choices"][0]["logprobs"]
        for i, offset in enumerate(listed["text_offset"]):  # every token is at its offset
            token = listed["tokens"][i]
            assert "\ufffd" in token or text[offset:].startswith(token) or token in tiny.SPECIAL
        n_cut = 0
        for begin, end in ((3, 9), (5, 6), (4, len(text))):
            stops = [text[begin:end], text[begin:end] + "~never"]
            _, found = await client.ask("POST", "/v1/completions", **completion, stop=stops)
            choice = found["choices"][0]
            assert choice["text"] == text[: text.find(stops[0])] and choice["finish_reason"] == "stop"
            n = len(choice["logprobs"]["tokens"])
            assert choice["logprobs"] == {name: values[:n] for name, values in listed.items()}
            assert n == sum(offset < len(choice["text"]) for offset in listed["text_offset"])
            n_cut += len(listed["tokens"]) - n
            # Streamed: the same, piece by piece.
            chunks = await streamed(client, "/v1/completions", **completion, stop=stops)
            assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
            for name, values in choice["logprobs"].items():
                parts = [chunk["logprobs"][name] for chunk in chunks if chunk["logprobs"]]
                assert list(chain.from_iterable(parts)) == values
        assert n_cut > 10

        _, plain = await client.ask("POST", "/v1/chat/completions", **conversation)
        text, entries = plain["choices"][0]["message"]["content"], plain["choices"][0]["logprobs"]["content"]
        stops = [text[4:9], text[4:6] + "~never"]
        _, found = await client.ask("POST", "/v1/chat/completions", **conversation, stop=stops)
        choice = found["choices"][0]
        listed_entries = choice["logprobs"]["content"]
        assert choice["message"]["content"] == text[:4] and choice["finish_reason"] == "stop"
        assert listed_entries == entries[: len(listed_entries)] and len(listed_entries) < len(entries)
        words = b"".join(bytes(one["bytes"]) for one in listed_entries if one["token"] not in tiny.SPECIAL)
        assert words.decode("utf-8", "replace").startswith(text[:4])
        chunks = await streamed(client, "/v1/chat/completions", **conversation, stop=stops)
        told = [chunk["logprobs"]["content"] for chunk in chunks if chunk["logprobs"]]
        assert list(chain.from_iterable(told)) == listed_entries
        assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == text[:4]

    inside(tmp_path, tiny_folder, work)


def test_a_stop_string_that_is_a_control_token_stops_a_completion(tiny_folder: Path, tmp_path: Path) -> None:
    async def work(client: Inside) -> None:
        body = {"prompt": "the", "max_tokens": 12, "temperature": 0, "logit_bias": {str(IM_START): 100}}
        _, plain = await client.ask("POST", "/v1/completions", **body)
        assert plain["choices"][0]["finish_reason"] == "length" and plain["choices"][0]["text"] == ""
        for stop in ("<|im_start|>", "<|im_start|><|im_start|>", "<|im"):
            _, found = await client.ask("POST", "/v1/completions", **body, stop=[stop], logprobs=0)
            choice = found["choices"][0]
            assert choice["finish_reason"] == "stop" and choice["text"] == ""
            assert choice["logprobs"]["tokens"] == [] and found["usage"]["completion_tokens"] < 3

    inside(tmp_path, tiny_folder, work)


def test_what_is_not_certain_when_an_answer_is_cancelled_is_not_listed(tiny_model: Model) -> None:
    plain = list(tiny_model.generate("the", SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)))
    text = "".join(piece.text for piece in plain)
    with tiny_model.generate(
        "the", SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, stop=(text[1:] + "~",))
    ) as generation:
        pieces = [next(generation) for _ in range(4)]
        generation.cancel()
    assert generation.read_so_far()[1] == "".join(piece.text for piece in pieces) == text[:1]
    assert pieces[-1].n_certain == sum(piece.offset < 1 for piece in plain[:4])
