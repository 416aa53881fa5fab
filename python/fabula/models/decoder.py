"""Decoders as a list of operators in the order of the paper.

    x = embed(token)
    per layer:  x += o(attention(rope(qkv(norm(x)))))        pre-norm, grouped queries
                x += down(silu(gate(norm(x))) * up(norm(x)))
    logits = head(norm(x))

This is Llama. What other families have in place of it, `ModelConfig` describes layer by layer: norms before, after or
around each half, both halves side by side, a plain MLP, and so on. Tensors have the names of Llama; a layer's norms are

    input_layernorm -> attention -> post_self_attn_layernorm, post_attention_layernorm -> MLP -> post_mlp_layernorm

A recurrent layer (models/mixers.py) stands in place of attention or beside it.
"""

from __future__ import annotations

import numpy as np

from fabula.formats.checkpoint import Checkpoint
from fabula.models.altup import Streams
from fabula.models.builder import F32, ProgramBuilder, Weights
from fabula.models.description import Attention, Experts, HeadNorm, Layer, Mixer, Mlp, ModelConfig, Norm
from fabula.models.experts import emit_experts
from fabula.models.latent import emit_latent_attention
from fabula.models.mixers import States, emit_mixer
from fabula.models.shares import Axis, whole


def has_head(checkpoint: Checkpoint, c: ModelConfig) -> bool:
    """Whether a model has a head. An untied base model without `lm_head` gives embeddings only."""
    return c.tied or not c.base or "lm_head.weight" in checkpoint.tensors


def redundant(c: ModelConfig) -> set[str]:
    """Tensors that files have and nothing uses: the head of a tied model, projections of layers that reuse KV, scales
    that the config turns off."""
    names = {"lm_head.weight"} if c.tied else set()
    for i, layer in enumerate(c.layers):
        prefix = f"model.layers.{i}."
        if c.altup and not c.altup.scaled:
            names.add(prefix + "altup.correct_output_scale")
        if layer.attends and not layer.attention.writes:
            names |= {f"{prefix}self_attn.{part}.weight" for part in ("k_proj", "v_proj", "k_norm")}
            names |= {f"{prefix}self_attn.{part}.bias" for part in ("k_proj", "v_proj")}
    return names


def emit_decoder(b: ProgramBuilder, c: ModelConfig) -> None:
    """Emits the whole program.

    Args:
        b: collects operators, reads and packs tensors.
        c: the model.

    Raises:
        ModelFileError: a tensor is missing or its shape does not match the config.
    """
    _Emitter(b, c).emit()


