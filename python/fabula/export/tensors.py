"""Lays out a model's tensors as GGUF has them: from canonical names and forms to those of an architecture.

`models/views.py` gives every family one form: q, k and v apart, rotated pairs in halves, norm weights as they are
multiplied. Here that becomes an architecture's: fused where llama.cpp wants them fused, rows of q and k pairwise, a
norm for each head as a matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt

from fabula.errors import ModelFileError, Unsupported, shown
from fabula.export import hybrids
from fabula.export.part import Part
from fabula.formats.checkpoint import Checkpoint, TensorTable
from fabula.formats.gguf_families import ARCHITECTURES, MLP, OF_EXPERTS, PAIRED
from fabula.formats.gguf_names import canonical_name, stored_name
from fabula.formats.tensor_names import of_further_tokens
from fabula.models.decoder import redundant
from fabula.models.description import Attention, Experts, ModelConfig
from fabula.models.latent import orders
from fabula.models.rope import rotated_width
from fabula.models.views import View, ViewedCheckpoint

_FUSED = ("falcon", "gpt2", "gptneox", "bloom", "mpt")  # architectures that read q, k and v in one matrix only
_OF_QUERIES = ("attn_q", "attn_q_a", "attn_q_a_norm", "attn_q_b")  # with a latent of queries, or without
_GATE_UP = "ffn_gate_up_exps"  # gates and ups of all experts, in architectures that have them in one tensor
_NUMBERS = ".act_fn."  # numbers of xIELU, which are keys
_STREAM_SCALE = ".altup.correct_output_scale"
_NOT_WEIGHTS = ".rotary_emb.inv_freq"  # a buffer in older checkpoints, derived from the config


def laid_out(source: Checkpoint, config: ModelConfig, arch: str) -> tuple[Checkpoint, dict[str, tuple[int, ...]]]:
    """The checkpoint with GGUF's tensors, in the order of the model, and their shapes.

    Args:
        source: the checkpoint with canonical names (`viewed`).
        config: of the model.
        arch: architecture of the file.

    Raises:
        ModelFileError: a tensor is missing.
        Unsupported: a tensor that GGUF has no name for, or that the config does not mention.
    """
    names = source.tensors.all_names if isinstance(source.tensors, TensorTable) else set(source.tensors)
    views: dict[str, View] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    used: set[str] = set()
    for part in _parts(config, arch, names):
        if not all(name in names for name in part.sources):
            if part.needed:
                raise ModelFileError(
                    f"{source.path}: tensor for {part.name} is missing", path=source.path, field=part.name
                )
            continue
        views[part.name] = View(part.sources, part.rows, columns=part.columns)
        used.update(part.sources)
        shape = source.tensors[part.sources[0]].shape
        shapes[part.name] = (part.n_heads, shape[0] // part.n_heads) if part.n_heads else part.shape
        if part.stacked:
            shapes[part.name] = (len(part.sources), *shape)
    for name in sorted(names - used - redundant(config) - of_further_tokens(names)):
        if name.endswith(_NOT_WEIGHTS) or _NUMBERS in name:
            continue
        known = canonical_name(name, arch)
        raise Unsupported(
            f"{source.path}: tensor {shown(name)}: "
            + ("not part of this model's config" if known else "GGUF has no name for it in this family")
        )
    made = ViewedCheckpoint(source, views)
    return made, {name: shape or made.tensors[name].shape for name, shape in shapes.items()}


def _parts(config: ModelConfig, arch: str, names: Collection[str]) -> Iterator[Part]:
    """Everything that the config mentions. Biases that it allows may be missing from some layers."""
    yield Part("token_embd.weight", ("model.embed_tokens.weight",))
    if config.n_positions:
        yield Part("position_embd.weight", ("model.embed_positions.weight",))
    if config.n_per_layer:
        # Readers want a row for each token; those without one take that of token 0.
        n = config.n_per_layer_rows or config.vocab_size
        rows = (
            None
            if n == config.vocab_size
            else np.where(np.arange(config.vocab_size) < n, np.arange(config.vocab_size), 0)
        )
        yield Part("per_layer_token_embd.weight", ("model.embed_tokens_per_layer.weight",), rows)
        yield Part("per_layer_model_proj.weight", ("model.per_layer_model_projection.weight",))
        yield Part("per_layer_proj_norm.weight", ("model.per_layer_projection_norm.weight",))
    if config.embedding_norm and config.embedding_norm.weighted:
        yield Part("token_embd_norm.weight", ("model.embed_norm.weight",))
        yield Part("token_embd_norm.bias", ("model.embed_norm.bias",))
    if config.altup:
        for name, part in (("altup_proj", "altup_projections"), ("altup_unembd_proj", "altup_unembed_projections")):
            matrices = tuple(f"model.{part}.{i}.weight" for i in range(config.altup.n - 1))
            yield Part(f"{name}.weight", matrices, stacked=True)
    for i in range(config.n_layers):
        yield from _layer(config, arch, i, names)
    if config.final_norm.weighted:
        yield Part(f"{ARCHITECTURES[arch].final_norm}.weight", ("model.norm.weight",))
    if config.final_norm.biased:
        yield Part("output_norm.bias", ("model.norm.bias",))
    if not config.tied:
        yield Part("output.weight", ("lm_head.weight",))
    if config.head_bias:
        yield Part("output.bias", ("lm_head.bias",))


def _layer(config: ModelConfig, arch: str, i: int, names: Collection[str]) -> Iterator[Part]:
    row, layer = ARCHITECTURES[arch], config.layers[i]
    a, prefix = layer.attention, f"model.layers.{i}."
    norms = {
        "input_layernorm": layer.before_attention,
        "post_self_attn_layernorm": layer.after_attention,
        "post_attention_layernorm": layer.before_mlp,
        "post_mlp_layernorm": layer.after_mlp,
    }
    biases = {
        **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_qkv"), a.qkv_bias),
        "attn_output": a.output_bias,
        **dict.fromkeys(MLP, layer.mlp.bias),
        "ffn_down": layer.mlp.down_bias,
    }
    two_norms = arch == "falcon" and layer.before_mlp is not None
    for part in row.layer:
        name = canonical_name(stored_name(i, part), arch, two_norms=two_norms)
        assert name is not None
        short = name.removeprefix(prefix).removesuffix(".weight")
        if short == "input_layernorm" and not layer.attends and not layer.mixer:  # an MLP alone
            short = "post_attention_layernorm"
            name = f"{prefix}{short}.weight"
        if short in norms:
            norm = norms[short]
            if norm is not None and norm.weighted:
                yield Part(stored_name(i, part, arch), (name,))
            if norm is not None and norm.biased:
                yield Part(f"blk.{i}.{part}.bias", (name.replace(".weight", ".bias"),))
            continue
        if (short.startswith("self_attn.") and not layer.attends) or (short.startswith("mlp.") and not layer.has_mlp):
            continue
        if short.startswith(hybrids.PARTS):
            if layer.mixer and short.startswith(layer.mixer.part):
                yield from hybrids.mixer_parts(layer.mixer, arch, i, part, name)
            continue
        if part in ("attn_k", "attn_v", "attn_k_norm") and not a.writes:
            if arch == "gemma3n":  # llama.cpp wants them there, and does not use them
                yield Part(f"blk.{i}.{part}.weight", (name.replace(prefix, f"model.layers.{a.kv}.", 1),))
            continue
        if part in ("attn_q_norm", "attn_k_norm"):
            yield from _head_norm(config, arch, a, f"blk.{i}.{part}.weight", name)
            continue
        if part in _OF_QUERIES and a.latent and (part == "attn_q") == (a.latent.q_rank > 0):
            continue
        if part == "attn_kv_b":  # stands for attn_k_b and attn_v_b in older files
            continue
        if (part == "attn_qkv") != (arch in _FUSED) and part in ("attn_qkv", "attn_q", "attn_k", "attn_v"):
            continue
        if part.endswith(OF_EXPERTS):
            if part in ("ffn_gate_exps", "ffn_up_exps") and _GATE_UP in row.layer:
                continue
            if layer.experts:
                yield from _of_experts(config.hidden_size, layer.experts, i, part, name, names)
            continue
        if part in MLP and layer.experts and not layer.experts.beside_mlp:
            continue
        if part in ("inp_gate", "proj", "post_norm") and not layer.n_per_layer:
            continue
        if name.endswith(_STREAM_SCALE) and not (config.altup and config.altup.scaled):
            continue
        if part == "ffn_gate" and (not layer.mlp.gated or "gate_up_proj" in row.names.get("ffn_up", "")):
            continue
        if part == "attn_v" and a.values_are_keys:
            continue
        sources: tuple[str, ...] = (name,)
        rows: npt.NDArray[np.int64] | None = None
        shape: tuple[int, ...] = ()
        if part == "attn_qkv":
            sources = tuple(f"{prefix}self_attn.{x}_proj.weight" for x in "qkv")
        elif short == "mlp.gate_up_proj":
            sources = (f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight")
        elif a.latent:
            order = orders(a, a.latent, interleaved=True).get(short.removeprefix("self_attn."))
            rows = None if order is None else np.argsort(order)
            shape = {
                "attn_k_b": (a.n_heads, a.latent.rank, a.latent.plain),
                "attn_v_b": (a.n_heads, a.latent.value, a.latent.rank),
            }.get(part, ())
        elif part == "attn_q" and a.gated:
            sources, rows = (name, name.replace("q_proj", "gate_proj")), hybrids.gated_queries(a)
        elif part in ("attn_q", "attn_k"):
            rows = _pairwise(config, arch, a, a.n_heads if part == "attn_q" else a.n_kv_heads)
        needed = part != "layer_output_scale"
        yield Part(f"blk.{i}.{part}.weight", sources, rows, needed=needed, shape=shape)
        if biases.get(part):
            sources = tuple(source.replace(".weight", ".bias") for source in sources)
            yield Part(f"blk.{i}.{part}.bias", sources, rows, needed=False)


def _of_experts(
    hidden_size: int, experts: Experts, i: int, part: str, name: str, names: Collection[str]
) -> Iterator[Part]:
    """A tensor of a mixture of experts: the matrices of all experts in one."""
    router, target = experts.router, stored_name(i, part)
    if part == "exp_probs_b":
        if router.corrected:
            yield Part(f"blk.{i}.{part}.bias", (name,))
    elif part == "ffn_gate_inp_shexp":
        if experts.shared_gated:
            yield Part(target, (name,), shape=(hidden_size,))
    elif part.endswith(".scale"):
        if router.scaled if part == "ffn_down_exps.scale" else router.normed:
            yield Part(target, (name,))
    elif part.startswith(("pre_", "post_")):
        if experts.beside_mlp:
            yield Part(target, (name,))
    elif part == _GATE_UP:
        both = name if name in names else name.removesuffix(".weight")
        prefix = name.removesuffix("gate_up_proj.weight")
        pairs = [f"{prefix}{e}.{half}_proj.weight" for e in range(router.n_experts) for half in ("gate", "up")]
        wide = (router.n_experts, 2 * experts.size, hidden_size)
        yield Part(target, (both,) if both in names else tuple(pairs), shape=wide)
    elif part.endswith("_shexp"):
        if experts.shared:
            yield Part(target, (name,))
    elif part == "ffn_gate_inp":
        yield Part(target, (name,))
        if router.biased:
            yield Part(f"blk.{i}.{part}.bias", (name.replace(".weight", ".bias"),))
    else:
        matrix = name.removesuffix(".weight").rsplit(".", 1)[1]
        prefix = name.removesuffix(f"{matrix}.weight")
        n, size = router.n_experts, experts.size
        shape = (n, hidden_size, size) if matrix == "down_proj" else (n, size, hidden_size)
        fused = next((x for x in (f"{prefix}gate_up_proj", f"{prefix}gate_up_proj.weight") if x in names), None)
        whole = next((x for x in (f"{prefix}{matrix}", f"{prefix}{matrix}.weight") if x in names), None)
        if whole:
            yield Part(target, (whole,), shape=shape)
        elif fused and matrix != "down_proj":
            first = 0 if matrix == "gate_proj" else size
            rows = (np.arange(n)[:, None] * 2 * size + np.arange(first, first + size)).reshape(-1)
            yield Part(target, (fused,), rows, shape=shape)
        else:
            yield Part(target, tuple(f"{prefix}{e}.{matrix}.weight" for e in range(n)), shape=shape)
        if experts.bias:
            stored = f"{prefix}{matrix}.bias"
            yield Part(f"blk.{i}.{part}.bias", (stored if stored in names else f"{prefix}{matrix}_bias",))


def _head_norm(config: ModelConfig, arch: str, a: Attention, target: str, name: str) -> Iterator[Part]:
    """The norm of q or k heads."""
    is_q = ".attn_q_norm." in target
    if a.norm is None or a.norm.weights == "none":
        return
    n_heads = a.n_heads if is_q else a.n_kv_heads
    several = a.norm.weights in ("heads", "row")
    rows = None if a.norm.rotated else _pairwise(config, arch, a, n_heads if several else 1)
    yield Part(target, (name,), rows, n_heads=n_heads if a.norm.weights == "heads" else 0)


def _pairwise(config: ModelConfig, arch: str, a: Attention, n_heads: int) -> npt.NDArray[np.int64] | None:
    """The rows of heads with rotated pairs side by side; None if they stay in halves.

    Architectures in PAIRED want that in every layer. Of the others those do whose family has pairs side by side; there
    a layer without rotation keeps its order.
    """
    if arch not in PAIRED and (not config.interleaved or a.rope < 0):
        return None
    n = rotated_width(config.ropes[a.rope][0], a.k_dim) if arch not in PAIRED else a.k_dim
    head = np.concatenate([np.arange(n).reshape(2, n // 2).T.reshape(-1), np.arange(n, a.k_dim)])
    rows: npt.NDArray[np.int64] = (np.arange(n_heads)[:, None] * a.k_dim + head).reshape(-1)
    return rows
