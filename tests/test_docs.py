"""The programs, commands, requests and typed lines in docs/ work as written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from documented import PROJECT, Command, Desk, Document, check_exists
from serving import Running

DOCS = PROJECT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
NEEDED = {  # packages of some clients, by the modules that are imported
    "anthropic": "anthropic",
    "fabula.plugs.langchain_chat": "langchain_core",
    "fabula.plugs.llamaindex_llm": "llama_index.core",
    "fabula.plugs.llm_models": "llm",
    "ollama": "ollama",
}
SHOWN = [page for page in PAGES if Document(DOCS / page).steps]


@pytest.fixture(scope="module")
def address(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server with the built-in model."""
    with Running(tmp_path_factory.mktemp("served"), smollm2_gguf) as running:
        yield running.address


def is_run(command: Command) -> bool:
    """Whether a command is run: not one that downloads, measures for minutes, builds, or needs a server."""
    words = command.words
    if words[0] == "fabula":
        return words[1] not in ("bench", "pull", "serve") or words[1:] in (["pull", "--list"], ["pull"])
    return words[0] == "curl"


@pytest.mark.heavy
@pytest.mark.parametrize("page", SHOWN)
def test_what_is_shown_works(page: str, smollm2_gguf: Path, address: str, tmp_path: Path) -> None:
    for package in sorted({NEEDED[module] for module in Document(DOCS / page).modules & NEEDED.keys()}):
        pytest.importorskip(package, reason=f"the {package} package is not installed")
    (tmp_path / "model.gguf").symlink_to(smollm2_gguf)
    desk = Desk(tmp_path, address)
    shown = []
    for step in Document(DOCS / page).steps:
        if isinstance(step, str) or is_run(step):
            shown.append(desk.run(step))
        elif step.words[:2] == ["fabula", "serve"] and len(step.words) > 2 and "--model" not in step.words:
            desk.run(Command(step.line.replace("fabula serve", "fabula config check", 1)))
        elif step.words[0] in ("fabula", "make", "pip"):
            check_exists(step)
    if page == "tutorial.md":  # the second branch of its chat begins at turn 1, and its fork reuses the past
        tree = next(text for text in shown if text.startswith("0 start"))
        assert [line.split(" ")[:2] for line in tree.splitlines()[2:4]] == [["├──", "2"], ["└──", "3"]]
        reused = [int(number) for number in re.findall(r"^(\d+) tokens reused", "".join(shown), re.MULTILINE)]
        assert reused and min(reused) > 10


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_links_within_sentences(page: str) -> None:
    document = Document(DOCS / page)
    for command in document.inline:
        if "..." not in command.line and "COMMAND" not in command.line:
            check_exists(command)
    assert document.broken_links() == []


def test_troubleshooting_names_messages_of_the_program() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "python" / "fabula").rglob("*.py"))
    headings = re.findall(r"^### .*$", Document(DOCS / "troubleshooting.md").text, re.MULTILINE)
    messages = [text for heading in headings for text in re.findall(r"`([^`]+)`", heading) if "make " not in text]
    assert len(messages) > 10
    for message in messages:
        assert all(part.strip() in sources for part in message.split("…")), message


def test_pages_are_plain_lines() -> None:
    """At most 100 columns, but for tables, code, and links; a clause a line reads and merges well."""
    for page in set(PAGES) - {"architecture.md"}:
        code = False
        for number, line in enumerate(Document(DOCS / page).text.splitlines(), 1):
            code ^= line.startswith("```")
            if not code and not line.lstrip().startswith(("|", "![", "<img")):
                assert len(line) <= 100, f"{page}:{number} has {len(line)} columns"
