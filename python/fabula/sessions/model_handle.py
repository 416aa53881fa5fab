"""`ModelHandle`: a model by name. Sessions hold the handle while the model itself is unloaded and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fabula.engine.defaults import SamplingDefaults
from fabula.engine.generation import Engine
from fabula.errors import InvalidArgument
from fabula.lean_dataclasses import dataclass, field

if TYPE_CHECKING:
    from fabula.kv.spill import Fingerprint
    from fabula.text.template import ChatTemplate


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A loaded model.

    Attributes:
        engine: runs its requests.
        template: returns its chat template, or raises TemplateError.
        fingerprint: returns the fingerprint of weights, tokenizer and KV layout; computed on the first call.
        why_cold: why KV on disk cannot be used; "" if it can.
        defaults: sampling parameters the model recommends.
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
        loaded: the loaded model; None if it is not loaded.
        load: loads it on demand and calls `attach`; None if it cannot be loaded again.

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
        """Sets the loaded model."""
        self._loaded = loaded
        self._fingerprint = loaded.fingerprint

    def detach(self) -> None:
        """Forgets the loaded model."""
        self._loaded = None

    @property
    def fingerprint(self) -> str:
        """Fingerprint key of the model that is or was loaded, "" before the first load. Models with the same key may
        share KV pages on disk."""
        return "" if self._fingerprint is None else self._fingerprint().key

    @property
    def vocabulary(self) -> str:
        """Fingerprint of its tokenizer: token ids mean the same under the same one. "" before the first load."""
        return "" if self._fingerprint is None else self._fingerprint().tokenizer

    @property
    def is_loaded(self) -> bool:
        return self._loaded is not None

    @property
    def loaded(self) -> LoadedModel:
        """The loaded model; loads it if it can be.

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
