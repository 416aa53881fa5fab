"""The REPL of chats and stories: reads lines, runs commands, streams replies."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import click

from fabula.cli.commands import run_command
from fabula.cli.console import complain, emit, err, note
from fabula.cli.drawing import show_opened
from fabula.cli.options import Keeping, ModelOptions, is_given, with_given
from fabula.cli.session_source import SessionSource, changed_last, find_record, kind_of, open_workspace
from fabula.cli.story import summary
from fabula.errors import ContextOverflow, EngineError, InvalidArgument

if TYPE_CHECKING:
    from fabula.engine.sampling import SamplingParams
    from fabula.sessions.reply import Reply
    from fabula.sessions.session import Session
    from fabula.store.records import SessionRecord
    from fabula.workspace import Workspace

_NO_SPACE_BEFORE = ",.;:!?)]}'’”…-"  # typed text that begins with these is appended to a story without a space


def converse(
    loading: ModelOptions,
    params: SamplingParams,
    keeping: Keeping,
    *,
    kind: str = "chat",
    system: str | None = None,
    prompt: str | None = None,
    parse_special: bool | None = None,
) -> None:
    """A chat or a story in the terminal, until /exit or Ctrl-D.

    Args:
        loading: the model of a new session; an existing session has its own.
        params: sampling settings.
        keeping: which session, and where it is stored.
        kind: "chat" or "story", of a new session.
        system: system message of a new chat.
        prompt: the first input.
        parse_special: whether to parse control tokens in user input; None for the default of the kind.
    """
    with ExitStack() as stack:
        workspace = None
        if keeping.save:
            way_out = "end it, use another folder with --data FOLDER, or use --no-save"
            workspace = stack.enter_context(open_workspace(keeping.data, way_out=way_out))
        record = _record(workspace, keeping, kind)
        if record is not None:
            loading = _model_of(record, loading)
        model = loading.load(workspace)
        if workspace is None:
            stack.enter_context(model)
        if kind == "chat":
            model.template.render(
                [{"role": "user", "content": "?"}]
            )  # raises now if the model has no usable chat template
        note(
            f"{model.path.name} · {model.weights} · {model.threads} threads · context {model.context} · /help for help"
        )
        source = SessionSource(model, workspace, loading.name)
        if workspace is not None and record is not None:
            before = workspace.open(record.id)
            session = workspace.session(
                record.id, system=system, sampling=with_given(before.params, params), context_policy=keeping.policy
            )
        else:
            name = keeping.session or source.new_name(kind)
            chosen = model.defaults.in_terminal(params, kind)
            session = source.blank(name, system=system, params=chosen, policy=keeping.policy)
        repl = Repl(source, session, line_reader(), kind=kind, parse_special=parse_special)
        if record is not None:
            repl.go_to(session)
        if prompt and kind == "story":
            emit(prompt)
        repl.run(prompt)


def _record(workspace: Workspace | None, keeping: Keeping, kind: str) -> SessionRecord | None:
    """The record of the requested session, if it exists."""
    if workspace is None:
        return None
    if keeping.resume:
        return changed_last(workspace, kind)
    return find_record(workspace, keeping.session) if keeping.session is not None else None


def _model_of(record: SessionRecord, loading: ModelOptions) -> ModelOptions:
    """Options to load a session's own model."""
    if is_given("model") and loading.name != record.model:
        raise click.UsageError(f"session {record.id} uses the model {record.model}; leave out --model")
    return dataclasses.replace(loading, model=record.model)


def line_reader() -> Callable[[], str]:
    """Returns a function that reads a line, with editing and an in-memory history."""
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


