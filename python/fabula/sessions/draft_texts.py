"""The turns of a session's tree as texts in which drafts are found: a regenerated or edited turn repeats much of its
siblings."""

from __future__ import annotations

from fabula.engine.drafts import MAX_TREE_TOKENS, DraftTexts
from fabula.sessions.turn import Turn
from fabula.sessions.turn_tree import TurnTree


def with_turns(texts: DraftTexts, tree: TurnTree) -> DraftTexts:
    """Adds the turns of a tree that came since the last call, the latest ones if they are many; returns `texts`."""
    new: list[Turn] = []
    n_tokens = 0
    for turn in reversed(tree.turns):
        if turn.id in texts or n_tokens > MAX_TREE_TOKENS:
            break
        new.append(turn)
        n_tokens += len(turn.prompt_ids) + len(turn.token_ids)
    for turn in reversed(new):
        parent = turn.parent
        before = () if parent is None or turn.kept < parent.n_ids else (*parent.prompt_ids, *parent.token_ids)
        texts.add(turn.id, before, (*turn.prompt_ids, *turn.token_ids))
    return texts
