"""Stop strings found in pieces: always what a search in the whole text finds."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from fabula.engine.stop import StopMatcher

# Three letters make overlaps, repeats and near misses frequent.
texts = st.text(alphabet="abc", max_size=40)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=6), max_size=5)


def in_whole(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The match that ends first, of two with one end the longer; and the text before it."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    _, start, stop = min(found)
    return text[:start], stop


def in_pieces(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher, out, match = StopMatcher(stops), "", None
    for piece in pieces:
        text, match = matcher.feed(piece)
        out += text
        if match is not None:
            break
    return out + matcher.flush(), match


@given(texts, stop_lists, st.lists(st.integers(0, 40), max_size=12))
@settings(max_examples=600, deadline=None)
def test_any_splitting_equals_a_search_in_the_whole(text: str, stops: list[str], cuts: list[int]) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    assert in_pieces(pieces, stops) == in_whole(text, stops)


@given(texts, st.text(alphabet="abc", min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_one_stop_character_by_character_is_str_find(text: str, stop: str) -> None:
    at = text.find(stop)
    assert in_pieces(list(text), [stop]) == ((text, None) if at < 0 else (text[:at], stop))


@given(texts, stop_lists, st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_holds_back_the_longest_possible_beginning_and_no_more(text: str, stops: list[str], cut: int) -> None:
    head = text[:cut]
    matcher = StopMatcher(stops)
    out, match = matcher.feed(head)
    if match is None:
        beginnings = {stop[:n] for stop in stops for n in range(len(stop))}
        ends = [head[len(head) - n :] for n in range(len(head), -1, -1)]
        assert head[len(out) :] == next((end for end in ends if end in beginnings), "")


def test_first_complete_wins_then_the_longer() -> None:
    assert in_pieces(["ab", "cd"], ["abcd", "bc"]) == ("a", "bc")
    assert in_pieces(["xa", "bc"], ["c", "bc", "abc"]) == ("x", "abc")
    assert in_pieces(["ab", "c"], ["abc", "ab"]) == ("", "ab")


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("one E") == ("one ", None)
    assert matcher.feed("ND two") == ("", "END")
    assert matcher.matched == "END"
    assert matcher.feed(" three") == ("", "END")
    assert matcher.flush() == ""


def test_without_stops_text_passes_at_once() -> None:
    matcher = StopMatcher(())
    assert matcher.feed("anything") == ("anything", None)
    assert matcher.flush() == ""


def test_flush_gives_what_was_held_once() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.feed("a##") == ("a", None)
    assert matcher.flush() == "##"
    assert matcher.flush() == ""


def test_characters_beyond_the_basic_plane() -> None:
    assert in_pieces(["a🦊", "🦊b"], ["🦊🦊"]) == ("a", "🦊🦊")