class Repl:
    """The loop.

    Args:
        source: of sessions.
        session: the first session.
        read: returns the next line; EOFError ends the loop, KeyboardInterrupt discards the line.
        kind: "chat" or "story", for an empty session.
        parse_special: see `converse`.

    Attributes:
        session: the current session.
        choices: actions for the next line, by its text.
        is_over: whether to end the loop.
    """

    def __init__(
        self,
        source: SessionSource,
        session: Session,
        read: Callable[[], str],
        *,
        kind: str = "chat",
        parse_special: bool | None = None,
    ) -> None:
        self.source, self.session, self._parse_special = source, session, parse_special
        self._read, self._kind = read, kind
        self.choices: dict[str, Callable[[], None]] = {}
        self.is_over = False
        self._answering = False

    # ---- The loop ---------------------------------------------------------------------------------------------------

    def run(self, first: str | None = None) -> None:
        """Runs the loop.

        Args:
            first: the first input, before a line is read.
        """
        before = signal.signal(signal.SIGINT, self._interrupted)
        try:
            if first:
                self._guard(lambda: self._send(first))
            while not self.is_over:
                try:
                    line = self._read()
                except KeyboardInterrupt:
                    note("/exit or Ctrl-D exits")
                except EOFError:
                    return
                else:
                    self._guard(lambda line=line: self._handle(line))  # type: ignore[misc]
        finally:
            signal.signal(signal.SIGINT, before)

    def _guard(self, act: Callable[[], None]) -> None:
        """Runs an action and prints its error; the loop continues."""
        try:
            act()
        except ContextOverflow as error:
            complain(f"{error}. /undo goes back, /reset starts a new session; see also --context-policy")
        except InvalidArgument as error:
            note(str(error))
        except EngineError as error:
            complain(str(error))

    def _handle(self, line: str) -> None:
        choices, self.choices = self.choices, {}
        word = line.strip()
        if word in choices:
            choices[word]()
        elif word.startswith("/"):
            run_command(self, word)
        elif word:
            self._send(line.rstrip() if self.kind == "story" else word)
        elif self.kind == "story" and not choices:
            self._continue()

    def _send(self, text: str) -> None:
        special = self._parse_special
        if self.kind == "chat":
            self.answer(lambda session, params: session.say(text, params, parse_special=bool(special)))
        else:
            added = self._joined(text)
            self.answer(lambda session, params: session.tell(prompt=added, params=params, parse_special=special))

    def _continue(self) -> None:
        if self.session.head.number:
            self.answer(lambda session, params: session.tell(params=params))
        else:
            note("type the beginning of the story")

    def _joined(self, text: str) -> str:
        """Text for a story, with a space before it if needed to separate words."""
        head = self.session.head
        end = (head.prompt + head.text)[-1:]
        runs_in = end and not end.isspace() and not text[0].isspace() and text[0] not in _NO_SPACE_BEFORE
        return " " + text if runs_in else text

    # ---- For commands -----------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """The kind of this session, "chat" or "story"."""
        return kind_of(self.session) or self._kind

    def params(self) -> SamplingParams:
        """Sampling settings of the next reply. A fixed seed gives each turn a seed of its own, reproducibly."""
        params = self.session.params
        if params.seed is None:
            return params
        return dataclasses.replace(params, seed=(params.seed + len(self.session.turns)) % 2**64)

    def answer(self, begin: Callable[[Session, SamplingParams], Reply], *, show_begun: bool = False) -> None:
        """Streams a reply until its end or Ctrl-C. On an error the session stays unchanged.

        Args:
            begin: starts the reply in a session.
            show_begun: also print the given beginning of the reply.
        """
        self.session = self.source.keep(self.session)
        try:
            with begin(self.session, self.params()) as reply, self.interruptible():
                if show_begun:
                    emit(reply.begun_text)
                for piece in reply:
                    emit(piece.text)
        finally:
            self.session = self.source.settle(self.session)
        emit("\n")
        turn = reply.turn
        if turn is not None and turn.timings is not None and err().is_terminal:
            line = summary(turn.timings, turn.finish_reason, turn.params.seed if turn.params else None)
            note(f"{line} · context {turn.n_ids}/{self.source.model.context}")

    def begin(self, system: str | None) -> None:
        """Switches to a new session with the settings of this one; replaces an empty one."""
        name = self.new_name() if self.session.turns else self.session.id
        self.session = self.source.blank_like(self.session, name, system)
        note(f"a new {self.kind}{' with a system message' if system else ''}")

    def new_name(self) -> str:
        """A name for a new session."""
        return self.source.new_name(self.kind)

    def go_to(self, session: Session) -> None:
        """Switches to an existing session and shows its last turns."""
        self.session = session
        show_opened(session)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the block, Ctrl-C stops the replies."""
        self._answering = True
        try:
            yield
        finally:
            self._answering = False

    def _interrupted(self, *_: object) -> None:
        """Handles Ctrl-C outside the line editor; ignored between replies."""
        if self._answering:  # in another thread, since this one may hold the session's lock
            threading.Thread(target=self.session.stop, daemon=True).start()
