"""What a family is: a name and its traits. The rows are in dense_families.py, layer_norm_families.py,
sparse_families.py and hybrid_families.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fabula.lean_dataclasses import dataclass
from fabula.models.config import Traits, read_config
from fabula.models.description import ModelConfig


@dataclass(frozen=True, slots=True)
class Family:
    """A family: how its config is read.

    Attributes:
        name: as people write it.
        traits: what differs from Llama.
    """

    name: str
    traits: Traits

    def read(self, config: Mapping[str, Any], path: Path) -> ModelConfig:
        """Checks a config.json; `path` is named in errors.

        Raises:
            ModelFileError, Unsupported: see `read_config`.
        """
        return read_config(config, path, self.traits)


NO_BIAS: Mapping[str, Any] = {"qkv_bias": False, "output_bias": False}  # traits
