"""The chat, in a real browser: from the first visit on, every action at least once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from page.conftest import Page, crafted
from serving import Running, lasting_port


@pytest.fixture
def short(served: Running) -> str:
    """A session that answers in few words: its id, with one turn said."""
    made = served.post("/chat", message="Say something.", max_len=12, ignore_eos=True, title="Short")
    served.client.patch(f"/sessions/{made['session_id']}", json={"sampling": {"max_len": 12, "ignore_eos": True}})
    return str(made["session_id"])


def test_first_visit_to_first_words(page: Page) -> None:
    assert page.find(".welcome p").count() == 3 and page.find(".starter").count() == 3
    page.find(".starter").first.click()
    page.find(".live .rest:not(.waiting), .live .markdown", has_text="e").first.wait_for()
    assert "/#/chat/" in page.page.url
    page.button("Stop").click()
    page.settled(1)
    assert page.find(".reason").inner_text() == "stopped"
    page.find(".sessions .open", has_text="Tell me a story").wait_for()  # it is called by its first words
    page.page.reload()
    page.settled(1)


def test_stopped_before_its_first_word(page: Page) -> None:
    page.page.route("**/chat", lambda route: route.abort())
    page.find(".starter").first.click()
    page.find(".toast.bad").wait_for()
    assert page.find("#composer").input_value() == "Tell me a story about a lighthouse keeper."


def test_versions(page: Page, short: str) -> None:
    page.open(f"#/chat/{short}").settled(1)
    first = page.find(".answer .markdown").inner_text().split()
    page.button("Answer again").click()
    page.find(".versions", has_text="2/2").wait_for()
    page.button("Previous version").click()
    page.find(".versions", has_text="1/2").wait_for()
    assert page.find(".answer .markdown").inner_text().split() == first
    page.find(".message").hover()
    page.find(".message").get_by_role("button", name="Edit").click()
    page.page.fill("form.edit textarea", "Say something else.")
    page.page.press("form.edit textarea", "Enter")
    page.find(".versions", has_text="3/3").wait_for()
    assert page.find(".said").inner_text().endswith("Say something else.")


def test_continue_and_details(page: Page, short: str) -> None:
    page.open(f"#/chat/{short}").settled(1)
    before = page.find(".answer .markdown").inner_text()
    page.button("Continue").click()
    page.find(".versions", has_text="2/2").wait_for()
    after = page.find(".answer .markdown").inner_text()
    assert len(after) > len(before)
    page.find(".turn").get_by_role("button", name="More").click()
    page.choose("Details")
    told = page.find(".details").inner_text()
    assert "tokens/s" in told and "reused" in told and "seed" in told and "first token" in told


def test_keys_walk(page: Page, short: str) -> None:
    page.open(f"#/chat/{short}").settled(1)
    page.say("More.")
    page.settled(2)
    page.find("header h1").click()
    page.page.keyboard.press("u")
    page.settled(1)
    page.page.keyboard.press("r")
    page.settled(2)
    page.page.keyboard.press("?")
    page.find("dialog kbd").first.wait_for()
    page.page.keyboard.press("Escape")
    page.page.keyboard.press("n")
    page.find(".starter").first.wait_for()


def test_fork_and_tags(page: Page, served: Running, short: str) -> None:
    page.open(f"#/chat/{short}").settled(1)
    page.find(".turn").get_by_role("button", name="More").click()
    page.choose("Name this turn")
    page.page.fill("dialog input", "good")
    page.button("OK").click()
    page.find(".tag", has_text="good").wait_for()
    page.find(".turn").get_by_role("button", name="More").click()
    page.choose("New conversation from here")
    page.page.wait_for_url(lambda url: short not in url)
    page.settled(1)
    assert served.get(f"/sessions/{page.session_id}")["head"] == 1


def test_settings(page: Page, served: Running) -> None:
    page.page.click("#settings-button")
    page.page.fill("#set-system", "You are a pirate.")
    page.page.press("#set-system", "Tab")
    page.page.fill("#set-max_tokens", "9")
    page.page.press("#set-max_tokens", "Tab")
    page.button("Precise").click()
    page.page.keyboard.press("Escape")
    page.say("Who are you?")
    page.settled(1)
    told = served.get(f"/sessions/{page.session_id}")
    assert told["system"] == "You are a pirate." and told["path"][0]["generated"] <= 9
    page.page.click("#settings-button")
    assert page.find("#set-system").is_disabled()
    page.page.fill("#set-seed", "5")
    page.page.press("#set-seed", "Tab")
    page.page.keyboard.press("Escape")
    page.until(lambda: served.get(f"/sessions/{page.session_id}")["sampling"].get("seed") == 5)


def test_a_draft_is_kept(page: Page) -> None:
    page.page.fill("#composer", "A thought that is not\nfinished")
    page.page.reload()
    page.find(".starter").first.wait_for()
    assert page.find("#composer").input_value() == "A thought that is not\nfinished"


def test_the_list(page: Page, served: Running, short: str, tmp_path: Path) -> None:
    page.open(f"#/chat/{short}").settled(1)

    def more(label: str) -> None:
        page.find(".sessions .open").get_by_role("button", name="More").click()
        page.choose(label)

    more("Rename")
    page.page.fill("dialog input", "Whales and ships")
    page.button("OK").click()
    page.find(".sessions .open", has_text="Whales and ships").wait_for()
    page.page.fill(".search", "wHales")
    page.until(lambda: page.find(".sessions li").count() == 1)
    page.page.fill(".search", "")
    with page.page.expect_download() as download:
        more("Export as a file")
    download.value.save_as(tmp_path / "kept.json")
    assert json.loads((tmp_path / "kept.json").read_text())["id"] == short

    page.unhurried()
    more("Delete")
    page.button("Undo").click()
    page.find(".sessions", has_text="Whales and ships").wait_for()
    page.open(f"#/chat/{short}").settled(1)
    more("Delete")
    page.find(".toast", has_text="is deleted").wait_for()
    page.page.goto("about:blank")  # whoever leaves does not take it back
    page.open()
    page.find(".starter").first.wait_for()
    assert served.client.get(f"/sessions/{short}").status_code == 404
    page.find("input[type=file]").set_input_files(tmp_path / "kept.json")
    page.page.wait_for_url(f"**/#/chat/{short}")
    page.settled(1)
    page.page.fill(".search", "in none of the titles")
    page.find(".sessions .empty").wait_for()
    page.find("input[type=file]").set_input_files(tmp_path / "kept.json")  # its id is taken; the list does not tell
    page.page.wait_for_url(f"**/#/chat/{short}-*")
    (tmp_path / "other.json").write_text("[1]")
    page.find("input[type=file]").set_input_files(tmp_path / "other.json")
    page.find(".toast.bad", has_text="no exported conversation").wait_for()


def test_chinese(open_page: Callable[..., Page]) -> None:
    page = open_page(locale="zh-CN").open()
    page.find(".starter", has_text="灯塔").wait_for()
    assert page.find("#composer").get_attribute("placeholder") == "写一条消息……"


# ---- Never lose a word ----------------------------------------------------------------------------------------------


def test_reload_in_the_middle(page: Page, served: Running) -> None:
    sampling = {"max_len": 250, "ignore_eos": True}  # whatever it would like to say, it takes a while
    id = served.post("/chat", message="Hello.", max_len=4, title="Long", sampling=sampling)["session_id"]
    page.open(f"#/chat/{id}").settled(1)
    page.say("Tell me a very long story.")
    page.find(".live .rest:not(.waiting), .live .markdown", has_text="e").first.wait_for()
    page.page.reload()
    page.find(".turn").first.wait_for()
    page.settled(2)
    turn = served.get(f"/sessions/{id}")["path"][1]
    assert turn["finish_reason"] == "length" and page.find(".said").last.inner_text().endswith("long story.")


def test_two_pages_in_step(open_page: Callable[..., Page], short: str) -> None:
    one, other = open_page().open(f"#/chat/{short}"), open_page().open(f"#/chat/{short}")
    one.settled(1)
    other.settled(1)
    one.say("From the first page.")
    other.find(".said", has_text="From the first page.").wait_for()
    one.settled(2)
    other.settled(2)
    other.say("From the other.")
    one.find(".said", has_text="From the other.").wait_for()
    one.settled(3)
    other.settled(3)
    other.find("header h1").click()
    other.page.keyboard.press("u")
    one.settled(2)
    assert one.find(".said").all_inner_texts() == other.find(".said").all_inner_texts()


def test_a_restart_in_the_middle(open_page: Callable[..., Page], tmp_path: Path, tiny_folder: Path) -> None:
    port = str(lasting_port())
    first = Running(tmp_path / "data", tiny_folder, "--port", port)
    try:
        page = open_page(first.address).impatient().open()
        page.page.click("#settings-button")
        page.page.fill("#set-max_tokens", "560")
        page.page.press("#set-max_tokens", "Tab")
        page.page.keyboard.press("Escape")
        page.say("go")
        page.page.wait_for_url("**/#/chat/**")
        first.process.kill()
        first.process.wait()
        page.find(".banner", has_text="does not answer").wait_for()
        page.page.fill("#composer", "kept")
    finally:
        first.stop()
    with Running(tmp_path / "data", tiny_folder, "--port", port):
        page.find(".banner").wait_for(state="hidden")
        page.find(".live").wait_for(state="detached")
        page.find(".said", has_text="go").wait_for()
        assert page.find("#composer").input_value() == "kept"
        # Written down before the end or not: what was seen is still there, and one can go on.
        assert page.find(".turn").count() == 1 and page.find(".answer").inner_text().strip()
        said = page.find(".said", has_text="kept")
        # Enter does nothing while the page takes the server for away, as it may for another moment.
        page.until(lambda: said.count() or page.find("#composer").press("Enter"), "it is not said")
        page.complaints.clear()  # the browser's own words about a server that is away


# ---- Hostile words --------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>window.bad = 1</script><img src=x onerror='window.bad = 2'>",
    "[click](javascript:window.bad=3) <a href='javascript:window.bad=4'>x</a> ![far](http://example.invalid/x.png)",
    "<iframe srcdoc='<script>parent.bad=5</script>'></iframe><svg onload='window.bad=6'><style>*{display:none}</style>",
    "```html\n" + "<b onclick='window.bad=7'>x</b>\n" * 30_000 + "```\n",
    "|" + "a|" * 200 + "\n|" + "-|" * 200 + "\n" + ("|" + "b|" * 200 + "\n") * 400,
]


def test_hostile_words_do_nothing(page: Page, served: Running) -> None:
    parents = [None, *(f"t{i}" for i in range(len(HOSTILE) - 1))]
    id = crafted(served, list(zip(parents, HOSTILE, strict=True)))
    newest = served.get(f"/sessions/{id}/tree")["turns"][-1]["id"]
    served.post("/rollback", session_id=id, target_turn=newest)
    asked: list[Any] = []
    page.page.on("request", lambda request: asked.append(request.url))
    page.open(f"#/chat/{id}").settled(len(HOSTILE))
    page.find(".turn .markdown pre.code").first.wait_for()
    page.page.wait_for_timeout(500)
    assert page.page.evaluate("window.bad") is None
    assert page.find(".markdown img, .markdown script, .markdown iframe, .markdown svg:not(.icon)").count() == 0
    hrefs = page.find(".markdown a").evaluate_all("all => all.map((one) => one.getAttribute('href'))")
    assert all(href is None or href.startswith("http") for href in hrefs)
    assert all(url.startswith(served.address) for url in asked)
