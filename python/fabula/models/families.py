"""The model families, by `model_type` of config.json: one row each, in tables by kind.

All of them are the decoder of models/decoder.py. A row says how its config and layers differ from Llama's; see
`Traits`. Where only the config decides, a short function of models/family_rules.py or expert_rules.py does. Names of
tensors that differ from Llama's are in formats/family_names.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fabula.errors import ModelFileError, Unsupported
from fabula.models.dense_families import DENSE
from fabula.models.family import Family
from fabula.models.hybrid_families import HYBRIDS
from fabula.models.layer_norm_families import LAYER_NORM
from fabula.models.mla import LATENT
from fabula.models.sparse_families import SPARSE

FAMILIES: Mapping[str, Family] = {**DENSE, **LAYER_NORM, **SPARSE, **LATENT, **HYBRIDS}


def family_of(config: Mapping[str, Any], path: Path) -> Family:
    """The family of a config.

    Raises:
        ModelFileError: `model_type` is missing or not a string.
        Unsupported: no such family.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ModelFileError(f"{path}: config 'model_type' is missing", path=path, field="model_type")
    if kind not in FAMILIES:
        raise Unsupported(f"{path}: model family {kind[:60]!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[kind]
