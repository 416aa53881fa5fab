"""Which layers of a config have experts, and how a family's router chooses them.

Source: configuration and modeling files of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fabula.lean_dataclasses import replace
from fabula.models.config import ConfigReader, Traits, read_activation
from fabula.models.description import Experts, Router

MOST_EXPERTS, MOST_CHOSEN = 1024, 64  # FB_MOST_EXPERTS, FB_MOST_CHOSEN of the native library
_MAX_WIDTH = 1 << 20
FULL, SLIDING = "full_attention", "sliding_attention"
Layers = Sequence[Experts | None]


def counts(read: ConfigReader, n_experts: int, n_chosen: int, key: str = "num_experts") -> tuple[int, int]:
    """How many experts there are, and how many a token goes to; with their defaults."""
    n = read.integer(key, 1, MOST_EXPERTS, n_experts)
    return n, read.integer("num_experts_per_tok", 1, min(n, MOST_CHOSEN), min(n, n_chosen))


def width(read: ConfigReader, key: str, default: int | None = None) -> int:
    return read.integer(key, 1, _MAX_WIDTH, default)


def gpt_oss(read: ConfigReader, n_layers: int) -> Layers:
    """Biases everywhere; weights are the softmax over the chosen logits."""
    n, chosen = counts(read, 128, 4)
    router = Router(n_experts=n, n_chosen=chosen, scores="chosen", biased=True)
    if read.number("swiglu_alpha", 0.0, 1e6, 1.702) != 1.702:
        raise read.unsupported("swiglu_alpha", "experts of this family have 1.702")
    experts = Experts(
        router=router,
        size=width(read, "intermediate_size", 2880),
        activation="clamped_silu",
        bias=True,
        limit=read.number("swiglu_limit", 1e-6, 1e6, 7.0),
    )
    return [experts] * n_layers


def sparse_steps(read: ConfigReader, n_layers: int, experts: Experts) -> list[Experts | None]:
    """Each `decoder_sparse_step`-th layer has experts, but for those in `mlp_only_layers`."""
    step, dense = read.integer("decoder_sparse_step", 1, 1024, 1), read.config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in dense):
        raise read.error("mlp_only_layers", "must be a list of layers")
    return [None if i in dense or (i + 1) % step else experts for i in range(n_layers)]


def mixtral(read: ConfigReader, n_layers: int) -> Layers:
    n, chosen = counts(read, 8, 2)
    router = Router(n_experts=n, n_chosen=chosen, renormalized=True)
    activation = read_activation(read, "hidden_act", "silu")
    return [Experts(router=router, size=width(read, "intermediate_size", 14336), activation=activation)] * n_layers


def olmoe(read: ConfigReader, n_layers: int) -> Layers:
    n, chosen = counts(read, 64, 8)
    router = Router(n_experts=n, n_chosen=chosen, renormalized=read.flag("norm_topk_prob", False))
    activation = read_activation(read, "hidden_act", "silu")
    return [Experts(router=router, size=width(read, "intermediate_size", 2048), activation=activation)] * n_layers


def qwen3(read: ConfigReader, n_layers: int) -> Layers:
    n, chosen = counts(read, 128, 8)
    router = Router(n_experts=n, n_chosen=chosen, renormalized=read.flag("norm_topk_prob", False))
    size = width(read, "moe_intermediate_size", 768)
    experts = Experts(router=router, size=size, activation=read_activation(read, "hidden_act", "silu"))
    return sparse_steps(read, n_layers, experts)


def with_gated_shared(
    read: ConfigReader, n_layers: int, *, n_experts: int, n_chosen: int, size: int, shared: int, renormalized: bool
) -> Layers:
    """With shared experts behind a gate; the arguments are defaults of the config."""
    n, chosen = counts(read, n_experts, n_chosen)
    router = Router(n_experts=n, n_chosen=chosen, renormalized=read.flag("norm_topk_prob", renormalized))
    experts = Experts(
        router=router,
        size=width(read, "moe_intermediate_size", size),
        activation=read_activation(read, "hidden_act", "silu"),
        shared=width(read, "shared_expert_intermediate_size", shared),
        shared_gated=True,
    )
    return sparse_steps(read, n_layers, experts)


def qwen2(read: ConfigReader, n_layers: int) -> Layers:
    return with_gated_shared(read, n_layers, n_experts=60, n_chosen=4, size=1408, shared=5632, renormalized=False)


def _of_groups(
    read: ConfigReader, n_layers: int, n_experts: int | None, n_chosen: int | None, shared: int | None, **more: Any
) -> Layers:
    """Sigmoids with a correction, groups of experts, shared experts, and dense layers first, as in DeepSeek-V3.

    Args:
        n_experts, n_chosen, shared: defaults, None where the config must have them.
        more: defaults of `moe_intermediate_size`, `first_k_dense_replace` and `norm_topk_prob`.
    """
    n = read.integer("n_routed_experts", 1, MOST_EXPERTS, n_experts)
    n_groups = read.integer("n_group", 1, n, 1)
    top = read.integer("topk_group", 1, n_groups, 1)
    if n % n_groups:
        raise read.error("n_group", f"is {n_groups}, must divide the {n} experts")
    chosen = read.integer("num_experts_per_tok", 1, min(n // n_groups * top, MOST_CHOSEN), n_chosen)
    size = width(read, "moe_intermediate_size", more["size"])
    router = Router(
        n_experts=n,
        n_chosen=chosen,
        scores="sigmoid",
        renormalized=read.flag("norm_topk_prob", more["renormalized"]),
        eps=1e-20,
        scale=read.number("routed_scaling_factor", -1e6, 1e6, 1.0),
        n_groups=n_groups if n_groups > 1 else 0,
        n_top_groups=top if n_groups > 1 else 0,
        corrected=True,
    )
    experts = Experts(
        router=router,
        size=size,
        activation=read_activation(read, "hidden_act", "silu"),
        shared=size * read.integer("n_shared_experts", 1, MOST_EXPERTS, shared),
    )
    dense = read.integer("first_k_dense_replace", 0, 1024, more["dense"])
    return [None if i < dense else experts for i in range(n_layers)]


def glm4(read: ConfigReader, n_layers: int) -> Layers:
    return _of_groups(read, n_layers, 128, 8, 1, size=1408, dense=1, renormalized=True)


def glm4_norms(read: ConfigReader, t: Traits) -> Traits:
    return replace(t, qk_norm="head" if read.flag("use_qk_norm", False) else "")


def dots1(read: ConfigReader, n_layers: int) -> Layers:
    return _of_groups(read, n_layers, None, None, None, size=1408, dense=0, renormalized=False)


def dots1_kinds(read: ConfigReader, n_layers: int) -> list[str]:
    """Layers from `max_window_layers` on have a window."""
    first = read.integer("max_window_layers", 0, 1024, 62)
    has_windows = read.config.get("sliding_window", 4096) is not None
    return [SLIDING if has_windows and i >= first else FULL for i in range(n_layers)]


def ernie(read: ConfigReader, n_layers: int) -> Layers:
    """A softmax with a correction for choosing. A least sum of weights that matters is refused."""
    n, chosen = counts(read, 64, 6)
    if read.number("moe_norm_min", 0.0, 1e6, 1e-12) > 1e-9:
        raise read.unsupported("moe_norm_min", "a larger least sum than 1e-9 is not offered")
    router = Router(n_experts=n, n_chosen=chosen, renormalized=True, corrected=True)
    size = width(read, "moe_intermediate_size", 1536)
    experts = Experts(
        router=router,
        size=size,
        activation=read_activation(read, "hidden_act", "silu"),
        shared=size * read.integer("moe_num_shared_experts", 0, MOST_EXPERTS, 2),
    )
    step, first = read.integer("moe_layer_interval", 1, 1024, 1), read.integer("moe_layer_start_index", 0, 1024, 1)
    last = read.integer("moe_layer_end_index", -1, 1024, -1)
    last = n_layers - 1 if last == -1 else last
    return [experts if first <= i <= last and (i + 1) % step == 0 else None for i in range(n_layers)]


def minimax_m2(read: ConfigReader, n_layers: int) -> Layers:
    n, chosen = counts(read, 256, 8)
    router = Router(n_experts=n, n_chosen=chosen, scores="sigmoid", renormalized=True, corrected=True)
    activation = read_activation(read, "hidden_act", "silu")
    return [Experts(router=router, size=width(read, "intermediate_size", 1536), activation=activation)] * n_layers


def minimax_m2_rotation(read: ConfigReader, t: Traits) -> Traits:
    """Released configs have the width that is rotated, not its part."""
    if read.config.get("rotary_dim") is None or "partial_rotary_factor" in read.config:
        return t
    head_dim = read.integer("head_dim", 2, 1024, 128)
    return replace(t, rotated=read.integer("rotary_dim", 2, head_dim) / head_dim)


def granite(read: ConfigReader, n_layers: int) -> Layers:
    """Weights are the softmax over those chosen."""
    n, chosen = counts(read, 8, 2)
    experts = Experts(
        router=Router(n_experts=n, n_chosen=chosen, scores="chosen"),
        size=width(read, "intermediate_size", 11008),
        activation=read_activation(read, "hidden_act", "silu"),
        shared=read.integer("shared_intermediate_size", 0, _MAX_WIDTH, 0),
    )
    return [experts] * n_layers


def granite_alone(read: ConfigReader, n_layers: int) -> Layers:
    """Without shared experts, whatever the config says."""
    return [replace(experts, shared=0) for experts in granite(read, n_layers) if experts]


def hunyuan(read: ConfigReader, n_layers: int) -> Layers:
    """One MLP as the shared expert."""
    for key in ("num_experts", "moe_topk"):
        if isinstance(listed := read.config.get(key), list):
            if len(set(map(str, listed))) != 1 or len(listed) < n_layers:
                raise read.unsupported(key, "only one number for all layers is offered")
            read.config = {**read.config, key: listed[0]}
    n, chosen = counts(read, 1, 1)
    size = width(read, "intermediate_size", 11008)
    router = Router(n_experts=n, n_chosen=chosen, renormalized=True)
    activation = read_activation(read, "hidden_act", "silu")
    return [Experts(router=router, size=size, activation=activation, shared=size)] * n_layers


def phimoe(read: ConfigReader, n_layers: int) -> Layers:
    """SparseMixer, which chooses two."""
    n, chosen = counts(read, 16, 2)
    if chosen != 2:
        raise read.unsupported("num_experts_per_tok", "the router of this family chooses 2")
    noise = read.number("router_jitter_noise", 0.0, 1e6, 0.01)
    router = Router(n_experts=n, n_chosen=chosen, scores="mixer", tolerance=2 * noise)
    activation = read_activation(read, "hidden_act", "silu")
    return [Experts(router=router, size=width(read, "intermediate_size", 6400), activation=activation)] * n_layers


def llama4(read: ConfigReader, n_layers: int) -> Layers:
    """Sigmoids of the chosen logits weigh the experts' input. Each layer has one shared expert."""
    n, chosen = counts(read, 16, 1)
    size = width(read, "moe_intermediate_size", 8192)
    experts = Experts(
        router=Router(n_experts=n, n_chosen=chosen, scores="sigmoid"),
        size=size,
        activation=read_activation(read, "hidden_act", "silu"),
        weighs_input=True,
        shared=size,
    )
    sparse = read.config.get("moe_layers")
    if sparse is None:
        step = read.integer("interleave_moe_layer_step", 1, 1024, 1)
        sparse = list(range(step - 1, n_layers, step))
    if not isinstance(sparse, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in sparse):
        raise read.error("moe_layers", "must be a list of layers")
    return [experts if i in sparse else None for i in range(n_layers)]


