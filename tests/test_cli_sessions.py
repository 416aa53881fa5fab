"""Conversations in the terminal that are trees and are kept: slash commands, `fabula sessions`, a crash."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fabula import Model, SamplingParams
from fabula.cli.drawing import show_tree
from fabula.cli.main import run
from fabula.cli.session_source import SessionSource
from fabula.errors import InvalidArgument, StoreFull
from fabula.sessions.session import Session
from fabula.workspace import Workspace
from test_cli import Lines, Result
from tiny import random_tensors, write_model
from waiting import run_program, wait_until

SIX = SamplingParams(max_tokens=6, seed=3)


@pytest.fixture
def source(tiny_model: Model) -> SessionSource:
    """In memory only."""
    return SessionSource(tiny_model)


@pytest.fixture
def kept(tiny_folder: Path, tmp_path: Path) -> Iterator[SessionSource]:
    """In a workspace."""
    with Workspace(tmp_path) as workspace:
        yield SessionSource(workspace.load(tiny_folder, threads=1), workspace, str(tiny_folder))


@pytest.fixture
def fabula(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command in this process, with its data in tmp_path."""
    monkeypatch.setenv("FABULA_DATA", str(tmp_path))

    def call(*words: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(int(end.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def endless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that generates 65,536 tokens: control tokens are never the likeliest."""
    tensors = random_tensors()
    tensors["lm_head.weight"][:4] = 0.0
    folder = tmp_path_factory.mktemp("models") / "endless"
    return write_model(folder, config={"max_position_embeddings": 65536}, tensors=tensors)


# ---- Slash commands -------------------------------------------------------------------------------------------------


def test_branches_are_chosen_by_number(source: SessionSource, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines("hi", "/branches", "", "/branches 2", "6", "7")
    talk = lines.run(source, SIX)
    turns = talk.session.turns
    assert [number for number, _ in lines.heads] == [0, 1, 1, 1, 1, 1, 2]
    assert [turn.number for turn in turns] == [1, 1, 1, 1, 1, 1, 2], "all are answers to hi; then 7 was said"
    assert len({turn.text for turn in turns[:6]}) > 1
    assert lines.heads[3][1] == turns[0].text, "Enter stays"
    assert lines.heads[5][1] == turns[5].text, "6 goes on from turn 6"
    assert turns[-1].parent is turns[5] and turns[-1].prompt == "7", "a number means nothing once it was chosen"
    said = capsys.readouterr().err
    assert "type 2 or 3 or 4 to continue from there; Enter stays at 1" in said
    assert all(f"{i} {turns[i - 1].text.split(chr(10))[0][:3]}" in said for i in (2, 3, 4))


def test_another_token(source: SessionSource, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Lines("hi", "/alternatives 2", "3", "/alternatives 99", "/alternatives", "/alternatives x").run(source, SIX)
    first, other = talk.session.turns
    assert other.token_ids[:2] == first.token_ids[:2] and other.token_ids[2] != first.token_ids[2]
    assert talk.session.head is other
    captured = capsys.readouterr()
    assert "position 2 of 0 .. " in captured.err and "← chosen" in captured.err
    assert "position is 99, must be 0 .. " in captured.err and "'x' is not a number" in captured.err
    assert captured.out == f"{first.text}\n{other.text}\n", "the whole answer is shown again"


def test_a_story(source: SessionSource, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines("", "the cat", "", "sat", ", then", "/undo", "/branches 2", "5", "/fork aside", "", "/open nothing")
    talk = lines.run(source, SamplingParams(max_tokens=4, seed=3), kind="story")
    turns = talk.session.turns
    assert [turn.prompt for turn in turns] == ["the cat", "", " sat", "", ""], "the past, and one piece in the fork"
    assert talk.session.id == "aside" and not any(turn.chat for turn in turns)
    assert turns[3].parent is turns[2] and talk.session.head is turns[4]
    said = capsys.readouterr().err
    for part in ("type the beginning of the story", "in aside, a fork from turn 4", "no session 'nothing'"):
        assert part in said, part
    (story,) = [item for item in source.contents() if item.name != "aside"]
    assert [turn.prompt for turn in source.open(story.name).turns] == ["the cat", "", " sat", ", then", "", ""]


def test_tags_continue_and_figures(source: SessionSource, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(
        *("/stats", "/tag a", "/continue", "hi", "/tag", "/tag start", "/continue 3", "/tree", "/stats", "more"),
        *("/goto start", "/goto", "/continue no", "/edit", "/save", "/branches 0", "/regenerate", "/undo"),
    )
    talk = lines.run(source, SIX)
    first, longer, more, again = talk.session.turns
    assert longer.token_ids[: len(first.token_ids)] == first.token_ids and first.tags == {"start"}
    assert len(longer.token_ids) == len(first.token_ids) + 3
    assert more.parent is longer and again.parent is first.parent
    said = capsys.readouterr().err
    for part in (
        *("there is no turn yet", "usage: /tag NAME", "turn 1 is tagged start", "[start]", "(truncated)"),
        *("3 tokens at ", "ended by length", "reused", "dropped     nothing", "pages ", "'no' is not a number"),
        *("usage: /edit TEXT", "usage: /save FILE", "n is 0, must be a whole number in 1 .. 32"),
    ):
        assert part in said, part


def test_sessions_in_memory(source: SessionSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a b.json"
    lines = Lines(
        *(
            "/sessions",
            "hi",
            f"/save {file}",
            "/fork second",
            "more",
            "/fork second",
            "/sessions",
            "/reset",
            "/open one",
        ),
        *(f"/load {file}", f"/load {tmp_path / 'none.json'}", f"/save {tmp_path / 'no' / 'folder.json'}", "/stats"),
    )
    talk = lines.run(source, SIX, name="one")
    assert {item.name for item in source.contents()} == {"one", "second", "one-1"} and talk.session.id == "one-1"
    assert [turn.prompt for turn in talk.session.path] == ["hi"]
    assert [file.name for file in tmp_path.iterdir()] == ["a b.json"]
    said = capsys.readouterr().err
    for part in (
        "no sessions yet",
        "already; /open second switches to it",
        "one-1 · at turn 1 of 1",
        "none.json cannot be read",
    ):
        assert part in said, part
    assert f"error: {tmp_path / 'no' / 'folder.json'} cannot be written" in said


def test_what_fails_is_told_and_the_talk_goes_on(
    source: SessionSource, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Session.say

    def say(self: Session, text: str, *rest: Any, **more: Any) -> Any:
        if text == "full":
            raise StoreFull("the disk is full")
        return real(self, text, *rest, **more)

    monkeypatch.setattr(Session, "say", say)
    talk = Lines("full", "hi").run(source, SIX)
    assert [turn.prompt for turn in talk.session.turns] == ["hi"]
    assert "error: the disk is full" in capsys.readouterr().err


def test_ctrl_c_stops_every_branch(endless_folder: Path) -> None:
    with Model.load(endless_folder, threads=1) as model:
        lines = Lines()

        def press(n: int) -> None:
            """Once, when each of n answers has a token."""

            def begun() -> bool:
                running = (
                    list(lines.talk.session._queue.running) if lines.talk is not None and lines.talk._answering else []
                )
                return len(running) == n and all(reply.generation.token_ids for reply in running)

            wait_until(begun)
            os.kill(os.getpid(), signal.SIGINT)

        def typed() -> Iterator[str]:
            for line, n in (("hi", 1), ("/branches 2", 2)):
                presser = threading.Thread(target=press, args=(n,))
                presser.start()
                yield line
                presser.join()
            yield "/continue 1"

        lines._lines = typed()
        talk = lines.run(SessionSource(model), SamplingParams(temperature=0.0, max_tokens=60000))
        first, *branches, longer = talk.session.turns
        assert [turn.finish_reason for turn in (first, *branches)] == ["cancelled"] * 3
        assert len(longer.token_ids) == len(first.token_ids) + 1


# ---- The tree -------------------------------------------------------------------------------------------------------


def drawn(session: Session) -> str:
    console = Console(width=40, file=io.StringIO())  # narrower than its lines
    with console.capture() as capture:
        show_tree(session, console)
    return capture.get()


def test_a_tree_of_a_thousand_turns(source: SessionSource) -> None:
    session = source.model.session()
    one = SamplingParams(max_tokens=1, seed=1)
    session.tell(prompt="a", params=one).text()
    data = session.export()
    row = data["turns"][0]
    rows = [row]
    for i in range(2, 1001):
        past = rows[-1]
        n_ids = past["kept"] + len(past["prompt_ids"]) + len(past["token_ids"])
        rows.append({**row, "id": str(i), "parent_id": past["id"], "number": i, "kept": n_ids, "prompt": f"turn {i}"})
    rows[499]["tags"] = ["middle"]
    long = source.model.import_({**data, "turns": rows, "head": rows[-1]["id"]}, id="long")
    lines = drawn(long).splitlines()
    assert len(lines) == 2 + 1 + 12 and "988 turns" not in lines[0]
    assert lines[0] == "… 500 turns" and lines[1].startswith("500 turn 500") and "[middle]" in lines[1]
    assert lines[2] == "… 488 turns" and lines[-1].endswith("← here") and lines[-1].startswith("1000 turn 1000")
    long.rollback(2)
    assert drawn(long).splitlines()[1].endswith("← here")


def test_a_tree_of_many_branches(source: SessionSource) -> None:
    session = source.model.session()
    params = SamplingParams(max_tokens=1, seed=1)
    for _ in range(30):
        session.tell(prompt="no", params=params).text()
        session.regenerate(params).text()
    text = drawn(session)
    assert text.startswith("… 24 turns\n") and text.rstrip().endswith("here")
    session.rollback(0)
    text = drawn(session)
    assert text.startswith("0 start  ← here\n├── 1 no") and "…" in text.splitlines()[-1]


# ---- Kept -----------------------------------------------------------------------------------------------------------


def test_everything_is_kept_and_nothing_before_the_first_answer(
    kept: SessionSource, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Lines("/system Be brief.", "/reset", "/tree", "/regen", "long " * 2000, "/fork")
    lines.run(kept, SIX)
    assert kept.contents() == [], "nothing was said"
    lines = Lines("hi", "/tag t", "more", "/undo", "/fork side", "again", "/open first", "/redo", "/reset", "/sessions")
    talk = lines.run(kept, SIX, name="first")
    assert re.fullmatch(r"chat-\d{4}-\d\d-\d\d-1", talk.session.id)
    found = {item.name: (item.n_turns, item.first_words, item.kind) for item in kept.contents()}
    assert found == {"first": (2, "hi", "chat"), "side": (2, "hi", "chat")}
    before = [turn.text for turn in kept.open("first").path]
    assert "first · at turn 1 of 2" in capsys.readouterr().err
    assert kept._workspace is not None
    kept._workspace.close()
    with Workspace(tmp_path) as workspace:
        again = workspace.open("first")
        assert [turn.text for turn in again.path] == before and again.turns[0].tags == {"t"}
        assert again.params == SIX
        with pytest.raises(InvalidArgument, match="uses the model"):
            SessionSource(workspace.load(tiny_folder, threads=1), workspace, "another name").open("first")


@pytest.fixture
def talk(fabula: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`fabula chat` and `fabula story` as in a terminal, with lines that are typed."""

    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    def call(words: list[object], *lines: str) -> Any:
        waiting = iter(lines)

        def read() -> str:
            for line in waiting:
                return line
            raise EOFError

        monkeypatch.setattr("fabula.cli.repl.line_reader", lambda: read)
        monkeypatch.setattr("sys.stdin", Tty())
        return fabula(*words)

    return call


def test_a_session_keeps_its_model_and_settings(talk: Any, tiny_folder: Path, tmp_path: Path) -> None:
    words = ["chat", "--session", "a", "--model", tiny_folder, "--temperature", 0, "-n", 5, "--context-policy", "slide"]
    assert talk([*words, "--window", 100, "--system", "Be kind."], "hi").code == 0
    assert talk(["chat", "--resume", "-n", 7], "more", "/save " + str(tmp_path / "a.json")).code == 0
    with Workspace(tmp_path) as workspace:
        session = workspace.open("a")
        assert [(turn.prompt, len(turn.token_ids)) for turn in session.path] == [("hi", 5), ("more", 7)]
        assert session.params == SamplingParams(temperature=0.0, top_p=0.9, max_tokens=7)
        assert (session.policy.name, session.policy.window, session.system) == ("slide", 100, "Be kind.")
    for more, text in (
        (["--session", "a", "--model", "other"], f"session a uses the model {tiny_folder}; leave out --model"),
        (["--session", "a", "--context-policy", "error"], "has the context policy slide, which cannot be changed"),
        (["--session", "a", "--system", "Be rude."], "has turns with another system message"),
        (["--session", "a b", "--model", tiny_folder], "session id 'a b' must be"),
    ):
        result = talk(["chat", *more])
        assert result.code in (1, 2) and text in result.err, text
    assert "there is no chat to resume in" in talk(["chat", "--resume", "--data", tmp_path / "empty"]).err
    assert talk(["chat", "--no-save", "--model", tiny_folder, "-n", 3], "hi", f"/load {tmp_path / 'a.json'}").code == 0
    assert [json.loads(line)["name"] for line in talk(["sessions", "list", "--json"]).out.splitlines()] == ["a"]


@pytest.fixture
def stored(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """A workspace in tmp_path with a chat and, newer, a story; the texts of the chat."""
    with Workspace(tmp_path) as workspace:
        workspace.load(tiny_folder, threads=1)
        chat = workspace.session("letters", system="Be kind.", sampling=SIX)
        texts = [chat.say(text).text() for text in ("hello [bold]there", "more")]
        chat.rollback(1)
        workspace.session("tale", sampling=SIX).tell(prompt="the cat").text()
    return texts


def test_list_show_and_check(fabula: Any, stored: list[str], tiny_folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in fabula("sessions", "list", "--json").out.splitlines()]
    assert [(row["name"], row["kind"], row["n_turns"]) for row in rows] == [
        ("tale", "story", 1),
        ("letters", "chat", 2),
    ]
    assert rows[1]["first_words"] == "hello [bold]there" and rows[1]["model"] == str(tiny_folder)
    shown = fabula("sessions", "list").out
    assert "letters" in shown and "just now" in shown and "hello [bold]" in shown
    found = json.loads(fabula("sessions", "show", "letters", "--json").out)
    assert (found["head"], found["path"], found["system"]) == (1, [1], "Be kind.")
    assert [(turn["turn"], turn["parent"], turn["text"]) for turn in found["turns"]] == [
        *((1, 0, stored[0]), (2, 1, stored[1])),
    ]
    shown = fabula("sessions", "show", "letters").out
    assert "← here" in shown and "> hello [bold]there" in shown and "Be kind." in shown and "\x1b" not in shown
    result = fabula("sessions", "show", "nothing")
    assert (result.code, result.err) == (1, "error: there is no session 'nothing'\n")
    assert fabula("sessions", "check").code == 0
    file = tmp_path / "sessions.sqlite3"
    file.write_bytes(file.read_bytes().replace(b"hello [bold]there", b"HELLO [bold]there"))
    result = fabula("sessions", "check", "--json")
    assert result.code == 1 and "is damaged" in json.loads(result.out)["problems"][0]
    result = fabula("sessions", "list")
    assert result.code == 0 and "damaged" in result.out and "letters is damaged: " in result.err


def test_export_import_delete(fabula: Any, stored: list[str], tmp_path: Path) -> None:
    file, kv = tmp_path / "letters.json", tmp_path / "letters.safetensors"
    plain = json.loads(fabula("sessions", "export", "letters").out)
    assert fabula("sessions", "export", "letters", file, "--kv", kv).code == 0
    assert json.loads(file.read_text())["turns"] == plain["turns"] and kv.stat().st_size > 5000  # a page at least
    result = fabula("sessions", "import", file)
    assert result.code == 1 and "'letters' already" in result.err
    assert fabula("sessions", "import", file, "--name", "copy", "--kv", kv).out == "copy\n"
    shown = json.loads(fabula("sessions", "show", "copy", "--json").out)
    assert [turn["text"] for turn in shown["turns"]] == stored
    result = fabula("sessions", "delete", "copy")
    assert result.code == 2 and "needs --yes" in result.err
    assert fabula("sessions", "delete", "copy", "--yes").code == 0
    assert fabula("sessions", "delete", "copy", "--yes").code == 1
    result = fabula("sessions", "export", "letters", tmp_path / "no" / "folder.json")
    assert result.code == 1 and "cannot be written" in result.err
    (tmp_path / "text").write_text("[")
    result = fabula("sessions", "import", tmp_path / "text")
    assert result.code == 1 and "is not JSON" in result.err
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_a_folder_in_use(fabula: Any, tmp_path: Path) -> None:
    with Workspace(tmp_path):
        for command in ("list", "check"):
            result = fabula("sessions", command)
            assert result.code == 1 and "Another fabula is running" in result.err and "--data FOLDER" in result.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["chat", "--resume", "--session", "x"], "give one of them"),
        (["chat", "--no-save", "--resume"], "--no-save uses no saved sessions"),
        (["chat", "--window", "5"], "--window needs --context-policy slide"),
        (["chat", "--context-policy", "slide", "--window", "0"], "window is 0"),
        (["chat", "-p", "hi", "--session", "x"], "for a conversation in a terminal"),
        (["story", "hi", "--resume"], "for a conversation in a terminal"),
    ],
)
def test_wrong_usage(fabula: Any, words: list[str], text: str) -> None:
    result = fabula(*words)
    assert result.code == 2 and text in result.err


def test_help_loads_no_database() -> None:
    code = (
        "import sys, fabula.cli.main as m\ntry: m.run(['chat', '--help'])\nfinally: print('sqlalchemy' in sys.modules)"
    )
    done = run_program([sys.executable, "-c", code])
    assert done.stdout.endswith("False\n") and "Examples:" in done.stdout


# ---- In a terminal --------------------------------------------------------------------------------------------------


def seen(text: str) -> str:
    """What came to a terminal, without its control sequences."""
    return re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|[=>])", "", text).replace("\r", "")


