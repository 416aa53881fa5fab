"""A chat or a story in the terminal: reads a line, obeys it or gives it to the model, until the end."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import click

from fabula.cli.commands import obey
from fabula.cli.console import complain, emit, err, note
from fabula.cli.drawing import show_opened
from fabula.cli.options import Keeping, ModelOptions, is_given, with_given
from fabula.cli.session_source import Shelf, changed_last, find_record, kind_of, open_workspace
from fabula.cli.story import summary
from fabula.errors import ContextOverflow, EngineError, InvalidArgument

if TYPE_CHECKING:
    from fabula.engine.sampling import SamplingParams
    from fabula.sessions.reply import Reply
    from fabula.sessions.session import Session
    from fabula.store.records import SessionRecord
    from fabula.workspace import Workspace

_NO_SPACE_BEFORE = ",.;:!?)]}'’”…-"  # nor between a word and what is typed behind it


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
        loading: the model of a new session; one that exists has its own.
        params: sampling settings.
        keeping: which session, and where it is kept.
        kind: "chat" or "story", of a new session.
        system: system message of a new chat.
        prompt: said at once.
        parse_special: whether control tokens that are typed are control tokens; None for the default of the kind.
    """
    with ExitStack() as stack:
        workspace = None
        if keeping.save:
            way_out = "end it, or use --data FOLDER for another folder, or --no-save to keep nothing"
            workspace = stack.enter_context(open_workspace(keeping.data, way_out=way_out))
        record = _record(workspace, keeping, kind)
        if record is not None:
            loading = _model_of(record, loading)
        model = loading.load(workspace)
        if workspace is None:
            stack.enter_context(model)
        if kind == "chat":
            model.template.render([{"role": "user", "content": "?"}])  # a model that cannot chat says so now
        note(
            f"{model.path.name} · {model.weights} · {model.threads} threads · context {model.context} · /help for help"
        )
        shelf = Shelf(model, workspace, loading.name)
        if workspace is not None and record is not None:
            before = workspace.open(record.id)
            session = workspace.session(
                record.id, system=system, sampling=with_given(before.params, params), context_policy=keeping.policy
            )
        else:
            name = keeping.session or shelf.new_name(kind)
            chosen = model.defaults.in_terminal(params, kind)
            session = shelf.blank(name, system=system, params=chosen, policy=keeping.policy)
        talk = Talk(shelf, session, line_reader(), kind=kind, parse_special=parse_special)
        if record is not None:
            talk.go_to(session)
        if prompt and kind == "story":
            emit(prompt)
        talk.run(prompt)


def _record(workspace: Workspace | None, keeping: Keeping, kind: str) -> SessionRecord | None:
    """The session that is asked for, if it exists."""
    if workspace is None:
        return None
    if keeping.resume:
        return changed_last(workspace, kind)
    return find_record(workspace, keeping.session) if keeping.session is not None else None


def _model_of(record: SessionRecord, loading: ModelOptions) -> ModelOptions:
    """How a session's own model is loaded."""
    if is_given("model") and loading.name != record.model:
        raise click.UsageError(f"session {record.id} talks to {record.model}; leave out --model")
    return dataclasses.replace(loading, model=record.model)


def line_reader() -> Callable[[], str]:
    """Reads a line with line editing and the history of this talk; nothing is written to disk."""
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


