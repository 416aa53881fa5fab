"""llama.cpp's own conversion, run as a program: `python llama_convert.py SOURCE FOLDER OUT [FOLDER OUT ...]`.

SOURCE is llama.cpp's source tree. The tiny checkpoints of the tests have no tokenizer, so each vocabulary is replaced
by tokens that no text contains; everything else is what the conversion makes of the model. Its last line is JSON: for
each FOLDER, why it could not be converted, or null.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def convert(folder: Path, out: Path) -> None:
    import gguf
    from conversion import base, get_model_class

    hparams = base.ModelBase.load_hparams(folder, False)
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    part = rope.get("partial_rotary_factor")
    # Keys of released configs that transformers no longer writes.
    kinds = {"full_attention": "attention", "linear_attention": "mamba"}
    listed = [kinds.get(kind, kind) for kind in config.get("layer_types") or config.get("layers_block_type") or ()]
    letters = {"mamba": "M", "attention": "*", "mlp": "-"}
    old = {
        "bamba": {"attn_rotary_emb": int((part or 0.5) * config.get("hidden_size", 0)) // config["num_attention_heads"]}
        if config["model_type"] == "bamba"
        else {},
        "falcon_h1": {"head_dim": config.get("hidden_size", 0) // config.get("num_attention_heads", 1)},
        "nemotron_h": {"hybrid_override_pattern": "".join(letters.get(kind, "?") for kind in listed)},
        "gpt2": {"n_ctx": config.get("n_positions")},
        "phimoe": {"original_max_position_embeddings": config.get("max_position_embeddings")},
        "cohere2": {"rotary_pct": 1.0},
        "gpt_neox": {"rotary_pct": config.get("rotary_pct", part)},
        "deepseek_v3": {"scoring_func": "sigmoid"},
        "glm4_moe_lite": {"scoring_func": "sigmoid"},
    }.get(config["model_type"], {})
    hparams = {**old, **hparams}
    if config["model_type"] == "granitemoehybrid":
        hparams["layer_types"] = listed
    if config["model_type"] == "nemotron_h":  # by its fields it would be a mixture of experts
        hparams = {key: value for key, value in hparams.items() if "expert" not in key and "group" not in key}
        hparams["n_groups"] = config["n_groups"]
    # transformers writes another name than the published config has.
    name = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}.get(config["architectures"][0], config["architectures"][0])
    kind: Any = get_model_class(name)
    kind = getattr(kind, "Ministral3Model", kind)
    n_vocab = int(config["vocab_size"])

    def set_vocab(self: Any) -> None:
        self.gguf_writer.add_tokenizer_model("gpt2")
        self.gguf_writer.add_tokenizer_pre("gpt-2")
        self.gguf_writer.add_token_list([f"t{i}" for i in range(n_vocab)])
        self.gguf_writer.add_token_types([1] * n_vocab)
        self.gguf_writer.add_token_merges(["t 1"])
        self.gguf_writer.add_bos_token_id(1)
        self.gguf_writer.add_eos_token_id(2)

    kind.set_vocab = set_vocab
    kind.no_mtp = True
    tokenizer = folder / "tokenizer.json"
    before = tokenizer.read_text()
    if config["model_type"].startswith(("gemma3", "gemma4")):  # its embedding is cut to the vocabulary's tokens
        tokens = {"model": {"vocab": {f"t{i}": i for i in range(n_vocab)}}, "added_tokens": []}
        tokenizer.write_text(json.dumps(tokens))
    try:
        kind(folder, gguf.LlamaFileType.ALL_F32, out, hparams=hparams, model_name="tiny").write()
    finally:
        tokenizer.write_text(before)


def main(source: str, *paths: str) -> None:
    import torch

    sys.path[:0] = [str(Path(source) / "gguf-py"), source]
    problems: dict[str, str | None] = {}
    for folder, out in zip(paths[::2], paths[1::2], strict=True):
        try:
            with torch.inference_mode():
                convert(Path(folder), Path(out))
            problems[folder] = None
        except Exception as error:
            problems[folder] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(problems))


if __name__ == "__main__":
    main(*sys.argv[1:])
