"""Slash commands: what can be typed in a chat or a story beside words for the model."""

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
    from fabula.cli.repl import Talk
    from fabula.sessions.turn import Turn


@dataclass(frozen=True, slots=True)
class Command:
    """A slash command.

    Attributes:
        usage: how it is typed.
        help: what it does, in a line.
        run: does it, given what stands behind its word.
    """

    usage: str
    help: str
    run: Callable[[Talk, str], None]


COMMANDS: dict[str, Command] = {}
_OTHER_WORDS = {"/quit": "/exit", "/bye": "/exit", "/regenerate": "/regen"}

_Run = Callable[["Talk", str], None]


def _command(usage: str, help: str) -> Callable[[_Run], _Run]:
    def add(run: _Run) -> _Run:
        COMMANDS[usage.split()[0]] = Command(usage, help, run)
        return run

    return add


def obey(talk: Talk, line: str) -> None:
    """Does what a line that begins with a slash says.

    Raises:
        InvalidArgument: it makes no sense now.
    """
    word, _, rest = line.partition(" ")
    command = COMMANDS.get(_OTHER_WORDS.get(word, word))
    if command is None:
        raise InvalidArgument(f"{word} is no command; /help lists them")
    command.run(talk, rest.strip())


def _head(talk: Talk) -> Turn:
    if not talk.session.head.number:
        raise InvalidArgument("at the beginning: nothing was said yet, or /undo went back before it")
    return talk.session.head


def _needed(rest: str, usage: str) -> str:
    if not rest:
        raise InvalidArgument(f"say {usage}")
    return rest


def _number(rest: str, usage: str) -> int:
    if not (rest.isascii() and rest.isdecimal()):
        raise InvalidArgument(f"{rest!r} is no number; say {usage}")
    return int(rest)


# ---- Walking --------------------------------------------------------------------------------------------------------


@_command("/undo", "go back one turn")
def _undo(talk: Talk, _: str) -> None:
    talk.session.rollback(_head(talk).number - 1)
    show_head(talk.session)


@_command("/redo", "take the last step back")
def _redo(talk: Talk, _: str) -> None:
    talk.session.redo()
    show_head(talk.session)


@_command("/goto N", "go on from turn N of the tree, or from the turn with that tag; 0 is the beginning")
def _goto(talk: Talk, rest: str) -> None:
    turns = numbered(talk.session)
    tagged = [turn for turn in turns if rest in turn.tags]
    number = int(rest) if rest.isascii() and rest.isdecimal() else len(turns) + 1
    if number > len(turns) and not tagged:
        raise InvalidArgument(f"/goto takes a number of the tree, 0 .. {len(turns)}, or a tag; /tree shows them")
    talk.session.rollback(tagged[-1] if tagged else turns[number - 1] if number else 0)
    show_head(talk.session)


@_command("/tree", "every turn, the numbers for /goto, and where we are")
def _tree(talk: Talk, _: str) -> None:
    show_tree(talk.session, err())


@_command("/tag NAME", "give this turn a name")
def _tag(talk: Talk, rest: str) -> None:
    head, session = _head(talk), talk.session
    session.tag(head, _needed(rest, "/tag NAME"))
    note(f"turn {number_of(session, head)} is tagged {rest}")


# ---- Making turns ---------------------------------------------------------------------------------------------------


@_command("/regen", "answer the last message again; the first answer stays in the tree")
def _regen(talk: Talk, _: str) -> None:
    _head(talk)
    talk.answer(lambda session, params: session.regenerate(params))


@_command("/edit TEXT", "say this in place of the last message")
def _edit(talk: Talk, rest: str) -> None:
    text, head = _needed(rest, "/edit TEXT"), _head(talk)
    talk.answer(lambda session, params: session.edit(head, text, params))


@_command("/continue [N]", "go on with an answer that was stopped or cut, for N more tokens")
def _continue(talk: Talk, rest: str) -> None:
    n_tokens = _number(rest, "/continue N") if rest else None
    _head(talk)
    talk.answer(lambda session, _: session.continue_(n_tokens))


