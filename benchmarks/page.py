"""Cost of the web page: first paint, size, frames while a large tree is dragged, and CPU time of a stream.

    python benchmarks/page.py [--model FILE] [--json]

Needs playwright and a Chromium (`pip install "fabula[test]"`, and the system's own browser). The stream is paced to 100
tokens a second by a minimal duration of the server's steps. Its cost is the CPU time of all processes of the browser,
and of the event loop's thread on the server.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

PORT = 8473
ADDRESS = f"http://127.0.0.1:{PORT}"
STEP_S = 0.0085
TEXT = "Write a long list of things to see in a harbour, with **bold** words, and a table of ships at the end."


def paced_server(words: list[str]) -> None:
    """`fabula serve`, with steps of at least `STEP_S`."""
    from fabula import _program
    from fabula.cli import main

    run = _program.Program.run

    def paced(*args: Any, **more: Any) -> Any:
        end = time.perf_counter() + STEP_S
        found = run(*args, **more)
        time.sleep(max(0.0, end - time.perf_counter()))
        return found

    _program.Program.run = paced  # type: ignore[method-assign]
    sys.argv = ["fabula", *words]
    main()


def post(path: str, body: Any) -> Any:
    request = urllib.request.Request(ADDRESS + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def wait_for_server() -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(ADDRESS + "/health", timeout=5)
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("the server does not start")


# ---- CPU time -------------------------------------------------------------------------------------------------------


def _fields(place: Path) -> tuple[str, list[str]]:
    """Name of a process or thread, and the fields after it (proc(5))."""
    text = (place / "stat").read_text()
    return text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()


def _seconds(fields: list[str]) -> float:
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def browser_seconds() -> float:
    """CPU time of all browser processes among this process's descendants."""
    parents, names, times = {}, {}, {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                name, fields = _fields(place)
            except OSError:
                continue
            parents[int(place.name)], names[int(place.name)], times[int(place.name)] = (
                int(fields[1]),
                name,
                _seconds(fields),
            )

    def is_mine(pid: int) -> bool:
        while pid in parents:
            if pid == os.getpid():
                return True
            pid = parents[pid]
        return False

    return sum(times[pid] for pid in times if "chrom" in names[pid] and is_mine(pid))


def serving_seconds(pid: int) -> float:
    """CPU time of the event loop, the first thread of a server."""
    return _seconds(_fields(Path(f"/proc/{pid}/task/{pid}"))[1])


# ---- Measurements ----------------------------------------------------------------------------------------------------


def first_paint(browser: Any, rounds: int = 9) -> dict[str, float]:
    """Milliseconds to first paint and until the page is usable, on a first visit; and bytes transferred for the page
    and the story."""
    times, usable, weight = [], [], 0
    for _ in range(rounds):
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        page = context.new_page()
        sizes: list[int] = []
        page.on("response", lambda response, sizes=sizes: sizes.append(len(response.body())))
        page.goto(ADDRESS)
        page.locator(".starter").first.wait_for()
        usable.append(page.evaluate("performance.now()"))
        entry = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
        while (painted := page.evaluate(entry)) is None:
            time.sleep(0.02)
        times.append(painted)
        page.goto(ADDRESS + "/#/story")
        page.locator("#paper").wait_for()
        weight = sum(sizes)
        context.close()
    return {
        "first_paint_ms": statistics.median(times),
        "usable_ms": statistics.median(usable),
        "weight_kb": weight / 1e3,
    }


def stream(browser: Any, server: int, n_tokens: int = 600) -> dict[str, float]:
    """Shares of a core used by a stream of 100 tokens/s in the browser and on the server, beyond those of an idle
    page."""
    page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    page.goto(ADDRESS)
    page.locator(".starter").first.wait_for()
    time.sleep(2)

    def shares(begin: tuple[float, float, float]) -> tuple[float, float]:
        wall = time.perf_counter() - begin[0]
        return (browser_seconds() - begin[1]) / wall, (serving_seconds(server) - begin[2]) / wall

    def now() -> tuple[float, float, float]:
        return time.perf_counter(), browser_seconds(), serving_seconds(server)

    begin = now()
    time.sleep(5)
    idle = shares(begin)
    post_body = {"message": TEXT, "max_len": n_tokens, "ignore_eos": True, "seed": 1, "temperature": 0.8}
    page.evaluate("body => fetch('/chat', {method: 'POST', headers: {'Content-Type': 'application/json'}, "
                  "body: JSON.stringify({...body, session_id: 'measured', background: true})})", post_body)  # fmt: skip
    page.goto(ADDRESS + "/#/chat/measured")
    page.locator(".turn.live").wait_for()
    begin = now()
    page.locator(".turn.live").wait_for(state="detached", timeout=120_000)
    wall = time.perf_counter() - begin[0]
    busy = shares(begin)
    page.context.close()
    return {
        "tokens_per_s": n_tokens / wall,
        "browser_share": busy[0] - idle[0],
        "server_share": busy[1] - idle[1],
        "browser_share_idle": idle[0],
    }


def dragging(browser: Any, n_turns: int = 1000) -> dict[str, float]:
    """Frames a second while a tree of n turns is dragged."""
    post("/chat", {"message": "Name a ship.", "max_len": 8, "session_id": "small"})
    export = json.load(urllib.request.urlopen(ADDRESS + "/sessions/small/export"))
    turn = export["turns"][0]
    numbers = [0] * n_turns
    turns = []
    for i in range(n_turns):
        parent = None if i == 0 else (i - 1) // 2 if i % 7 else i - 1
        numbers[i] = 1 if parent is None else numbers[parent] + 1
        turns.append(
            turn
            | {"id": f"n{i}", "parent_id": None if parent is None else f"n{parent}", "number": numbers[i], "kept": 0}
        )
    post("/sessions/import?id=wide", export | {"id": "wide", "turns": turns, "head": "n0", "undone": []})
    page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    page.goto(ADDRESS + "/#/tree/wide")
    page.locator(".node").nth(n_turns - 1).wait_for(state="attached")
    page.evaluate(
        "() => { window.frames_seen = 0; const on = () => { window.frames_seen++; requestAnimationFrame(on); }; on(); }"
    )
    page.mouse.move(640, 400)
    page.mouse.down()
    begin, before = time.perf_counter(), page.evaluate("window.frames_seen")
    i = 0
    while time.perf_counter() - begin < 3:
        i += 1
        page.mouse.move(640 + 200 * ((i // 50) % 2 or -1) * (i % 50) / 50, 400 + i % 90)
    frames = page.evaluate("window.frames_seen") - before
    wall = time.perf_counter() - begin
    page.mouse.up()
    page.context.close()
    return {"frames_per_s": frames / wall}


def main() -> None:
    if sys.argv[1:2] == ["--paced-server"]:
        paced_server(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    words = ["serve", "--port", str(PORT), "--model", given.model]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = subprocess.Popen(
            [sys.executable, __file__, "--paced-server", *words, "--data", folder], stderr=subprocess.DEVNULL
        )
        try:
            wait_for_server()
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            found = first_paint(browser) | stream(browser, server.pid) | dragging(browser)
            browser.close()
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
    if given.json:
        print(json.dumps({name: round(value, 4) for name, value in found.items()}))
        return
    print(f"first paint {found['first_paint_ms']:.0f} ms, usable after {found['usable_ms']:.0f}, "
          f"{found['weight_kb']:.0f} KB")  # fmt: skip
    print(f"a stream of {found['tokens_per_s']:.0f} tokens/s takes {100 * found['browser_share']:.1f} % of a core in "
          f"the browser and {100 * found['server_share']:.1f} % on the server")  # fmt: skip
    print(f"a tree of 1,000 turns is dragged at {found['frames_per_s']:.0f} frames/s")


if __name__ == "__main__":
    main()
