"""A decoder in numbers: what `read_config` makes of a config.json and `emit_decoder` turns into operators.

    ModelConfig         sizes, embedding, head, rope tables
      Layer             norms around both halves, parallel or one after the other
        Attention       head geometry, mask, rope table, KV layer, norms of q and k
        Mixer           a recurrent layer, in place of attention or beside it
        Mlp             gated or plain, activation, biases

Layers are described one by one, since many families mix windows, ropes or geometries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fabula._native import KvLayer
from fabula._program import Heads, conv_floats, head_floats
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
class Latent:
    """The widths of multi-head latent attention; see models/latent.py.

    Attributes:
        rank: of the latent that keys and values are made of.
        q_rank: of the latent that queries are made of; 0 for none.
        plain, rotated: the two parts of a q and a k head.
        value: width of a v head.
    """

    rank: int
    q_rank: int
    plain: int
    rotated: int
    value: int

    @property
    def width(self) -> int:
        """What is kept of a position."""
        return self.rotated + self.rank


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
        in_scale: factor on the input;  out_scale: on the result.
        sinks: whether each head has a logit that takes its share of the softmax.
        latent: of latent attention, where the geometry is that of queries for latents; None for none.
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
    in_scale: float = 1.0
    out_scale: float = 1.0
    sinks: bool = False
    slopes: tuple[float, ...] = ()
    rounds_biases: bool = False
    latent: Latent | None = None

    @property
    def heads(self) -> Heads:
        return Heads(self.n_heads, self.n_kv_heads, self.k_dim, self.v_dim, self.rope, int(self.latent is not None))

    @property
    def result_dim(self) -> int:
        """Width of a head of the result that o_proj reads."""
        return self.latent.value if self.latent else self.v_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortConv:
    """A gated short convolution: out_proj(c * conv(b * u)), where b, c and u are the thirds of in_proj(x).

    Attributes:
        width: columns of each third.
        n_taps: tokens that the convolution sees, the current one included.
        bias: whether all three have biases.
    """

    width: int
    n_taps: int
    bias: bool = False
    part = "conv."
    out_scale = 1.0

    @property
    def out_bias(self) -> bool:
        """Whether out_proj has a bias."""
        return self.bias

    @property
    def inner(self) -> int:
        """Columns of what out_proj reads."""
        return self.width

    @property
    def state_layers(self) -> tuple[int, ...]:
        """f32 numbers that each of its recurrent operators remembers of a sequence."""
        return (conv_floats(self.width, self.n_taps),)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaRule:
    """A gated delta rule after a short convolution of q, k and v, with a gated norm of its result (FB_OP_DELTA_RULE).

    Attributes:
        n_k_heads, n_v_heads: heads of q and k, and of v; several v heads share a k head.
        k_dim, v_dim: widths of a head.
        n_taps: tokens that the convolution sees.
        norm: of each head of the result, whose weights all heads share; the gate is a factor behind it.
        activation: of the convolution.
        tiled: whether v head h has k head h % n_k_heads, as in files of llama.cpp's conversion; else neighbors share.
        negative: whether the factor of updates is 0 .. 2.
    """

    n_k_heads: int
    n_v_heads: int
    k_dim: int
    v_dim: int
    n_taps: int
    norm: Norm
    activation: Activation = "silu"
    tiled: bool = False
    negative: bool = False
    part = "linear_attn."
    out_bias = False
    out_scale = 1.0

    @property
    def inner(self) -> int:
        """Columns of v, of the gate and of the result."""
        return self.n_v_heads * self.v_dim

    @property
    def conv_width(self) -> int:
        """Columns of q, k and v together."""
        return 2 * self.n_k_heads * self.k_dim + self.n_v_heads * self.v_dim

    @property
    def state_layers(self) -> tuple[int, ...]:
        """See `ShortConv`."""
        return conv_floats(self.conv_width, self.n_taps), head_floats(self.n_v_heads, self.k_dim, self.v_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2:
    """A state space model after a short convolution, with a gate of its result (FB_OP_SSM).

    Attributes:
        n_heads, head_dim: of x, the gate and the result.
        n_groups, state_dim: groups of B and C, and their width.
        n_taps: tokens that the convolution sees.
        conv_bias: whether the convolution has a bias;  activation: its activation.
        bias, out_bias: whether in_proj and out_proj have biases.
        dt_low, dt_limit: bounds of time steps; dt_limit 0 for none.
        norm: of the gated result; None for a gate without a norm.
        n_norm_groups: groups of columns that are normed by themselves.
        gate_first: whether the gate is a factor before the norm.
        in_scale: factor on the input;  scales: on the gate, x, B, C and time steps;  out_scale: on the result.
    """

    n_heads: int
    head_dim: int
    n_groups: int
    state_dim: int
    n_taps: int
    conv_bias: bool = True
    activation: Activation = "silu"
    bias: bool = False
    out_bias: bool = False
    dt_low: float = 0.0
    dt_limit: float = 0.0
    norm: Norm | None = None
    n_norm_groups: int = 1
    gate_first: bool = True
    in_scale: float = 1.0
    scales: tuple[float, ...] = (1.0,) * 5
    out_scale: float = 1.0
    part = "mamba."

    @property
    def inner(self) -> int:
        """Columns of x, of the gate and of the result."""
        return self.n_heads * self.head_dim

    @property
    def part_widths(self) -> tuple[int, ...]:
        """Columns of the gate, x, B, C and time steps."""
        return self.inner, self.inner, self.n_groups * self.state_dim, self.n_groups * self.state_dim, self.n_heads

    @property
    def conv_width(self) -> int:
        """Columns of x, B and C together."""
        return self.inner + 2 * self.n_groups * self.state_dim

    @property
    def state_layers(self) -> tuple[int, ...]:
        """See `ShortConv`."""
        return conv_floats(self.conv_width, self.n_taps), head_floats(self.n_heads, self.state_dim, self.head_dim)


Mixer = ShortConv | DeltaRule | Mamba2


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """The MLP of a layer: down(activation(gate(x)) * up(x)), or down(activation(up(x))) where it is not gated.

    Attributes:
        cutoff: of sparse gates: those below the mean + cutoff standard deviations count as that limit, which is
            subtracted from all; None for none.
        gate_scale: factor on gates before their activation;  out_scale: on the result.
    """

    size: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    down_bias: bool = False
    cutoff: float | None = None
    gate_scale: float = 1.0
    out_scale: float = 1.0


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
        mixer: a recurrent layer that reads what attention reads; what both give is added. None for none.
        attends: whether there is attention;  has_mlp: whether there is an MLP or a mixture of experts. A part that is
            missing is described, but not there.
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
    mixer: Mixer | None = None
    attends: bool = True
    has_mlp: bool = True
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
    def attentions(self) -> tuple[Attention, ...]:
        """Attention of the layers that have it."""
        return tuple(layer.attention for layer in self.layers if layer.attends)

    @property
    def state_layers(self) -> tuple[int, ...]:
        """f32 numbers in a state slot, for each recurrent operator in the order of the program; () without any."""
        return tuple(n for layer in self.layers if layer.mixer for n in layer.mixer.state_layers)

    @property
    def geometries(self) -> tuple[Heads, ...]:
        """The different head geometries of its layers."""
        return tuple(dict.fromkeys(attention.heads for attention in self.attentions))

    @property
    def kv_layers(self) -> tuple[KvLayer, ...]:
        """What a KV page holds: one entry for each layer that writes K and V of its own."""
        own = [a for a in self.attentions if a.writes]
        return tuple(KvLayer(a.n_kv_heads, a.k_dim, 0 if a.latent else a.v_dim) for a in own)

    @property
    def kv_windows(self) -> tuple[tuple[tuple[int, bool], ...], ...]:
        """For each of `kv_layers`, the windows of the layers that read it: size (0 for all), and whether in chunks."""
        readers = self.attentions
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
            "latent attention": a.latent is not None,
            "a mixture of experts": any(layer.experts for layer in self.layers),
            "clipped q, k and v": a.qkv_clip > 0,
            "recurrent layers": any(layer.mixer for layer in self.layers),
        }
        return ", ".join(name for name, is_so in found.items() if is_so)