@_command("/branches [N]", "N other answers side by side (3); type the number of one to go on from it")
def _branches(talk: Talk, rest: str) -> None:
    n, head, session = _number(rest or "3", "/branches N"), _head(talk), talk.session
    replies = session.branch(n, params=talk.params())
    with talk.interruptible():
        stream_branches(replies)
    made = [reply.turn for reply in replies if reply.turn is not None]
    show_branches(session, made)
    numbers = [str(number_of(session, turn)) for turn in made]
    talk.choices = {number: partial(_goto, talk, number) for number in numbers}
    if made:
        note(f"type {' or '.join(numbers)} to go on from there; Enter stays at {number_of(session, head)}")


@_command("/alternatives [PLACE]", "what else could stand at a place of the last answer; its end if none is given")
def _alternatives(talk: Talk, rest: str) -> None:
    turn, session = _head(talk), talk.session
    last = max(0, len(turn.token_ids) - 1)
    place = _number(rest, "/alternatives PLACE") if rest else last
    found = session.alternatives(turn, place)
    show_alternatives(found, talk.shelf.model.tokenizer.decode(list(turn.token_ids[:place])))

    def take(token: int) -> None:
        talk.answer(lambda session, _: session.fork_at(turn, place, token), show_begun=True)

    talk.choices = {str(i): partial(take, alternative.token_id) for i, alternative in enumerate(found, 1)}
    note(f"place {place} of 0 .. {last}; a number goes on with that one, Enter leaves it as it is")


# ---- Sessions -------------------------------------------------------------------------------------------------------


@_command("/fork [NAME]", "begin a new session that goes on from here")
def _fork(talk: Talk, rest: str) -> None:
    _head(talk)
    talk.session = talk.shelf.fork(talk.session, rest or talk.new_name())
    note(f"in {talk.session.id}, which goes on from turn {number_of(talk.session, talk.session.head)}")


@_command("/system TEXT", "set the system message (empty: remove it) and begin anew")
def _system(talk: Talk, rest: str) -> None:
    talk.begin(rest or None)


@_command("/reset", "begin a new session; the old one stays")
def _reset(talk: Talk, _: str) -> None:
    talk.begin(talk.session.system)


@_command("/sessions", "list the sessions")
def _sessions(talk: Talk, _: str) -> None:
    items = talk.shelf.contents()
    if items:
        err().print(sessions_table(items, here=talk.session.id))
    else:
        note("no sessions yet")


@_command("/open NAME", "go to another session")
def _open(talk: Talk, rest: str) -> None:
    talk.go_to(talk.shelf.open(_needed(rest, "/open NAME")))


@_command("/save FILE", "write the session to a JSON file")
def _save(talk: Talk, rest: str) -> None:
    path = Path(_needed(rest, "/save FILE")).expanduser()
    write_json(path, talk.session.export())
    note(f"written to {path}")


@_command("/load FILE", "take in a session that was written by /save")
def _load(talk: Talk, rest: str) -> None:
    path = Path(_needed(rest, "/load FILE")).expanduser()
    talk.go_to(talk.shelf.take_in(read_json(path)))


# ---- The rest -------------------------------------------------------------------------------------------------------


@_command("/stats", "figures of the last answer, and of the memory that is used")
def _stats(talk: Talk, _: str) -> None:
    show_stats(_head(talk), talk.shelf.model.context, talk.shelf.model.kv_usage)


@_command("/help", "this list")
def _help(_talk: Talk, _: str) -> None:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:{width}}  {command.help}" for command in COMMANDS.values()]
    note("\n".join([*lines, "Ctrl-C stops an answer. Escape, then Enter, begins a new line."]))


@_command("/exit", "leave (Ctrl-D too)")
def _exit(talk: Talk, _: str) -> None:
    talk.is_over = True
