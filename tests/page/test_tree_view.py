"""The tree and the story, in a real browser."""

from __future__ import annotations

import pytest

from page.conftest import Page, crafted
from serving import Running


@pytest.fixture
def family(served: Running) -> tuple[str, list[str]]:
    """A session of five turns, and their ids: a - (b - (d, e), c), the head at d."""
    id = crafted(
        served,
        [
            (None, "The whale came up."),
            ("t0", "It was a white whale."),
            ("t0", "Nobody saw it."),
            ("t1", "The ship turned north at once."),
            ("t1", "The ship turned south at last."),
        ],
    )
    turns = served.get(f"/sessions/{id}/tree")["turns"]
    ids = [next(turn["id"] for turn in turns if turn["text"].startswith(start)) for start in ("The w", "It", "No")]
    ids += [next(turn["id"] for turn in turns if word in turn["text"]) for word in ("north", "south")]
    served.post("/rollback", session_id=id, target_turn=ids[3])
    served.client.patch(f"/sessions/{id}", json={"sampling": {"max_len": 8, "ignore_eos": True}})
    return id, ids


def test_walking_the_tree(page: Page, served: Running, family: tuple[str, list[str]]) -> None:
    id, (a, b, c, d, e) = family
    page.open(f"#/tree/{id}")
    page.find(".node.head").wait_for()
    assert page.find(".node").count() == 6 and page.find(".node.on-path").count() == 4
    page.find(f".node[data-id='{c}']").click()
    page.find(f".node.head[data-id='{c}']").wait_for()
    assert served.get(f"/sessions/{id}")["head_id"] == c
    page.page.keyboard.press("u")
    page.find(f".node.head[data-id='{a}']").wait_for()
    page.find(f".node[data-id='{b}']").click(button="right")
    page.choose("Fold")
    page.find(".folded", has_text="Unfold 2").wait_for()
    assert page.find(".node").count() == 4
    page.find(f".node[data-id='{b}']").click()
    page.find(".folded").wait_for(state="detached")
    page.find(f".node[data-id='{e}']").click()
    page.find(f".node.head[data-id='{e}']").focus()
    page.page.keyboard.press("ArrowLeft")
    page.page.keyboard.press("Enter")
    page.find(f".node.head[data-id='{d}']").wait_for()
    page.find(f".node[data-id='{e}']").click(button="right")
    page.choose("Compare with the current turn")
    assert page.find("dialog mark").all_inner_texts() == ["south", "last.", "north", "once."]


def test_pruning_can_be_taken_back(page: Page, served: Running, family: tuple[str, list[str]]) -> None:
    id, (_, b, _, _, _) = family
    page.open(f"#/tree/{id}")
    page.find(f".node[data-id='{b}']").click(button="right")
    page.unhurried()
    page.choose("Delete what follows")
    page.find(".toast", has_text="2 turns are deleted").wait_for()
    assert page.find(".node").count() == 4
    page.button("Undo").click()
    page.find(".node").nth(5).wait_for()
    page.find(f".node[data-id='{b}']").click(button="right")
    page.choose("Delete what follows")
    page.page.goto("about:blank")
    page.until(lambda: len(served.get(f"/sessions/{id}/tree")["turns"]) == 3)


def test_alternatives_side_by_side(page: Page, served: Running, family: tuple[str, list[str]]) -> None:
    id, (a, *_) = family
    page.open(f"#/chat/{id}").settled(3)
    page.page.click("#tree-button")
    page.find(f".tree-side .node[data-id='{a}']").click(button="right")
    page.choose("3 more answers")
    page.find(".tree-side .node").nth(8).wait_for()
    page.find(".node.growing").first.wait_for(state="detached")
    assert page.find(".tree-side .node").count() == 9
    assert len(served.get(f"/sessions/{id}/tree")["turns"]) == 8


def test_a_thousand_turns(page: Page, served: Running) -> None:
    id = crafted(served, [(None if i == 0 else f"t{(i - 1) // 3}", f"Turn {i}") for i in range(1000)])
    page.open(f"#/tree/{id}")
    page.find(".node").nth(1000).wait_for()
    box = page.find("svg.tree").bounding_box()
    assert box is not None
    page.page.evaluate(
        "() => { window.drawn = 0; const tick = () => { window.drawn++; requestAnimationFrame(tick); }; tick(); }"
    )
    page.page.mouse.move(box["x"] + 300, box["y"] + 300)
    page.page.mouse.down()
    moved = page.find("svg.tree > g").get_attribute("transform")
    for i in range(40):
        page.page.mouse.move(box["x"] + 300 + 5 * i, box["y"] + 300 + i)
    page.page.mouse.up()
    page.until(lambda: page.find("svg.tree > g").get_attribute("transform") != moved, "it does not move")
    page.until(lambda: page.page.evaluate("window.drawn") > 10, "it is not drawn any more")


def test_a_story(page: Page, served: Running) -> None:
    page.open("#/story")
    page.page.fill("#paper", "Once upon a time there was a whale.")
    page.page.click("#write-on")
    page.page.wait_for_url("**/#/story/**")
    page.find("#write-on", has_text="Continue").wait_for()
    text = page.find("#paper").input_value()
    assert text.startswith("Once upon a time there was a whale.") and len(text) > 40
    page.page.click("#ways")
    page.find(".card button").nth(2).wait_for()
    page.find(".card button").nth(1).click()
    page.find(".card").first.wait_for(state="detached")
    longer = page.find("#paper").input_value()
    assert longer.startswith(text) and len(longer) > len(text)
    # A change in the middle goes back to before it; the old way stays in the tree.
    n = len(served.get(f"/sessions/{page.session_id}/tree")["turns"])
    ship = "Once upon a time there was a small ship."
    page.page.fill("#paper", ship)
    page.page.click("#write-on")
    page.shows_paper(lambda text: len(text) > len(ship))
    page.find("#write-on", has_text="Continue").wait_for()
    assert page.find("#paper").input_value().startswith(ship)
    assert len(served.get(f"/sessions/{page.session_id}/tree")["turns"]) == n + 1
    with page.page.expect_download() as download:
        page.find(".view-head").get_by_role("button", name="More").click()
        page.choose("Export as Markdown")
    assert "small ship" in download.value.path().read_text()
