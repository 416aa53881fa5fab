"""Every key with the architecture's prefix is followed or refused by name, and so is every tensor.

Followed means: the logits are those of transformers with an equivalent config, and, if llama.cpp is installed, those of
llama.cpp with the same file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tiny
from fabula import Model
from fabula.errors import EngineError, ModelFileError, Unsupported
from fabula.export.quantize import quantize_model
from fabula.formats.checkpoint import DType
from fabula.formats.gguf import GgufFile
from fabula.formats.gguf_names import open_gguf
from fabula.formats.gguf_write import GgufWriter, NewTensor, Value
from llama_peer import LlamaCpp
from test_export import make_folder

# Keys of llama.cpp with the architecture's prefix, for any architecture: "%s.NAME" in src/llama-arch.cpp of the
# source that llama-cpp-python 0.3.36 carries, and {arch}.NAME in its gguf-py/gguf/constants.py.
_NAMES = """
activation.situ_beta activation.situ_linear_beta activation_sparsity_scale adapters.count adapters.lora_rank
adapters.router_gain adapters.token_ids_activate adapters.token_ids_substitute altup.active_idx altup.num_inputs
attention.causal attention.clamp_kqv attention.compress_ratios attention.compress_rope_freq_base
attention.decay_lora_rank attention.gate_lora_rank attention.group_norm_epsilon attention.group_norm_groups
attention.head_count attention.head_count_kv attention.iclr_lora_rank attention.indexer.block_size
attention.indexer.head_count attention.indexer.key_length attention.indexer.kpool
attention.indexer.kpool_select_tail attention.indexer.local_blocks attention.indexer.top_k attention.indexer.types
attention.key_length attention.key_length_mla attention.key_length_mla_swa attention.key_length_swa
attention.kv_lora_rank attention.kv_lora_rank_swa attention.layer_norm_epsilon attention.layer_norm_rms_epsilon
attention.max_alibi_bias attention.output_group_count attention.output_lora_rank attention.output_scale
attention.q_lora_rank attention.recurrent_layers attention.relative_buckets_count attention.rope_pattern
attention.scale attention.shared_kv_layers attention.sliding_window attention.sliding_window_pattern
attention.temperature_length attention.temperature_scale attention.value_length attention.value_length_mla
attention.value_length_mla_swa attention.value_length_swa attention.value_residual_mix_lora_rank
attention.value_scale attn_logit_softcapping attn_res.block_size block_count block_size classifier.output_labels
classifier.pooling_type context_length conv_group_size conv_kernel_size convnext.block_count
convnext.embedding_length decoder_block_count decoder_start_token_id deepstack_mapping dense_2_feat_in
dense_2_feat_out dense_3_feat_in dense_3_feat_out embedding_length embedding_length_out
embedding_length_per_layer_input embedding_scale expert_chunk_feed_forward_length expert_count
expert_feed_forward_length expert_gating_func expert_group_count expert_group_scale expert_group_used_count
expert_latent_length expert_shared_count expert_shared_feed_forward_length expert_used_count expert_weights_norm
expert_weights_scale experts_per_group features_length feed_forward_length final_logit_softcapping
full_attention_interval hash_layer_count hidden_activation hrm.h_cycles hrm.l_cycles hrm.layers_per_stack
hrm.prefix_lm hyper_connection.count hyper_connection.epsilon hyper_connection.low_rank hyper_connection.magnitude
hyper_connection.sinkhorn_iterations interleave_moe_layer_step kda.gate_lower_bound kda.head_dim kda.safe_gate
leading_dense_block_count logit_scale moe_every_n_layers moe_latent_size n_deepstack_layers nextn_predict_layers
norm_before_fc norm_before_residual num_loops ple.conv_kernel ple.eos_token_id ple.head_offsets
ple.head_vocab_sizes ple.heads_per_ngram ple.image_token_id ple.layer_multipliers ple.layers ple.ngram_size
pooling_type posnet.block_count posnet.embedding_length rescale_every_n_layers residual_scale rope.dimension_count
rope.dimension_count_swa rope.dimension_sections rope.freq_base rope.freq_base_swa rope.scale_linear
rope.scaling.alpha rope.scaling.attn_factor rope.scaling.factor rope.scaling.finetuned
rope.scaling.original_context_length rope.scaling.type rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast
rope.scaling.yarn_beta_slow rope.scaling.yarn_ext_factor rope.scaling.yarn_log_multiplier router_logit_softcapping
selector_rank selector_top_k shortconv.l_cache skip_loop_final_norm ssm.conv_kernel ssm.dt_b_c_rms ssm.group_count
ssm.inner_size ssm.state_size ssm.time_step_rank swiglu_clamp_exp swiglu_clamp_shexp swin_norm target_hidden_size
target_layers tensor_data_layout time_decay_extra_dim time_mix_extra_dim token_shift_count use_parallel_residual
vocab_size wkv.head_size
"""
NAMES = frozenset(_NAMES.split())
# No logit depends on these, with any value.
NO_EFFECT: Mapping[str, Value] = {
    "attention.layer_norm_epsilon": np.float32(0.5),
    "classifier.output_labels": ["yes", "no"],
    "classifier.pooling_type": 2,
    "decoder_start_token_id": 3,
    "pooling_type": 3,
    "rope.scaling.finetuned": True,
    "tensor_data_layout": "Meta AI original pth",
    "vocab_size": 32000,
}
# Those whose every value is of some size, kind or scaling: the cases below change them.
FOLLOWED = {
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "block_count", "context_length", "embedding_length", "feed_forward_length", "rope.freq_base", "rope.scale_linear",
    "rope.scaling.attn_factor", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.type",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier",
    "attention.sliding_window_pattern", "attention.key_length", "attention.value_length",
}  # fmt: skip
IDS = np.random.default_rng(4).integers(4, tiny.VOCAB, 120).tolist()
BASES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"rope_theta": 100.0, "max_position_embeddings": 160},
    "qwen2": {"rope_theta": 100.0, "max_position_embeddings": 160, "model_type": "qwen2"},
    "qwen3": {"rope_theta": 100.0, "max_position_embeddings": 160, "model_type": "qwen3", "head_dim": 8},
    "mistral3": {"rope_theta": 100.0, "max_position_embeddings": 160},
    "granite_swa": {
        "rope_theta": 100.0, "max_position_embeddings": 160, "model_type": "mistral", "sliding_window": 40,
    },
}  # fmt: skip


def rewritten(
    source: Path,
    target: Path,
    changes: Mapping[str, Value | None],
    tensors: Mapping[str, np.ndarray | None] | None = None,
    arch: str | None = None,
) -> Path:
    """A copy of a file with other values of some keys, behind the architecture's name if they have no dot-free head of
    their own, and other tensors; None takes away. `arch` renames the architecture."""
    tensors = tensors or {}
    with GgufFile(source) as file:
        old = str(file.metadata["general.architecture"])
        new = arch or old
        metadata: dict[str, Any] = {
            (new + key.removeprefix(old) if key.startswith(f"{old}.") else key): value
            for key, value in file.metadata.items()
        } | {"general.architecture": new}
        for name, value in changes.items():
            key = name if name.startswith(("general.", "tokenizer.")) else f"{new}.{name}"
            metadata[key] = value
        kept = [t for t in file.tensors.values() if t.name not in tensors]
        more = {name: array for name, array in tensors.items() if array is not None}
        infos = [NewTensor(t.name, t.dtype, t.shape) for t in kept]
        infos += [NewTensor(name, DType.F32, array.shape) for name, array in more.items()]
        metadata = {key: value for key, value in metadata.items() if value is not None}
        with GgufWriter(target, metadata, infos, overwrite=True) as writer:
            for tensor in kept:
                writer.write(tensor.name, file.read(tensor.name))
            for name, array in more.items():
                writer.write(name, array.astype(np.float32))
    return target


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each architecture."""
    found = {}
    for arch, settings in BASES.items():
        folder = tmp_path_factory.mktemp(arch)
        quantize_model(make_folder(folder / "m", settings), folder / "out.gguf", "f32")
        found[arch] = folder / "out.gguf"
        if arch == "mistral3":
            rewritten(found["llama"], found[arch], {}, arch=arch)
    return found


