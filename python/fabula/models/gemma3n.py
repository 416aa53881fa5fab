"""Gemma 3n: alternating updates, low-rank residuals, sparse gates, per-layer embeddings, KV that later layers reuse.

Source: configuration and modeling files of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fabula.lean_dataclasses import replace
from fabula.models.config import ConfigReader, Traits
from fabula.models.description import AltUp, HeadNorm, Layer, ModelConfig
from fabula.models.family_rules import gemma, shared_kv


def adapt(read: ConfigReader, t: Traits) -> Traits:
    """MLPs may have a size for each layer."""
    n_layers = read.integer("num_hidden_layers", 1, 1024)
    sizes = _each(read, "intermediate_size", n_layers) or [16384]
    cap = read.number("final_logit_softcapping", 1e-6, 1e6, 30.0)
    read.config = {**read.config, "intermediate_size": sizes[0], "intermediate_sizes": sizes}
    return replace(gemma(read, t), logit_cap=cap)


def finish(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    sizes = [ConfigReader({"intermediate_size": n}, read.path).integer("intermediate_size", 1, 1 << 20)
             for n in read.config["intermediate_sizes"]]  # fmt: skip
    n_per_layer = read.integer("hidden_size_per_layer_input", 1, 1 << 16, 256)
    rank = read.integer("laurel_rank", 1, 1 << 16, 64)
    n_streams = read.integer("altup_num_inputs", 2, 64, 4)
    altup = AltUp(
        n_streams, read.integer("altup_active_idx", 0, n_streams - 1, 0), read.flag("altup_correct_scale", True)
    )
    kv = shared_kv(read, c, read.integer("num_kv_shared_layers", 0, c.n_layers - 1, 15))
    cutoffs = _cutoffs(read, c.n_layers)
    norm = HeadNorm("rms", c.rms_norm_eps, values=True)
    layers: list[Layer] = []
    for i, layer in enumerate(c.layers):
        number, writes = kv[i]
        attention = replace(layer.attention, norm=norm, kv=number, writes=writes)
        mlp = replace(layer.mlp, size=sizes[i] if len(sizes) > 1 else sizes[0], cutoff=cutoffs[i])
        layers.append(replace(layer, attention=attention, mlp=mlp, laurel=rank, n_per_layer=n_per_layer))
    n_rows = read.integer("vocab_size_per_layer_input", 1, 1 << 22, 262144)
    return replace(c, layers=tuple(layers), n_per_layer=n_per_layer, n_per_layer_rows=n_rows, altup=altup)


def _each(read: ConfigReader, key: str, n_layers: int) -> list[Any] | None:
    """The items of a list with one for each layer; one number stands for all."""
    value = read.config.get(key)
    if isinstance(value, list) and len(value) != n_layers:
        raise read.error(key, f"has {len(value)} items, must have one for each of {n_layers} layers")
    return value if isinstance(value, list) or value is None else [value]


def _cutoffs(read: ConfigReader, n_layers: int) -> Sequence[float | None]:
    """How many standard deviations above their mean gates must be in each layer; None for layers that are not sparse.

    The config has the part of the gates that is cut, if they are distributed normally.
    """
    parts = _each(read, "activation_sparsity_pattern", n_layers)
    if parts is None:
        parts = [0.95 if i < 10 < n_layers else 0.0 for i in range(n_layers)]
    if len(parts) != n_layers:
        raise read.error("activation_sparsity_pattern", f"must list a number for each of {n_layers} layers")
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | float) or not part < 1:
            raise read.error("activation_sparsity_pattern", f"has {part!r}, must be numbers below 1")
    from statistics import NormalDist  # slow to import

    return [NormalDist().inv_cdf(float(np.float32(part))) if part > 0 else None for part in parts]
