"""What sessions need of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fabula.engine.runner import Runner
from fabula.sessions.snapshots import Snapshots
from fabula.text.template import ChatTemplate
from fabula.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Host:
    """A loaded model and the snapshots of all its sessions.

    Attributes:
        runner, tokenizer: of the model.
        template: returns its chat template, or raises TemplateError.
        snapshots: K and V of finished turns.
    """

    runner: Runner
    tokenizer: Tokenizer
    template: Callable[[], ChatTemplate]
    snapshots: Snapshots
