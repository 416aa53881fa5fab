"""The tree that a notebook shows: which turns, where, and that no text of a session becomes markup."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from fabula import Model, SamplingParams
from fabula.sessions.tree_html import MAX_LETTERS, MAX_TURNS, tree_html
from fabula.sessions.turn import START, Turn

TAGS = {"div", "b", "small", "bdi"}
ATTRIBUTES = {"role", "aria-label", "aria-level", "aria-current", "style", "title"}
HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' style='position:fixed'",
    "</div></bdi><iframe srcdoc='x'>",
    "&lt;b&gt; &#60;script&#62;",
    "<!-- ]]> -->",
    "a\u202egnp.exe\u2066",
    "\x00\x1b[31m\ud800 end",
    "line\nbreak\r\n\ttab",
    "\u2028\u2029",
)


class Read(HTMLParser):
    """What a page holds. Attributes:
    rows: of the tree: their attributes and their text.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.rows: list[tuple[dict[str, str | None], str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS and {name for name, _ in attrs} <= ATTRIBUTES, (tag, attrs)
        self.open.append(tag)
        found = dict(attrs)
        if found.get("role") == "treeitem":
            self.rows.append((found, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.rows:
            self.rows[-1] = (self.rows[-1][0], self.rows[-1][1] + data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


def turn(parent: Turn, prompt: str, text: str, **more: Any) -> Turn:
    from fabula.sessions.user_input import UserInput

    return Turn(parent=parent, number=parent.number + 1, said=UserInput(prompt), text=text, **more)


def shown(turns: list[Turn], head: Turn, **more: Any) -> Read:
    return Read(tree_html("s", "", turns, head, is_busy=False, **more))


def test_head_path_and_branches(tiny_model: Model) -> None:
    session = tiny_model.session("letters", sampling=SamplingParams(max_tokens=3, seed=1))
    empty = Read(session._repr_html_())
    assert empty.rows == [] and "letters" in empty.texts and "0 turns" in "".join(empty.texts)
    session.say("one").text()
    session.say("two").text()
    session.regenerate().text()
    session.say("three").text()
    session.rollback(-1)
    session.tag(session.head, "good")
    found = Read(session._repr_html_())
    levels = [attributes["aria-level"] for attributes, _ in found.rows]
    assert [text.split()[1:3] for _, text in found.rows] == [["1", "one"], ["2", "two"], ["2", "two"], ["3", "three"]]
    assert levels == ["1", "2", "1", "1"]
    assert [attributes.get("aria-current") for attributes, _ in found.rows] == [None, None, "true", None]
    assert ["opacity" in str(attributes["style"]) for attributes, _ in found.rows] == [False, True, False, True]
    assert found.rows[2][1].endswith("(good, head)") and "4 turns, head at 2" in "".join(found.texts)
    with session.say("more") as reply:
        next(reply)
        assert "a reply is running" in session._repr_html_()
    assert "cancelled" in session._repr_html_()
    fork = Read(session.fork(1)._repr_html_())
    assert [text.split()[1:3] for _, text in fork.rows] == [["1", "one"]] and fork.rows[0][0]["aria-current"] == "true"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_text(text: str) -> None:
    one = turn(START, text, text, tags={text}, finish_reason="cancelled")
    two = turn(one, text * 50, text * 50)
    written = tree_html(text, text, [one, two], two, is_busy=False)
    written.encode()  # which a lone surrogate would not let
    found = Read(written)
    plain = "".join(found.texts)
    assert not any(c < " " or "\ud800" <= c <= "\udfff" for c in plain)
    clean = " ".join(text.split()).replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    assert found.rows[0][1].count(clean) >= 2 and found.texts[0].strip() == clean
    assert written.count("<bdi") == written.count("</bdi>") == (4 if text.strip() else 0)


def test_long_texts_and_trees_are_cut() -> None:
    past, turns = START, []
    for i in range(5_000):  # deeper than Python recurses
        past = turn(past, f"prompt {i}", "word " * 1_000)
        turns += [past, turn(past.parent or START, f"side {i}", "x")]
    found = shown(turns, past)
    assert len(found.rows) == MAX_TURNS and f"{10_000 - MAX_TURNS} turns are not shown" in found.texts
    assert found.rows[-1][0]["aria-current"] == "true" and "prompt 4999" in found.rows[-1][1]
    assert max(len(text) for _, text in found.rows) < 2 * MAX_LETTERS + 60
    newest = shown(turns, turns[0])
    assert len(newest.rows) == MAX_TURNS and any("side 4999" in text for _, text in newest.rows)
    head = next(text for attributes, text in newest.rows if "aria-current" in attributes)
    assert head.split()[1:4] == ["1", "prompt", "0"]
    deep = shown([one for one in turns if one.prompt.startswith("prompt")][:50], turns[0])
    assert {attributes["aria-level"] for attributes, _ in deep.rows} == {"1"}


def test_notes_and_handwritten_turns(tiny_model: Model) -> None:
    session = tiny_model.session(sampling=SamplingParams(max_tokens=3, seed=1))
    session.write("A note.", frozen=True)
    session.write("Once upon a time")
    session.tell(3).text()
    texts = [text for _, text in Read(session._repr_html_()).rows]
    assert texts[0].endswith("(note)") and texts[1].endswith("(by hand)") and texts[2].endswith("(head)")
