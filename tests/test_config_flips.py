"""The law of configs: every field that transformers reads either changes the logits here alike, or is refused by name.

Each field of each family's config class, the general ones, and those that modeling code reads by name, is set to one or
more other values on a tiny random checkpoint. Then transformers loads the folder, and so does Fabula:

    transformers gives logits     Fabula's are equal (1e-4 of the largest), or the load raises an error naming the field
    transformers refuses          Fabula raises a typed error, or the value is one that cannot change logits (LENIENT)

A field that a newer transformers adds fails the test until it has values here. FABULA_TEST_LONG=1 flips what
families share on each of them, and pairs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from fabula.engine.runner import Runner
from fabula.errors import EngineError
from fabula.formats.checkpoint import DType
from fabula.models.opening import open_model

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
LONG = os.environ.get("FABULA_TEST_LONG") == "1"
ABSENT = "__absent__"  # takes a key away
N_TOKENS, N_PROMPT = 24, 16
FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
BASE = {family: SIZES | ({"head_dim": 6} if family in ("Llama", "Qwen3") else {}) for family in FAMILIES}
WINDOW = {"sliding_window": 8}
SWITCHED = WINDOW | {"use_sliding_window": True, "layer_types": ABSENT}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PAIRS = {"Llama": 3, "Mistral": 2, "Qwen2": 2, "Qwen3": 3}  # rotated pairs of a head


def ropes(n: int) -> list[Any]:
    """Scalings, for heads of `n` pairs."""
    long = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0][:n], "long_factor": [2.0, 3.0, 4.0][:n]}
    return [
        *(None, {}, {"type": "default"}, {"factor": 2.0}),
        *({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "type": "dynamic", "factor": 2}),
        *({"rope_type": "linear", "factor": 0.5}, {"rope_type": "linear", "factor": None}, {"rope_type": "linear"}),
        *(YARN, {"type": "yarn", "factor": 4.0, "rope_theta": 50.0}, YARN | {"beta_fast": 0, "beta_slow": 0}),
        *(YARN | {"beta_fast": 2, "beta_slow": 0.5}, YARN | {"truncate": False}, YARN | {"mscale": 0.7}),
        *(YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}, YARN | {"attention_factor": 0.5}),
        *(YARN | {"attention_factor": 0}, YARN | {"factor": None}, YARN | {"factor": 0.5}),
        *(LLAMA3 | {"original_max_position_embeddings": 16}, LLAMA3),
        *(LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}, {"rope_type": "dynamic", "factor": 2.0}),
        *({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16},),
        *(long, long | {"original_max_position_embeddings": 16}, long | {"factor": 4.0, "attention_factor": 0.5}),
        *({"type": "su", **{key: long[key] for key in ("short_factor", "long_factor")}}, {"type": "ntk", "factor": 2}),
        *({"type": "mrope", "mrope_section": [1, 1, 1]}, {"rope_type": "proportional", "partial_rotary_factor": 0.5}),
        *({FULL: {"rope_type": "linear", "factor": 2.0}}, {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ]


# Values of fields of the config classes; None in place of a list: sizes, which `test_sizes` changes with the weights.
FIELDS: dict[str, list[Any] | None] = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_attention_heads": None,
    "num_hidden_layers": [1, "2"],
    "num_key_value_heads": [None, ABSENT],
    "head_dim": [None, ABSENT],
    "hidden_act": ["gelu", "relu", "swish", "gelu_pytorch_tanh", "no such", None, ABSENT],
    "max_position_embeddings": [32, ABSENT],
    "initializer_range": [0.5],
    "rms_norm_eps": [1e-2, 0.0, ABSENT],
    "use_cache": [False],
    "pad_token_id": [5, -1, None, 1000],
    "bos_token_id": [3, None],
    "eos_token_id": [[3, 4], None],
    "pretraining_tp": [2, None],
    "tie_word_embeddings": [True, ABSENT],
    "rope_parameters": [],  # those of `ropes` with a theta
    "attention_bias": [True],
    "attention_dropout": [0.5],
    "mlp_bias": [True],
    "sliding_window": [8, None, 0, 100, ABSENT],
    "use_sliding_window": [True, False],
    "max_window_layers": [1, 0, ABSENT],
    "layer_types": [[FULL, SLIDING], [SLIDING] * 2, [FULL] * 2, [FULL], ["attention", FULL], ["mamba", FULL], None],
    "transformers_version": ["9.9"],
    "architectures": [["Other"], [], None, ["LlamaModel"], ["LlamaForSequenceClassification"]],
    "output_hidden_states": [True],
    "return_dict": [False],
    "dtype": ["float16", "bfloat16"],
    "chunk_size_feed_forward": [4],
    "is_encoder_decoder": [True],
    "id2label": [{"0": "a"}],
    "label2id": [{"a": 0}],
    "problem_type": ["regression"],
}
# Fields that no class declares: older spellings, those read by name, and those that other families have.
OTHERS: dict[str, list[Any]] = {
    "rope_scaling": [],
    "rope_theta": [100.0, 100],
    "partial_rotary_factor": [0.5, 1.0, None],
    "original_max_position_embeddings": [16],
    "is_causal": [False, None, True],
    "per_layer_config": [{"0": {"rms_norm_eps": 0.1}}, {"1": {"skip": ["mlp"]}}, {}],
    "kv_sharing_modes": [["a", "b"]],
    "attention_chunk_size": [8, None],
    "quantization_config": [None, {}, {"quant_method": "gptq", "bits": 4}],
    "torch_dtype": ["float16"],
    "transformers_weights": ["other.safetensors"],
    "text_config": [{"model_type": "llama"}, {}],
    "num_labels": [3],
    "auto_map": [{"AutoModelForCausalLM": "modeling.X"}],
    "pruned_heads": [{"0": [0]}],
    "is_decoder": [True, False],
    "add_cross_attention": [True],
    "tie_encoder_decoder": [True],
    "torchscript": [True],
    "output_attentions": [True],
    "attn_implementation": ["sdpa"],
    "temperature": [0.1],
    "suppress_tokens": [[3]],
    "max_length": [3],
    "name_or_path": ["x"],
    "hidden_activation": ["gelu"],
    "layer_norm_eps": [0.1],
    "qkv_bias": [True],
    "use_qk_norm": [True],
    "attn_logit_softcapping": [5.0],
    "final_logit_softcapping": [5.0],
    "logit_scale": [0.5],
    "embedding_multiplier": [2.0],
    "residual_multiplier": [2.0],
    "attention_multiplier": [0.1],
    "query_pre_attn_scalar": [4],
    "rotary_pct": [0.5],
    "no_rope_layers": [[0, 1]],
    "attn_temperature_tuning": [True],
    "position_embedding_type": ["absolute"],
    "num_experts": [4],
    "mlp_layer_types": [["dense", "dense"]],
    "a_note": ["anything"],
}
# What transformers does not load, and what has no say in logits: loading it differs from nothing.
LENIENT = {"pad_token_id", "return_dict"}
# Several fields that belong together.
TOGETHER: dict[str, list[dict[str, Any]]] = {
    "Llama": [WINDOW | {"layer_types": [FULL, FULL]}, WINDOW | {"layer_types": [FULL, SLIDING]}],
    "Mistral": [
        *(WINDOW | {"layer_types": kinds} for kinds in ([FULL, SLIDING], [SLIDING] * 2, [FULL] * 2, None)),
        *(WINDOW | {"use_sliding_window": False}, WINDOW | {"max_window_layers": 1}),
        {"sliding_window": None, "layer_types": [FULL, SLIDING]},
    ],
}
for _qwen in ("Qwen2", "Qwen3"):
    TOGETHER[_qwen] = [
        *(SWITCHED | {"max_window_layers": first} for first in (0, 1, 2, ABSENT)),
        *(SWITCHED | {"layer_types": kinds} for kinds in ([FULL, SLIDING], ["attention", SLIDING], [FULL] * 2)),
        SWITCHED | {"layer_types": [FULL, SLIDING], "use_sliding_window": False},
        SWITCHED | {"sliding_window": None, "layer_types": [FULL, SLIDING]},
        SWITCHED | {"sliding_window": ABSENT, "max_window_layers": 0},
    ]
IDS = np.random.default_rng(0).integers(3, SIZES["vocab_size"], N_TOKENS).astype(np.int32)
Logits = npt.NDArray[np.float32]


def write(folder: Path, family: str, settings: dict[str, Any]) -> Path:
    """A random checkpoint of that family, its weights spread wide enough for logits that differ clearly."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name or "bias" in name else 0.25))
    model.save_pretrained(folder)
    return folder


