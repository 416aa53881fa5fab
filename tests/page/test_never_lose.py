"""Words that are being written stay, whatever happens meanwhile; what was left in the middle is found again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from page.conftest import Page
from serving import Running

KEY = "a-key-of-the-tests-only"


def made(served: Running, max_len: int, title: str) -> str:
    """A session with one turn, whose next answers are just so many tokens long: its id."""
    id = str(served.post("/chat", message="Say something.", max_len=4, title=title)["session_id"])
    served.client.patch(f"/sessions/{id}", json={"sampling": {"max_len": max_len, "ignore_eos": True}})
    return id


@pytest.fixture
def short(served: Running) -> str:
    return made(served, 8, "Short")


@pytest.fixture
def long(served: Running) -> Iterator[str]:
    id = made(served, 1500, "Long")
    yield id
    served.post("/stop", session_id=id)


@pytest.fixture
def tabs(browser: Any, served: Running) -> Iterator[tuple[Page, Page]]:
    """Two pages of one reader: they share what the browser keeps."""
    context = browser.new_context()
    context.set_default_timeout(0)
    yield Page(context.new_page(), served.address), Page(context.new_page(), served.address)
    context.close()


def shown(page: Page, text: str) -> None:
    """Waits until the paper of a story says so."""
    page.shows_paper(lambda found: found == text)


def begin(page: Page, session: str) -> None:
    page.open(f"#/chat/{session}").settled(1)
    page.say("Tell me more.")
    page.find(".live .rest:not(.waiting), .live .markdown", has_text="e").first.wait_for()


def test_an_answer_that_was_left_is_found_again(page: Page, long: str, short: str) -> None:
    begin(page, long)
    page.open(f"#/chat/{short}")
    page.find("h1", has_text="Short").wait_for()
    assert page.find(".live").count() == 0 and page.button("Send").count() == 1
    page.open(f"#/chat/{long}")
    page.find(".live .markdown", has_text="e").first.wait_for()
    page.button("Stop").click()
    page.settled(2)


def test_an_answer_elsewhere_writes_nothing_here(page: Page, served: Running) -> None:
    page.say("Tell me a very long story.")
    page.page.wait_for_url("**/#/chat/**")
    left = page.session_id
    page.find(".new-buttons a").first.click()
    page.find(".starter").first.wait_for()
    served.post("/stop", session_id=left)
    page.page.wait_for_timeout(500)
    assert page.find("#composer").input_value() == "" and page.find(".turn").count() == 0


def test_what_another_tab_sends_takes_no_words(tabs: tuple[Page, Page], short: str) -> None:
    one, other = tabs
    one.open(f"#/chat/{short}").settled(1)
    one.page.fill("#composer", "A thought in the making")
    other.open(f"#/chat/{short}").settled(1)
    other.say("Go on.")
    other.settled(2)
    one.page.bring_to_front()
    one.settled(2)
    assert one.find("#composer").input_value() == "A thought in the making"


@pytest.mark.parametrize(("view", "place"), [("chat", "#composer"), ("story", "#paper")])
def test_each_tab_has_words_of_its_own(tabs: tuple[Page, Page], view: str, place: str) -> None:
    one, other = tabs
    one.open(f"#/{view}")
    one.page.fill(place, "of one tab")
    other.open(f"#/{view}")
    other.find(place).wait_for()
    assert other.find(place).input_value() == ""
    other.page.fill(place, "of the other")
    for page, words in ((one, "of one tab"), (other, "of the other")):
        page.page.reload()
        page.find(place).wait_for()
        assert page.find(place).input_value() == words


def test_what_one_tab_sends_is_not_taken_from_another(tabs: tuple[Page, Page], short: str) -> None:
    one, other = tabs
    one.open(f"#/chat/{short}").settled(1)
    other.open(f"#/chat/{short}").settled(1)
    other.page.fill("#composer", "Go on.")
    one.page.fill("#composer", "A thought in the making")
    other.page.press("#composer", "Enter")
    other.settled(2)
    for page, words in ((one, "A thought in the making"), (other, "")):
        page.page.bring_to_front()
        page.page.reload()
        page.settled(2)
        assert page.find("#composer").input_value() == words


def test_words_for_a_session_outlive_their_tab(tabs: tuple[Page, Page], short: str) -> None:
    one, other = tabs
    one.open(f"#/chat/{short}").settled(1)
    one.page.fill("#composer", "A thought in the making")
    one.page.close()
    other.open(f"#/chat/{short}").settled(1)
    assert other.find("#composer").input_value() == "A thought in the making"
    other.page.fill("#composer", "")
    other.page.reload()
    other.settled(1)
    assert other.find("#composer").input_value() == ""


def test_a_change_in_the_making_stays(page: Page, served: Running, short: str) -> None:
    page.open(f"#/chat/{short}").settled(1)
    page.find(".message").hover()
    page.find(".message").get_by_role("button", name="Edit").click()
    page.page.fill("form.edit textarea", "half a change")
    served.client.patch(f"/sessions/{short}", json={"title": "Renamed"})
    page.find("h1", has_text="Renamed").wait_for()
    turn = served.get(f"/sessions/{short}")["path"][0]["id"]
    served.post("/tags", session_id=short, turn=turn, tag="seen")
    page.page.wait_for_timeout(300)
    assert page.find("form.edit textarea").input_value() == "half a change"
    page.button("Cancel").click()
    assert page.find(".said").count() == 1


def test_stopped_while_it_read(page: Page, served: Running) -> None:
    words = ("word and another " * 250).strip()
    page.say(words)
    page.page.wait_for_url("**/#/chat/**")
    page.button("Stop").click()
    page.find(".turn.live").wait_for(state="detached")
    page.until(lambda: not served.get(f"/sessions/{page.session_id}")["busy"])
    page.page.wait_for_timeout(300)
    # A fast model may have said something by then; either way the words are somewhere.
    if served.get(f"/sessions/{page.session_id}/tree")["turns"]:
        assert page.find(".said").inner_text().endswith("another")
        return
    assert page.find("#composer").input_value() == words
    page.page.reload()
    page.find("#composer").wait_for()
    assert page.find("#composer").input_value() == words


def test_the_session_asked_for_last_is_shown(page: Page, served: Running, short: str) -> None:
    last = made(served, 8, "Last")
    page.find(".starter").first.wait_for()
    page.page.evaluate(
        """async ([slow, last]) => {
            const real = window.fetch, gate = new Promise((open) => { window.open_gate = open; });
            let asked;
            const reached = new Promise((done) => { asked = done; });
            window.fetch = async (path, options) => {
                const response = await real(path, options);
                if (path === `/sessions/${slow}`) { asked(); await gate; }
                return response;
            };
            location.hash = `#/chat/${slow}`;
            await reached;
            location.hash = `#/chat/${last}`;
        }""",
        [short, last],
    )
    page.find("h1", has_text="Last").wait_for()
    page.page.evaluate("async () => { open_gate(); await new Promise((done) => setTimeout(done, 500)); }")
    assert page.find("h1").inner_text() == "Last"


def test_a_key_opens_what_the_address_asks_for(
    open_page: Callable[..., Page], tmp_path: Path, tiny_folder: Path
) -> None:
    (tmp_path / "keys").write_text(f"reader:{KEY}\n")
    with Running(tmp_path / "data", tiny_folder, "--keys", str(tmp_path / "keys"), key=KEY) as running:
        id = running.post("/chat", message="x", max_len=3)["session_id"]
        page = open_page(running.address).open(f"#/chat/{id}")
        page.page.fill("dialog input", "not-the-key-of-this-server")
        page.button("OK").click()
        page.find("dialog p", has_text="not accepted").wait_for()
        page.page.fill("dialog input", KEY)
        page.button("OK").click()
        page.settled(1)
        page.open()
        page.page.goto("about:blank")  # its streams end before the server does


def test_copying_where_browsers_offer_no_clipboard(open_page: Callable[..., Page], served: Running, short: str) -> None:
    page = open_page()
    page.page.add_init_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.open(f"#/chat/{short}").settled(1)
    page.find(".answer .tools").get_by_role("button", name="Copy").click()
    page.find(".toast", has_text="Copied").wait_for()
    page.page.focus("#composer")
    page.page.keyboard.press("Control+V")
    assert page.find("#composer").input_value() == served.get(f"/sessions/{short}")["path"][0]["text"]


def test_a_story_keeps_what_stands_behind_the_cursor(page: Page, served: Running) -> None:
    page.open("#/story")
    page.page.fill("#paper", "Once there was a king. He had words nobody told.")
    page.page.evaluate("() => { const p = document.querySelector('#paper'); p.focus(); p.setSelectionRange(22, 22); }")
    page.page.keyboard.press("Control+Enter")
    page.page.wait_for_url("**/#/story/**")
    page.find("#write-on", has_text="Continue").wait_for()
    turn = served.get(f"/sessions/{page.session_id}")["path"][0]
    text = turn["prompt"] + turn["text"] + " He had words nobody told."
    shown(page, text)
    page.page.reload()
    shown(page, text)


def test_a_story_that_is_refused_keeps_its_words(page: Page) -> None:
    page.open("#/story")
    page.page.route("**/story", lambda route: route.abort())
    page.page.fill("#paper", "Words that went nowhere.")
    page.page.click("#write-on")
    page.find(".toast.bad").wait_for()
    assert page.find("#paper").input_value() == "Words that went nowhere."
    page.page.reload()
    shown(page, "Words that went nowhere.")
