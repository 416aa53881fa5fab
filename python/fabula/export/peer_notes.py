"""What llama.cpp computes differently from a written file, or refuses in it.

Source: load_arch_hparams, load_arch_tensors and the graphs of llama.cpp's src/models, in the source of llama-cpp-python
0.3.36.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from fabula.export.metadata import has_windows, local_theta, main_rope, other_betas
from fabula.formats.gguf_config import ROPE_FREQS
from fabula.formats.gguf_families import ARCHITECTURES
from fabula.formats.gguf_write import Value
from fabula.models.description import DeltaRule, ModelConfig

# Architectures whose heads are hidden_size / n_heads wide in llama.cpp.
_WHOLE_HEADS = ("qwen2", "qwen2vl", "phi2", "phi3", "olmo", "olmo2", "command-r", "cohere2", "stablelm", "nemotron",
                "starcoder2", "falcon", "gpt2", "gptneox", "bloom", "mpt", "internlm2", "baichuan", "chatglm",
                "exaone4", "qwen2moe", "olmoe", "lfm2", "lfm2moe")  # fmt: skip


def llama_cpp_notes(config: ModelConfig, metadata: Mapping[str, Value], names: Collection[str]) -> Iterator[str]:
    """What llama.cpp computes differently from a file, or cannot read; one sentence each.

    Args:
        config: of the model.
        metadata: key-values of the file.
        names: of its tensors.
    """
    arch = str(metadata["general.architecture"])
    if has_windows(config):
        window = max(config.windows)
        if arch == "granite_swa":
            yield (
                f"it is written as granite_swa, in which llama.cpp has the window of {window} tokens; versions that do "
                "not know this architecture refuse the file"
            )
        elif arch == "exaone4" and config.n_layers != 64:
            yield f"llama.cpp has windows in architecture {arch} only in models of 64 layers, so its results differ"
        elif arch in ("llama", "mistral3", "phi3", "phimoe"):
            yield (
                f"llama.cpp has no window in architecture {arch}: it ignores that of {window} tokens, so its "
                "results differ for longer texts; convert the model's Hugging Face folder for a file that keeps it"
            )
    if arch != "mistral3" and (betas := other_betas(config)):
        yield f"llama.cpp ignores {' and '.join(betas)} of YaRN in architecture {arch}, so its results differ"
    if arch == "falcon" or arch == "gptneox":
        yield f"llama.cpp takes GELU's approximation with tanh in architecture {arch}, so its results differ slightly"
    if arch == "phimoe":
        yield (
            "llama.cpp has RMS norms and a softmax over all experts in architecture phimoe, where the model has layer "
            "norms and SparseMixer, so its results differ"
        )
    if arch == "mellum" and local_theta(config) not in (None, main_rope(config)[0]["rope_theta"]):
        yield "llama.cpp takes one theta for all layers in architecture mellum, so its results differ"
    without_output_bias = (
        "qwen2", "qwen3", "seed_oss", "olmo2", "glm4", "chatglm", "exaone4", "command-r", "cohere2", "smollm3", "gemma",
        "gemma2", "gemma3", "hunyuan-dense", "arcee", "falcon", "ernie4_5", "qwen3moe", "dots1", "glm4moe",
        "hunyuan-moe", "llama4", "mellum",
    )  # fmt: skip
    without_mlp_bias = ("seed_oss", "smollm3", "arcee", "falcon", "ernie4_5")

    def biased(part: str) -> bool:
        return any(name.endswith(f"{part}.bias") for name in names)

    experts = [layer.experts is not None for layer in config.layers]
    problems = {
        "layers without experts behind the first with": arch == "ernie4_5-moe" and experts != sorted(experts),
        "Llama 3's scaling of positions": ROPE_FREQS in names
        and (arch in ("qwen2", "qwen3") or not ARCHITECTURES[arch].factors),
        "a bias of attn_output": arch in without_output_bias and biased("attn_output"),
        "a bias of attn_qkv": arch == "falcon" and biased("attn_qkv"),
        "biases of the MLP": arch in without_mlp_bias and biased("ffn_up"),
        f"{config.n_heads} heads of {config.head_dim} in a hidden size of {config.hidden_size}": arch in _WHOLE_HEADS
        and config.n_heads * config.head_dim != config.hidden_size,
        "a head or projections without biases": arch == "phimoe"
        and not ("output.bias" in names and biased("attn_output")),
        "biases of recurrent layers": biased("ssm_in") or biased("ssm_out") or biased("shortconv.conv"),
        "heads of v that are not as wide as those of k": arch.startswith("qwen3")
        and any(isinstance(m := layer.mixer, DeltaRule) and m.v_dim != m.k_dim for layer in config.layers),
        f"norms of q and k in {config.n_layers} layers": arch == "command-r"
        and config.n_layers < 64
        and any("attn_q_norm" in name for name in names),
    }
    for what, found in problems.items():
        if found:
            yield f"llama.cpp refuses the file: it does not support {what} in architecture {arch}"
