"""What holds for every view: no barrier for those who use it otherwise, little weight, nothing from elsewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from page.conftest import Page, crafted
from serving import Running

# Whether everything has been fetched and shown: what fades in has too little contrast for a moment.
STILL = """() => document.readyState === "complete"
    && document.getAnimations().every((one) => one.playState !== "running")"""


@pytest.fixture(scope="module")
def axe() -> str:
    found = importlib.util.find_spec("axe_core_python")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("axe-core-python is not installed")
    return next(Path(found.submodule_search_locations[0]).rglob("axe.min.js")).read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.heavy)])
@pytest.mark.parametrize(
    "place", ["", "#/chat/{id}", "#/tree/{id}", "#/story/{id}", "settings", "keys", "notes", "closer"]
)
def test_no_barriers(open_page: Callable[..., Page], served: Running, axe: str, scheme: str, place: str) -> None:
    page = open_page(color_scheme=scheme, bypass_csp=True)
    if "{id}" in place:
        code = '```python\ndef f(x):  # a comment\n    return "text" + str(1)\n```\n'
        text = f"# Title\n\nSome *words* and `code`.\n\n{code}"
        place = place.format(id=crafted(served, [(None, text), ("t0", "Then.")]))
    if place in ("notes", "closer"):
        made = served.post("/story", prompt="Once there was a whale.", max_len=8, ignore_eos=True)
        served.post("/write", session_id=made["session_id"], text="It is white.", frozen=True)
        page.open(f"#/story/{made['session_id']}")
        page.page.click(f"#{place}:not([disabled])")
        page.find(".notes li" if place == "notes" else ".token").first.wait_for()
        if place == "closer":
            page.find(".token").first.hover()
            page.find(".alternatives button").first.wait_for()
    else:
        page.open(place if place.startswith("#") else "")
    if place in ("settings", "keys"):
        page.find(".starter").first.wait_for()
        page.page.click("#settings-button") if place == "settings" else page.button("Keys").click()
    page.until(lambda: page.page.evaluate(STILL), "something moves")
    page.page.evaluate(axe)
    found: dict[str, Any] = page.page.evaluate("() => axe.run()")
    bad = [
        (one["id"], [node["html"][:120] for node in one["nodes"]][:3])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert bad == []


def test_weight_and_sources(open_page: Callable[..., Page], served: Running) -> None:
    page = open_page()
    sizes: dict[str, int] = {}
    page.page.on("response", lambda response: sizes.__setitem__(response.url, len(response.body())))
    page.open()
    page.find(".starter").first.wait_for()
    page.open("#/story").find("#paper").wait_for()
    page.open("#/tree/none")
    page.until(lambda: any("tree" in url.rpartition("/")[2] for url in sizes), lambda: list(sizes))
    assert all(url.startswith(served.address) for url in sizes)
    assert 20_000 < sum(sizes.values()) < 200_000


def test_a_phone(open_page: Callable[..., Page]) -> None:
    page = open_page(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True).open()
    page.find(".starter").first.wait_for()
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert not page.find(".sidebar").is_visible()
    page.page.click("#opener")
    page.find(".sidebar .search").wait_for()
    page.page.touchscreen.tap(350, 500)
    page.find(".sidebar").wait_for(state="hidden")