def test_what_a_person_sees(terminal: Any, tiny_folder: Path) -> None:
    common = ("--model", tiny_folder, "--max-tokens", 12, "--seed", 5, "-t", 1)
    story = terminal("story", "the cat", "--session", "tale", *common)
    story.wait_for("> ")
    story.type("\r")
    story.wait_for("tokens/s")
    story.type("/branches 2\r")
    story.wait_for("Enter stays at 2")
    story.type("4\r")
    story.wait_for("at turn 4")
    story.type("/tree\r")
    story.wait_for("here")
    second = terminal("chat", *common)
    assert "Another fabula is running" in second.wait_for("or use --no-save")
    assert second.process.wait() == 1
    third = terminal("chat", "--no-save", *common)
    third.wait_for("> ")
    third.type("/exit\r")
    assert third.process.wait() == 0
    story.type("/exit\r")
    assert story.process.wait() == 0
    text = seen(story.text)
    for part in ("/help for help", "the cat", "type 3 or 4 to continue", "├── 3 → ", "└── 4 → "):
        assert part in text, part
    assert "\x1b[1;32m" in story.text, "where we are is green"
    again = terminal("story", "--resume", "--temperature", 0)
    again.wait_for("tale · at turn 4 of 4")
    again.type("/exit\r")
    assert again.process.wait() == 0


