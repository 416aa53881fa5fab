"""A browser and a server for tests of the page. They skip, with the reason, where there is no Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serving import Running
from waiting import wait_until

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


# For the package, not the session: while a browser is open, playwright keeps an event loop in this thread, and tests
# elsewhere run their own.
@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="package")
def served(browser: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Running]:
    del browser  # without one nothing is started
    try:
        model = request.getfixturevalue("smollm2_gguf")
    except pytest.skip.Exception:
        model = request.getfixturevalue("tiny_folder")
    with Running(tmp_path_factory.mktemp("page"), model) as running:
        yield running


# Of one wait. The browser asks again and again what a page shows, which the watchdog takes for progress.
MOST_MS = 15 * 60_000.0


class Page:
    """A page of the server: playwright's own, and what tests do with it.

    Attributes:
        page: playwright's page.
        complaints: errors of the console and refusals of the Content-Security-Policy; none are wanted.
    """

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address = page, address
        self.complaints: list[str] = []
        page.on("console", lambda message: self._told(message))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _told(self, message: Any) -> None:
        # A server that is down is told by the browser too; the page shows it in its own words.
        if message.type == "error" and "ERR_" not in message.text and "status of" not in message.text:
            self.complaints.append(message.text)

    def open(self, place: str = "") -> Page:
        self.page.goto(f"{self.address}/{place}")
        return self

    def find(self, selector: str, **how: Any) -> Any:
        return self.page.locator(selector, **how)

    def button(self, label: str) -> Any:
        return self.page.get_by_role("button", name=label, exact=True)

    def choose(self, label: str) -> None:
        self.page.get_by_role("menuitem", name=label, exact=True).click()

    def say(self, text: str) -> None:
        self.page.fill("#composer", text)
        self.page.press("#composer", "Enter")

    def settled(self, n_turns: int) -> None:
        """Waits until so many turns are shown and none is being made."""
        self.find(".turn.live").wait_for(state="detached")
        self.until(
            lambda: self.find(".turn:not(.live)").count() == n_turns and not self.find(".turn.live").count(),
            lambda: f"{self.find('.turn').count()} turns are shown, not {n_turns}",
        )

    def shows_paper(self, wanted: Callable[[str], bool]) -> None:
        """Waits until the paper says what is wanted."""
        self.until(lambda: wanted(self.find("#paper").input_value()), lambda: self.find("#paper").input_value())

    def until(self, condition: Callable[[], object], what: str | Callable[[], object] = "it does not come") -> None:
        """Waits for what cannot be asked by a selector."""
        wait_until(condition, what, pause=lambda: self.page.wait_for_timeout(100))

    def impatient(self) -> Page:
        """Pages opened from now on ask often whether the server is there."""
        self.page.add_init_script(
            """{
                const real = window.setTimeout;
                window.setTimeout = (work, ms, ...more) => real(work, Math.min(ms, 200), ...more);
            }"""
        )
        return self

    def unhurried(self) -> None:
        """From now on nothing that is offered for some seconds goes away: messages, and what can be taken back."""
        self.page.evaluate(
            """() => {
                const real = window.setTimeout;
                window.setTimeout = (work, ms, ...more) => real(work, ms >= 5000 ? 1e9 : ms, ...more);
            }"""
        )

    @property
    def session_id(self) -> str:
        return str(self.page.url).rpartition("/")[2]


@pytest.fixture
def open_page(browser: Any, served: Running) -> Iterator[Callable[..., Page]]:
    """Opens pages, each for a reader of its own; at the end none may have complained."""
    contexts, pages = [], []

    def open(address: str = "", **how: Any) -> Page:
        contexts.append(browser.new_context(viewport=how.pop("viewport", {"width": 1280, "height": 800}), **how))
        contexts[-1].set_default_timeout(MOST_MS)
        pages.append(Page(contexts[-1].new_page(), address or served.address))
        return pages[-1]

    yield open
    for context in contexts:
        context.close()
    assert [page.complaints for page in pages if page.complaints] == []


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    return open_page().open()


def crafted(served: Running, texts: list[tuple[str | None, str]]) -> str:
    """A session whose turns say what they are told: (id of the parent or None, text); ids are t0, t1, ..."""
    made = served.post("/chat", message="x", max_len=1)
    data = served.get(f"/sessions/{made['session_id']}/export")
    turn = data["turns"][0]
    numbers: dict[str | None, int] = {None: 0}
    data["turns"] = []
    for i, (parent, text) in enumerate(texts):
        numbers[f"t{i}"] = numbers[parent] + 1
        data["turns"].append(turn | {"id": f"t{i}", "parent_id": parent, "number": numbers[f"t{i}"], "text": text})
    data |= {"id": f"crafted-{made['session_id'][:12]}", "head": "t0"}
    return str(served.post("/sessions/import", 201, **data)["session_id"])
