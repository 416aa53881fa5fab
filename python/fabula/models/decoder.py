"""The decoder that Llama introduced and most open models share, as a list of operators in the order of the paper.

    x = embed(token)
    per layer:  x += o(attention(rope(qkv(norm(x)))))        pre-norm, grouped queries
                x += down(silu(gate(norm(x))) * up(norm(x)))
    logits = head(norm(x))

What differs between families (biases, norms of q and k, windows) are switches of the config; a family's own file says
which it uses.
"""

from __future__ import annotations

from fabula.models.builder import ProgramBuilder
from fabula.models.config import ModelConfig


def emit_decoder(b: ProgramBuilder, c: ModelConfig, *, head_norm: bool = False) -> None:
    """Emits the whole program.

    Args:
        b: collects operators, reads and packs tensors.
        c: sizes and switches.
        head_norm: whether q and k heads have RMS norms of their own (Qwen3).

    Raises:
        ModelFileError: a tensor is missing or has another shape than the config says.
    """
    q_width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    embedding = b.matrix("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
    x, h = b.buffer(c.hidden_size), b.buffer(c.hidden_size)
    qkv, attended = b.buffer(q_width + 2 * kv_width), b.buffer(q_width)
    inner = b.buffer(c.intermediate_size)

    b.embed(embedding, x)
    for layer in range(c.n_layers):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."

        b.rms_norm(x, h, b.vector(prefix + "input_layernorm.weight", c.hidden_size), c.rms_norm_eps)
        names, rows = ("q_proj", "k_proj", "v_proj"), (q_width, kv_width, kv_width)
        weights = b.stacked([f"{attention}{name}.weight" for name in names], rows, c.hidden_size)
        bias = None
        if c.attention_bias:
            bias = b.joined([f"{attention}{name}.bias" for name in names], rows)
        b.linear(h, qkv, weights, bias=bias)
        if head_norm:
            q_norm = b.vector(attention + "q_norm.weight", c.head_dim)
            k_norm = b.vector(attention + "k_norm.weight", c.head_dim)
            b.head_norm(qkv, q_norm, k_norm, c.rms_norm_eps)
        b.rope(qkv)
        b.kv_write(qkv, layer)
        b.attention(qkv, attended, layer, window=c.windows[layer], scale=c.head_dim**-0.5)
        weight = b.matrix(attention + "o_proj.weight", c.hidden_size, q_width)
        bias = b.vector(attention + "o_proj.bias", c.hidden_size) if c.output_bias else None
        b.linear(attended, x, [weight], bias=bias, residual=x)

        b.rms_norm(x, h, b.vector(prefix + "post_attention_layernorm.weight", c.hidden_size), c.rms_norm_eps)
        pair = (mlp + "gate_proj", mlp + "up_proj")
        weight = b.woven((pair[0] + ".weight", pair[1] + ".weight"), c.intermediate_size, c.hidden_size)
        bias = b.woven_bias((pair[0] + ".bias", pair[1] + ".bias"), c.intermediate_size) if c.mlp_bias else None
        b.linear_swiglu(h, inner, weight, bias=bias)
        weight = b.matrix(mlp + "down_proj.weight", c.hidden_size, c.intermediate_size)
        bias = b.vector(mlp + "down_proj.bias", c.hidden_size) if c.mlp_bias else None
        b.linear(inner, x, [weight], bias=bias, residual=x)

    wanted, normed = b.buffer(c.hidden_size), b.buffer(c.hidden_size)
    b.gather_outputs(x, wanted)
    b.rms_norm(wanted, normed, b.vector("model.norm.weight", c.hidden_size), c.rms_norm_eps)
    head = embedding if c.tied else b.matrix("lm_head.weight", c.vocab_size, c.hidden_size)
    b.logits(normed, head)
