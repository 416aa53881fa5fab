"""Terminal output of all commands: notes on stderr, progress bars, and removal of control characters."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# All control characters except newline and tab: a model's text must not send escape sequences to the terminal.
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def err() -> Console:
    """The console of stderr; colors only on a terminal."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def _is_plain() -> bool:
    """Whether stderr is no terminal and gets no colors: then rich, which is slow to import, is not needed."""
    return not sys.stderr.isatty() and not os.environ.get("FORCE_COLOR")


def clean(text: str) -> str:
    """Replaces control characters in a text."""
    return text.translate(_CONTROLS)


def shorten(text: str, length: int = 40) -> str:
    """A text truncated to `length` characters on one line."""
    line = " ".join(clean(text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def note(text: str, *, style: str = "dim") -> None:
    """Prints a message for the user on stderr."""
    if _is_plain():
        print(clean(text), file=sys.stderr)
        return
    from rich.text import Text

    err().print(Text(clean(text), style=style))


def complain(text: str) -> None:
    """Prints an error in red on stderr."""
    if _is_plain():
        print(f"error: {clean(text)}", file=sys.stderr)
        return
    from rich.text import Text

    err().print(Text("error: ", style="bold red") + Text(clean(text), style="not bold red"))


def emit(text: str) -> None:
    """Writes a model's text to stdout and flushes; without control characters on a terminal."""
    sys.stdout.write(clean(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


class Bar:
    """A progress bar on stderr, drawn only on a terminal."""

    def __init__(self, start: Callable[[str, int | None], Callable[[int, int | None], None]]) -> None:
        self._start = start
        self._update: Callable[[int, int | None], None] | None = None
        self._title = ""

    def show(self, title: str, done: int, total: int | None) -> None:
        """Shows `done` of `total` bytes; a new title starts a new bar."""
        if self._update is None or title != self._title:
            self._title = title
            self._update = self._start(title, total)
        self._update(done, total)


class FetchProgress:
    """A `fabula.formats.download.Progress` that updates a bar."""

    def __init__(self, bar: Bar, title: str) -> None:
        self._bar, self._title = bar, title

    def update(self, done_bytes: int, total_bytes: int | None) -> None:
        self._bar.show(self._title, done_bytes, total_bytes)


@contextlib.contextmanager
def bars() -> Iterator[Bar]:
    """Progress bars that disappear at the end of the block. Without a terminal, a download writes one line."""
    console = None if _is_plain() else err()
    if console is None or not console.is_terminal:

        def announce(title: str, total: int | None) -> Callable[[int, int | None], None]:
            # Loading takes about a second; only downloads deserve a line in a log.
            if title.startswith("fetching"):
                note(title if total is None else f"{title} ({total / 1e6:.0f} MB)")
            return lambda *_: None

        yield Bar(announce)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:

        def start(title: str, total: int | None) -> Callable[[int, int | None], None]:
            task = progress.add_task(title, total=total)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield Bar(start)
