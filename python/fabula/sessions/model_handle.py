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
class LoadedModel:
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


class ModelHandle:
    """A model by name, loaded or not.

    Args:
        name: of the model.
        loaded: the loaded model; None for not now.
        load: loads it when it is needed, by calling `attach`; None if it cannot be.

    Attributes:
        name: of the model.
    """

    def __init__(
        self, name: str = "", loaded: LoadedModel | None = None, load: Callable[[], object] | None = None
    ) -> None:
        self.name = name
        self._fingerprint: Callable[[], Fingerprint] | None = None
        self._loaded: LoadedModel | None = None
        self._load = load
        if loaded is not None:
            self.attach(loaded)

    def attach(self, loaded: LoadedModel) -> None:
        """The model is loaded."""
        self._loaded = loaded
        self._fingerprint = loaded.fingerprint

    def detach(self) -> None:
        """The model is no longer loaded."""
        self._loaded = None

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
        return self._loaded is not None

    @property
    def loaded(self) -> LoadedModel:
        """The loaded model, loaded now if it can be.

        Raises:
            InvalidArgument: it is closed.
        """
        if self._loaded is None and self._load is not None:
            self._load()
        if self._loaded is None:
            raise InvalidArgument("the model is closed")
        return self._loaded

    @property
    def engine(self) -> Engine:
        return self.loaded.engine