class Talk:
    """The loop.

    Args:
        shelf: of sessions.
        session: to begin in.
        read: returns the next line; EOFError ends the talk, KeyboardInterrupt drops the line.
        kind: "chat" or "story", where the session is empty.
        parse_special: as `converse`.

    Attributes:
        session: where we are.
        choices: lines that mean something special if they come next.
        is_over: whether the loop ends.
    """

    def __init__(
        self,
        shelf: Shelf,
        session: Session,
        read: Callable[[], str],
        *,
        kind: str = "chat",
        parse_special: bool | None = None,
    ) -> None:
        self.shelf, self.session, self._parse_special = shelf, session, parse_special
        self._read, self._kind = read, kind
        self.choices: dict[str, Callable[[], None]] = {}
        self.is_over = False
        self._answering = False

    # ---- The loop ---------------------------------------------------------------------------------------------------

    def run(self, first: str | None = None) -> None:
        """Reads and answers until the end.

        Args:
            first: words to say before a line is read.
        """
        before = signal.signal(signal.SIGINT, self._interrupted)
        try:
            if first:
                self._guard(lambda: self._say(first))
            while not self.is_over:
                try:
                    line = self._read()
                except KeyboardInterrupt:
                    note("/exit or Ctrl-D leaves")
                except EOFError:
                    return
                else:
                    self._guard(lambda line=line: self._take(line))  # type: ignore[misc]
        finally:
            signal.signal(signal.SIGINT, before)

    def _guard(self, act: Callable[[], None]) -> None:
        """Does something; what fails is told, and the talk goes on as it was."""
        try:
            act()
        except ContextOverflow as error:
            complain(f"{error}. /undo goes back, /reset begins anew; --context-policy says what else could be done")
        except InvalidArgument as error:
            note(str(error))
        except EngineError as error:
            complain(str(error))

    def _take(self, line: str) -> None:
        choices, self.choices = self.choices, {}
        word = line.strip()
        if word in choices:
            choices[word]()
        elif word.startswith("/"):
            obey(self, word)
        elif word:
            self._say(line.rstrip() if self.kind == "story" else word)
        elif self.kind == "story" and not choices:
            self._go_on()

    def _say(self, text: str) -> None:
        special = self._parse_special
        if self.kind == "chat":
            self.answer(lambda session, params: session.say(text, params, parse_special=bool(special)))
        else:
            added = self._joined(text)
            self.answer(lambda session, params: session.tell(prompt=added, params=params, parse_special=special))

    def _go_on(self) -> None:
        if self.session.head.number:
            self.answer(lambda session, params: session.tell(params=params))
        else:
            note("type how the story begins")

    def _joined(self, text: str) -> str:
        """Text for a story, with a space before it where it would run into the last word."""
        head = self.session.head
        end = (head.prompt + head.text)[-1:]
        runs_in = end and not end.isspace() and not text[0].isspace() and text[0] not in _NO_SPACE_BEFORE
        return " " + text if runs_in else text

    # ---- For commands -----------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """What this session is, "chat" or "story"."""
        return kind_of(self.session) or self._kind

    def params(self) -> SamplingParams:
        """Sampling settings of the next answer: a fixed seed repeats the whole talk, yet not each answer of it."""
        params = self.session.params
        if params.seed is None:
            return params
        return dataclasses.replace(params, seed=(params.seed + len(self.session.turns)) % 2**64)

    def answer(self, begin: Callable[[Session, SamplingParams], Reply], *, show_begun: bool = False) -> None:
        """Streams an answer until its end or Ctrl-C. What cannot be answered leaves the session as it was.

        Args:
            begin: begins it in a session.
            show_begun: also what the answer begins with already.
        """
        self.session = self.shelf.keep(self.session)
        try:
            with begin(self.session, self.params()) as reply, self.interruptible():
                if show_begun:
                    emit(reply.begun_text)
                for piece in reply:
                    emit(piece.text)
        finally:
            self.session = self.shelf.settle(self.session)
        emit("\n")
        turn = reply.turn
        if turn is not None and turn.timings is not None and err().is_terminal:
            line = summary(turn.timings, turn.finish_reason, turn.params.seed if turn.params else None)
            note(f"{line} · context {turn.n_ids}/{self.shelf.model.context}")

    def begin(self, system: str | None) -> None:
        """Goes to a new session with the settings of this one; one in which nothing was said is simply begun anew."""
        name = self.new_name() if self.session.turns else self.session.id
        self.session = self.shelf.blank_like(self.session, name, system)
        note(f"a new {self.kind}{' with a system message' if system else ''}")

    def new_name(self) -> str:
        """A name for a new session."""
        return self.shelf.new_name(self.kind)

    def go_to(self, session: Session) -> None:
        """Goes to a session that exists, and shows where it stands."""
        self.session = session
        show_opened(session)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """While Ctrl-C stops the answers that are being made."""
        self._answering = True
        try:
            yield
        finally:
            self._answering = False

    def _interrupted(self, *_: object) -> None:
        """Ctrl-C, unless the line editor has the terminal. Between two answers it means nothing."""
        if self._answering:  # another thread, as this one may hold the session's lock just now
            threading.Thread(target=self.session.stop, daemon=True).start()
