"""`fabula chat`: a conversation in the terminal, or one question from a pipe."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import click

from fabula.cli.console import complain, emit, err, note
from fabula.cli.options import ModelOptions, model_options, sampling_options
from fabula.cli.story import follow, report, summary
from fabula.errors import ContextOverflow, InvalidArgument

if TYPE_CHECKING:
    from fabula.engine.sampling import SamplingParams
    from fabula.model import Model
    from fabula.sessions.reply import Reply
    from fabula.sessions.session import Session
    from fabula.sessions.turn import Turn

HELP = """\
/regen         answer the last message again; the first answer stays in the tree
/edit TEXT     say this in place of the last message
/undo          go back one turn
/redo          take the last step back
/tree          every turn of this chat, the numbers for /goto, and where we are
/goto N        go on from turn N of the tree; 0 is the beginning
/reset         begin a new conversation
/system TEXT   set the system message (empty: remove it) and begin anew
/help          this list
/exit          leave (Ctrl-D too)
Ctrl-C stops an answer. Escape, then Enter, begins a new line."""


@click.command(short_help="Chat with a model in the terminal.")
@model_options
@sampling_options(temperature=0.7, top_p=0.9, max_tokens=1024)
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("-p", "--prompt", metavar="TEXT", help="Ask this one thing, print the answer and end.")
@click.option("--json", "as_json", is_flag=True, help="With --prompt or a pipe: print one JSON object.")
def chat(loading: ModelOptions, params: SamplingParams, system: str | None, prompt: str | None, as_json: bool) -> None:
    """Chat with a model. What comes through a pipe is one message; its answer goes to stdout.

    Ctrl-C stops an answer, not the program; /help lists what can be typed.

    \b
    Examples:
      fabula chat
      fabula chat --system "Answer like a pirate." --temperature 0.9
      fabula chat --prompt "Name three rivers in France." --json
      git diff | fabula chat --system "Write a commit message for this change."
    """
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    if prompt is None:
        if as_json:
            raise click.UsageError("--json needs --prompt or a message through a pipe")
        converse(loading, params, system)
        return
    if not prompt:
        raise click.UsageError("the message is empty")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    with loading.load() as model, model.chat(messages, params) as generation:
        text = follow(generation, show=not as_json)
        if not as_json:
            emit("\n")
            return
        messages.append({"role": "assistant", "content": text})
        click.echo(
            json.dumps(
                {
                    "messages": messages,
                    "text": text,
                    **report(generation),
                    "model": loading.model,
                }
            )
        )


def converse(loading: ModelOptions, params: SamplingParams, system: str | None) -> None:
    """The chat in a terminal, until /exit or Ctrl-D."""
    with loading.load() as model:
        model.template.render([{"role": "user", "content": "?"}])  # a model that cannot chat says so now
        note(
            f"{model.path.name} · {model.weights} · {model.threads} threads · context {model.context} · /help for help"
        )
        Chat(model, params, line_reader(), system=system).run()


def line_reader() -> Callable[[], str]:
    """Reads a message with line editing and the history of this chat; nothing is written to disk."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import HTML
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(history=InMemoryHistory(), key_bindings=keys)
    return lambda: session.prompt(HTML("<ansigreen><b>&gt; </b></ansigreen>"), prompt_continuation="  ")


