"""Slash commands of a chat or a story in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fabula.cli.console import err, note
from fabula.cli.drawing import (
    number_of,
    numbered,
    sessions_table,
    show_alternatives,
    show_branches,
    show_head,
    show_stats,
    show_tree,
    stream_branches,
)
from fabula.cli.session_source import read_json, write_json
from fabula.errors import InvalidArgument

if TYPE_CHECKING:
    from fabula.cli.repl import Repl
    from fabula.sessions.turn import Turn


@dataclass(frozen=True, slots=True)
class Command:
    """A slash command.

    Attributes:
        usage: its syntax, for /help.
        help: one line.
        run: executes it; gets the text after the command's name.
    """

    usage: str
    help: str
    run: Callable[[Repl, str], None]


COMMANDS: dict[str, Command] = {}
_ALIASES = {"/quit": "/exit", "/bye": "/exit", "/regenerate": "/regen"}

_Run = Callable[["Repl", str], None]


def _command(usage: str, help: str) -> Callable[[_Run], _Run]:
    def add(run: _Run) -> _Run:
        COMMANDS[usage.split()[0]] = Command(usage, help, run)
        return run

    return add


def run_command(repl: Repl, line: str) -> None:
    """Executes a line that begins with a slash.

    Raises:
        InvalidArgument: unknown command, wrong syntax, or not possible now.
    """
    word, _, rest = line.partition(" ")
    command = COMMANDS.get(_ALIASES.get(word, word))
    if command is None:
        raise InvalidArgument(f"there is no command {word}; /help lists them")
    command.run(repl, rest.strip())


def _head(repl: Repl) -> Turn:
    if not repl.session.head.number:
        raise InvalidArgument(
            "this is the beginning of the tree: there is no turn yet, or /undo went back to the start"
        )
    return repl.session.head


def _needed(rest: str, usage: str) -> str:
    if not rest:
        raise InvalidArgument(f"usage: {usage}")
    return rest


def _number(rest: str, usage: str) -> int:
    if not (rest.isascii() and rest.isdecimal()):
        raise InvalidArgument(f"{rest!r} is not a number; usage: {usage}")
    return int(rest)


# ---- Navigation-----------------------------------------------------------------------------------------------------


@_command("/undo", "go back one turn")
def _undo(repl: Repl, _: str) -> None:
    repl.session.rollback(_head(repl).number - 1)
    show_head(repl.session)


@_command("/redo", "undo the last /undo or /goto")
def _redo(repl: Repl, _: str) -> None:
    repl.session.redo()
    show_head(repl.session)


@_command("/goto N", "go to turn N of the tree, or to the turn with that tag; 0 is the start")
def _goto(repl: Repl, rest: str) -> None:
    turns = numbered(repl.session)
    tagged = [turn for turn in turns if rest in turn.tags]
    number = int(rest) if rest.isascii() and rest.isdecimal() else len(turns) + 1
    if number > len(turns) and not tagged:
        raise InvalidArgument(f"/goto takes a number of the tree, 0 .. {len(turns)}, or a tag; /tree shows them")
    repl.session.rollback(tagged[-1] if tagged else turns[number - 1] if number else 0)
    show_head(repl.session)


@_command("/tree", "show all turns, their numbers for /goto, and the current turn")
def _tree(repl: Repl, _: str) -> None:
    show_tree(repl.session, err())


@_command("/tag NAME", "tag the current turn")
def _tag(repl: Repl, rest: str) -> None:
    head, session = _head(repl), repl.session
    session.tag(head, _needed(rest, "/tag NAME"))
    note(f"turn {number_of(session, head)} is tagged {rest}")


# ---- Making turns ---------------------------------------------------------------------------------------------------


@_command("/regen", "regenerate the last reply; the old one stays in the tree")
def _regen(repl: Repl, _: str) -> None:
    _head(repl)
    repl.answer(lambda session, params: session.regenerate(params))


@_command("/edit TEXT", "replace the last message; the old one stays in the tree")
def _edit(repl: Repl, rest: str) -> None:
    text, head = _needed(rest, "/edit TEXT"), _head(repl)
    repl.answer(lambda session, params: session.edit(head, text, params))


@_command("/continue [N]", "continue a reply that was stopped or truncated, for N more tokens")
def _continue(repl: Repl, rest: str) -> None:
    n_tokens = _number(rest, "/continue N") if rest else None
    _head(repl)
    repl.answer(lambda session, _: session.continue_(n_tokens))


@_command("/branches [N]", "generate N more replies side by side (3); type a number to continue from that one")
def _branches(repl: Repl, rest: str) -> None:
    n, head, session = _number(rest or "3", "/branches N"), _head(repl), repl.session
    replies = session.branch(n, params=repl.params())
    with repl.interruptible():
        stream_branches(replies)
    made = [reply.turn for reply in replies if reply.turn is not None]
    show_branches(session, made)
    numbers = [str(number_of(session, turn)) for turn in made]
    repl.choices = {number: partial(_goto, repl, number) for number in numbers}
    if made:
        note(f"type {' or '.join(numbers)} to continue from there; Enter stays at {number_of(session, head)}")


@_command("/alternatives [POSITION]", "other tokens at a position of the last reply; default: the last token")
def _alternatives(repl: Repl, rest: str) -> None:
    turn, session = _head(repl), repl.session
    last = max(0, len(turn.token_ids) - 1)
    position = _number(rest, "/alternatives POSITION") if rest else last
    found = session.alternatives(turn, position)
    show_alternatives(found, repl.source.model.tokenizer.decode(list(turn.token_ids[:position])))

    def take(token: int) -> None:
        repl.answer(lambda session, _: session.fork_at(turn, position, token), show_begun=True)

    repl.choices = {str(i): partial(take, alternative.token_id) for i, alternative in enumerate(found, 1)}
    note(f"position {position} of 0 .. {last}; type a number to continue with that token, Enter keeps the reply")


# ---- Sessions -------------------------------------------------------------------------------------------------------


@_command("/fork [NAME]", "start a new session from the current turn")
def _fork(repl: Repl, rest: str) -> None:
    _head(repl)
    repl.session = repl.source.fork(repl.session, rest or repl.new_name())
    note(f"in {repl.session.id}, a fork from turn {number_of(repl.session, repl.session.head)}")


@_command("/system TEXT", "start a new session with this system message (empty: none)")
def _system(repl: Repl, rest: str) -> None:
    repl.begin(rest or None)


@_command("/reset", "start a new session; the old one is kept")
def _reset(repl: Repl, _: str) -> None:
    repl.begin(repl.session.system)


@_command("/sessions", "list the sessions")
def _sessions(repl: Repl, _: str) -> None:
    items = repl.source.contents()
    if items:
        err().print(sessions_table(items, here=repl.session.id))
    else:
        note("no sessions yet")


@_command("/open NAME", "switch to another session")
def _open(repl: Repl, rest: str) -> None:
    repl.go_to(repl.source.open(_needed(rest, "/open NAME")))


@_command("/save FILE", "write the session to a JSON file")
def _save(repl: Repl, rest: str) -> None:
    path = Path(_needed(rest, "/save FILE")).expanduser()
    write_json(path, repl.session.export())
    note(f"written to {path}")


@_command("/load FILE", "import a session written by /save")
def _load(repl: Repl, rest: str) -> None:
    path = Path(_needed(rest, "/load FILE")).expanduser()
    repl.go_to(repl.source.import_(read_json(path)))


# ---- The rest -------------------------------------------------------------------------------------------------------


@_command("/stats", "statistics of the last reply and of the KV cache")
def _stats(repl: Repl, _: str) -> None:
    show_stats(_head(repl), repl.source.model.context, repl.source.model.kv_usage)


@_command("/help", "show this list")
def _help(_talk: Repl, _: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:{width}}  {command.help}" for command in COMMANDS.values()]
    note("\n".join([*lines, "Ctrl-C stops a reply. Escape, then Enter, inserts a new line."]))


@_command("/exit", "exit (also Ctrl-D)")
def _exit(repl: Repl, _: str) -> None:
    repl.is_over = True
