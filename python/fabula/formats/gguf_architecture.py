"""How a row of the tables of GGUF architectures is made: its fields, names of tensors, and what several rows read.

The rows are in gguf_dense.py, gguf_layer_norm.py, gguf_sparse.py and gguf_hybrids.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fabula.formats.gguf import GgufTensor
from fabula.formats.gguf_keys import Keys
from fabula.lean_dataclasses import dataclass, field

FULL, SLIDING = "full_attention", "sliding_attention"

QKV = ("attn_q", "attn_k", "attn_v")
ATTENTION = (*QKV, "attn_output")
FUSED = ("attn_qkv", *ATTENTION)
PLAIN_MLP = ("ffn_up", "ffn_down")
MLP = ("ffn_gate", *PLAIN_MLP)
USUAL = ("attn_norm", *ATTENTION, "ffn_norm", *MLP)
HEAD_NORMS = ("attn_q_norm", "attn_k_norm")
EXPERTS = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
# Ends of the names of their tensors. Vectors of factors end in ".scale" in place of ".weight" (gguf_names.py).
OF_EXPERTS = (
    *("_exps", "_shexp", "ffn_gate_inp", "exp_probs_b", ".scale"),
    *("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"),
)
SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
EXPERT_KEYS = frozenset(["expert_count", "expert_used_count", "expert_feed_forward_length"])
SHARED_KEYS = EXPERT_KEYS | {"expert_shared_feed_forward_length"}
GROUP_KEYS = EXPERT_KEYS | {
    *("expert_shared_count", "expert_weights_scale", "expert_weights_norm", "expert_gating_func"),
    *("leading_dense_block_count", "expert_group_count", "expert_group_used_count"),
}
SPARSE_LAYER = ("attn_norm", *ATTENTION, "ffn_norm", *EXPERTS)
# A norm behind each half of a layer.
POST = {"post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"}

# Tensors of Gemma 3n's streams and low-rank residuals.
ALTUP = {
    "altup_correct_coef": "altup.correction_coefs",
    "altup_correct_scale": "altup.correct_output_scale",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}
PER_LAYER = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
XIELU = ("alpha_n", "alpha_p", "beta", "eps")

Config = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a row's function may ask.

    Attributes:
        keys, arch: of the file.
        tensors: its tensors, by name.
        n_layers, n_kv_heads, hidden_size, n_heads, head_dim: sizes.
    """

    keys: Keys
    arch: str
    tensors: Mapping[str, GgufTensor]
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int

    def key(self, name: str) -> str:
        return f"{self.arch}.{name}"

    def has(self, part: str, kind: str = "weight") -> bool:
        """Whether the layers have a tensor of that name."""
        return any(name.startswith("blk.") and name.split(".")[2:] == [part, kind] for name in self.tensors)

    def number(self, name: str, default: float | None, *, zero: float | None = None) -> float:
        if zero is not None and self.keys.metadata.get(self.key(name)) == 0:
            return zero
        return self.keys.positive(self.key(name), default, zero=zero)


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """The sliding windows of an architecture.

    Attributes:
        default: its length where the key is missing; None where the key must be there, 0 for no windows.
        every: without a pattern in the file each layer but every n-th has one; 0: all have.
    """

    default: int | None = 0
    every: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How a file of an architecture is read.

    Attributes:
        model_type: of the config.json that says the same;  model_class: of transformers.
        paired: whether rows of q and k are stored pairwise, unlike in transformers (gguf_names.py).
        layer: names of a layer's tensors.
        names: names behind `model.layers.N.`, where they differ from those that are usual.
        biases: by flag of config.json, the tensors that may have a bias; "" for a bias that config.json has no flag
            for, since it is always there.
        norm_bias, head_bias, positions, embedding_norm: whether norms have biases, the head has one, positions are
            learned, and embeddings have a norm.
        eps: key of config.json for the epsilon of layer norms; "" for RMS norms.
        silu: whether the MLP is a gated SiLU.
        latent: whether attention is that of latents, whose rotated part `head_dim` stands for.
        varied: whether heads and MLPs may differ from layer to layer, or be missing; `finish` reads them.
        final_norm: the name of the norm before the head.
        scale: of scores, where it is not that of a head's width.
        rotated: whether a part of each head may be rotated.
        factors, longrope: whether rope factors may come as tensors: one list, or two by the context's length. (Qwen has
            such files from `fabula quantize` only.)
        scalings: types of rope scaling.
        windows: None for none.
        fields: keys of config.json that stand in place of the usual ones.
        reads: keys that only this architecture reads.
        finish: adds to the config what only the file decides, or changes it.
    """

    model_type: str
    model_class: str
    paired: bool = False
    layer: tuple[str, ...] = USUAL
    names: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    norm_bias: bool = False
    head_bias: bool = False
    positions: bool = False
    embedding_norm: bool = False
    eps: str = ""
    silu: bool = True
    varied: bool = False
    latent: bool = False
    final_norm: str = "output_norm"
    scale: float | None = None
    rotated: bool = False
    factors: bool = False
    longrope: bool = False
    scalings: tuple[str, ...] = ("none", "linear", "yarn", "longrope")
    windows: Windows | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    finish: Callable[[Facts, Config], None] | None = None


def read_experts(f: Facts, config: Config) -> int:
    """Numbers of experts, and their width, which is also that of their tensors. Returns it."""
    n = f.keys.integer(f.key("expert_count"))
    down = next((t for name, t in f.tensors.items() if name.endswith(".ffn_down_exps.weight")), None)
    if down is None:
        raise f.keys.unsupported(f.key("expert_count"), f"is {n}, but no tensor holds all experts (ffn_down_exps)")
    config |= {"num_experts": n, "num_experts_per_tok": f.keys.integer(f.key("expert_used_count"))}
    width = down.shape[-1]
    if (said := f.keys.integer(f.key("expert_feed_forward_length"), width)) != width:
        raise f.keys.error(f.key("expert_feed_forward_length"), f"is {said}, but experts are {width} wide")
    return width


def shared_width(f: Facts, default: int) -> int:
    """The width of the shared experts together."""
    shared = next((t for name, t in f.tensors.items() if name.endswith(".ffn_gate_shexp.weight")), None)
    return f.keys.integer(
        f.key("expert_shared_feed_forward_length"), default if shared is None else shared.shape[0], low=0
    )
