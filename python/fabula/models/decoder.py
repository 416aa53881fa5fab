"""The decoder of Llama and most open models, as a list of operators in the order of the paper.

    x = embed(token)
    per layer:  x += o(attention(rope(qkv(norm(x)))))        pre-norm, grouped queries
                x += down(silu(gate(norm(x))) * up(norm(x)))
    logits = head(norm(x))

Families differ in switches (biases, norms of q and k, windows); models/families.py sets them.
"""

from __future__ import annotations

from fabula.formats.checkpoint import Checkpoint
from fabula.models.builder import ProgramBuilder
from fabula.models.config import ModelConfig
from fabula.models.shares import whole


def has_head(checkpoint: Checkpoint, c: ModelConfig) -> bool:
    """Whether a model has a head. An untied base model without `lm_head` gives embeddings only."""
    return c.tied or not c.base or "lm_head.weight" in checkpoint.tensors


def emit_decoder(b: ProgramBuilder, c: ModelConfig, *, head_norm: bool = False) -> None:
    """Emits the whole program.

    Args:
        b: collects operators, reads and packs tensors.
        c: sizes and switches.
        head_norm: whether q and k heads have RMS norms of their own (Qwen3).

    Raises:
        ModelFileError: a tensor is missing or its shape does not match the config.
    """
    s = b.shares
    embedding = b.matrix("model.embed_tokens.weight", whole(c.vocab_size, s.n), s.hidden)
    x, h = b.buffer(s.hidden), b.buffer(s.hidden)
    qkv, attended, inner = b.buffer(s.q, s.kv, s.kv), b.buffer(s.q), b.buffer(s.inner)

    # If no layer has a bias of o it is 0, as in transformers: some models have biases on q, k and v only.
    output_bias = c.output_bias and any(b.has(f"model.layers.{i}.self_attn.o_proj.bias") for i in range(c.n_layers))

    b.embed(embedding, x)
    for layer in range(c.n_layers):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."

        b.rms_norm(x, h, b.vector(prefix + "input_layernorm.weight", c.hidden_size), c.rms_norm_eps)
        names, rows = [attention + name for name in ("q_proj", "k_proj", "v_proj")], (s.q, s.kv, s.kv)
        stack = b.stacked([name + ".weight" for name in names], rows, s.hidden)
        b.linear(h, qkv, stack, bias=b.joined([name + ".bias" for name in names], rows) if c.attention_bias else None)
        if head_norm:
            q_norm = b.vector(attention + "q_norm.weight", c.head_dim)
            k_norm = b.vector(attention + "k_norm.weight", c.head_dim)
            b.head_norm(qkv, q_norm, k_norm, c.rms_norm_eps)
        b.rope(qkv)
        b.kv_write(qkv, layer)
        b.attention(qkv, attended, layer, window=c.windows[layer], scale=c.head_dim**-0.5)
        weights = b.matrix(attention + "o_proj.weight", s.hidden, s.q)
        b.linear_add(
            attended, x, weights, bias=b.vector(attention + "o_proj.bias", c.hidden_size) if output_bias else None
        )

        b.rms_norm(x, h, b.vector(prefix + "post_attention_layernorm.weight", c.hidden_size), c.rms_norm_eps)
        gate, up, down = (mlp + name for name in ("gate_proj", "up_proj", "down_proj"))
        weights = b.interleaved((gate + ".weight", up + ".weight"), s.inner, s.hidden)
        b.linear_swiglu(
            h, inner, weights, bias=b.interleaved_bias((gate + ".bias", up + ".bias"), s.inner) if c.mlp_bias else None
        )
        weights = b.matrix(down + ".weight", s.hidden, s.inner)
        b.linear_add(inner, x, weights, bias=b.vector(down + ".bias", c.hidden_size) if c.mlp_bias else None)

    wanted, normed = b.buffer(s.hidden), b.buffer(s.hidden)
    b.gather_outputs(x, wanted)
    b.rms_norm(wanted, normed, b.vector("model.norm.weight", c.hidden_size), c.rms_norm_eps)
    shared = c.tied or not has_head(b.checkpoint, c)  # a program needs a head; without one, its logits are not used
    head = (
        embedding
        if shared and s.n == 1
        else b.matrix("model.embed_tokens.weight" if shared else "lm_head.weight", s.vocabulary, s.hidden)
    )
    b.logits(normed, head)
    b.warn_of_unused({"lm_head.weight"} if c.tied else ())
