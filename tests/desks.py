"""A workspace that tests close and open again, and what they say there."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fabula import Model, SamplingParams, Session, Turn, Workspace
from fabula.engine.generation import Generation

SHORT = SamplingParams(temperature=1.0, max_tokens=9, seed=11)
LONG = SamplingParams(temperature=1.0, max_tokens=300, seed=12, ignore_eos=True)
PAST = "a b c d e f g " * 6


class Desk:
    """A workspace that can be closed and opened again."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model_folder = folder, model
        self.options: dict[str, Any] = {"threads": 1}
        self.workspace = Workspace(folder)
        self.load()

    def load(self, **options: Any) -> Model:
        return self.workspace.load(self.model_folder, name="tiny", **self.options | options)

    def session(self, id: str = "a", **settings: Any) -> Session:
        return self.workspace.session(id, model="tiny", **settings)

    def again(self, **options: Any) -> None:
        """As if the process had ended in order and begun again."""
        self.workspace.close()
        gc.collect()
        self.workspace = Workspace(self.folder)
        self.load(**options)

    @property
    def pool(self) -> Any:
        return self.workspace.models["tiny"]._runner.pool

    @property
    def store(self) -> Any:
        return self.workspace._keeper.store


@pytest.fixture
def desk(tmp_path: Path, tiny_folder: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path / "data", tiny_folder)
    yield desk
    desk.workspace.close()


def talk(session: Session, *words: str) -> list[Turn]:
    for text in words:
        session.say(text, SHORT).text()
    return session.path


def alone(model: Model, turn: Turn) -> list[int]:
    """The answer of a turn from scratch, under a salt that nobody uses."""
    assert turn.params is not None
    prompt = turn.ids()[: turn.n_ids - len(turn.token_ids)]
    generation = Generation(
        model._engine,
        prompt,
        turn.params,
        continues=not turn.chat,
        begun=turn.token_ids[: turn.n_begun],
        salt=os.urandom(8).hex(),
    )
    generation.text()
    return generation.token_ids


def told(session: Session) -> dict[str, Any]:
    """Everything about a session that must survive."""
    return {
        "turns": {
            turn.id: (
                turn.parent.id if turn.parent else None, turn.number, turn.chat, turn.prompt, turn.text, turn.kept,
                turn.prompt_ids, turn.token_ids, turn.n_begun, turn.params, turn.finish_reason, turn.timings, turn.cut,
                turn.why_recomputed, turn.created_at, turn.tags,
            )
            for turn in session.turns
        },
        "head": session.head.id,
        "undone": [turn.id for turn in session._tree.redo_stack],
        "settings": (session.system, session.params, session.policy, session.created_at, session.vocabulary),
    }  # fmt: skip
