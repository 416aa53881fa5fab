"""The n-gram index: what it finds, how much it holds, and drafts by lookup."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabula.engine.drafts import Acceptance, DraftTexts, LookupDrafts, Rate
from fabula.engine.ngrams import GAP, MAX_CANDIDATES, MAX_MATCH, NONE, N, NgramIndex

words = st.lists(st.integers(0, 3), min_size=0, max_size=60)


def searched(texts: Sequence[Sequence[int]], tail: Sequence[int]) -> tuple[int, int]:
    """The latest of the longest matches that `find` looks at, by comparing everything."""
    ids: list[int] = []
    for text in texts:
        ids += ([GAP] if ids and ids[-1] != GAP else []) + list(text)
    ends = [e for e in range(len(ids), N - 1, -1) if ids[e - N : e] == list(tail[-N:]) and GAP not in ids[e - N : e]]
    best, longest = NONE, 0
    for end in ends[:MAX_CANDIDATES]:
        n = 0
        while n < min(len(tail), end) and ids[end - 1 - n] == tail[len(tail) - 1 - n]:
            n += 1
        if n > longest and end < len(ids) and ids[end] != GAP:
            best, longest = end, n
    return (best, longest) if len(tail) >= N else (NONE, 0)


@given(st.lists(words, min_size=1, max_size=4), st.data())
@settings(max_examples=300, deadline=None)
def test_the_longest_match_is_found(texts: list[list[int]], data: st.DataObject) -> None:
    """However the texts come: token by token, in pieces, or as a whole."""
    whole, single = NgramIndex(), NgramIndex()
    for text in texts:
        for index in (whole, single):
            index.begin()
        cut = data.draw(st.integers(0, len(text)))
        whole.extend(text[:cut])
        whole.extend(text[cut:])
        for token in text:
            single.append(token)
    tail = data.draw(st.one_of(st.just(texts[-1][-MAX_MATCH:]), words.map(lambda ids: ids[-MAX_MATCH:])))
    assert whole.find(tail) == single.find(tail) == searched([text for text in texts if text], tail)


@given(st.lists(words, max_size=8), st.integers(64, 90))
@settings(max_examples=200, deadline=None)
def test_memory_is_bounded_and_the_latest_tokens_stay(texts: list[list[int]], most: int) -> None:
    index, ids = NgramIndex(most), list[int]()
    for text in texts:
        index.begin()
        ids += [GAP] if ids and ids[-1] != GAP else []
        index.extend(text)
        ids += text
        for token in text[:5]:
            index.append(token)
        ids += text[:5]
        assert len(index) <= most
        assert [index.token(index.end - len(index) + i) for i in range(len(index))] == ids[len(ids) - len(index) :]
        assert len(index) >= min(len(ids), most // 2)
    assert index.token(index.end) == index.token(-1) == GAP
    position, _ = index.find(ids[-MAX_MATCH:])
    if position != NONE:
        assert index.tokens(position, 3)[0] == index.token(position)


def test_a_large_index_takes_16_bytes_a_token_and_finds_in_constant_time() -> None:
    index = NgramIndex(1 << 15)
    rng = np.random.default_rng(0)
    for _ in range(40):
        index.extend(rng.integers(0, 40_000, 5000))
    assert len(index) <= 1 << 15 and index.n_bytes <= 16 << 15
    index.extend(np.full(20_000, 7))  # the same n-gram everywhere: MAX_CANDIDATES of them are compared
    position, length = index.find([7] * MAX_MATCH)
    assert length == MAX_MATCH and index.end - position == 1


def test_too_long_a_text_leaves_its_end() -> None:
    index = NgramIndex(64)
    index.extend(range(1000))
    assert index.tokens(index.find([990, 991, 992])[0], 10) == [*range(993, 1000)]


# ---- Lookup ---------------------------------------------------------------------------------------------------------


def ids(*tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(tokens, np.int32)


def test_what_came_after_the_same_tokens_is_drafted() -> None:
    lookup = LookupDrafts()
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 21, 2, 3, 4]
    draft = lookup.propose(ids(*text), 4)
    assert draft.tokens == [5, 6, 7, 8]
    assert all(a >= b > 0 for a, b in pairwise(draft.chances))
    assert lookup.propose(ids(*text, 5, 6), 2).tokens == [7, 8]
    assert lookup.propose(ids(*text, 5, 6, 30), 3).tokens == [8, 9, 20], "one token was replaced: the text goes on"
    assert lookup.propose(ids(*text, 5, 6, 30, 31), 3).tokens == [], "wrong twice"


def test_a_loop_is_drafted_beyond_the_end() -> None:
    lookup = LookupDrafts()
    assert lookup.propose(ids(9, 1, 2, 3, 1, 2, 3, 1, 2, 3), 8).tokens == [1, 2, 3, 1, 2, 3, 1, 2]


def test_other_texts_of_the_session_are_found_and_forgotten() -> None:
    texts = DraftTexts()
    texts.add("a", [1, 2, 3], [4, 5, 6, 7])
    texts.add("a", [], [0] * 9)  # it is there already
    assert "a" in texts and "b" not in texts and len(texts.index) == 7
    assert LookupDrafts(texts).propose(ids(8, 1, 2, 3), 9).tokens == [4, 5, 6, 7], "it begins with what was before it"
    texts.add("b", [], [1, 2, 3, 11, 12])
    assert LookupDrafts(texts).propose(ids(8, 1, 2, 3), 9).tokens == [11, 12], "the latest of equal matches"
    assert LookupDrafts(texts).propose(ids(2, 3, 4, 5, 6), 9).tokens == [7]
    texts.forget()
    assert "a" not in texts and not LookupDrafts(texts).propose(ids(8, 1, 2, 3), 9).tokens


def test_chances_follow_what_was_measured() -> None:
    """Also while nothing is drafted: every token is compared with what would have been."""
    good, bad = DraftTexts(), DraftTexts()
    rng = np.random.default_rng(1)
    text = rng.integers(0, 1000, 400)
    copied, misled = LookupDrafts(good), LookupDrafts(bad)
    copied.observe(text.astype(np.int32))
    copied.observe(np.concatenate([text, text]).astype(np.int32))
    pieces = [*text.tolist()]
    misled.observe(ids(*pieces))
    for i in range(0, 300, 5):  # three tokens of the text, and then always something else
        pieces += [*text[i : i + 3].tolist(), 2000 + i, 3000 + i]
        misled.observe(ids(*pieces))
    assert good.acceptance.chances(MAX_MATCH, 3)[2] > 0.9
    assert bad.acceptance.chances(3, 1)[0] < 0.1


@given(st.lists(st.booleans(), max_size=300))
def test_a_rate_is_a_share(hits: list[bool]) -> None:
    rate = Rate(0.5)
    assert rate.value == 0.5
    for hit in hits:
        before = rate.value
        rate.count(hit)
        assert 0 < rate.value < 1 and (rate.value > before) == hit


@pytest.mark.parametrize("length", [0, 1, N, 10, MAX_MATCH, 10 * MAX_MATCH])
def test_chances_never_rise_along_a_draft(length: int) -> None:
    acceptance = Acceptance()
    for i in range(100):
        acceptance.count(i % 40, i % 3 > 0)
    chances = acceptance.chances(length, 15)
    assert len(chances) == 15 and all(1 > a > b > 0 for a, b in pairwise(chances))
