"""What people write into the tree themselves, in a real browser: other words in an answer, notes of a story, tags; and
a story looked at closely."""

from __future__ import annotations

from typing import Any

import pytest

from page.conftest import Page
from serving import Running


@pytest.fixture
def short(served: Running) -> str:
    """A chat of one turn that answers in few words: its id."""
    made = served.post(
        "/chat", message="Say something.", max_len=12, title="Short", sampling={"max_len": 12, "ignore_eos": True}
    )
    return str(made["session_id"])


@pytest.fixture
def story(served: Running) -> str:
    """A story of one piece: its id."""
    made = served.post(
        "/story",
        prompt="Once there was a whale who",
        max_len=12,
        title="Whale",
        sampling={"max_len": 12, "temperature": 0},
    )
    return str(made["session_id"])


def test_other_words_in_an_answer(page: Page, served: Running, short: str) -> None:
    page.open(f"#/chat/{short}").settled(1)
    page.find(".answer").hover()
    page.button("Edit the answer").click()
    page.page.fill("form.edit textarea", "I am a lighthouse, and **proud** of it.")
    page.button("Keep the change").click()
    page.find(".versions", has_text="2/2").wait_for()
    page.find(".answer strong", has_text="proud").wait_for()
    assert page.find(".reason").inner_text() == "written by hand"
    page.button("Continue").click()
    page.find(".versions", has_text="3/3").wait_for()
    assert served.get(f"/sessions/{short}")["path"][0]["text"].startswith("I am a lighthouse")
    assert len(served.get(f"/sessions/{short}/tree")["turns"]) == 3


def test_details_stay_open(page: Page, served: Running, short: str) -> None:
    page.open(f"#/chat/{short}").settled(1)
    page.find(".turn").get_by_role("button", name="More").click()
    page.choose("Details")
    page.find(".details").wait_for()
    served.post("/tags", session_id=short, turn=1, tag="seen")  # the turn is drawn anew
    page.find(".tag", has_text="seen").wait_for()
    assert page.find(".details").is_visible()


def test_a_setting_can_be_emptied(page: Page, served: Running, short: str) -> None:
    page.open(f"#/chat/{short}").settled(1)
    page.page.click("#settings-button")
    page.page.fill("#set-seed", "5")
    page.page.press("#set-seed", "Tab")
    page.until(lambda: served.get(f"/sessions/{short}")["sampling"].get("seed") == 5)
    page.page.fill("#set-seed", "")
    page.page.press("#set-seed", "Tab")
    page.until(lambda: served.get(f"/sessions/{short}")["sampling"] == {"max_tokens": 12, "ignore_eos": True})


def test_new_chats_keep_what_they_draw_with(page: Page, served: Running) -> None:
    page.page.click("#settings-button")
    page.button("Creative").click()
    page.page.fill("#set-max_tokens", "5")
    page.page.press("#set-max_tokens", "Tab")
    page.page.keyboard.press("Escape")
    page.say("Hello.")
    page.settled(1)
    told = served.get(f"/sessions/{page.session_id}")["sampling"]
    assert told == {"temperature": 1.1, "top_p": 0.95, "top_k": 0, "max_tokens": 5}


def test_settings_begin_with_the_models_own_and_go_back_to_them(page: Page, served: Running, short: str) -> None:
    own = served.get("/health")["models"][0]["sampling_defaults"]
    page.open(f"#/chat/{short}").settled(1)
    page.page.click("#settings-button")
    shown = {name: float(page.page.input_value(f"#set-{name}")) for name in ("temperature", "top_p", "top_k")}
    assert shown == {name: own[name] for name in shown}
    page.button("Creative").click()
    page.page.wait_for_timeout(300)
    assert served.get(f"/sessions/{short}")["sampling"].items() >= {"temperature": 1.1, "top_k": 0}.items()
    page.button("The model’s own").click()
    page.page.wait_for_timeout(300)
    assert served.get(f"/sessions/{short}")["sampling"] == {"max_tokens": 12, "ignore_eos": True}
    assert float(page.page.input_value("#set-temperature")) == own["temperature"]


def test_tags_of_a_conversation(page: Page, short: str) -> None:
    page.open(f"#/chat/{short}").settled(1)
    page.find(".sessions .open").get_by_role("button", name="More").click()
    page.choose("Tags")
    page.page.fill("dialog input", f"ships, unheard-of-{short[:8]}")
    page.button("OK").click()
    page.find(".sessions .open .tags span", has_text="ships").wait_for()
    page.page.fill(".search", f"of-{short[:8]}")
    page.until(lambda: page.find(".sessions li").count() == 1, lambda: f"{page.find('.sessions li').count()} are found")
    page.page.fill(".search", "")


