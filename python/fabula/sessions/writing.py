"""Turns written by hand: words that a person puts into a tree, with nothing computed for them.

Their K and V are computed with the next answer, as the K and V of any new words are.
"""

from __future__ import annotations

from fabula.errors import InvalidArgument
from fabula.sessions.growth import check_not_mixed
from fabula.sessions.looking import Looking
from fabula.sessions.prompts import common_length, parses_special, story_prompt
from fabula.sessions.said import Said
from fabula.sessions.tree import TurnRef
from fabula.sessions.turn import WRITTEN, Turn


class Writing(Looking):
    """A session into which people write themselves."""

    def write(
        self, text: str, *, frozen: bool = False, parse_special: bool | None = None, wait: bool | float = False
    ) -> Turn:
        """Adds a piece to a story, behind the head, as its author wrote it; the model adds nothing.

        Args:
            text: the piece.
            frozen: whether it is a note: the model reads it where it stands, it is no part of the story, and when the
                context is full the policy `drop_oldest_turns` leaves it where it is. A note at the front costs once
                what its tokens cost: its K and V serve every way the story goes.
            parse_special: whether control tokens written in it are control tokens; None as in `Session.tell`.
            wait: for the end of another reply; see `Session`.

        Returns:
            The new head.

        Raises:
            InvalidArgument: the session is a chat, or the text is empty.
            ContextOverflow, SessionBusy, StoreError: as `Session.tell`.
        """
        _ = self._host.served  # loaded before the lock is taken, as for an answer
        with self.quiet(wait):
            self._check_vocabulary()
            if not text:
                raise InvalidArgument("there are no words to write")
            parent, engine = self.head, self._host.served.engine
            check_not_mixed(parent, chat=False)
            said = Said.of(text, parse_special=parses_special(parse_special, parent))
            prompt = story_prompt(engine, self.policy, self.params, parent, said)
            engine.runner.check_room(len(prompt.ids), self.policy.visible(engine.runner.context))
            turn = Turn(
                parent=parent,
                number=parent.number + 1,
                said=said,
                kept=prompt.kept,
                prompt_ids=tuple(prompt.ids[prompt.kept :]),
                params=self.params.resolved(engine.defaults),
                finish_reason=WRITTEN,
                cut=prompt.cut,
                frozen=frozen,
            )
            return self._put(turn)

    def rewrite(
        self, turn: TurnRef, text: str, *, parse_special: bool | None = None, wait: bool | float = False
    ) -> Turn:
        """Puts other words in place of a turn's answer, as a sibling of the turn that becomes the head.

        Behind them the conversation goes on as if the model had said them; `continue_` lets it go on with them.

        Args:
            turn: whose answer.
            text: what it says instead.
            parse_special: whether control tokens written in it are control tokens; None for as in the turn's prompt if
                it tells a story, and for no in a chat.
            wait: for the end of another reply; see `Session`.

        Returns:
            The new head.

        Raises:
            InvalidArgument: no such turn, or the text is empty.
            ContextOverflow, SessionBusy, StoreError: as `Session.say`.
        """
        _ = self._host.served
        with self.quiet(wait):
            self._check_vocabulary()
            found = self._made(self._find(turn))
            if not text:
                raise InvalidArgument("an answer needs words")
            engine = self._host.served.engine
            before = found.ids()[: found.n_ids - len(found.token_ids)]
            special = not found.chat and found.said.parse_special if parse_special is None else parse_special
            words = engine.tokenizer.encode(text, add_bos=False, special=special)
            engine.runner.check_room(len(before) + len(words), self.policy.visible(engine.runner.context))
            written = Turn(
                parent=found.parent,
                number=found.number,
                chat=found.chat,
                said=found.said,
                text=text,
                kept=found.kept,
                prompt_ids=found.prompt_ids,
                token_ids=tuple(words),
                n_begun=len(words),
                params=found.params,
                finish_reason=WRITTEN,
                cut=found.cut,
                frozen=found.frozen,
            )
            written.kv = found.fork_kv(common_length(found.ids(), [*before, *words]), engine.cache)
            return self._put(written)

    def _put(self, turn: Turn) -> Turn:
        """Takes a turn in as the head; it is kept when this returns."""
        try:
            if self._keeper is not None:
                self._keeper.written(turn, self)
        except BaseException:
            if turn.kv is not None:
                turn.kv.close()
            raise
        if turn.kv is not None:
            self._host.served.engine.cache.keep(turn.kv)
        self._tree.add(turn, selects=True)
        return turn
