"""What GGUF has of recurrent layers: key-values, and the order of rows in tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from fabula.export.part import Part, Rows
from fabula.formats.gguf_names import stored_name
from fabula.formats.gguf_write import Value
from fabula.models.description import Attention, DeltaRule, Mamba2, Mixer, ModelConfig, ShortConv

PARTS = (ShortConv.part, DeltaRule.part, Mamba2.part)  # beginnings of their tensors' names


def _kv_heads(c: ModelConfig) -> Value:
    """KV heads of each layer; 0 for one without attention."""
    return np.array([layer.attention.n_kv_heads if layer.attends else 0 for layer in c.layers], np.int32)


def _lfm2(c: ModelConfig) -> dict[str, Value]:
    mixer = next((layer.mixer for layer in c.layers if layer.mixer), None)
    n_taps = mixer.n_taps if isinstance(mixer, ShortConv) else 3  # without any it has no effect
    return {"attention.head_count_kv": _kv_heads(c), "shortconv.l_cache": n_taps}


def _qwen(c: ModelConfig) -> dict[str, Value]:
    """The rank of time steps is the number of v heads, the count of groups that of k heads."""
    rule = next((layer.mixer for layer in c.layers if isinstance(layer.mixer, DeltaRule)), None)
    keys: dict[str, Value] = {"attention.recurrent_layers": np.array([not layer.attends for layer in c.layers])}
    if rule is None:
        return keys
    return keys | {
        "ssm.conv_kernel": rule.n_taps,
        "ssm.state_size": rule.k_dim,
        "ssm.group_count": rule.n_k_heads,
        "ssm.time_step_rank": rule.n_v_heads,
        "ssm.inner_size": rule.inner,
    }


def _qwen35(c: ModelConfig) -> dict[str, Value]:
    """Sections of positions in images, which llama.cpp wants; those of the released models."""
    return {**_qwen(c), "rope.dimension_sections": np.array([11, 11, 10, 0], np.int32)}


def _mamba(c: ModelConfig) -> dict[str, Value]:
    m = next(layer.mixer for layer in c.layers if isinstance(layer.mixer, Mamba2))
    return {
        "ssm.conv_kernel": m.n_taps,
        "ssm.state_size": m.state_dim,
        "ssm.group_count": m.n_groups,
        "ssm.time_step_rank": m.n_heads,
        "ssm.inner_size": m.inner,
    }


def _granite(c: ModelConfig) -> dict[str, Value]:
    return {
        **_mamba(c),
        "attention.head_count_kv": _kv_heads(c),
        "rope.scaling.finetuned": bool(c.ropes),
        "logit_scale": np.float32(1 / c.logit_scale),
        "residual_scale": np.float32(c.layers[0].residual_scale),
        "embedding_scale": np.float32(c.embedding_scale),
        "attention.scale": np.float32(c.layers[0].attention.scale),
    }


def _nemotron(c: ModelConfig) -> dict[str, Value]:
    sizes = [layer.mlp.size if layer.has_mlp else 0 for layer in c.layers]
    eps = np.float32(c.final_norm.eps)
    return {
        **_mamba(c),
        "attention.head_count_kv": _kv_heads(c),
        "feed_forward_length": np.array(sizes, np.int32),
        "attention.layer_norm_epsilon": eps,
    }


HYBRID_KEYS: Mapping[str, Callable[[ModelConfig], dict[str, Value]]] = {
    "lfm2": _lfm2,
    "lfm2moe": _lfm2,
    "qwen3next": _qwen,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
    "granitehybrid": _granite,
    "falcon-h1": _mamba,
    "nemotron_h": _nemotron,
}


def mixer_parts(mixer: Mixer, arch: str, i: int, part: str, name: str) -> Iterator[Part]:
    """A tensor of a recurrent layer.

    Args:
        mixer: of layer `i`.
        arch: architecture of the file.
        part: of the tensor's name in the file.
        name: canonical, with the ending ".weight" of matrices.
    """
    target = stored_name(i, part)
    if isinstance(mixer, DeltaRule):
        yield from _delta_rule(mixer, arch, target, part, name)
        return
    shape: tuple[int, ...] = ()
    if isinstance(mixer, Mamba2):
        if part == "ssm_norm" and mixer.norm is None:
            return
        groups = mixer.n_norm_groups
        shape = {
            "ssm_a": (mixer.n_heads, 1),
            "ssm_d": (mixer.n_heads, 1),
            "ssm_norm": (groups, mixer.inner // groups),
        }.get(part, ())
    yield Part(target, (name,), shape=shape)
    biased = {"ssm_in": mixer.bias, "ssm_out": mixer.out_bias}
    if isinstance(mixer, Mamba2):
        biased["ssm_conv1d"] = mixer.conv_bias
    if biased.get(part, isinstance(mixer, ShortConv) and mixer.bias):
        yield Part(target.replace(".weight", ".bias"), (name.replace(".weight", ".bias"),))


def _delta_rule(m: DeltaRule, arch: str, target: str, part: str, name: str) -> Iterator[Part]:
    """v heads that share a k head are neighbors in qwen3next, and far from each other elsewhere."""
    fused = arch == "qwen3next"
    if part == "ssm_in" or ((part == "ssm_ba") != fused and part in ("ssm_ba", "ssm_beta", "ssm_alpha")):
        return
    shared = m.n_v_heads // m.n_k_heads
    if part == "ssm_ba":
        prefix = name.removesuffix("in_proj_ba.weight")
        heads = np.arange(m.n_v_heads).reshape(m.n_k_heads, shared)
        rows = np.concatenate([heads, heads + m.n_v_heads], axis=1).reshape(-1)
        yield Part(target, (f"{prefix}in_proj_b.weight", f"{prefix}in_proj_a.weight"), rows)
        return
    if fused or m.tiled or shared == 1:
        yield Part(target, (name,))
        return
    order = np.arange(m.n_v_heads).reshape(m.n_k_heads, shared).T.reshape(-1)
    values = (order[:, None] * m.v_dim + np.arange(m.v_dim)).reshape(-1)
    first = 2 * m.n_k_heads * m.k_dim
    if part == "ssm_out":
        yield Part(target, (name,), columns=values)
        return
    qkv = np.concatenate([np.arange(first), first + values])
    orders = {"attn_qkv": qkv, "ssm_conv1d": qkv, "attn_gate": values, "ssm_norm": None}
    yield Part(target, (name,), orders.get(part, order))


def gated_queries(a: Attention) -> Rows:
    """The rows of q and gate, which follow each other, in the order of an architecture with both in one matrix."""
    heads = np.arange(a.n_heads)[:, None]
    q, gate = heads * a.k_dim + np.arange(a.k_dim), heads * a.v_dim + np.arange(a.v_dim)
    rows: Rows = np.concatenate([q, a.n_heads * a.k_dim + gate], axis=1).reshape(-1)
    return rows
