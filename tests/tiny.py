"""A tiny random Llama as a Hugging Face folder, made without torch: two layers, 130 tokens, a few kilobytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Tensors = dict[str, npt.NDArray[Any]]

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
# As a byte-level vocabulary writes them: space, newline, the bytes of "é" and of "😀", then what ASCII shows.
PIECES = ["Ġ", "Ċ", "Ã", "©", "ð", "Ł", "ĺ", "Ģ", *map(chr, range(0x21, 0x7F))]
MERGES = ["t h", "Ġ t", "h e", "Ġ a", "Ġt he", "i n", "e r", "o n", "Ġ w", "s t", "Ġ s", "l l"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": len(SPECIAL) + len(PIECES) + len(MERGES),
    "max_position_embeddings": 600,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
VOCAB = int(CONFIG["vocab_size"])


def tokenizer_json(n_more: int = 0) -> str:
    """A byte-level BPE's description, with `n_more` tokens at the end that no text contains."""
    tokens = [*SPECIAL, *PIECES, *(merge.replace(" ", "") for merge in MERGES)]
    tokens += [f"unused{i}" for i in range(n_more)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIAL)],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": MERGES},
        }
    )


def random_tensors(config: Mapping[str, Any] = CONFIG, seed: int = 0) -> Tensors:
    """Every tensor of a Llama, float32; wide enough spread for logits that differ clearly."""
    rng = np.random.default_rng(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (q, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, q),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return {
        name: (rng.standard_normal(shape) * 0.4 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_model(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Tensors | None = None,
    template: str | None = CHATML,
    n_more_tokens: int = 0,
) -> Path:
    """Writes the whole folder: `config` over CONFIG (None takes a key away), other tensors, another template."""
    folder.mkdir(parents=True, exist_ok=True)
    merged = {**CONFIG, **(config or {})}
    (folder / "config.json").write_text(json.dumps({key: v for key, v in merged.items() if v is not None}))
    (folder / "tokenizer.json").write_text(tokenizer_json(n_more_tokens))
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    save_file(random_tensors() if tensors is None else tensors, folder / "model.safetensors")
    return folder
