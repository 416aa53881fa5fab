"""Checkpoints with random weights in the shape of a published model, to measure its family's speed.

Writes a folder as transformers does (bf16, SmolLM2's tokenizer, whose missing ids are filled up), from which
`fabula quantize` makes GGUF files that llama.cpp reads, too. A tensor repeats one block of random numbers.

Example:
    python benchmarks/random_family.py gemma-3-1b /tmp/gemma
    fabula quantize /tmp/gemma /tmp/gemma-q8_0.gguf --type q8_0
    fabula bench model --model /tmp/gemma-q8_0.gguf --peers --peer-python ./peers/bin/python
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from fabula.formats.gguf import GgufFile
from fabula.formats.locate import locate
from fabula.text.tokenizer import Tokenizer

_SPREAD = 0.02  # standard deviation of weights, about that of trained models
_PIECE = 1 << 18  # random numbers

# Shapes from config.json of google/gemma-3-1b-it, meta-llama/Llama-3.2-1B (without its scaling of rope),
# microsoft/phi-1_5, microsoft/Phi-4-mini-instruct and openai/gpt-oss-20b; the last two with 8 of 32 and 4 of 24 layers,
# so that they are as large as the others, and gpt-oss with a smaller vocabulary and without its scaling of rope.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-3-1b": (
        "gemma3_text",
        {
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262144,
            "sliding_window": 512,
            "query_pre_attn_scalar": 256,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.2-1b": (
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
    "phi-1.5": (
        "phi",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 51200,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 2048,
        },
    ),
    # No released model: 64 experts, 8 for a token; 3.9 billion weights, of which 0.7 compute a token.
    "moe-4b-a1b": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "vocab_size": 49152,
            "max_position_embeddings": 4096,
        },
    ),
    # A dense model that reads as many bytes a token as the mixture above: 8 experts of 768 are an MLP of 6,144.
    "dense-of-moe-4b-a1b": (
        "qwen3",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 49152,
            "max_position_embeddings": 4096,
        },
    ),
    "gpt-oss-4-layers": (
        "gpt_oss",
        {
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 4,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "vocab_size": 49152,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
        },
    ),
    "phi-4-mini-8-layers": (
        "phi3",
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 8,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "vocab_size": 200064,
            "partial_rotary_factor": 0.75,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        },
    ),
}


def tensors(config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of all weights of a model, in bf16: matrices random, norms neutral."""
    piece = torch.randn(_PIECE, generator=torch.Generator().manual_seed(0)).mul(_SPREAD).to(torch.bfloat16)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    for name, empty in model.state_dict().items():
        if name in tied and config.tie_word_embeddings:
            continue
        if empty.dim() > 1:
            yield name, piece.repeat(-(-empty.numel() // _PIECE))[: empty.numel()].reshape(empty.shape)
        else:  # a norm of Gemma's multiplies by 1 + weight
            is_one = name.endswith("weight") and "gemma" not in config.model_type
            yield name, torch.full(empty.shape, float(is_one), dtype=torch.bfloat16)


def write(name: str, folder: Path) -> None:
    """Writes the checkpoint."""
    family, settings = SHAPES[name]
    config = transformers.AutoConfig.for_model(family, **settings, bos_token_id=1, eos_token_id=2)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors(config)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"torch_dtype": "bfloat16"}))
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Writes SmolLM2's tokenizer, of 49152 tokens."""
    path = locate("smollm2-135m-instruct")
    file = GgufFile(path)
    file.close()
    tokenizer = Tokenizer.from_gguf(file.metadata, path)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.description()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write(arguments.name, arguments.folder)


if __name__ == "__main__":
    main()
