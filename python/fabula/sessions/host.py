"""What sessions need of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fabula.engine.generation import Engine
from fabula.text.template import ChatTemplate


@dataclass(frozen=True, slots=True)
class Host:
    """A loaded model.

    Attributes:
        engine: makes its answers.
        template: returns its chat template, or raises TemplateError.
    """

    engine: Engine
    template: Callable[[], ChatTemplate]