def edit(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = json.loads((folder / "original.json").read_text())
    path.write_text(json.dumps({k: v for k, v in (config | changes).items() if v != ABSENT}))


def theirs(folder: Path) -> tuple[Logits, bool] | None:
    """Logits of transformers, and whether decoding with its cache gives them again; None where it refuses."""
    transformers.logging.set_verbosity(60)
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()
        ids = torch.tensor(IDS[None].astype(np.int64))
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits[0].numpy()
            past = model(ids[:, :N_PROMPT], use_cache=True).past_key_values
            rest = model(ids[:, N_PROMPT:], past_key_values=past, use_cache=True).logits[0].numpy()
    except Exception:  # whatever it raises, it gives no logits
        return None
    finally:
        transformers.logging.set_verbosity_warning()
        transformers.utils.logging.enable_progress_bar()
    return whole, bool(np.abs(rest - whole[N_PROMPT:]).max() <= 1e-4 * np.abs(whole).max())


def ours(folder: Path) -> Logits:
    checkpoint, _ = open_model(folder)
    try:
        runner = Runner(checkpoint, weights=DType.F32, kv=(DType.F32, DType.F32), n_threads=1)
    finally:
        checkpoint.close()
    try:
        return np.concatenate(list(runner.all_logits(IDS)))
    finally:
        runner.close()


def judge(folder: Path, changes: dict[str, Any]) -> str:
    """ "" if the law holds; else what is wrong."""
    edit(folder, changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = theirs(folder)
        try:
            logits = ours(folder)
        except EngineError as error:
            words = str(error)
            for key in changes:
                inner = changes[key] if isinstance(changes[key], dict) else {}
                if any(name in words for name in (key, *inner, *SPOKEN.get(key, ()))):
                    return ""
            return f"{changes}: refused without the field's name: {words}"
    if reference is None:  # a null is read as if the key was not there
        lenient = changes.keys() <= LENIENT or all(value is None for value in changes.values())
        return "" if lenient else f"{changes}: transformers refuses it, Fabula loads it"
    whole, steady = reference
    error = float(np.abs(logits - whole).max() / np.abs(whole).max())
    if error > 1e-4:
        return f"{changes}: logits differ by {error:.1e}"
    if not steady and "longrope" not in str(changes):  # which changes within a text; here it does so with the context
        return f"{changes}: transformers' own logits depend on its cache, which nobody is told"
    return ""


# What a refusal speaks of instead of the field, where that only shows in the weights.
SPOKEN = {
    "attention_bias": ("q_proj.bias",),
    "mlp_bias": ("gate_proj.bias",),
    "head_dim": ("q_proj.weight",),
    "num_key_value_heads": ("k_proj.weight",),
    "num_hidden_layers": ("layer_types",),
    "rope_scaling": ("rope",),
    "rope_parameters": ("rope",),
}


# The others are more examples of the same reader.
QUICK = ("Llama", "Mistral")


@pytest.fixture(
    scope="module",
    params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.heavy) for name in FAMILIES],
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    family = request.param
    folder = write(tmp_path_factory.mktemp(family), family, BASE[family])
    (folder / "config.json").rename(folder / "original.json")
    return family, folder


def flips(family: str) -> Iterator[dict[str, Any]]:
    """Single fields of a family's config, and what belongs together."""
    declared = {field.name for field in dataclasses.fields(getattr(transformers, f"{family}Config"))}
    unknown = declared - FIELDS.keys()
    assert not unknown, f"fields nobody wrote values for: {unknown}"
    for key, values in FIELDS.items():  # also those that only other families declare
        for value in values or ():
            yield {key: value}
    yield from TOGETHER[family]
    shared: list[dict[str, Any]] = [{key: value} for key, values in OTHERS.items() for value in values]
    for rope in ropes(PAIRS[family]):
        shared.append({"rope_scaling": rope})
        shared.append({"rope_scaling": rope, "rope_theta": 70.0, "rope_parameters": ABSENT})
        if rope is not None:
            shared.append({"rope_parameters": rope | {"rope_theta": 33.0}})
    # What all families have from one place is flipped once, on each family a part of it.
    yield from shared if LONG else shared[FAMILIES.index(family) :: len(FAMILIES)]


@pytest.mark.filterwarnings("ignore")
def test_every_field(made: tuple[str, Path]) -> None:
    family, folder = made
    wrong = [problem for changes in flips(family) if (problem := judge(folder, changes))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not LONG, reason="FABULA_TEST_LONG is not 1")
def test_pairs_of_fields(made: tuple[str, Path]) -> None:
    """Each flip that transformers loads, with each other of another field, as far as its weights go."""
    family, folder = made
    singles = [changes for changes in flips(family) if not {"architectures", "quantization_config"} & changes.keys()]
    wrong = []
    for one, other in list(combinations(singles, 2))[:: max(1, len(singles) // 40)]:
        if not one.keys() & other.keys() and (problem := judge(folder, one | other)):
            wrong.append(problem)
    assert not wrong, "\n".join(wrong)


SIZES_CHANGED: list[dict[str, Any]] = [
    {"vocab_size": 77},
    {"hidden_size": 40},
    {"intermediate_size": 33},
    {"num_attention_heads": 2},
    {"num_attention_heads": 8},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1},
    {"num_hidden_layers": 3},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes(family: str, tmp_path: Path) -> None:
    """Fields that the weights' shapes follow: a checkpoint of its own for each value."""
    assert {key for key, values in FIELDS.items() if values is None} <= {key for c in SIZES_CHANGED for key in c}
    for i, changes in enumerate(SIZES_CHANGED):
        folder = write(tmp_path / str(i), family, BASE[family] | changes)
        (folder / "config.json").rename(folder / "original.json")
        assert not judge(folder, {})
        assert theirs(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_for_missing_fields(family: str) -> None:
    """A field that a config does not have is what the family's config class says."""
    from fabula.models.families import family_of

    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    config: dict[str, Any] = {key: SIZES[key] for key in needed}
    config |= {"model_type": family.lower(), "num_attention_heads": 32, "hidden_size": 64, "num_hidden_layers": 40}
    found = family_of(config, Path("x")).read(config, Path("x"))
    told = getattr(transformers, f"{family}Config")(**{k: v for k, v in config.items() if k != "model_type"})
    assert found.context_length == told.max_position_embeddings
    assert found.n_kv_heads == told.num_key_value_heads
    assert found.head_dim == getattr(told, "head_dim", None) or 64 // 32
    assert found.rms_norm_eps == told.rms_norm_eps
    assert found.rope["rope_theta"] == told.rope_parameters["rope_theta"]
    assert found.tied == told.tie_word_embeddings
    window = told.sliding_window if family == "Mistral" else None
    assert set(found.windows) == {window or 0}
    if family in ("Qwen2", "Qwen3"):
        config["use_sliding_window"] = True
        told = getattr(transformers, f"{family}Config")(**{k: v for k, v in config.items() if k != "model_type"})
        windows = family_of(config, Path("x")).read(config, Path("x")).windows
        assert windows == tuple(told.sliding_window if kind == SLIDING else 0 for kind in told.layer_types)
        assert len(set(windows)) == 2
