"""What the README shows works as it stands there: its programs, its requests, its commands, its links."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from serving import Running

PROJECT = Path(__file__).resolve().parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line[2:] for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_programs(number: int, smollm2_gguf: Path, tmp_path: Path) -> None:
    assert smollm2_gguf.is_file()
    done = subprocess.run([sys.executable, "-c", PROGRAMS[number]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 2, done.stderr


def test_requests(tiny_folder: Path, tmp_path: Path) -> None:
    requests = [command for command in COMMANDS if command.startswith("curl ")]
    assert len(requests) >= 4
    with Running(tmp_path, tiny_folder) as running:
        for request in requests:
            here = request.replace("http://127.0.0.1:8000", running.address)
            done = subprocess.run(
                [*shlex.split(here), "--silent", "--fail-with-body"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, (request, done.stdout, done.stderr)


def test_commands_exist(tmp_path: Path) -> None:
    """Every `fabula` command is one, with the options that are shown; what is installed is in this project."""
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    targets = re.findall(r"^([a-z]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    shown = [*COMMANDS, *re.findall(r"`((?:fabula|pip) [^`]+)`", README)]
    assert len(shown) > 8
    for command in shown:
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in targets
        elif words[0] == "pip":
            extra = re.fullmatch(r"\.(?:\[(\w+)\])?", words[2])
            assert words[1] == "install" and extra is not None and (extra[1] is None or extra[1] in extras), command
        elif words[0] == "fabula" and words[1] != "--help":
            done = subprocess.run(
                [sys.executable, "-m", "fabula", words[1], "--help"], cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 0, command
            assert all(word in done.stdout for word in words if word.startswith("--")), command


def test_links() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (PROJECT / target).exists(), target
    assert len(README.splitlines()) <= 150
