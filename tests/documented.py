"""What a document shows: its programs, its commands with the lines that are typed, its links. Runs them, too."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click

import waiting
from fabula.cli.main import cli

PROJECT = Path(__file__).resolve().parent.parent
ADDRESS = "http://127.0.0.1:8000"  # of the server in documents


@dataclass(frozen=True, slots=True)
class Command:
    """A line that begins with `$`, and the lines after it that begin with `>`: what is typed while it runs."""

    line: str
    typed: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)


class Document:
    """A Markdown file.

    Attributes:
        text: all of it.
        steps: programs (str) and commands, in order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.steps: list[str | Command] = []
        for kind, body in re.findall(r"^```(python|console)\n(.*?)^```", self.text, re.DOTALL | re.MULTILINE):
            self.steps += [body] if kind == "python" else commands(body)

    @property
    def programs(self) -> list[str]:
        return [step for step in self.steps if isinstance(step, str)]

    @property
    def modules(self) -> set[str]:
        """Modules that the programs import."""
        return set(re.findall(r"^(?:from|import) ([\w.]+)", "\n".join(self.programs), re.MULTILINE))

    @property
    def commands(self) -> list[Command]:
        return [step for step in self.steps if isinstance(step, Command)]

    @property
    def inline(self) -> list[Command]:
        """Commands within sentences."""
        return [Command(text) for text in re.findall(r"`((?:fabula|pip) [^`]+)`", self.text)]

    def broken_links(self) -> list[str]:
        """Links to files that are not there; headings are checked by `make docs`."""
        targets = re.findall(r"\]\(([^)#\s]+)", self.text) + re.findall(r'src="([^"]+)"', self.text)
        return [
            target for target in targets if not target.startswith("http") and not (self.path.parent / target).exists()
        ]


def commands(body: str) -> list[Command]:
    """The commands of a console block; other lines are output."""
    found: list[Command] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:]))
        elif line.startswith(">") and found:
            found[-1] = Command(found[-1].line, (*found[-1].typed, line[2:]))
    return found


# ---- Running --------------------------------------------------------------------------------------------------------


class Desk:
    """A folder in which commands run as they are written, with its own data.

    Args:
        folder: to run in.
        address: of the server that replaces the one in documents; "" if there is none.
    """

    def __init__(self, folder: Path, address: str = "") -> None:
        self.folder, self.address = folder, address
        tools = folder / ".bin"
        tools.mkdir()
        (tools / "fabula").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fabula "$@"\n')
        (tools / "fabula").chmod(0o755)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("FABULA_")} | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "FABULA_DATA": str(folder / ".data"),
            "PROMPT_TOOLKIT_NO_CPR": "1",  # the terminal does not answer where the cursor is
            "TERM": "dumb",
        }
        if "FABULA_CACHE" in os.environ:
            self.env["FABULA_CACHE"] = os.environ["FABULA_CACHE"]
        if "PYTHONPATH" in self.env:  # commands run in another folder
            self.env["PYTHONPATH"] = os.pathsep.join(
                str(Path(place).resolve()) for place in self.env["PYTHONPATH"].split(os.pathsep)
            )

    def run(self, step: str | Command) -> str:
        """What a program or command printed; AssertionError if it failed."""
        if isinstance(step, str):
            done = waiting.run_program([sys.executable, "-c", self._here(step)], env=self.env, cwd=self.folder)
        elif step.typed:
            return self._type(step)
        else:
            line = self._here(step.line)
            if step.words[0] == "curl":
                line += " --silent --show-error --fail-with-body"
            done = waiting.run_program(["sh", "-c", line], env=self.env, cwd=self.folder, input="")
        assert done.returncode == 0, (step, done.stdout, done.stderr)
        return done.stdout

    def _here(self, text: str) -> str:
        assert self.address or ADDRESS not in text
        return text.replace(ADDRESS, self.address)

    def _type(self, command: Command) -> str:
        """Runs a command in a terminal of its own."""
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            ["sh", "-c", command.line], stdin=theirs, stdout=theirs, stderr=theirs, env=self.env, cwd=self.folder,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        os.write(ours, "".join(line + "\r" for line in command.typed).encode())
        out = b""
        with suppress(OSError):  # EIO: the other end is closed
            while piece := os.read(ours, 65536):
                out += piece
        os.close(ours)
        shown = out.decode(errors="replace")
        assert process.wait() == 0, (command, shown)
        return shown


# ---- Checking without running ---------------------------------------------------------------------------------------


def check_exists(command: Command) -> None:
    """Checks that a command is one of this project's, with the options that are shown, without running it."""
    words = command.words
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets, command
    elif words[0] == "pip":
        text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
        extras = tomllib.loads(text)["project"]["optional-dependencies"]
        extra = re.fullmatch(r"\.(?:\[([\w-]+)\])?", words[2])
        assert words[1] == "install" and extra is not None and (extra[1] is None or extra[1] in extras), command
    elif words[0] == "fabula" and words[1] != "--help":
        found: click.Command = cli
        options = {"--help"}
        rest = iter(words[1:])
        for word in rest:
            own = {name: option for option in found.params for name in (*option.opts, *option.secondary_opts)}
            options |= set(own)
            if not isinstance(found, click.Group):
                break
            if word.startswith("--"):  # an option of the group, before its command
                assert word in own, (command, word)
                if not getattr(own[word], "is_flag", False):
                    next(rest)
                continue
            found = found.get_command(click.Context(found), word)  # type: ignore[assignment]
            assert found is not None, (command, word)
        options |= {name for option in found.params for name in (*option.opts, *option.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= options, command
