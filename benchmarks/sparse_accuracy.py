"""Accuracy of quantized mixtures of experts beside llama.cpp, on random weights; no package index has trained ones.

Makes a checkpoint of a family, all of its weights different, and compares the next token's distribution in each format
with that in f32, over a text: Kullback-Leibler divergence in nats, and how often the likeliest token is the same.
llama.cpp reads the same weights, from a file as `fabula quantize` writes it.

Example:
    python benchmarks/sparse_accuracy.py qwen3-moe tests/data/lighthouse.txt --peer-python ./peers/bin/python
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers

from fabula.bench.accuracy import bench_accuracy
from fabula.bench.peer_llama_cpp import LlamaCpp
from fabula.bench.report import perplexity_table
from fabula.model import Model
from random_family import write_tokenizer

# Standard deviation of weights: logits of these widths then spread as widely as a trained model's, about 1.5.
_SPREAD = 0.06
_FORMATS = ("q8_0", "q4_k_m", "mxfp4")
_SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": _SPREAD,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": (
        "qwen3_moe",
        _SIZES | {"intermediate_size": 1024, "moe_intermediate_size": 256, "num_experts": 32, "num_experts_per_tok": 4}
        | {"norm_topk_prob": True},
    ),
    # Without YaRN, whose ramp llama.cpp cuts to whole numbers (docs/formats.md).
    "gpt-oss": (
        "gpt_oss",
        _SIZES | {"intermediate_size": 512, "num_local_experts": 16, "num_experts_per_tok": 4}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
    ),
}  # fmt: skip


def write(name: str, folder: Path) -> None:
    """Writes the checkpoint, in f32."""
    family, settings = SHAPES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("text", type=Path)
    parser.add_argument("--peer-python", help="interpreter with llama_cpp; without it llama.cpp is not asked")
    parser.add_argument("--window", type=int, default=512, help="tokens that are predicted after each other")
    arguments = parser.parse_args()

    def peer(model: Model, n_positions: int) -> LlamaCpp:
        return LlamaCpp.of(model, n_positions, print, python=arguments.peer_python, choose=False)

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary) / arguments.name
        write(arguments.name, folder)
        models = [stack.enter_context(Model.load(folder, weights=name)) for name in ("f32", *_FORMATS)]
        rows = bench_accuracy(
            models,
            arguments.text.read_text(encoding="utf-8"),
            window=arguments.window,
            reference=0,
            make_peer=peer if arguments.peer_python else None,
        )
    print(perplexity_table(rows))


if __name__ == "__main__":
    main()
