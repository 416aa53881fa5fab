"""The text part of a multimodal config: the config of the decoder inside it, as if it stood alone.

    {"model_type": "gemma3", "text_config": {...}, "vision_config": {...}}  ->  {"model_type": "gemma3_text", ...}

Its tensors are found by their names; see tensor_names.py. What belongs to images and sound is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fabula.lean_dataclasses import dataclass

LEFT_OUT = "left_out"  # key of the flat config: the parts that are not loaded


@dataclass(frozen=True, slots=True)
class _Wrapper:
    """What holds where a config says nothing: the family of the text part, and whether head and embedding are one."""

    family: str
    tied: bool


_WRAPPERS: Mapping[str, _Wrapper] = {
    "gemma3": _Wrapper("gemma3_text", True),
    "gemma3n": _Wrapper("gemma3n_text", True),
    "gemma4": _Wrapper("gemma4_text", True),
    "mistral3": _Wrapper("mistral", True),
    "llama4": _Wrapper("llama4_text", False),
    "qwen2_vl": _Wrapper("qwen2_vl_text", False),
    "qwen2_5_vl": _Wrapper("qwen2_5_vl_text", False),
    "qwen3_vl": _Wrapper("qwen3_vl_text", False),
    "qwen3_5": _Wrapper("qwen3_5_text", False),
    "qwen3_5_moe": _Wrapper("qwen3_5_moe_text", False),
    "muse_glimmer": _Wrapper("muse_glimmer_text", False),
}
_KEPT = ("quantization_config", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
_PARTS = {"vision_config": "vision", "audio_config": "audio"}
# Tensors of those parts, under any prefix, and of heads that predict further tokens for drafts (MTP).
_OTHER_TENSORS = (
    *("vision_tower.", "vision_model.", "visual.", "multi_modal_projector.", "embed_vision.", "vision_adapter."),
    *("vision_projection.", "mtp."),
    *("audio_tower.", "embed_audio.", "vision_embed_tokens.", "mm_projector.", "vision_projector."),
)


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text part; a config that is one already comes back as it is."""
    wrapper = _WRAPPERS.get(str(config.get("model_type")))
    inner = config.get("text_config")
    if wrapper is None or not (isinstance(inner, Mapping) or "vision_config" in config):
        return dict(config)
    # Older files of Qwen2-VL have the text part's fields beside `vision_config`.
    text = dict(inner) if isinstance(inner, Mapping) else {k: v for k, v in config.items() if k != "architectures"}
    for part in _PARTS:
        text.pop(part, None)
    if not isinstance(inner, Mapping) or "model_type" not in text:
        text["model_type"] = wrapper.family
    tied = config.get("tie_word_embeddings")
    text["tie_word_embeddings"] = tied if tied is not None else text.get("tie_word_embeddings", wrapper.tied)
    for key in _KEPT:
        if config.get(key) is not None:
            text[key] = config[key]
    text.pop("architectures", None)
    left_out = [name for key, name in _PARTS.items() if config.get(key) is not None]
    return {**text, LEFT_OUT: left_out}


def is_of_another_part(name: str) -> bool:
    """Whether a tensor belongs to what is left out."""
    return any(f".{part}" in f".{name}" for part in _OTHER_TENSORS)
