"""A decoder in numbers: what `read_config` makes of a config.json and `emit_decoder` turns into operators.

    ModelConfig         sizes, embedding, head, rope tables
      Layer             norms around both halves, parallel or one after the other
        Attention       head geometry, mask, rope table, KV layer, norms of q and k
        Mlp             gated or plain, activation, biases

Layers are described one by one, since many families mix windows, ropes or geometries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fabula._native import KvLayer
from fabula._program import Heads
from fabula.lean_dataclasses import dataclass

Activation = Literal[
    "silu", "gelu_tanh", "gelu", "relu", "relu2", "clamp", "xielu", "sigmoid", "tanh", "clamped_silu"
]  # fmt: skip
Rope = Mapping[str, Any]  # theta and scaling of one rope table; see models/rope.py


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm of a row.

    Attributes:
        kind: "rms", or "layer" for one that also subtracts the mean.
        eps: added to the mean square or variance.
        weighted: whether it has weights;  biased: whether it has a bias (layer norms only).
    """

    kind: Literal["rms", "layer"]
    eps: float
    weighted: bool = True
    biased: bool = False


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Norms of q and k heads.

    Attributes:
        kind, eps: as in `Norm`.
        weights: "head": one vector [k_dim] for all heads;  "heads": one for each head;  "row": one norm over all heads
            together;  "none": without weights.
        biased: whether it has biases, as many as weights (layer norms only).
        values: whether v heads have an RMS norm, without weights.
        rotated: whether it follows the rotation.
    """

    kind: Literal["rms", "layer"]
    eps: float
    weights: Literal["head", "heads", "row", "none"] = "head"
    biased: bool = False
    values: bool = False
    rotated: bool = False


@dataclass(frozen=True, slots=True)
class Temperature:
    """A factor on queries that grows with their position: 1 + beta ln(1 + floor((position + offset) / length))."""

    beta: float
    length: int
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention of a layer.

    Attributes:
        n_heads, n_kv_heads, k_dim, v_dim: head geometry.
        rope: index of its rope table; -1 where positions are not encoded.
        window: how many positions a token attends to, itself included; 0 for all.
        chunked: whether positions are cut into chunks of `window` instead.
        scale: factor on scores;  cap: soft cap of scores, 0 for none.
        kv: layer of the page pool;  writes: whether it fills that layer, or reuses what an earlier one wrote.
        values_are_keys: whether v is the k projection, before norm and rotation.
        qkv_bias, output_bias: whether the projections have biases.
        qkv_clip: q, k and v are kept within -qkv_clip .. qkv_clip; 0 for no bound.
        gated: whether the result is multiplied by sigmoid(gate_proj(x)).
        sinks: whether each head has a logit that takes its share of the softmax.
        slopes: of ALiBi, one for each head; () for none.  rounds_biases: whether its biases are rounded as Falcon's are
            (FB_ALIBI_BF16 in fabula.h).
    """

    n_heads: int
    n_kv_heads: int
    k_dim: int
    v_dim: int
    scale: float
    rope: int = 0
    window: int = 0
    chunked: bool = False
    cap: float = 0.0
    temperature: Temperature | None = None
    norm: HeadNorm | None = None
    kv: int = 0
    writes: bool = True
    values_are_keys: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qkv_clip: float = 0.0
    gated: bool = False
    sinks: bool = False
    slopes: tuple[float, ...] = ()
    rounds_biases: bool = False

    @property
    def heads(self) -> Heads:
        return Heads(self.n_heads, self.n_kv_heads, self.k_dim, self.v_dim, self.rope)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """The MLP of a layer: down(activation(gate(x)) * up(x)), or down(activation(up(x))) where it is not gated.

    Attributes:
        cutoff: of sparse gates: those below the mean + cutoff standard deviations count as that limit, which is
            subtracted from all; None for none.
    """

    size: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    down_bias: bool = False
    cutoff: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """How a row's experts and their weights are chosen; see FB_OP_ROUTER in fabula.h.

    Attributes:
        n_experts, n_chosen: experts, and how many a row goes to.
        scores: "softmax" over all experts, "sigmoid" of each, "chosen": softmax over those chosen, or "mixer": one
            expert after the other, by a softmax over those that are left and near.
        tolerance: of "mixer": how much smaller a logit may be than the best one that is left, as a part of the larger.
        renormalized: whether weights are divided by their sum + `eps`.
        scale: factor on the weights.
        n_groups, n_top_groups: experts are chosen from the best groups only; 0 for no groups.
        rated_by_best: whether a group is as good as its best expert, not as the sum of its best two.
        corrected: whether a stored correction is added to the scores for choosing.
        biased: whether the logits have a bias.
        normed: whether it reads the layer's input through a norm of its own, with stored factors / sqrt(hidden size).
        scaled: whether a stored factor of each expert is on its weights.
    """

    n_experts: int
    n_chosen: int
    scores: Literal["softmax", "sigmoid", "chosen", "mixer"] = "softmax"
    tolerance: float = 0.0
    renormalized: bool = False
    eps: float = 0.0
    scale: float = 1.0
    n_groups: int = 0
    n_top_groups: int = 0
    rated_by_best: bool = False
    corrected: bool = False
    biased: bool = False
    normed: bool = False
    scaled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts in place of an MLP or beside it: sum of weight_e * expert_e(x), plus the shared experts.

    Attributes:
        router: chooses the experts.
        size: inner width of an expert, which is a gated MLP with `activation`.
        bias: whether the experts' matrices have biases.
        limit: of the activation, where it has one.
        weighs_input: whether an expert's weight is a factor on its input, not on its result.
        shared: inner width of the shared experts together, which every row goes to; 0 for none.
        shared_gated: whether their result is multiplied by sigmoid(shared_expert_gate(x)).
        beside_mlp: whether the layer has its MLP, too. Mixture and MLP read the layer's input through a norm each, and
            what they give is normed before it is added.
    """

    router: Router
    size: int
    activation: Activation = "silu"
    bias: bool = False
    limit: float = 0.0
    weighs_input: bool = False
    shared: int = 0
    shared_gated: bool = False
    beside_mlp: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer:  x += scale after_attention(attention(before_attention(x))),  then the same for the MLP.

    Attributes:
        experts: in place of the MLP, or beside it; None for none.
        parallel: whether both halves read the layer's input; the MLP shares attention's norm if it has none.
        residual_scale: factor on what each half adds.
        scaled: whether the layer's result is multiplied by a stored number (`layer_scalar`).
        n_per_layer: width of the per-layer embedding that is added at the end; 0 for none.
        laurel: rank of the learned residual beside attention (LAuReL, Menghani et al. 2024); 0 for none.
    """

    attention: Attention
    mlp: Mlp
    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None
    experts: Experts | None = None
    parallel: bool = False
    residual_scale: float = 1.0
    scaled: bool = False
    n_per_layer: int = 0
    laurel: int = 0