def logits(path: Path) -> np.ndarray:
    with Model.load(path, weights="f32", kv="f32", context=160) as model:
        return model.logits(IDS)


def theirs(folder: Path) -> np.ndarray:
    """transformers' logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([IDS])).logits[0].numpy()
    return found


def assert_close(ours: np.ndarray, other: np.ndarray | None) -> None:
    assert other is not None
    assert np.abs(ours - other).max() <= 1e-4 * np.abs(other).max()


# ---- Refused, or without effect -------------------------------------------------------------------------------------


def config_of(path: Path) -> Mapping[str, Any]:
    checkpoint = open_gguf(path)
    checkpoint.close()
    return checkpoint.config


@pytest.mark.parametrize("arch", BASES)
def test_keys_of_other_computations_are_refused_by_name(bases: dict[str, Path], tmp_path: Path, arch: str) -> None:
    values: tuple[Value, ...] = (7, np.float32(0.37), np.array([3, 5], np.int32))
    for name in sorted(NAMES - FOLLOWED - NO_EFFECT.keys() - {"attention.rope_pattern"}):
        for value in values if arch == "llama" else values[:1]:
            path = rewritten(bases[arch], tmp_path / "out.gguf", {name: value})
            with pytest.raises(EngineError, match=rf"'{arch}\.{name}'"):
                config_of(path)


@pytest.mark.parametrize("name", ["expert_new_thing", "rope.scaling.beta", "attention.window_kind", "hrm.more"])
def test_keys_that_are_newer_than_this_are_refused_too(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(Unsupported, match=f"'llama.{name}': is '1'"):
        config_of(rewritten(bases["llama"], tmp_path / "out.gguf", {name: "1"}))


@pytest.mark.parametrize("arch", BASES)
def test_what_says_nothing_and_what_has_no_effect(bases: dict[str, Path], tmp_path: Path, arch: str) -> None:
    kept = FOLLOWED | {"attention.causal", "rope.dimension_count",
                       "attention.rope_pattern"}  # fmt: skip
    changes: dict[str, Value] = dict.fromkeys(NAMES - kept - NO_EFFECT.keys(), 0)
    changes |= NO_EFFECT
    changes |= {"expert_used_count": 0, "residual_scale": np.float32(1.0), "use_parallel_residual": False}
    changes |= {"logit_scale": np.float32(1.0), "embedding_scale": 1, "hidden_activation": "silu", "own_note": "x"}
    changes |= {"embedding_length_out": 24, "rope.dimension_sections": np.zeros(4, np.int32)}
    changes |= {"deepstack_mapping": np.full(2, -1, np.int32), "target_layers": np.zeros(0, np.int32)}
    changes |= {"attention.causal": np.uint8(1)}
    path = rewritten(bases[arch], tmp_path / "out.gguf", changes)
    assert np.array_equal(logits(path), logits(bases[arch]))


@pytest.mark.parametrize("arch", BASES)
@pytest.mark.parametrize("name", ["key_length", "value_length"])
def test_heads_of_two_sizes(bases: dict[str, Path], tmp_path: Path, arch: str, name: str) -> None:
    with pytest.raises(Unsupported, match=rf"'{arch}\.attention\.value_length'.*whole head"):
        config_of(rewritten(bases[arch], tmp_path / "out.gguf", {f"attention.{name}": 10}))


def test_attention_that_is_not_causal(bases: dict[str, Path], tmp_path: Path) -> None:
    for value in (False, np.uint8(0)):
        for arch, base in bases.items():
            path = rewritten(base, tmp_path / "out.gguf", {"attention.causal": value})
            with pytest.raises(Unsupported, match=rf"'{arch}\.attention\.causal': is false: tokens would attend"):
                config_of(path)
    with pytest.raises(ModelFileError, match=r"attention\.causal.*true or false"):
        config_of(rewritten(bases["llama"], tmp_path / "out.gguf", {"attention.causal": 2}))


# ---- Followed -------------------------------------------------------------------------------------------------------

F = np.float32
PAIRS = np.array([1.5, 2.0, 3.0], np.float32)  # factors of the rotated pairs of a head of 6
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": F(4.0)}
HF_YARN = {"rope_type": "yarn", "factor": 4.0}
LONG = {"rope_type": "longrope", "factor": 1.0, "original_max_position_embeddings": 160, "attention_factor": 1.0}
# Name -> architecture, keys, tensors, and what config.json says instead.
CASES: Mapping[str, tuple[str, Mapping[str, Value | None], Mapping[str, np.ndarray], Mapping[str, Any]]] = {
    "theta": ("llama", {"rope.freq_base": F(5000.0)}, {}, {"rope_theta": 5000.0}),
    "theta-missing": ("llama", {"rope.freq_base": None}, {}, {"rope_theta": 10000.0}),
    "theta-f64": ("qwen2", {"rope.freq_base": np.float64(5000.0)}, {}, {"rope_theta": 5000.0}),
    "epsilon": ("qwen3", {"attention.layer_norm_rms_epsilon": F(0.25)}, {}, {"rms_norm_eps": 0.25}),
    "factor-alone": (
        "llama", {"rope.scaling.factor": F(2.5)}, {}, {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}
    ),
    "factor-old-name": (
        "qwen2", {"rope.scale_linear": F(2.5)}, {}, {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}
    ),
    "factor-both-names": (
        "llama", {"rope.scale_linear": F(7.0), "rope.scaling.factor": F(2.5)}, {},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    ),
    "factor-0": ("llama", {"rope.scaling.factor": F(0.0)}, {}, {}),
    "factor-of-none": ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": F(2.5)}, {}, {}),
    "linear": (
        "qwen3", {"rope.scaling.type": "linear", "rope.scaling.factor": F(2.5)}, {},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    ),
    "attention-factor-alone": (
        "llama", {"rope.scaling.attn_factor": F(1.3)}, {},
        {"rope_scaling": {**LONG, "short_factor": [1.0] * 3, "long_factor": [1.0] * 3, "attention_factor": 1.3}},
    ),
    "attention-factor-of-linear": (
        "llama", {"rope.scaling.attn_factor": F(1.3), "rope.scaling.factor": F(2.0)}, {},
        {"rope_scaling": {**LONG, "short_factor": [2.0] * 3, "long_factor": [2.0] * 3, "attention_factor": 1.3}},
    ),
    "pairs": (
        "llama", {}, {"rope_freqs.weight": PAIRS},
        {"rope_scaling": {**LONG, "short_factor": PAIRS.tolist(), "long_factor": PAIRS.tolist()}},
    ),
    "pairs-and-attention-factor": (
        "llama", {"rope.scaling.attn_factor": F(0.7)}, {"rope_freqs.weight": PAIRS},
        {"rope_scaling": {
            **LONG, "short_factor": PAIRS.tolist(), "long_factor": PAIRS.tolist(), "attention_factor": 0.7
        }},
    ),
    "longrope-short": (
        "mistral3",
        {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": F(1.2),
         "rope.scaling.original_context_length": 256},  # llama.cpp's contexts are multiples of that
        {"rope_factors_short.weight": PAIRS, "rope_factors_long.weight": 2 * PAIRS},
        {"rope_scaling": {
            **LONG, "short_factor": PAIRS.tolist(), "long_factor": [9.0] * 3, "attention_factor": 1.2,
            "original_max_position_embeddings": 256,
        }},
    ),
    "longrope-long": (
        "llama", {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 64},
        {"rope_factors_short.weight": PAIRS, "rope_factors_long.weight": 2 * PAIRS},
        {"rope_scaling": {
            **LONG, "short_factor": [9.0] * 3, "long_factor": (2 * PAIRS).tolist(),
            "original_max_position_embeddings": 64,
        }},
    ),
    "yarn": (
        "qwen2", {**YARN, "rope.scaling.original_context_length": 40}, {},
        {"rope_scaling": {**HF_YARN, "original_max_position_embeddings": 40}},
    ),
    "yarn-of-the-context": (
        "llama", YARN, {}, {"rope_scaling": {**HF_YARN, "original_max_position_embeddings": 160}}
    ),
    "yarn-attention-factor": (
        "llama", {**YARN, "rope.scaling.original_context_length": 40, "rope.scaling.attn_factor": F(0.8)}, {},
        {"rope_scaling": {
            **HF_YARN, "original_max_position_embeddings": 40, "attention_factor": 0.8 * (0.1 * np.log(4.0) + 1.0)
        }},
    ),
    "yarn-betas": (
        "mistral3",
        {**YARN, "rope.scaling.original_context_length": 40, "rope.scaling.yarn_beta_fast": F(3.0),
         "rope.scaling.yarn_beta_slow": F(1.5)}, {},
        {"rope_scaling": {**HF_YARN, "original_max_position_embeddings": 40, "beta_fast": 3.0, "beta_slow": 1.5}},
    ),
    "yarn-log-multiplier": (
        "mistral3",
        {**YARN, "rope.scaling.original_context_length": 40, "rope.scaling.yarn_log_multiplier": F(0.6)}, {},
        {"rope_scaling": {**HF_YARN, "original_max_position_embeddings": 40, "mscale": 1.0, "mscale_all_dim": 0.6}},
    ),
    "window": ("granite_swa", {"attention.sliding_window": 17}, {}, {"sliding_window": 17}),
    "window-of-one": ("granite_swa", {"attention.sliding_window": 1}, {}, {"sliding_window": 1}),
    "no-window": (
        "granite_swa", {"attention.sliding_window_pattern": np.zeros(2, np.bool_)}, {}, {"sliding_window": None}
    ),
    "numbers-for-each-layer": (
        "llama",
        {"attention.head_count": np.full(2, 4, np.uint32), "attention.head_count_kv": np.full(2, 2, np.int32),
         "feed_forward_length": np.full(2, 40, np.uint32)}, {}, {},
    ),
    "key-length-missing": ("qwen2", {"attention.key_length": None, "attention.value_length": None}, {}, {}),
    "dimension-count-missing": ("qwen2", {"rope.dimension_count": None, "vocab_size": None}, {}, {}),
}  # fmt: skip
# llama.cpp refuses another width of float, and wants a window somewhere where it knows windows.
_NOT_LLAMA_CPP = {"theta-f64", "no-window"}


def case_file(bases: dict[str, Path], folder: Path, name: str) -> tuple[Path, Mapping[str, Any]]:
    arch, keys, tensors, config = CASES[name]
    return rewritten(bases[arch], folder / "out.gguf", keys, tensors), {**BASES[arch], **config}


@pytest.mark.parametrize("name", CASES)
def test_logits_follow_as_in_transformers(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    path, config = case_file(bases, tmp_path, name)
    ours = logits(path)
    assert_close(ours, theirs(make_folder(tmp_path / "m", config)))
    arch, *_, changed = CASES[name]
    if changed:  # what was changed shows
        assert np.abs(ours - logits(bases[arch])).max() > 1e-2 * np.abs(ours).max()


@pytest.mark.parametrize("name", sorted(CASES.keys() - _NOT_LLAMA_CPP))
def test_logits_follow_as_in_llama_cpp(llama_cpp: LlamaCpp, bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    path, _ = case_file(bases, tmp_path, name)
    assert_close(logits(path), llama_cpp.logits(path, IDS, context=160))


@pytest.mark.parametrize("arch", BASES)
def test_llama_cpp_passes_over_the_same_keys(
    llama_cpp: LlamaCpp, bases: dict[str, Path], tmp_path: Path, arch: str
) -> None:
    for name, value in NO_EFFECT.items():
        path = rewritten(bases[arch], tmp_path / "out.gguf", {name: value})
        if name.endswith("pooling_type"):
            continue  # another pooling makes it give vectors in place of logits
        assert_close(logits(path), llama_cpp.logits(path, IDS, context=160))


# ---- Values that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention.head_count_kv": np.array([2, 4], np.int32)}, r"head_count_kv': is \[2, 4\], must be the same"),
        ({"attention.head_count": np.array([4, 2], np.int32)}, r"head_count': is \[4, 2\], must be the same"),
        ({"feed_forward_length": np.array([40, 48], np.uint64)}, r"feed_forward_length': is \[40, 48\], must"),
        ({"attention.head_count_kv": np.full(3, 2, np.int32)}, "has 3 items, must be one number or one for each of 2"),
        ({"attention.head_count_kv": np.zeros(0, np.int32)}, "has 0 items"),
        ({"attention.head_count_kv": np.zeros(2, np.int32)}, "is 0, must be 1 to"),
        ({"attention.head_count": np.full(2, 4.0, np.float32)}, "items must be integers"),
        ({"feed_forward_length": ["40", "40"]}, "of type list, must be an integer"),
        ({"rope.scaling.type": "longrope"}, "longrope', but the tensor 'rope_factors_short.weight'"),
        ({"rope.scaling.type": "su"}, "offered are none, linear, yarn and longrope"),
        ({**YARN, "rope.scaling.yarn_attn_factor": F(1.0)}, "yarn_attn_factor"),
        ({"attention.sliding_window": 9, "attention.sliding_window_pattern": 6}, "must be an array of 2 booleans"),
    ],
)
def test_values_that_are_refused(bases: dict[str, Path], tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises((ModelFileError, Unsupported), match=words):
        config_of(rewritten(bases["llama"], tmp_path / "out.gguf", changes))


def test_granite_as_it_is_elsewhere_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["granite_swa"]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"logit_scale": F(8.0)}, "logit_scale"),
        ({"logit_scale": F(0.0)}, "logit_scale"),
        ({"logit_scale": None}, "logit_scale"),
        ({"residual_scale": F(0.22)}, "residual_scale"),
        ({"embedding_scale": F(12.0)}, "embedding_scale"),
        ({"attention.scale": F(0.0625)}, r"attention\.scale"),
        ({"attention.rope_pattern": np.array([1, 0], np.int32)}, "rope_pattern"),
        ({"attention.sliding_window": 0}, "sliding_window"),
        ({"attention.sliding_window_pattern": None}, "sliding_window_pattern"),
    ]
    for change, words in changes:
        with pytest.raises((ModelFileError, Unsupported), match=words):
            config_of(rewritten(base, tmp_path / "out.gguf", change))
    sinks = {"blk.1.attn_sinks.weight": np.array([0.5, -1e30, -1e30, -1e30], np.float32)}
    with pytest.raises(Unsupported, match="attention sinks are not offered"):
        config_of(rewritten(base, tmp_path / "out.gguf", {}, sinks))
    some = rewritten(base, tmp_path / "out.gguf", {"attention.sliding_window_pattern": np.array([True, False])})
    assert config_of(some)["layer_types"] == ["sliding_attention", "full_attention"]
    same = rewritten(
        base, tmp_path / "out.gguf", {"attention.scale": F(6**-0.5), "attention.rope_pattern": np.ones(2, np.int32)}
    )
    assert np.array_equal(logits(same), logits(base))


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.uint64, np.int64])
def test_integers_of_any_width(bases: dict[str, Path], tmp_path: Path, kind: type[np.generic]) -> None:
    with GgufFile(bases["llama"]) as file:
        changes: dict[str, Value | None] = {
            key.removeprefix("llama."): kind(value)  # type: ignore[call-arg]
            for key, value in file.metadata.items()
            if key.startswith(("llama.", "tokenizer.ggml.bos", "tokenizer.ggml.eos"))
            and isinstance(value, int)
            and value < 128
        }
    assert len(changes) > 8
    path = rewritten(bases["llama"], tmp_path / "out.gguf", changes)
    assert np.array_equal(logits(path), logits(bases["llama"]))


# ---- Tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("llama", "blk.0.attn_q_norm.weight"), ("qwen2", "blk.1.attn_k_norm.weight"), ("llama", "blk.0.attn_norm.bias"),
        ("llama", "output_norm.bias"), ("qwen2", "output.bias"), ("qwen3", "cls.output.weight"),
        ("qwen2", "blk.0.attn_output.bias"), ("qwen3", "blk.0.ffn_up.bias"), ("llama", "blk.0.attn_qkv.weight"),
        ("llama", "blk.0.attn_q.scale"), ("llama", "blk.0.ffn_down.input_scale"), ("llama", "blk.1.attn_sinks.weight"),
        ("llama", "rope_factors_long.weight"), ("granite_swa", "blk.0.attn_q.bias"),
    ],
)  # fmt: skip
def test_tensors_that_nothing_uses_are_refused(bases: dict[str, Path], tmp_path: Path, arch: str, name: str) -> None:
    path = rewritten(bases[arch], tmp_path / "out.gguf", {}, {name: np.ones(24, np.float32)})
    with pytest.raises(Unsupported, match=f"tensor '{name}'"):
        config_of(path)


def some_biases() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from (
        ("llama", ("blk.1.attn_k.bias",)),
        ("llama", ("blk.0.attn_output.bias",)),
        ("llama", ("blk.1.ffn_down.bias", "blk.0.attn_q.bias")),
        ("llama", ("blk.0.ffn_up.bias",)),
        ("qwen3", ("blk.0.attn_v.bias",)),
    )


def with_biases(bases: dict[str, Path], folder: Path, arch: str, names: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """A file with some biases, and what config.json and safetensors would say of it: 0 for the others."""
    rng = np.random.default_rng(6)
    checkpoint = open_gguf(bases[arch])
    with GgufFile(bases[arch]) as file:
        tensors = {
            name: rng.standard_normal(file.tensors[name.replace(".bias", ".weight")].shape[0]).astype(np.float32)
            for name in names
        }
    path = rewritten(bases[arch], folder / "out.gguf", {}, tensors)
    checkpoint.close()
    opened = open_gguf(path)
    found = {name: opened.read(name).view(np.float32).reshape(info.shape) for name, info in opened.tensors.items()}
    opened.close()
    return path, found


@pytest.mark.parametrize(("arch", "names"), list(some_biases()))
def test_some_biases_of_many(bases: dict[str, Path], tmp_path: Path, arch: str, names: tuple[str, ...]) -> None:
    path, tensors = with_biases(bases, tmp_path, arch, names)
    attention = any("attn" in name for name in names)
    config = {**BASES[arch], "attention_bias": attention, "mlp_bias": any("ffn" in name for name in names)}
    folder = tiny.write_model(tmp_path / "m", config=config, tensors=tensors)
    ours = logits(path)
    assert_close(ours, theirs(folder))
    assert np.abs(ours - logits(bases[arch])).max() > 1e-2 * np.abs(ours).max()


@pytest.mark.parametrize(("arch", "names"), list(some_biases()))
def test_some_biases_of_many_in_llama_cpp(
    llama_cpp: LlamaCpp, bases: dict[str, Path], tmp_path: Path, arch: str, names: tuple[str, ...]
) -> None:
    path, _ = with_biases(bases, tmp_path, arch, names)
    assert_close(logits(path), llama_cpp.logits(path, IDS, context=160))


# ---- Ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [2**32 - 1, tiny.VOCAB, 10**6])
@pytest.mark.parametrize("name", ["padding", "unknown", "seperator", "mask", "cls", "fim_pre", "fim_pad"])
def test_ids_that_nothing_needs(bases: dict[str, Path], tmp_path: Path, name: str, value: int) -> None:
    path = rewritten(bases["llama"], tmp_path / "out.gguf", {f"tokenizer.ggml.{name}_token_id": value})
    read = name in ("padding", "unknown", "fim_pad")  # the last ends answers, where it is one
    with pytest.warns(UserWarning, match=f"{name}_token_id is {value}") if read else contextlib.nullcontext():
        assert np.array_equal(logits(path), logits(bases["llama"]))


@pytest.mark.parametrize("name", ["bos", "eos", "eot", "eom"])
def test_ids_that_are_needed(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    key = f"tokenizer.ggml.{name}_token_id"
    with pytest.raises(ModelFileError, match=f"{key}': is {tiny.VOCAB}, must be 0 to {tiny.VOCAB - 1}"):
        config_of(rewritten(bases["llama"], tmp_path / "out.gguf", {key: tiny.VOCAB}))
    path = rewritten(bases["llama"], tmp_path / "out.gguf", {key: 2**32 - 1})
    with pytest.warns(UserWarning, match=f"{key} is {2**32 - 1}"), Model.load(path) as model:
        assert model.tokenizer.bos_id == (None if name == "bos" else 0)


def test_a_padding_id_of_minus_one() -> None:
    path = Path(__file__).resolve().parents[2] / "shared" / "cases" / "12_pad_minus1.gguf"
    if not path.is_file():
        pytest.skip("the shared cases are not at hand")
    with pytest.warns(UserWarning, match="padding_token_id is 4294967295"), Model.load(path) as model:
        assert np.isfinite(model.logits([5, 6, 7])).all()
