"""`fabula chat`: a conversation in the terminal, or one question from a pipe."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from fabula.cli.console import complain, emit, err, note
from fabula.cli.options import ModelOptions, model_options, sampling_options
from fabula.cli.story import follow, report, summary
from fabula.errors import ContextOverflow, EngineError

if TYPE_CHECKING:
    from fabula.engine.generation import Generation
    from fabula.engine.sampling import SamplingParams
    from fabula.model import Model

HELP = """\
/regen         answer the last message again
/undo          take the last message and its answer back
/reset         begin a new conversation
/system TEXT   set the system message (empty: remove it) and begin anew
/help          this list
/exit          leave (Ctrl-D too)
Ctrl-C stops an answer. Escape, then Enter, begins a new line."""


class Conversation:
    """Messages of one chat, and what the slash commands do to them.

    Attributes:
        messages: system message if any, then user and assistant in turn.
    """

    def __init__(self, system: str | None = None) -> None:
        self.messages: list[dict[str, str]] = []
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Starts anew, with this system message."""
        self.messages = [{"role": "system", "content": system}] if system else []

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def take_back(self, *, keep_question: bool = False) -> bool:
        """Drops the last exchange, or its answer only; False if there is none."""
        if not any(message["role"] == "user" for message in self.messages):
            return False
        while self.messages[-1]["role"] != "user":
            self.messages.pop()
        if not keep_question:
            self.messages.pop()
        return True


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
    conversation = Conversation(system)
    conversation.add("user", prompt)
    with loading.load() as model, model.chat(conversation.messages, params) as generation:
        text = follow(generation, show=not as_json)
        if not as_json:
            emit("\n")
            return
        conversation.add("assistant", text)
        click.echo(
            json.dumps(
                {
                    "messages": conversation.messages,
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
        Chat(model, params, Conversation(system), line_reader()).run()


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
        conversation: to go on with.
        read: returns the next line; EOFError ends the chat, KeyboardInterrupt drops the line.
    """

    def __init__(
        self, model: Model, params: SamplingParams, conversation: Conversation, read: Callable[[], str]
    ) -> None:
        self._model, self._params, self._read = model, params, read
        self._conversation = conversation
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
            if not line:
                continue
            if not line.startswith("/"):
                self._conversation.add("user", line)
                self._answer()
            elif not self._obey(line):
                return

    def _obey(self, line: str) -> bool:
        """Does what a slash command says; False to leave."""
        command, _, rest = line.partition(" ")
        talk = self._conversation
        match command:
            case "/exit" | "/quit" | "/bye":
                return False
            case "/help":
                note(HELP)
            case "/reset":
                talk.reset(talk.system)
                note("a new conversation")
            case "/system":
                talk.reset(rest.strip() or None)
                note("a new conversation with this system message" if rest.strip() else "no system message")
            case "/undo":
                note("taken back" if talk.take_back() else "there is nothing to take back")
            case "/regen":
                if talk.take_back(keep_question=True):
                    self._answer()
                else:
                    note("there is nothing to answer again")
            case _:
                note(f"{command} is no command; /help lists them")
        return True

    def _answer(self) -> None:
        """Streams the answer to the last message. A message that cannot be answered is taken back."""
        talk = self._conversation
        params = self._params
        if params.seed is not None:  # a fixed seed repeats the whole chat, yet not each answer of it
            params = dataclasses.replace(params, seed=(params.seed + self._answers) % 2**64)
        self._answers += 1
        try:
            with self._model.chat(talk.messages, params) as generation:
                text = self._stream(generation)
        except ContextOverflow as error:
            talk.take_back()
            complain(f"{error}. /undo shortens the conversation, /reset begins a new one")
            return
        except EngineError as error:
            talk.take_back()
            complain(str(error))
            return
        emit("\n")
        talk.add("assistant", text)
        if err().is_terminal:
            used = len(generation.prompt_ids) + len(generation.token_ids)
            note(f"{summary(generation)} · context {used}/{self._model.context}")

    def _stream(self, generation: Generation) -> str:
        """Shows an answer as it comes and returns it, or what came before Ctrl-C."""
        self._answering = True
        try:
            return follow(generation, show=True)
        except KeyboardInterrupt:  # it came just before the first or behind the last piece
            generation.cancel()
            return self._model.tokenizer.decode(generation.token_ids)
        finally:
            self._answering = False
