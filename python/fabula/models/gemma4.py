"""Gemma 4: two head geometries, KV that later layers reuse, per-layer embeddings. Source: transformers 5.24.

Layers without a window have wider heads, and in some models take their k for v. The last `num_kv_shared_layers` have no
K and V of their own: they attend to those of the last layer of their kind before them. Some models have a mixture of
experts beside the MLP of each layer (models/expert_rules.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fabula.lean_dataclasses import replace
from fabula.models.config import ConfigReader, Traits
from fabula.models.description import HeadNorm, Layer, ModelConfig, Rope
from fabula.models.family_rules import FULL, SLIDING, every, gemma, shared_kv

ROPES: Mapping[str, Any] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}


def adapt(read: ConfigReader, t: Traits) -> Traits:
    """The last layer never has a window. Bidirectional attention between parts of an image does not matter to text."""
    if read.config.get("use_bidirectional_attention") == "vision":
        read.config = {**read.config, "use_bidirectional_attention": None}
    for key in ("rope_theta", "rope_scaling"):
        if read.config.get(key) is not None:
            raise read.unsupported(key, "this family has its ropes in rope_parameters")
    n_layers = read.integer("num_hidden_layers", 1, 1024)
    kinds = read.config.get("layer_types") or every(6)(read, n_layers)
    if isinstance(kinds, list) and kinds:
        read.config = {**read.config, "layer_types": [*kinds[:-1], FULL]}
    cap = read.number("final_logit_softcapping", 0.0, 1e6, None, nullable=True)
    return replace(gemma(read, t), logit_cap=cap)


def finish(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    """Describes what differs from layer to layer."""
    shares = read.integer("num_kv_shared_layers", 0, c.n_layers - 1, 0)
    wide, k_is_v = read.flag("use_double_wide_mlp", False), read.flag("attention_k_eq_v", False)
    n_per_layer = read.integer("hidden_size_per_layer_input", 0, 1 << 16, 256)
    n_rows = read.integer("vocab_size_per_layer_input", 1, 1 << 22, 262144)
    if n_per_layer and n_rows != c.vocab_size:
        raise read.error("vocab_size_per_layer_input", f"is {n_rows}, must be vocab_size {c.vocab_size}")
    sizes = [_sizes(read, i, not window) for i, window in enumerate(c.windows)]
    dims: dict[int, int] = {}  # of each rope table
    kv = shared_kv(read, c, shares)
    layers: list[Layer] = []
    for i, (layer, (n_kv_heads, head_dim)) in enumerate(zip(c.layers, sizes, strict=True)):
        windowed, (number, writes) = c.windows[i] > 0, kv[i]
        if c.n_heads % n_kv_heads:
            raise read.error("num_key_value_heads", f"is {n_kv_heads} in layer {i}, must divide {c.n_heads}")
        if dims.setdefault(layer.attention.rope, head_dim) != head_dim:
            raise read.unsupported("per_layer_config", "layers that share a rope have heads of different widths")
        attention = replace(
            layer.attention,
            n_kv_heads=n_kv_heads,
            k_dim=head_dim,
            v_dim=head_dim,
            norm=HeadNorm("rms", c.rms_norm_eps, values=True),
            values_are_keys=k_is_v and not windowed,
            kv=number,
            writes=writes,
        )
        mlp = replace(layer.mlp, size=layer.mlp.size * (2 if wide and not writes else 1))
        layers.append(replace(layer, attention=attention, mlp=mlp, scaled=True, n_per_layer=n_per_layer))
    ropes = tuple((_rope(rope), dims[i]) for i, (rope, _) in enumerate(c.ropes))
    return replace(c, layers=tuple(layers), ropes=ropes, rope=ropes[0][0], n_per_layer=n_per_layer)


def _rope(rope: Rope) -> Rope:
    """Plain rotation is that of whole heads, whatever `partial_rotary_factor` says."""
    if rope.get("rope_type") != "default":
        return rope
    return {key: value for key, value in rope.items() if key != "partial_rotary_factor"}


def _sizes(read: ConfigReader, i: int, is_full: bool) -> tuple[int, int]:
    """KV heads and head width of a layer: those of `per_layer_config`, or older keys for layers without a window."""
    defaults = {"num_key_value_heads": 4, "head_dim": 256}
    found = {key: read.config.get(key, default) for key, default in defaults.items()}
    each = read.config.get("per_layer_config")
    if isinstance(each, Mapping):
        mine = each.get(str(i), {})
        if not isinstance(mine, Mapping) or mine.keys() - found.keys():
            raise read.unsupported("per_layer_config", f"layer {i} differs in more than its heads")
        found |= mine
    elif each is not None:
        raise read.error("per_layer_config", "must be an object")
    elif is_full:
        found["head_dim"] = read.config.get("global_head_dim", 512)
        n = read.config.get("num_global_key_value_heads")
        if n is not None and read.config.get("attention_k_eq_v", False):
            found["num_key_value_heads"] = n
    layer = ConfigReader(found, read.path)
    return layer.integer("num_key_value_heads", 1, 1024), layer.integer("head_dim", 2, 1024)
