"""Factors of a model in its tensors, for architectures that have no keys for them (Falcon-H1).

A product with a factor on its input or result is one with the factor on its matrix; a factor on keys is one on the
matrix of k; one on embeddings and another on logits need two matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fabula.formats.checkpoint import Checkpoint
from fabula.models.description import Layer, Mamba2, ModelConfig
from fabula.models.views import View, ViewedCheckpoint

Factors = npt.NDArray[np.float32]  # one number, or one for each row
_IN_TENSORS = ("falcon_h1",)  # families


def folded(checkpoint: Checkpoint, config: ModelConfig) -> tuple[Checkpoint, ModelConfig]:
    """The same model without factors; itself in other families.

    Args:
        checkpoint: with canonical names (`viewed`).
        config: of the model.
    """
    if config.model_type not in _IN_TENSORS:
        return checkpoint, config
    factors: dict[str, Factors] = {}
    for i, layer in enumerate(config.layers):
        factors |= {f"model.layers.{i}.{name}": factor for name, factor in _of_layer(layer).items()}
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    tied = config.tied and config.embedding_scale == config.logit_scale
    views = {name: View((name,), factors=factor) for name, factor in factors.items() if name in checkpoint.tensors}
    views[embedding] = View((embedding,), factors=_one(config.embedding_scale))
    if not tied:
        source = embedding if config.tied else head
        views[head] = View((source,), factors=_one(config.logit_scale))
    kept = {name: view for name, view in views.items() if view.factors is not None and (view.factors != 1).any()}
    if head in views and views[head].sources != (head,):
        kept[head] = views[head]
    layers = tuple(_without(layer) for layer in config.layers)
    config = replace(config, layers=layers, embedding_scale=1.0, logit_scale=1.0, tied=tied)
    return ViewedCheckpoint(checkpoint, kept), config


def _one(factor: float) -> Factors:
    return np.array([factor], np.float32)


def _of_layer(layer: Layer) -> Mapping[str, Factors]:
    """The factors of a layer's tensors, by names."""
    a, m, mixer = layer.attention, layer.mlp, layer.mixer
    keys = a.scale / a.k_dim**-0.5
    found = {
        **{f"self_attn.{part}_proj.weight": a.in_scale * (keys if part == "k" else 1.0) for part in "qkv"},
        "self_attn.k_proj.bias": keys,
        "mlp.gate_proj.weight": m.gate_scale,
        "mlp.gate_proj.bias": m.gate_scale,
    }
    for name, factor in (("self_attn.o_proj", a.out_scale), ("mlp.down_proj", m.out_scale)):
        found |= {f"{name}.weight": factor, f"{name}.bias": factor}
    factors = {name: _one(factor) for name, factor in found.items()}
    if isinstance(mixer, Mamba2):
        rows = np.repeat(np.array(mixer.scales, np.float32), mixer.part_widths)
        factors |= {"mamba.in_proj.weight": _one(mixer.in_scale) * rows, "mamba.in_proj.bias": rows}
        factors |= {f"mamba.out_proj.{kind}": _one(mixer.out_scale) for kind in ("weight", "bias")}
    return factors


def _without(layer: Layer) -> Layer:
    mixer = layer.mixer
    if isinstance(mixer, Mamba2):
        mixer = replace(mixer, in_scale=1.0, out_scale=1.0, scales=(1.0,) * 5)
    attention = replace(layer.attention, scale=layer.attention.k_dim**-0.5, in_scale=1.0, out_scale=1.0)
    return replace(layer, attention=attention, mlp=replace(layer.mlp, gate_scale=1.0, out_scale=1.0), mixer=mixer)