class _Emitter:
    """Emits one model.

    Attributes:
        x: buffer of the residual stream;  h: of what a norm makes of it;  y: of a half's result before its own norm.
        streams: the streams of a model with several; then x is the one that a layer computes.
    """

    def __init__(self, b: ProgramBuilder, c: ModelConfig) -> None:
        self.b, self.c, self.s = b, c, b.shares
        self.x, self.h = b.buffer(self.s.hidden), b.buffer(self.s.hidden)
        self._scratch: dict[tuple[str, tuple[Axis, ...]], int] = {}
        self._states = States()
        self.streams = Streams(b, c, c.altup, self.x, self.h) if c.altup else None
        # If no layer has a bias of o it is 0, as in transformers: some models have biases on q, k and v only.
        self.has_output_bias = any(b.has(f"model.layers.{i}.self_attn.o_proj.bias") for i in range(c.n_layers))

    def scratch(self, name: str, *axes: Axis) -> int:
        """A buffer for a layer's values; layers of the same widths share it."""
        key = (name, axes)
        if key not in self._scratch:
            self._scratch[key] = self.b.buffer(*axes)
        return self._scratch[key]

    def emit(self) -> None:
        b, c, s = self.b, self.c, self.s
        embedding = b.matrix("model.embed_tokens.weight", whole(c.vocab_size, s.n), s.hidden)
        b.embed(embedding, self.x, scale=c.embedding_scale)
        if c.embedding_norm:
            self.emit_norm("model.embed_norm", c.embedding_norm, self.x, self.h)
            b.scale(self.h, self.x, 1.0)
        if c.n_positions:
            positions = b.matrix("model.embed_positions.weight", whole(c.n_positions, s.n), s.hidden)
            b.embed_position(positions, self.h)
            b.add(self.x, self.x, self.h)
        if c.n_per_layer:
            self.emit_per_layer_embeddings()
        if self.streams:
            self.streams.begin()
        for i, layer in enumerate(c.layers):
            prefix = f"model.layers.{i}."
            if self.streams:
                self.streams.predict(prefix + "altup.")
            self.emit_layer(prefix, layer)
            if self.streams:
                self.streams.correct(prefix + "altup.")
            if layer.n_per_layer:
                self.emit_per_layer(i, layer)
            if layer.scaled:
                b.scale(self.x, self.x, b.scalar(prefix + "layer_scalar"))
        wanted, normed = b.buffer(s.hidden), b.buffer(s.hidden)
        if self.streams:
            self.streams.end(wanted)
        else:
            b.gather_outputs(self.x, wanted)
        self.emit_norm("model.norm", c.final_norm, wanted, normed)
        shared = c.tied or not has_head(b.checkpoint, c)  # a program needs a head; without one, its logits are not used
        head = (
            embedding
            if shared and s.n == 1
            else b.matrix("model.embed_tokens.weight" if shared else "lm_head.weight", s.vocabulary, s.hidden)
        )
        bias = b.joined(["lm_head.bias"], [s.vocabulary]) if c.head_bias else None
        b.logits(normed, head, bias=bias, scale=c.logit_scale, cap=c.logit_cap)
        b.warn_of_unused(redundant(c))

    def emit_layer(self, prefix: str, layer: Layer) -> None:
        b, x, h = self.b, self.x, self.h
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        before, between = prefix + "input_layernorm", prefix + "post_attention_layernorm"
        if layer.parallel:
            h_mlp = h
            self.emit_norm(before, layer.before_attention, x, h)
            if layer.before_mlp:
                h_mlp = self.scratch("h_mlp", self.s.hidden)
                self.emit_norm(between, layer.before_mlp, x, h_mlp)
            inner = self.emit_mlp(mlp, layer.mlp, h_mlp)
            attended = self.emit_attention(attention, layer.attention, h)
            self.emit_output(attention, layer, attended)
            self.emit_down(mlp, layer, inner)
            return
        source = self.emit_norm(before, layer.before_attention, x, h)
        low = self.emit_laurel(prefix, layer.laurel, source)
        after = prefix + "post_self_attn_layernorm"
        mixed = attended = -1
        if layer.mixer:
            mixed = emit_mixer(b, self.scratch, self._states, prefix, layer.mixer, source)
        if layer.attends:
            attended = self.emit_attention(attention, layer.attention, source)
        if layer.mixer:
            self.emit_mixer_output(prefix, layer, layer.mixer, mixed, after)
        if layer.attends:
            self.emit_output(attention, layer, attended, after)
        if layer.laurel:
            self.add_laurel(prefix, layer.laurel, low)
        if not layer.has_mlp:
            return
        source = self.emit_norm(between, layer.before_mlp, x, h)
        if layer.experts and layer.experts.beside_mlp:
            self.emit_both(prefix, layer, layer.experts, source)
            return
        if layer.experts:
            self.emit_experts(mlp, layer, layer.experts, source, prefix + "post_mlp_layernorm")
            return
        inner = self.emit_mlp(mlp, layer.mlp, source)
        self.emit_down(mlp, layer, inner, prefix + "post_mlp_layernorm")

    # ---- Low-rank residuals -----------------------------------------------------------------------------------------

    def emit_laurel(self, prefix: str, rank: int, source: int) -> int:
        """The first product of the low-rank residual, beside those of attention."""
        if not rank:
            return -1
        axis = whole(rank, self.s.n)
        low = self.scratch("laurel", axis)
        self.b.linear(source, low, [self.b.matrix(prefix + "laurel.linear_left.weight", axis, self.s.hidden)])
        return low

    def add_laurel(self, prefix: str, rank: int, low: int) -> None:
        """x = (x + h + norm(right(low))) / sqrt(2), where h is what attention read."""
        b, x, h = self.b, self.x, self.h
        y = self.scratch("y", self.s.hidden)
        b.linear(low, y, [b.matrix(prefix + "laurel.linear_right.weight", self.s.hidden, whole(rank, self.s.n))])
        weight = b.vector(prefix + "laurel.post_laurel_norm.weight", self.c.hidden_size)
        b.norm(y, h, Norm("rms", self.c.rms_norm_eps), weight, residual=h)
        b.add(x, x, h, scale=2**-0.5)

    # ---- Per-layer embeddings ---------------------------------------------------------------------------------------

    def emit_per_layer_embeddings(self) -> None:
        """A second embedding, of `n_per_layer` numbers for each layer, mixed with a projection of the first."""
        b, c, s = self.b, self.c, self.s
        width = whole(c.n_layers * c.n_per_layer, s.n)
        self.per_layer, projected, normed = b.buffer(width), b.buffer(width), b.buffer(width)
        table = b.matrix("model.embed_tokens_per_layer.weight", whole(c.n_per_layer_rows or c.vocab_size, s.n), width)
        b.embed(table, self.per_layer, scale=c.n_per_layer**0.5)
        projection = b.matrix("model.per_layer_model_projection.weight", width, s.hidden)
        b.linear(self.x, projected, [projection], scale=c.hidden_size**-0.5)
        weight = b.vector("model.per_layer_projection_norm.weight", c.n_per_layer)
        b.norm(projected, normed, Norm("rms", c.rms_norm_eps), weight)
        b.add(self.per_layer, self.per_layer, normed, scale=2**-0.5)

    def emit_per_layer(self, i: int, layer: Layer) -> None:
        """x += norm(projection(activation(gate(x)) * this layer's part of the per-layer embeddings)).

        Of several streams the first stays as it is.
        """
        b, c, s = self.b, self.c, self.s
        prefix, axis = f"model.layers.{i}.", whole(layer.n_per_layer, s.n)
        gate, y = self.scratch("per_layer_gate", axis), self.scratch("y", s.hidden)
        weights = b.matrix(prefix + "per_layer_input_gate.weight", axis, s.hidden)
        b.linear(self.x, gate, [weights], activation=layer.mlp.activation)
        b.multiply(gate, gate, self.per_layer, column=i * layer.n_per_layer)
        b.linear(gate, y, [b.matrix(prefix + "per_layer_projection.weight", s.hidden, axis)])
        weight = b.vector(prefix + "post_per_layer_input_norm.weight", c.hidden_size)
        norm = Norm("rms", c.rms_norm_eps)
        if self.streams:
            b.norm(y, self.h, norm, weight)
            self.streams.add_to_others(self.h)
        else:
            b.norm(y, self.x, norm, weight, residual=self.x)

    # ---- Norms and residuals ----------------------------------------------------------------------------------------

    def norm_vectors(self, name: str, norm: Norm) -> tuple[F32, F32 | None]:
        """Weights and bias of a norm; ones for one without weights."""
        n = self.c.hidden_size
        weight = self.b.vector(name + ".weight", n) if norm.weighted else np.ones(n, np.float32)
        return weight, self.b.vector(name + ".bias", n) if norm.biased else None

    def emit_norm(self, name: str, norm: Norm | None, x: int, out: int) -> int:
        """out = norm(x). Returns the buffer to read: `x` where there is no norm."""
        if norm is None:
            return x
        self.b.norm(x, out, norm, *self.norm_vectors(name, norm))
        return out

    def add_to_residual(
        self,
        source: int,
        weights: Weights,
        bias: F32 | None,
        layer: Layer,
        norm: Norm | None,
        name: str,
        factor: float = 1.0,
    ) -> None:
        """x += residual_scale * norm(factor * (weights @ source + bias))."""
        b, x = self.b, self.x
        if norm is None:
            b.linear_add(source, x, weights, bias=bias, scale=layer.residual_scale * factor)
            return
        y = self.scratch("y", self.s.hidden)
        b.linear(source, y, [weights], bias=None if bias is None else [bias], scale=factor)
        weight, norm_bias = self.norm_vectors(name, norm)
        scale = np.float32(layer.residual_scale)
        b.norm(y, x, norm, weight * scale, None if norm_bias is None else norm_bias * scale, residual=x)

    # ---- Attention --------------------------------------------------------------------------------------------------

    def emit_attention(self, prefix: str, a: Attention, source: int) -> int:
        """Attention over `source`; returns the buffer of the heads' results."""
        b, s = self.b, self.s
        if a.latent:
            return emit_latent_attention(b, self.scratch, prefix, a, self.c.geometries.index(a.heads), source)
        q, k, v = s.heads(a.n_heads, a.k_dim), s.heads(a.n_kv_heads, a.k_dim), s.heads(a.n_kv_heads, a.v_dim)
        heads = self.c.geometries.index(a.heads)
        rows = [q, k, v] if a.writes else [q]
        parts = ["q_proj", "k_proj", "k_proj" if a.values_are_keys else "v_proj"][: len(rows)]
        qkv, attended = self.scratch("qkv", *rows), self.scratch("attended", s.heads(a.n_heads, a.v_dim))
        stack = b.stacked([f"{prefix}{part}.weight" for part in parts], rows, s.hidden)
        bias = b.joined([f"{prefix}{part}.bias" for part in parts], rows) if a.qkv_bias else None
        clip = a.qkv_clip
        source = self.scaled(source, a.in_scale)
        b.linear(source, qkv, stack, bias=bias, activation="clamp" if clip else None, limit=clip)
        if a.norm and not a.norm.rotated:
            self.emit_head_norm(prefix, a, a.norm, qkv, heads)
        if a.rope >= 0:
            b.rope(qkv, heads)
        if a.norm and a.norm.rotated:
            self.emit_head_norm(prefix, a, a.norm, qkv, heads)
        if a.writes:
            b.kv_write(qkv, heads, a.kv)
        sinks = None
        if a.sinks:
            each = b.vector(prefix + "sinks", a.n_heads)
            sinks = [each[share.start : share.stop] for share in s.heads(a.n_heads, 1).shares]
        b.attention(qkv, attended, heads, a, sinks=sinks)
        if a.gated:
            axis = s.heads(a.n_heads, a.v_dim)
            gate = self.scratch("gate", axis)
            b.linear(source, gate, [b.matrix(prefix + "gate_proj.weight", axis, s.hidden)], activation="sigmoid")
            b.multiply(attended, attended, gate)
        return attended

    def scaled(self, source: int, factor: float) -> int:
        """The buffer of factor * source."""
        if factor == 1.0:
            return source
        out = self.scratch("scaled", self.s.hidden)
        self.b.scale(source, out, factor)
        return out

    def emit_head_norm(self, prefix: str, a: Attention, norm: HeadNorm, qkv: int, heads: int) -> None:
        def weight(part: str, n_heads: int) -> F32:
            length = a.k_dim * (n_heads if norm.weights in ("heads", "row") else 1)
            if norm.weights == "none":
                return np.ones(length, np.float32)
            kinds = ("weight", "bias") if norm.biased else ("weight",)
            return np.concatenate([self.b.vector(f"{prefix}{part}_norm.{kind}", length) for kind in kinds])

        q_weight = weight("q", a.n_heads)
        self.b.head_norm(qkv, heads, norm, q_weight, weight("k", a.n_kv_heads) if a.writes else None)

    def emit_output(self, prefix: str, layer: Layer, attended: int, norm_name: str = "") -> None:
        b, a, c = self.b, layer.attention, self.c
        weights = b.matrix(prefix + "o_proj.weight", self.s.hidden, self.s.heads(a.n_heads, a.result_dim))
        has_bias = a.output_bias and self.has_output_bias
        bias = b.vector(prefix + "o_proj.bias", c.hidden_size) if has_bias else None
        self.add_to_residual(attended, weights, bias, layer, layer.after_attention, norm_name, a.out_scale)

    def emit_mixer_output(self, prefix: str, layer: Layer, mixer: Mixer, mixed: int, norm_name: str) -> None:
        """x += residual_scale * norm(out_proj(mixed))."""
        b, prefix = self.b, prefix + mixer.part
        weights = b.matrix(prefix + "out_proj.weight", self.s.hidden, whole(mixer.inner, self.s.n))
        bias = b.vector(prefix + "out_proj.bias", self.c.hidden_size) if mixer.out_bias else None
        self.add_to_residual(mixed, weights, bias, layer, layer.after_attention, norm_name, mixer.out_scale)

    # ---- MLP --------------------------------------------------------------------------------------------------------

    def emit_mlp(self, prefix: str, mlp: Mlp, source: int) -> int:
        """The first half of an MLP; returns the buffer between its matrices."""
        b, s = self.b, self.s
        axis = s.inner(mlp.size)
        inner = self.scratch("inner", axis)
        up, gate = prefix + "up_proj", prefix + "gate_proj"
        if mlp.cutoff is not None:
            gates = self.scratch("gates", axis)
            b.linear(source, gates, [b.matrix(gate + ".weight", axis, s.hidden)])
            b.linear(source, inner, [b.matrix(up + ".weight", axis, s.hidden)])
            b.sparsify(gates, gates, cutoff=mlp.cutoff, activation=mlp.activation)
            b.multiply(inner, inner, gates)
            return inner
        if mlp.gate_scale != 1.0:
            gates = self.scratch("gates", axis)
            gate_bias = [b.vector(gate + ".bias", axis.size) * np.float32(mlp.gate_scale)] if mlp.bias else None
            up_bias = [b.vector(up + ".bias", axis.size)] if mlp.bias else None
            matrix = b.matrix(gate + ".weight", axis, s.hidden)
            b.linear(self.scaled(source, mlp.gate_scale), gates, [matrix], bias=gate_bias, activation=mlp.activation)
            b.linear(source, inner, [b.matrix(up + ".weight", axis, s.hidden)], bias=up_bias)
            b.multiply(inner, inner, gates)
            return inner
        if mlp.gated:
            weights = b.interleaved((gate + ".weight", up + ".weight"), axis, s.hidden)
            bias = b.interleaved_bias((gate + ".bias", up + ".bias"), axis) if mlp.bias else None
            b.linear_gated(source, inner, weights, activation=mlp.activation, bias=bias)
            return inner
        bias = b.joined([up + ".bias"], [axis]) if mlp.bias else None
        numbers = self.xielu_numbers(prefix) if mlp.activation == "xielu" else None
        stack = b.stacked([up + ".weight"], [axis], s.hidden)
        b.linear(source, inner, stack, bias=bias, activation=mlp.activation, numbers=numbers)
        return inner

    def emit_experts(self, prefix: str, layer: Layer, experts: Experts, source: int, norm_name: str) -> None:
        """x += residual_scale * norm(mixture(source))."""
        norm, scale = layer.after_mlp, np.float32(layer.residual_scale)
        if norm is None:
            emit_experts(self.b, self.scratch, prefix, experts, source, self.x, residual=self.x, scale=float(scale))
            return
        y = self.scratch("y", self.s.hidden)
        emit_experts(self.b, self.scratch, prefix, experts, source, y)
        weight, bias = self.norm_vectors(norm_name, norm)
        self.b.norm(y, self.x, norm, weight * scale, None if bias is None else bias * scale, residual=self.x)

    def emit_both(self, prefix: str, layer: Layer, experts: Experts, source: int) -> None:
        """x += norm(norm(mlp(source)) + norm(mixture(norm(x)))); the router reads norm(x) * its factors."""
        b, x, h = self.b, self.x, self.h
        y, both = self.scratch("y", self.s.hidden), self.scratch("both", self.s.hidden)
        norm, size = layer.after_mlp, self.c.hidden_size
        assert norm is not None
        inner = self.emit_mlp(prefix + "mlp.", layer.mlp, source)
        weights = b.matrix(prefix + "mlp.down_proj.weight", self.s.hidden, self.s.inner(layer.mlp.size))
        b.linear(inner, y, [weights])
        self.emit_norm(prefix + "post_dense_layernorm", norm, y, both)
        asked = -1
        if experts.router.normed:
            asked = self.scratch("asked", self.s.hidden)
            factors = b.vector(prefix + "mlp.gate.scale", size) * np.float32(size**-0.5)
            b.norm(x, asked, norm, factors)
        self.emit_norm(prefix + "pre_experts_layernorm", norm, x, h)
        emit_experts(b, self.scratch, prefix + "mlp.", experts, h, y, asked=asked)
        b.norm(y, both, norm, *self.norm_vectors(prefix + "post_experts_layernorm", norm), residual=both)
        b.norm(both, x, norm, *self.norm_vectors(prefix + "post_mlp_layernorm", norm), residual=x)

    def xielu_numbers(self, prefix: str) -> F32:
        """The four numbers of FB_ACTIVATION_XIELU, from the two that are trained and two that usually are not stored.

        Source: Huang & Schlag 2024, arXiv:2411.13010.
        """
        b = self.b

        def number(name: str, default: float) -> float:
            name = f"{prefix}act_fn.{name}"
            return b.scalar(name) if b.has(name) else default

        p, n = (float(np.logaddexp(0.0, number(name, 0.0))) for name in ("alpha_p", "alpha_n"))  # softplus
        beta = number("beta", 0.5)
        return np.array([p, beta, beta + n, number("eps", -1e-6)], np.float32)

    def emit_down(self, prefix: str, layer: Layer, inner: int, norm_name: str = "") -> None:
        b, c, mlp = self.b, self.c, layer.mlp
        weights = b.matrix(prefix + "down_proj.weight", self.s.hidden, self.s.inner(mlp.size))
        bias = b.vector(prefix + "down_proj.bias", c.hidden_size) if mlp.down_bias else None
        self.add_to_residual(inner, weights, bias, layer, layer.after_mlp, norm_name, mlp.out_scale)
