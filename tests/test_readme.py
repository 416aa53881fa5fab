"""The README's programs, requests, commands and links work as written."""

from __future__ import annotations

from pathlib import Path

import pytest

from documented import PROJECT, Desk, Document, check_exists
from serving import Running

README = Document(PROJECT / "README.md")


@pytest.mark.parametrize("number", range(len(README.programs)))
def test_programs(number: int, smollm2_gguf: Path, tmp_path: Path) -> None:
    assert smollm2_gguf.is_file()
    assert len(Desk(tmp_path).run(README.programs[number]).splitlines()) >= 2


def test_requests(tiny_server: Running, tmp_path: Path) -> None:
    requests = [command for command in README.commands if command.words[0] == "curl"]
    assert len(requests) >= 4
    desk = Desk(tmp_path, tiny_server.address)
    for request in requests:
        desk.run(request)


def test_commands_exist() -> None:
    """Every `fabula` command is one, with the options that are shown; what is installed is in this project."""
    shown = [*README.commands, *README.inline]
    assert len(shown) > 8
    for command in shown:
        check_exists(command)


def test_links() -> None:
    assert README.broken_links() == []
    assert len(README.text.splitlines()) <= 150