@dataclass(frozen=True, slots=True)
class AltUp:
    """Alternating updates: see models/altup.py.

    Attributes:
        n: number of streams;  active: the one that layers compute;  scaled: whether it is scaled by trained numbers
            before the per-layer embedding.
    """

    n: int
    active: int
    scaled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A model. Names as in transformers unless stated; where layers differ, the flat sizes are those of the first one.

    Attributes:
        model_type: the family's name in config.json.
        n_layers, n_heads, n_kv_heads, head_dim, hidden_size, intermediate_size, vocab_size: sizes.
        context_length: max_position_embeddings.
        rms_norm_eps: epsilon of the norms.
        rope: theta and scaling of the first rope table, all keys in one mapping; see `models/rope.py`.
        windows: per layer, how many positions a token attends to, itself included; 0 for all.
        tied: whether head and embedding are one matrix.
        base: whether it was saved as a base model (AutoModel), which may have no head.
        attention_bias: whether q, k and v have biases;  output_bias: whether o has one;  mlp_bias: gate, up and down.
        layers: each layer's description.
        ropes: parameters of each rope table, and the width of the heads that it rotates.
        qkv, transposed: how tensors are stored; see `Traits`.
        interleaved: whether rotated pairs are neighbors (2i, 2i + 1) in the checkpoint, not halves of a head.
        norm_offset: what the family adds to stored norm weights (files in GGUF contain it already).
        offset_final_norm: whether that holds for the final norm, too.
        final_norm: before the head.
        embedding_scale: factor on embeddings;  n_positions: rows of the learned position embedding, 0 for none.
        logit_scale: factor on logits;  logit_cap: soft cap, 0 for none;  head_bias: whether the head has one.
        n_per_layer: width of per-layer embeddings, 0 for none;  n_per_layer_rows: how many tokens have one, if not all:
            the others take that of token 0.
        altup: its streams; None for one residual stream.
        embedding_norm: of the embeddings.
        normalized_head: whether each row of the head is divided by its length.
        left_out: parts of a multimodal checkpoint that are not loaded, such as "vision".
    """

    model_type: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope: Rope
    windows: tuple[int, ...]
    tied: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    layers: tuple[Layer, ...]
    ropes: tuple[tuple[Rope, int], ...]
    final_norm: Norm
    qkv: str = "stacked"
    transposed: bool = False
    interleaved: bool = False
    norm_offset: float = 0.0
    offset_final_norm: bool = True
    embedding_scale: float = 1.0
    n_positions: int = 0
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    head_bias: bool = False
    n_per_layer: int = 0
    n_per_layer_rows: int = 0
    altup: AltUp | None = None
    embedding_norm: Norm | None = None
    normalized_head: bool = False
    left_out: tuple[str, ...] = ()
    base: bool = False

    @property
    def geometries(self) -> tuple[Heads, ...]:
        """The different head geometries of its layers."""
        return tuple(dict.fromkeys(layer.attention.heads for layer in self.layers))

    @property
    def kv_layers(self) -> tuple[KvLayer, ...]:
        """What a KV page holds: one entry for each layer that writes K and V of its own."""
        own = [layer.attention for layer in self.layers if layer.attention.writes]
        return tuple(KvLayer(a.n_kv_heads, a.k_dim, a.v_dim) for a in own)

    @property
    def kv_windows(self) -> tuple[tuple[tuple[int, bool], ...], ...]:
        """For each of `kv_layers`, the windows of the layers that read it: size (0 for all), and whether in chunks."""
        readers = [layer.attention for layer in self.layers]
        return tuple(
            tuple((reader.window, reader.chunked) for reader in readers if reader.kv == own.kv)
            for own in readers
            if own.writes
        )

    @property
    def differences(self) -> str:
        """What sets it apart from Llama's decoder, in words; "" for nothing. Windows, biases and q/k norms are not."""
        first = self.layers[0]
        a, norm = first.attention, Norm("rms", self.rms_norm_eps)
        found = {
            "layers of different shapes": len(self.geometries) > 1
            or any((layer.mlp.size, layer.attention.writes) != (first.mlp.size, True) for layer in self.layers),
            "several rope tables": len(self.ropes) > 1,
            "no rotation, or one of a part of each head": not self.ropes
            or (self.rope.get("partial_rotary_factor") or 1.0) != 1.0,
            "interleaved rotation": self.interleaved,
            "parallel blocks": first.parallel,
            "norms other than RMS norms before both halves": (
                *(first.before_attention, first.before_mlp, self.final_norm),
                *(first.after_attention, first.after_mlp),
            )
            != (norm, norm, norm, None, None),
            "an offset of norm weights": self.norm_offset != 0,
            "an MLP other than gated SiLU": not first.mlp.gated or first.mlp.activation != "silu",
            "norms of q and k other than per head": a.norm is not None
            and (a.norm.kind, a.norm.weights, a.norm.values, a.norm.rotated) != ("rms", "head", False, False),
            "a scale of embeddings, residuals or logits": (
                *(self.embedding_scale, first.residual_scale, self.logit_scale, self.logit_cap),
            )
            != (1.0, 1.0, 1.0, 0.0),
            "a score scale of its own": a.scale != a.k_dim**-0.5 or a.cap != 0 or a.temperature is not None,
            "chunked attention": a.chunked,
            "learned positions": self.n_positions > 0,
            "a bias of the head": self.head_bias,
            "per-layer embeddings": self.n_per_layer > 0,
            "a norm of embeddings": self.embedding_norm is not None,
            "ALiBi": bool(a.slopes),
            "several residual streams": self.altup is not None,
            "an output gate": a.gated,
            "a mixture of experts": any(layer.experts for layer in self.layers),
            "clipped q, k and v": a.qkv_clip > 0,
        }
        return ", ".join(name for name, is_so in found.items() if is_so)
