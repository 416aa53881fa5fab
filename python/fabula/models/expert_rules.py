"""Which layers of a config have experts, and how a family's router chooses them.

Source: configuration and modeling files of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Sequence

from fabula.models.config import ConfigReader, read_activation
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


def qwen2(read: ConfigReader, n_layers: int) -> Layers:
    """With shared experts behind a gate."""
    n, chosen = counts(read, 60, 4)
    router = Router(n_experts=n, n_chosen=chosen, renormalized=read.flag("norm_topk_prob", False))
    experts = Experts(
        router=router,
        size=width(read, "moe_intermediate_size", 1408),
        activation=read_activation(read, "hidden_act", "silu"),
        shared=width(read, "shared_expert_intermediate_size", 5632),
        shared_gated=True,
    )
    return sparse_steps(read, n_layers, experts)


def qwen3_kinds(read: ConfigReader, n_layers: int) -> list[str]:
    """All layers have a window, if windows are used."""
    return [SLIDING if _has_windows(read) else FULL] * n_layers


def qwen2_kinds(read: ConfigReader, n_layers: int) -> list[str]:
    """Every other of the first `max_window_layers` layers has a window, if windows are used."""
    most = read.integer("max_window_layers", 0, 1024, 28) if _has_windows(read) else 0
    return [SLIDING if i % 2 == 0 and i < most else FULL for i in range(n_layers)]


def _has_windows(read: ConfigReader) -> bool:
    return read.flag("use_sliding_window", False) and read.config.get("sliding_window", 4096) is not None
