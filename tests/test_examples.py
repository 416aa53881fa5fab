"""The examples run as a reader would run them, and stay short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving import Running
from waiting import run_program

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *words: object, text: str = "") -> subprocess.CompletedProcess[str]:
    return run_program([sys.executable, EXAMPLES / name, *words], input=text)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def test_story(tiny_folder: Path) -> None:
    first, second = (
        run("story.py", "the cat", "--model", tiny_folder, "--seed", 3, "--max-tokens", 20) for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the cat") and "seed 3]" in first.stdout
    assert first.stdout.split("\n\n[")[0] == second.stdout.split("\n\n[")[0]


def test_chat(tiny_folder: Path) -> None:
    done = run("chat.py", "--model", tiny_folder, "--seed", 3, text="hello\n\nand now\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") >= 4


def test_story_tree(tiny_folder: Path) -> None:
    done = run("story_tree.py", "the cat", "--model", tiny_folder, "--max-tokens", 12)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the cat") and done.stdout.count("--- way ") == 3
    assert done.stdout.count("and so it ended") == 2 and ", 0 recomputed]" in done.stdout
    assert done.stdout.endswith("6 turns in the tree, 3 on the path\n")


def test_client_rest(tiny_server: Running) -> None:
    command = ["sh", str(EXAMPLES / "client_rest.sh")]
    variables = os.environ | {"FABULA_URL": tiny_server.address}
    done = run_program(command, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("> POST /") == 5 and '"head":1' in done.stdout and "freed_bytes" in done.stdout
    assert "event: start" in done.stdout and "event: done" in done.stdout


@pytest.mark.parametrize("name", ["story.py", "chat.py", "tree.py", "story_tree.py"])
def test_errors_without_traceback(name: str, tmp_path: Path) -> None:
    done = run(name, "--model", "/no/such/model", *(["--data", tmp_path] if name == "tree.py" else []), text="hi\n")
    assert done.returncode == 1 and "error: /no/such/model" in done.stderr and "Traceback" not in done.stderr


def test_the_real_model_answers(smollm2_gguf: Path) -> None:
    done = run("chat.py", "--model", smollm2_gguf, "--seed", 1, text="Hello!\n")
    assert done.returncode == 0, done.stderr
    answer = done.stdout.removeprefix("> ").removesuffix("> ")
    assert len(answer.split()) > 3


def test_tree(tiny_folder: Path, tmp_path: Path) -> None:
    for times in (1, 2):
        done = run("tree.py", "--data", tmp_path / "data", "--model", tiny_folder)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0] == "start" and sum("<- here" in line for line in lines) == 1
        assert sum("'Name a city by a river.'" in line for line in lines) == times
        assert sum("'And what can I see there?'" in line for line in lines) == 2 * times