def test_memory_is_shown(page: Page) -> None:
    page.find(".model-line small", has_text="MB of weights, cache").wait_for()


def test_a_story_opens_as_one(page: Page, story: str) -> None:
    page.open(f"#/chat/{story}")
    page.page.wait_for_url(f"**/#/story/{story}")
    page.find("#paper").wait_for()


def test_notes(page: Page, served: Running, story: str) -> None:
    page.open(f"#/story/{story}")
    page.shows_paper(lambda text: text.startswith("Once"))
    before = page.find("#paper").input_value()
    page.page.click("#notes")
    page.page.fill("#note", "The whale is called Moby.")
    page.page.click("#note-front")
    page.find(".notes li", has_text="Moby").wait_for()
    page.page.fill("#note", "The sea is warm.")
    page.page.click("#note-here")
    page.find(".notes li", has_text="warm").wait_for()
    page.page.keyboard.press("Escape")
    assert page.find("#paper").input_value() == before, "notes are no part of the story"
    path = served.get(f"/sessions/{story}")["path"]
    assert [(turn["frozen"], turn["prompt"][:9]) for turn in path] == [
        (True, "The whale"), (False, "Once ther"), (True, "The sea i")
    ]  # fmt: skip
    page.page.click("#write-on")
    page.shows_paper(lambda text: len(text) > len(before))
    page.find("#write-on", has_text="Continue").wait_for()
    longer = page.find("#paper").input_value()
    assert longer.startswith(before) and len(longer) > len(before) and "Moby" not in before
    page.page.click("#notes")
    page.find(".notes li", has_text="Moby").get_by_role("button").click()
    page.page.fill("dialog form textarea", "The whale is called Ahab.")
    page.button("Keep the change").click()
    page.find(".notes li", has_text="Ahab").wait_for()
    page.find(".notes li", has_text="warm").wait_for()
    page.page.keyboard.press("Escape")
    page.shows_paper(lambda text: text == longer)
    told = served.get(f"/sessions/{story}")["path"]
    assert [turn["frozen"] for turn in told] == [True, False, True, False] and "Ahab" in told[0]["prompt"]
    turns = served.get(f"/sessions/{story}/tree")["turns"]
    assert any("Moby" in turn["prompt"] for turn in turns), "the way it was told stays in the tree"


def test_a_note_before_the_story_begins(page: Page, served: Running) -> None:
    page.open("#/story")
    page.page.click("#notes")
    page.page.fill("#note", "Everybody is a cat.")
    page.page.click("#note-front")
    page.find(".notes li", has_text="cat").wait_for()
    page.page.keyboard.press("Escape")
    page.page.fill("#paper", "It rained.")
    page.page.click("#write-on")
    page.shows_paper(lambda text: len(text) > len("It rained."))
    page.find("#write-on", has_text="Continue").wait_for()
    told = served.get(f"/sessions/{page.session_id}")
    assert [turn["frozen"] for turn in told["path"]] == [True, False] and told["title"] == "It rained."
    assert told["context_policy"]["name"] == "drop_oldest_turns"
    assert page.find("#paper").input_value().startswith("It rained.")


def test_a_closer_look(page: Page, served: Running, story: str) -> None:
    page.open(f"#/story/{story}")
    page.shows_paper(lambda text: text.startswith("Once"))
    text = page.find("#paper").input_value()
    page.page.click("#closer")
    page.find('.token[data-position="4"]').wait_for()
    assert page.find(".closer").evaluate("one => one.textContent") == text
    page.find('.token[data-position="4"]').hover()
    page.find(".alternatives button").nth(7).wait_for()
    assert page.find(".alternatives .chosen").count() <= 1
    shares = [float(share.rstrip(" %")) for share in page.find(".alternatives .quiet").all_inner_texts()]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.1
    page.page.keyboard.press("ArrowLeft")
    page.find(".token.at").wait_for()
    assert page.find(".token.at").get_attribute("data-position") == "3"
    page.page.keyboard.press("ArrowRight")
    page.find('.token.at[data-position="4"]').wait_for()
    other = page.find(".alternatives button:not(.chosen)").first
    other.wait_for()
    other.click()

    def told() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = served.get(f"/sessions/{story}/tree")["turns"]
        return found

    page.until(lambda: len(told()) >= 2, "no other way is told")
    turns = told()
    assert len(turns) == 2 and turns[0]["parent_id"] == turns[1]["parent_id"]
    first, second = (served.post("/turn_tokens", session_id=story, turn=turn["id"])["tokens"] for turn in turns)
    assert first[:4] == second[:4] and first[4] != second[4]