class Chat:
    """The loop: read a line, obey or answer it.

    Args:
        model: to answer.
        params: sampling settings of every answer.
        read: returns the next line; EOFError ends the chat, KeyboardInterrupt drops the line.
        system: system message.

    Attributes:
        session: the conversation.
    """

    def __init__(
        self, model: Model, params: SamplingParams, read: Callable[[], str], *, system: str | None = None
    ) -> None:
        self._model, self._params, self._read = model, params, read
        self._system = system
        self.session = model.session(system=system)
        self._answers = 0
        self._answering = False

    def run(self) -> None:
        """Reads and answers until the end."""
        before = signal.signal(signal.SIGINT, self._interrupted)
        try:
            self._loop()
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupted(self, *_: object) -> None:
        """Ctrl-C, unless the line editor has the terminal: stops an answer, and means nothing between two."""
        if self._answering:
            raise KeyboardInterrupt

    def _loop(self) -> None:
        while True:
            try:
                line = self._read().strip()
            except KeyboardInterrupt:
                note("/exit or Ctrl-D leaves")
                continue
            except EOFError:
                return
            if line.startswith("/"):
                command, _, rest = line.partition(" ")
                if command in ("/exit", "/quit", "/bye"):
                    return
                self._obey(command, rest.strip())
            elif line:
                self._answer(partial(self.session.say, line))

    def _obey(self, command: str, rest: str) -> None:
        """Does what a slash command says; one that makes no sense now is told so."""
        session = self.session
        try:
            match command:
                case "/help":
                    note(HELP)
                case "/reset":
                    self._begin(self._system)
                case "/system":
                    self._begin(rest or None)
                case "/undo":
                    session.rollback(session.head.number - 1)
                    self._tell_head()
                case "/redo":
                    session.redo()
                    self._tell_head()
                case "/goto":
                    session.rollback(self._numbered(rest))
                    self._tell_head()
                case "/tree":
                    draw(session)
                case "/regen":
                    self._answer(session.regenerate)
                case "/edit":
                    if not rest:
                        raise InvalidArgument("/edit takes the new message")
                    self._answer(partial(session.edit, session.head, rest))
                case _:
                    note(f"{command} is no command; /help lists them")
        except InvalidArgument as error:
            note(str(error))

    def _begin(self, system: str | None) -> None:
        self.session.delete()
        self._system = system
        self.session = self._model.session(system=system)
        note(f"a new conversation{' with a system message' if system else ''}")

    def _numbered(self, text: str) -> Turn:
        """The turn of that number in the drawn tree."""
        turns = self.session.turns
        if not text.isdecimal() or int(text) > len(turns):
            raise InvalidArgument(f"/goto takes a number of the tree, 0 .. {len(turns)}; /tree shows it")
        return turns[int(text) - 1] if int(text) else list(self.session.head.lineage())[-1]

    def _tell_head(self) -> None:
        head = self.session.head
        words = f"at turn {head.number}: {shorten(head.prompt)} → {shorten(head.text)}"
        note(words if head.number else "at the beginning")

    def _answer(self, begin: Callable[[SamplingParams], Reply]) -> None:
        """Streams an answer. A message that cannot be answered leaves the conversation as it was."""
        params = self._params
        if params.seed is not None:  # a fixed seed repeats the whole chat, yet not each answer of it
            params = dataclasses.replace(params, seed=(params.seed + self._answers) % 2**64)
        self._answers += 1
        try:
            with begin(params) as reply:
                self._stream(reply)
        except ContextOverflow as error:
            complain(f"{error}. /undo goes back, /reset begins anew")
            return
        emit("\n")
        turn = reply.turn
        if turn is not None and turn.timings is not None and turn.token_ids and err().is_terminal:
            line = summary(turn.timings, turn.finish_reason, turn.params.seed if turn.params else None)
            note(f"{line} · context {turn.n_ids}/{self._model.context}")

    def _stream(self, reply: Reply) -> None:
        """Shows an answer as it comes, until its end or Ctrl-C; the session keeps what was said."""
        self._answering = True
        try:
            for piece in reply:
                emit(piece.text)
        except KeyboardInterrupt:
            reply.cancel()
        finally:
            self._answering = False


def shorten(text: str, length: int = 40) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def draw(session: Session) -> None:
    """Draws the tree on stderr, with the numbers that /goto takes."""
    from rich.text import Text
    from rich.tree import Tree

    turns = session.turns
    numbers = {turn: i for i, turn in enumerate(turns, 1)}
    start = list(session.head.lineage())[-1]
    here = Text("  ← here", style="bold green")
    tree = Tree(Text("0 the beginning") + (here if session.head is start else Text("")))
    nodes = {start: tree}
    for turn in turns:  # parents come first
        label = Text(f"{numbers[turn]} ", style="bold") + Text(shorten(turn.prompt), style="not bold green")
        label += Text(f" → {shorten(turn.text)}", style="not bold")
        if turn is session.head:
            label += here
        assert turn.parent is not None
        nodes[turn] = nodes[turn.parent].add(label)
    err().print(tree)
