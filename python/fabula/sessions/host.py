"""What sessions need of a model. It outlives the model: sessions keep it when that is unloaded and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fabula.engine.defaults import SamplingDefaults
from fabula.engine.generation import Engine
from fabula.errors import InvalidArgument

if TYPE_CHECKING:
    from fabula.kv.spill import Fingerprint
    from fabula.text.template import ChatTemplate


@dataclass(frozen=True, slots=True)
class Served:
    """A loaded model.

    Attributes:
        engine: makes its answers.
        template: returns its chat template, or raises TemplateError.
        fingerprint: returns that of weights, tokenizer, and the layout of K and V; found when it is first asked for.
        defaults: what the model recommends for settings that nobody gives.
        why_cold: why K and V of sessions kept on disk may be missing; "" if nothing speaks against them.
    """

    engine: Engine
    template: Callable[[], ChatTemplate]
    fingerprint: Callable[[], Fingerprint]
    why_cold: str = ""
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)


class Host:
    """A model by name, loaded or not.

    Args:
        name: of the model.
        served: the loaded model; None for not now.
        load: loads it when it is needed, by calling `attach`; None if it cannot be.

    Attributes:
        name: of the model.
    """

    def __init__(self, name: str = "", served: Served | None = None, load: Callable[[], object] | None = None) -> None:
        self.name = name
        self._fingerprint: Callable[[], Fingerprint] | None = None
        self._served: Served | None = None
        self._load = load
        if served is not None:
            self.attach(served)

    def attach(self, served: Served) -> None:
        """The model is loaded."""
        self._served = served
        self._fingerprint = served.fingerprint

    def detach(self) -> None:
        """The model is no longer loaded."""
        self._served = None

    @property
    def fingerprint(self) -> str:
        """Of the model that is or was loaded last; two with the same one may share pages on disk. "" before."""
        return "" if self._fingerprint is None else self._fingerprint().key

    @property
    def vocabulary(self) -> str:
        """Of its tokenizer alone: token ids mean the same under the same one."""
        return "" if self._fingerprint is None else self._fingerprint().tokenizer

    @property
    def is_loaded(self) -> bool:
        return self._served is not None

    @property
    def served(self) -> Served:
        """The loaded model, loaded now if it can be.

        Raises:
            InvalidArgument: it is closed.
        """
        if self._served is None and self._load is not None:
            self._load()
        if self._served is None:
            raise InvalidArgument("the model is closed")
        return self._served

    @property
    def engine(self) -> Engine:
        return self.served.engine
