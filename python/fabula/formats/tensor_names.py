"""Maps tensor names to the canonical ones: those of a `transformers` decoder with a head.

    found                                                canonical
    model.layers.0.mlp.up_proj.weight                    the same
    layers.0.mlp.up_proj.weight                          a model saved without its head (AutoModel)
    language_model.model.layers.0...                     the text part of a vision model
    _orig_mod.model.layers.0..., module.model. ...       torch.compile, distributed training
    base_model.model.model.layers.0...                   a merged adapter
    transformer.h.0.mlp.c_fc.weight                      families with names of their own; see family_names.py

Whatever precedes `layers.0` and `embed_tokens` is the trunk's prefix; `lm_head` is next to the trunk or above it. Two
names for one tensor, and a second trunk, are refused as ambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from fabula.errors import ModelFileError, Unsupported, shown
from fabula.formats.family_names import renamed

TRUNK = "model."
HEAD = "lm_head."
# Wrapper modules that add a name anywhere in a path: torch.compile, FSDP, activation checkpointing, DeepSpeed. `module`
# (data-parallel training) wraps whole models only.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_LAYER = re.compile(r"(?P<prefix>(?:.*\.)?)layers\.\d+\.(?:self_attn|mlp|input_layernorm|post_attention_layernorm)\..+")
_EMBEDDING = re.compile(r"(?P<prefix>(?:.*\.)?)embed_tokens\.weight")
_ROOTS = ("embed_tokens.", "layers.", "norm.")  # of a trunk without prefix; some files mix both forms
_ADAPTER = re.compile(r"(?:^|\.)(?:lora_[A-Za-z_]+|base_layer|modules_to_save|original_module)(?:\.|$)")
_MISTRAL = re.compile(r"layers\.\d+\.attention\.wq\.weight|tok_embeddings\.weight")
_FURTHER = "eh_proj.weight"  # joins a token's embedding with the hidden state before it
# Buffers that older versions of transformers saved; every version recomputes them.
_LEFTOVER = re.compile(
    r"(?:.*\.)?(?:rotary_emb\.(?:inv_freq|(?:cos|sin)_cached)|(?:self_)?(?:attn|attention)\.(?:masked_)?bias)"
)


def is_leftover(name: str) -> bool:
    """Whether a tensor is a saved buffer that the model does not need."""
    return _LEFTOVER.fullmatch(name) is not None


def of_further_tokens(names: Iterable[str]) -> set[str]:
    """The tensors of layers behind the last that predict further tokens (DeepSeek V3, GLM), which are not used."""
    names = set(names)
    layers = tuple(name.removesuffix(_FURTHER) for name in names if name.endswith("." + _FURTHER))
    return {name for name in names if name.startswith(layers)}


def canonical_names(names: Iterable[str], path: Path, model_type: str = "") -> dict[str, str]:
    """The canonical name of each tensor.

    Args:
        names: as in the files.
        path: of the model, for error messages.
        model_type: the family, which may have names of its own.

    Raises:
        ModelFileError: two names for one tensor, or two trunks.
        Unsupported: an adapter that is not merged, or another format than Hugging Face's.
    """
    unwrapped = {name: renamed(_unwrap(name), model_type) for name in names}
    for name in unwrapped:
        if _ADAPTER.search(name):
            raise Unsupported(
                f"{path}: tensor {shown(name)} belongs to an adapter (LoRA) that is not merged into the model;"
                " merge it first (peft: merge_and_unload(), then save_pretrained)"
            )
    trunk = _trunk(unwrapped, path)
    if trunk is None:
        if found := next((name for name in unwrapped if _MISTRAL.fullmatch(name)), None):
            raise Unsupported(
                f"{path}: tensor {shown(found)} is named as in the original Llama and Mistral releases; convert the"
                " model to Hugging Face's format with transformers first"
            )
        return {name: name for name in unwrapped}
    above = trunk.removesuffix(TRUNK)
    heads = [prefix + HEAD for prefix in dict.fromkeys((above, trunk, ""))]
    result: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name, plain in unwrapped.items():
        head = next((prefix for prefix in heads if plain.startswith(prefix)), None)
        if head is not None:
            canonical = HEAD + plain.removeprefix(head)
        elif plain.startswith(trunk):
            canonical = TRUNK + plain.removeprefix(trunk)
        elif plain.startswith(_ROOTS):
            canonical = TRUNK + plain
        else:
            canonical = plain
        if canonical in taken:
            raise _ambiguous(path, taken[canonical], name)
        taken[canonical] = name
        result[name] = canonical
    return result


def _unwrap(name: str) -> str:
    """A name without wrapper modules."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def _trunk(unwrapped: Mapping[str, str], path: Path) -> str | None:
    """The trunk's prefix; None if there is no trunk."""
    layers: dict[str, str] = {}  # prefix -> a name with it
    embeddings: dict[str, str] = {}
    for name, plain in unwrapped.items():
        for pattern, found in ((_LAYER, layers), (_EMBEDDING, embeddings)):
            if match := pattern.fullmatch(plain):
                found.setdefault(match["prefix"], name)
    both = [prefix for prefix in layers if prefix in embeddings]
    prefixes = both or list(layers) or list(embeddings)
    if len(prefixes) > 1 and {*prefixes} == {"", TRUNK} and not both:
        return TRUNK
    if len(prefixes) > 1:
        first, second = (embeddings.get(prefix) or layers[prefix] for prefix in prefixes[:2])
        raise _ambiguous(path, first, second)
    return prefixes[0] if prefixes else None


def _ambiguous(path: Path, first: str, second: str) -> ModelFileError:
    return ModelFileError(
        f"{path}: tensors {shown(first)} and {shown(second)} are the same part of the model under two names;"
        " which one holds is unclear",
        path=path,
        field=second,
    )


def is_head(name: str) -> bool:
    """Whether a tensor, under any prefix, is the head's matrix."""
    return f".{name}".endswith(".lm_head.weight")
