"""What the page asks of the server: its files, markdown, and the changes of a session."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from fabula.server.render import MAX_MARKED, render
from serving import Running, parse


@pytest.fixture
def served(tiny_server: Running) -> Running:
    return tiny_server


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_files(served: Running) -> None:
    index = served.client.get("/")
    assert index.status_code == 200 and index.headers["content-type"] == "text/html; charset=utf-8"
    policy = index.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self'" in policy
    for name, kind in (("app.js", "text/javascript"), ("css/base.css", "text/css"), ("icon.svg", "image/svg+xml")):
        file = served.client.get(f"/static/{name}")
        assert file.status_code == 200 and file.headers["content-type"].startswith(kind)
        again = served.client.get(f"/static/{name}", headers={"If-None-Match": file.headers["etag"]})
        assert again.status_code == 304 and again.content == b""
    for path in ("/static/none.js", "/static/../app.py", "/static/%2e%2e/app.py", "/static/", "/static/css"):
        assert served.client.get(path).status_code == 404, path


def test_every_import_is_a_file() -> None:
    import re

    import fabula

    web = Path(fabula.__file__).parent / "web"
    checked = 0
    for path in web.glob("*.js"):
        for name in re.findall(r"(?:from|import\()\s*\"\./([^\"]+)\"", path.read_text(encoding="utf-8")):
            checked += 1
            assert (web / name).is_file(), f"{path.name} imports {name}"
    assert checked > 20


def test_both_languages_have_all_words() -> None:
    import re

    import fabula

    web = Path(fabula.__file__).parent / "web"
    words = [set(re.findall(r"(\w+): \"", (web / f"words_{name}.js").read_text("utf-8"))) for name in ("en", "zh")]
    assert words[0] - words[1] <= {"dark"} and words[1] - words[0] == set()
    used = {
        key
        for path in web.glob("*.js")
        if not path.name.startswith("words_")
        for key in re.findall(r"\bt\(\"(\w+)\"", path.read_text(encoding="utf-8"))
    }
    assert used - words[0] == set()


# ---- Markdown -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a *b* **c** `d`", "<p>a <em>b</em> <strong>c</strong> <code>d</code></p>"),
        ("# T\n\ntext", "<h1>T</h1>"),
        ("- a\n- b", "<li>a</li>"),
        ("3. a", '<ol start="3">'),
        ("|a|b|\n|-|:-:|\n|1|2|", '<td class="center">2</td>'),
        ("```python\ndef f(): pass\n```", '<span class="k">def</span>'),
        ("```nonsense\n<b>\n```", "&lt;b&gt;"),
        ("~~x~~", "<s>x</s>"),
        ("[x](https://example.org/a?b=1&c)", 'href="https://example.org/a?b=1&amp;c"'),
        ("https://example.org", "<p>https://example.org</p>"),
        ("a\n\n***\n\nb", "<hr>"),
    ],
)
def test_markdown(text: str, wanted: str) -> None:
    assert wanted in "".join(render(text).blocks)


ALLOWED = {
    *("p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "em", "strong", "s", "a"),
    *("br", "hr", "table", "thead", "tbody", "tr", "th", "td", "span", "div"),
}
HOSTILE = """
<script>alert(1)</script>
<img src=x onerror=alert(1)>
[x](javascript:alert(1))
[x](JaVaScRiPt:alert(1))
[x](data:text/html,<script>)
[x](vbscript:a)
![x](http://example.org/a.png)
![x](javascript:a)
<a href='javascript:x'>x</a>
<svg/onload=alert(1)>
```x" onload="alert(1)|```
```|</code></pre><script>|```
[x](http://a" onclick="b)
[a]: javascript:x||[a]
&lt;script&gt;
<style>*{}</style>
<iframe src=//x>
<form action=//x><input>
[x](//example.org/y)
[x](/delete)
<math><mi xlink:href=javascript:1>
"""


@pytest.mark.parametrize("text", [line.replace("|", "\n") for line in HOSTILE.strip().splitlines()] + ["x\0<script>"])
def test_hostile_markdown(text: str) -> None:
    import re

    html = "".join(render(text).blocks)
    for tag, rest in re.findall(r"<\s*/?\s*([a-zA-Z0-9]+)([^>]*)>", html):
        allowed = (
            "p h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code em strong s a br hr table thead tbody tr th td span div"
        )
        assert tag.lower() in allowed.split(), (tag, html)
        names = {name.lower() for name in re.findall(r"\s([a-zA-Z-]+)=", rest)}
        assert names <= {"href", "title", "class", "start", "rel", "target", "data-language"}, (names, html)
        for href in re.findall(r'href="([^"]*)"', rest):
            assert href.lower().startswith(("http://", "https://", "mailto:")), html


def test_what_is_appended_changes_only_the_last_block() -> None:
    whole = "# A\n\nb *c*\n\n- d\n- e\n\n```python\nx = 1\n\ny = 2\n```\n\n> f\n\ng\n\n|h|i|\n|-|-|\n|1|2|\n"
    final = render(whole).blocks
    for end in range(1, len(whole)):
        part = render(whole[:end])
        lines = whole[:end].splitlines(keepends=True)
        kept = part.blocks[:-1]
        rest = render("".join(lines[part.last_line :]) + whole[end:]).blocks
        assert kept + rest == final, end


def test_large_texts_are_bounded(served: Running) -> None:
    import time

    table = "|" + "a|" * 3000 + "\n|" + "-|" * 3000 + "\n" + ("|" + "b|" * 3000 + "\n") * 40
    marks = ("*" * 50_000, "[" * 50_000, "> " * 20_000 + "x", "- " * 5_000, "`" * 70_001, "**a" * 30_000)
    for text in ("```python\n" + "x = 1\n" * 150_000 + "```", table, *marks, "a" * (MAX_MARKED + 5)):
        begun = time.process_time()
        blocks = render(text).blocks
        assert blocks and time.process_time() - begun < 20  # not for ever; it takes a second at most
    assert served.post("/render", texts=["*a*", "b"])["rendered"][0] == {
        "blocks": ["<p><em>a</em></p>\n"],
        "last_line": 0,
    }
    assert served.client.post("/render", json={"texts": ["x"] * 257}).status_code == 400
    assert served.client.post("/render", json={"texts": [1]}).status_code == 400


# ---- Changes --------------------------------------------------------------------------------------------------------


class Listener:
    """Reads a session's events in a thread of its own."""

    def __init__(self, served: Running, id: str) -> None:
        self.events: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._begun = threading.Event()
        self._thread = threading.Thread(
            target=self._read, args=(f"{served.address}/sessions/{id}/events",), daemon=True
        )
        self._thread.start()
        self._begun.wait()

    def _read(self, url: str) -> None:
        with httpx.stream("GET", url, timeout=None) as reply:
            for event in parse(reply.iter_lines()):
                with self._news:
                    self.events.append(event)
                    self._news.notify_all()
                self._begun.set()

    def join(self) -> None:
        self._thread.join()

    def wait(self, n: int) -> list[str]:
        with self._news:
            self._news.wait_for(lambda: len(self.events) >= n)
            return [event["#event"] for event in self.events]


def test_changes_are_told_in_order(served: Running) -> None:
    first = served.post("/chat", session_id="watched", message="a", max_len=2, ignore_eos=True)
    listener = Listener(served, "watched")
    assert listener.wait(1) == ["state"] and listener.events[0]["head_id"] == first["turn_id"]
    second = served.post("/chat", session_id="watched", message="b", max_len=2, ignore_eos=True)
    assert listener.wait(3) == ["state", "begun", "ended"]
    begun = listener.events[1]
    assert (begun["prompt"], begun["parent_id"], begun["selects"]) == ("b", first["turn_id"], True)
    assert listener.events[2]["stream_id"] == begun["stream_id"] == second["stream_id"]
    served.post("/rollback", session_id="watched", target_turn=1)
    served.post("/redo", session_id="watched")
    served.post("/tags", session_id="watched", turn=1, tag="x")
    served.client.patch("/sessions/watched", json={"title": "T"})
    served.post("/rollback", session_id="watched", target_turn=1, prune=True)
    served.post("/delete_session", session_id="watched")
    assert listener.wait(9)[3:] == ["head", "head", "tags", "settings", "tree", "deleted"]
    assert listener.events[3]["head_id"] == first["turn_id"] and listener.events[4]["head_id"] == second["turn_id"]
    numbers = [int(event["#id"]) for event in listener.events]
    assert numbers == sorted(numbers)
    assert served.client.get("/sessions/watched/events").status_code == 404


def test_answers_in_the_making_are_told(served: Running) -> None:
    body = {
        "session_id": "late",
        "message": "a",
        "max_len": 400,
        "ignore_eos": True,
        "stream": True,
        "background": True,
    }
    with httpx.stream("POST", f"{served.address}/chat", json=body, timeout=None) as reply:
        start = next(parse(reply.iter_lines()))
        listener = Listener(served, "late")
        listener.wait(1)
        told = listener.events[0]["streams"]
    assert [one["stream_id"] for one in told] in ([start["stream_id"]], [])  # it may have ended by now
    ended = served.client.get(f"/streams/{start['stream_id']}").text
    assert "event: done" in ended


def test_search(served: Running) -> None:
    served.post("/chat", session_id="s1", message="a", max_len=1, title="The white WHALE")
    served.post("/chat", session_id="s2", message="a", max_len=1, title="Ships")
    found = served.get("/sessions?search=white%20whale")["sessions"]
    assert [one["session_id"] for one in found] == ["s1"]
    assert served.get("/sessions?search=nothing-of-that-kind")["sessions"] == []
    assert json.dumps(served.get("/sessions?search=S2")).count("s2") == 1


def test_a_server_that_ends_ends_its_listeners(tiny_folder: Path, tmp_path: Path) -> None:
    with Running(tmp_path / "data", tiny_folder) as running:
        running.post("/chat", session_id="a", message="a", max_len=1)
        listener = Listener(running, "a")
        listener.wait(1)
        assert running.stop() == 0
        listener.join()