def test_a_crash_leaves_the_partial_answer(terminal: Any, endless_folder: Path, tmp_path: Path) -> None:
    words = ("--model", endless_folder, "--temperature", 0, "-t", 1)
    chat = terminal("chat", *words, "--max-tokens", 60000)
    chat.wait_for("> ")
    chat.type("hello\r")
    chat.wait_for("hello")

    def n_stored() -> int:
        with closing(sqlite3.connect(tmp_path / "sessions.sqlite3")) as connection:
            return max((len(ids) // 4 for (ids,) in connection.execute("SELECT token_ids FROM turns")), default=0)

    while n_stored() <= 100:
        chat.wait_for_more(500)
    chat.process.send_signal(signal.SIGKILL)
    chat.process.wait()
    again = terminal("chat", "--resume", "--max-tokens", 20)
    again.wait_for("/continue continues it")
    again.type("/continue 15\r")
    again.wait_for("15 tokens")
    again.type("/exit\r")
    assert again.process.wait() == 0
    with Workspace(tmp_path) as workspace:
        (summary,) = workspace.sessions()
        partial, longer = workspace.open(summary.record.id).turns
        assert partial.finish_reason == "interrupted" and partial.prompt == "hello" and len(partial.token_ids) > 100
        assert longer.token_ids[: len(partial.token_ids)] == partial.token_ids
        assert len(longer.token_ids) == len(partial.token_ids) + 15
        assert workspace.open(summary.record.id).head is longer