def gemma4(read: ConfigReader, n_layers: int) -> Layers:
    """Beside the MLP, in the models that have them."""
    if not read.flag("enable_moe_block", False):
        return [None] * n_layers
    n = read.integer("num_experts", 1, MOST_EXPERTS)
    chosen = read.integer("top_k_experts", 1, min(n, MOST_CHOSEN))
    experts = Experts(
        router=Router(n_experts=n, n_chosen=chosen, renormalized=True, normed=True, scaled=True),
        size=width(read, "moe_intermediate_size"),
        activation=read_activation(read, "hidden_activation", "gelu_pytorch_tanh"),
        beside_mlp=True,
    )
    return [experts] * n_layers


def mellum(read: ConfigReader, n_layers: int) -> Layers:
    n, chosen = counts(read, 64, 8)
    experts = Experts(
        router=Router(n_experts=n, n_chosen=chosen, renormalized=read.flag("norm_topk_prob", True)),
        size=width(read, "moe_intermediate_size", 896),
        activation=read_activation(read, "hidden_act", "silu"),
    )
    kinds = read.config.get("mlp_layer_types")
    if kinds is None:
        return [experts] * n_layers
    if not isinstance(kinds, list) or len(kinds) != n_layers or any(kind not in ("dense", "sparse") for kind in kinds):
        raise read.error("mlp_layer_types", f"must list dense or sparse for each of {n_layers} layers")
    return [experts if kind == "sparse" else None for kind in kinds]


def qwen3_kinds(read: ConfigReader, n_layers: int) -> list[str]:
    """All layers have a window, if windows are used."""
    return [SLIDING if _has_windows(read) else FULL] * n_layers


def qwen2_kinds(read: ConfigReader, n_layers: int) -> list[str]:
    """Every other of the first `max_window_layers` layers has a window, if windows are used."""
    most = read.integer("max_window_layers", 0, 1024, 28) if _has_windows(read) else 0
    return [SLIDING if i % 2 == 0 and i < most else FULL for i in range(n_layers)]


def _has_windows(read: ConfigReader) -> bool:
    return read.flag("use_sliding_window", False) and read.config.get("sliding_window", 4096) is not None
