"""A session's tree as HTML for notebooks: static, without scripts, links or styles of the page's own.

Every text of a session may come from anybody. It is escaped, cut, kept on one line, and isolated (`<bdi>`), so that it
can neither become markup nor change the direction of what stands around it.

A turn on the path to the head stays at the left; the branches that leave the path before it are indented above it.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterator, Sequence

from fabula.sessions.turn import WRITTEN, Turn

MAX_TURNS = 200  # that are drawn: those nearest to the head on its path, and the newest others
MAX_DEPTH = 20  # levels that are indented
MAX_LETTERS, MAX_HINT = 80, 600  # of a text, and of the text that shows under the pointer
_INDENT_EM = 1.5
_PARTIAL = ("cancelled", "timeout", "interrupted")


def tree_html(name: str, model: str, turns: Sequence[Turn], head: Turn, *, is_busy: bool) -> str:
    """The tree.

    Args:
        name: title or id of the session.
        model: its name; "" for none.
        turns: all of them, parents before children.
        head: the current turn.
        is_busy: whether a reply is running.
    """
    path = [turn for turn in head.lineage() if turn.parent is not None]
    shown = set(path[:MAX_TURNS])
    for one in reversed(turns):
        if len(shown) >= MAX_TURNS:
            break
        shown.add(one)
    about = [f"{len(turns)} turn{'' if len(turns) == 1 else 's'}", f"head at {head.number}"]
    about += [_text(model, MAX_LETTERS)] if model else []
    about += ["a reply is running"] if is_busy else []
    rows = [f"<div><b>{_text(name, MAX_LETTERS)}</b> <small>{', '.join(about)}</small></div>"]
    if len(shown) < len(turns):
        rows.append(f"<div><small>{len(turns) - len(shown)} turns are not shown</small></div>")
    on_path = set(path)
    drawn = [_row(turn, depth, head, is_on_path=turn in on_path) for turn, depth in _placed(turns, shown, on_path)]
    rows.append(f'<div role="tree" aria-label="Turns">{"".join(drawn)}</div>')
    return f'<div style="font-family:sans-serif;line-height:1.5">{"".join(rows)}</div>'


def _placed(turns: Sequence[Turn], shown: set[Turn], path: set[Turn]) -> Iterator[tuple[Turn, int]]:
    """The turns to draw from top to bottom, each with its depth. Of the children of a turn one stays at its depth, that
    on the path or the last one; it is drawn after the others."""
    children: dict[Turn | None, list[Turn]] = {}
    for child in turns:
        if child in shown:
            children.setdefault(child.parent if child.parent in shown else None, []).append(child)
    stack: list[tuple[Turn | None, int]] = [(None, 0)]  # not recursive: a path may have thousands of turns
    while stack:
        turn, depth = stack.pop()
        if turn is not None:
            yield turn, depth
        below = children.get(turn, [])
        if below:
            main = next((one for one in below if one in path), below[-1])
            stack.append((main, depth))
            stack += [(one, depth + 1) for one in reversed(below) if one is not main]


def _row(turn: Turn, depth: int, head: Turn, *, is_on_path: bool) -> str:
    is_head = turn is head
    mark = "&#9679;" if is_head else "&#8226;" if is_on_path else "&#9702;"
    texts = [_bdi(text) for text in (turn.prompt, turn.text) if text.strip()]
    more = [_text(tag, MAX_LETTERS) for tag in sorted(turn.tags)]
    more += ["note"] if turn.frozen else ["by hand"] if turn.finish_reason == WRITTEN else []
    more += [str(turn.finish_reason)] if turn.finish_reason in _PARTIAL else []
    more += ["head"] if is_head else []
    body = f"{mark} {turn.number} {' &#8594; '.join(texts)}"
    body = f"<b>{body}</b>" if is_head else body
    body += f" <small>({', '.join(more)})</small>" if more else ""
    style = f"margin-left:{_INDENT_EM * min(depth, MAX_DEPTH):g}em"
    style += "" if is_on_path else ";opacity:0.6"
    current = ' aria-current="true"' if is_head else ""
    return f'<div role="treeitem" aria-level="{depth + 1}"{current} style="{style}">{body}</div>'


def _bdi(text: str) -> str:
    hint = f' title="{_text(text, MAX_HINT)}"' if len(text) > MAX_LETTERS else ""
    return f"<bdi{hint}>{_text(text, MAX_LETTERS)}</bdi>"


def _text(text: str, most: int) -> str:
    """A text on one line, cut and escaped. Control characters and lone surrogates, which no notebook can store, become
    U+FFFD."""
    start = text[: 4 * most]  # a long answer is not walked to its end
    line = " ".join(start.split())
    cut = line[:most].rstrip() + "\u2026" if len(line) > most or len(start) < len(text) else line
    return html.escape("".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in cut))
