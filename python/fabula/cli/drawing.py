"""Displays sessions in the terminal: the tree, the head, replies side by side, statistics."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from fabula.cli.console import clean, err, note, shorten

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text
    from rich.tree import Tree

    from fabula.cli.session_source import Listed
    from fabula.kv.pages import PoolUsage
    from fabula.sessions.reply import Reply
    from fabula.sessions.session import Session
    from fabula.sessions.turn import Turn
    from fabula.sessions.views import Alternative

# Replies that did not end by themselves.
ENDS = {"length": "truncated", "cancelled": "stopped", "timeout": "timed out", "interrupted": "interrupted"}
_LAST = 12  # turns shown of a run without branches
_DEPTH = 6  # levels of branches shown above and below the head
_WIDTH = 200  # minimal columns of a tree
_RECENT = 600  # characters of the last turn shown when a session is opened


def numbered(session: Session) -> list[Turn]:
    """All turns in order of creation, as in the store; users see numbers from 1."""
    return sorted(session.turns, key=lambda turn: turn.created_at)


def number_of(session: Session, turn: Turn) -> int:
    """The number of a turn in the tree; 0 for the root."""
    return numbered(session).index(turn) + 1 if turn.number else 0


# ---- The tree -------------------------------------------------------------------------------------------------------


def show_tree(session: Session, console: Console) -> None:
    """Prints the tree; a narrow terminal wraps long lines, so that marks at their ends stay visible."""
    console.width = max(console.width, _WIDTH)
    console.print(tree_of(session), soft_wrap=True)


def tree_of(session: Session) -> Tree:
    """The tree with the numbers for /goto. Only branches are indented; of a long run without branches only the last
    turns are shown."""
    from rich.text import Text
    from rich.tree import Tree

    from fabula.sessions.turn import START

    turns = numbered(session)
    numbers = {START: 0} | {turn: i for i, turn in enumerate(turns, 1)}
    children: dict[Turn, list[Turn]] = {turn: [] for turn in numbers}
    for turn in turns:
        assert turn.parent is not None
        children[turn.parent].append(turn)

    def draw(stretch: list[Turn]) -> Text:
        shown = [
            turn for i, turn in enumerate(stretch) if i >= len(stretch) - _LAST or turn.tags or turn is session.head
        ]
        lines = []
        n_before = 0
        for turn in shown:
            hidden = stretch.index(turn, n_before) - n_before
            n_before += hidden + 1
            if hidden:
                lines.append(Text(f"… {hidden} turns", style="dim"))
            lines.append(_line(turn, numbers[turn], here=turn is session.head))
        return Text("\n").join(lines)

    top = _top(session.head, children)
    root: Tree | None = None
    waiting: list[tuple[Turn, Tree | None, int]] = [(top, None, 0)]
    while waiting:
        turn, above, depth = waiting.pop()
        if above is not None and depth > 2 * _DEPTH:
            above.add(Text("…", style="dim"))
            continue
        stretch = [turn]
        while len(children[stretch[-1]]) == 1:
            stretch += children[stretch[-1]]
        label = draw(stretch)
        if above is None and top is not START:
            label = Text(f"… {top.number} turns\n", style="dim") + label
        node = Tree(label) if above is None else above.add(label)
        root = root or node
        waiting += [(child, node, depth + 1) for child in reversed(children[stretch[-1]])]
    assert root is not None
    return root


def _top(head: Turn, children: dict[Turn, list[Turn]]) -> Turn:
    """The root, or the first turn shown if there are many branches above the head."""
    n_branches = 0
    top = head
    for turn in head.lineage():
        n_branches += len(children[turn]) > 1
        if n_branches > _DEPTH:
            break
        top = turn
    return top


def _line(turn: Turn, number: int, *, here: bool) -> Text:
    from rich.text import Text

    line = Text(f"{number} ", style="bold")
    if turn.parent is None:
        line.append("start", style="not bold")
    if turn.prompt:
        line.append(shorten(turn.prompt), style="not bold green")
    if turn.parent is not None:
        line.append((" → " if turn.prompt else "→ ") + _reply_text(turn), style="not bold")
    for tag in sorted(turn.tags):
        line.append(f"  [{clean(tag)}]", style="not bold yellow")
    if turn.finish_reason in ENDS:
        line.append(f"  ({ENDS[turn.finish_reason]})", style="not bold dim")
    if here:
        line.append("  ← here", style="bold green")
    return line


def _reply_text(turn: Turn, length: int = 40) -> str:
    return shorten(turn.text, length) or "(nothing)"


# ---- The head -----------------------------------------------------------------------------------------------------


def show_head(session: Session) -> None:
    """Prints one line about the head."""
    head = session.head
    number = number_of(session, head)
    note(f"at turn {number}: {shorten(head.prompt)} → {_reply_text(head)}" if number else "at the start")


def show_opened(session: Session) -> None:
    """Prints the last turns of an opened session; truncates a long one."""
    from rich.text import Text

    head = session.head
    note(f"{session.id} · at turn {number_of(session, head)} of {len(session.turns)}")
    if head.parent is not None and head.parent.number:
        note(f"{shorten(head.parent.prompt, 60)} → {_reply_text(head.parent, 60)}")
    if not head.number:
        return
    prompt, text = Text(), Text(("…" + clean(head.text[-_RECENT:])) if len(head.text) > _RECENT else clean(head.text))
    if head.prompt:
        prompt = Text(f"> {clean(head.prompt)}\n" if head.chat else clean(head.prompt), style="green")
    err().print(prompt + text)
    if head.finish_reason in ENDS:
        note(f"this reply was {ENDS[head.finish_reason]}; /continue continues it")


# ---- Alternatives ---------------------------------------------------------------------------------------------------


def stream_branches(replies: Sequence[Reply]) -> None:
    """Runs replies to their ends and streams their texts side by side."""
    from rich.live import Live

    console = err()
    texts = [reply.begun_text for reply in replies]
    with ExitStack() as stack:
        for reply in replies:
            stack.enter_context(reply)
        live = stack.enter_context(Live(console=console, transient=True)) if console.is_terminal else None
        while not all(reply.is_done for reply in replies):
            for i, reply in enumerate(replies):
                piece = next(reply, None)
                texts[i] += piece.text if piece is not None else ""
            if live is not None:
                live.update(_columns(texts))


def show_branches(session: Session, turns: Sequence[Turn]) -> None:
    """Prints the replies of turns, with their numbers in the tree."""
    from rich.text import Text

    for turn in turns:
        label = Text(f"{number_of(session, turn)} ", style="bold")
        err().print(label + Text(clean(turn.text).strip() or "(nothing)", style="not bold"))


def _columns(texts: list[str]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    width = max(1, err().width // max(1, len(texts)) - 2)
    grid = Table.grid(*[""] * len(texts), expand=True, padding=(0, 1))
    grid.add_row(*(Text(clean(text)[-8 * width :], style="dim") for text in texts))
    return grid


def show_alternatives(found: Sequence[Alternative], before: str) -> None:
    """Prints candidate tokens of a position with numbers, after the text before it."""
    from rich.text import Text

    tail = " ".join(clean(before).split())[-60:]
    err().print(Text(f"… {tail}", style="dim"))
    for i, alternative in enumerate(found, 1):
        line = Text(f"{i:>3} ", style="bold") + Text(f"{alternative.text!r:20}", style="not bold")
        line.append(f"{math.exp(alternative.logprob):7.2%}", style="not bold dim")
        line.append("  ← chosen" if alternative.chosen else "", style="bold green")
        err().print(line)


# ---- Statistics -----------------------------------------------------------------------------------------------------


def show_stats(turn: Turn, context: int, usage: PoolUsage) -> None:
    """Prints statistics of a reply and of the KV cache."""
    t = turn.timings
    speed = f" at {t.tokens_per_s:.0f} tokens/s, the first after {t.first_token_ms:.0f} ms" if t is not None else ""
    rows = [("reply", f"{len(turn.token_ids) - turn.n_begun} tokens{speed}, ended by {turn.finish_reason}")]
    if t is not None:
        why = f": {turn.why_recomputed}" if turn.why_recomputed else ""
        rows += [
            ("prompt", f"{t.prompt_tokens} tokens: {turn.reused} reused, {t.prompt_tokens - turn.reused} computed"),
            ("recomputed", f"{turn.recomputed}{why}"),
        ]
        if t.drafted:
            rows.append(("drafted", f"{t.drafted} tokens, {t.accepted} of them accepted"))
    if turn.cut is None:
        rows.append(("dropped", "nothing"))
    else:
        turns = f"{turn.cut.n_turns} turns, " if turn.cut.n_turns else ""
        rows.append(("dropped", f"{turns}{turn.cut.n_tokens} tokens, by {turn.cut.policy}"))
    dropped = f", {usage.n_dropped} without dead windows" if usage.n_dropped else ""
    rows += [
        ("context", f"{turn.n_ids} of {context} tokens"),
        (
            "pages",
            f"{usage.n_used} of {usage.n_pages} used, {usage.n_shared} shared, {usage.n_cached} cached, "
            f"{usage.n_spilled} on disk{dropped}; {usage.page_bytes / 1e3:.0f} kB each",
        ),
    ]
    if usage.n_slots:
        rows.append(
            (
                "states",
                f"{usage.n_slots_used} of {usage.n_slots} slots used, {usage.n_states_evicted} evicted, "
                f"{usage.n_states_spilled} on disk; {usage.slot_bytes / 1e3:.0f} kB each",
            )
        )
    note("\n".join(f"{name:11} {value}" for name, value in rows))


def ago(seconds_since_1970: float) -> str:
    """A time relative to now, such as "5 min ago"."""
    seconds = max(0, int(time.time() - seconds_since_1970))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return "just now"


def sessions_table(items: Sequence[Listed], here: str = "") -> RenderableType:
    """A table of sessions."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "turns", "changed", "model", "first words"):
        table.add_column(title, no_wrap=True)
    for item in items:
        name = Text(clean(item.name), style="bold green" if item.name == here else "bold")
        words = Text(shorten(item.first_words)) if not item.problem else Text("damaged", style="red")
        model = shorten(item.model.rpartition("/")[2], 30)
        table.add_row(name, str(item.n_turns), ago(item.changed_at), model, words)
    return table
