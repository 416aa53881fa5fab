"""Every family as a GGUF file: written by Fabula, converted by llama.cpp, and read by both.

The tiny checkpoints are those of decoder_families.py, with shapes that llama.cpp can take: what it does not know (heads
of another width in some architectures, some biases) is in a case of its own, which it then is not asked about.

FABULA_TEST_LLAMA_CPP names a Python that has llama_cpp, FABULA_TEST_LLAMA_SOURCE llama.cpp's source tree, whose
conversion is run; tests that need one of them skip without it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

import llama_convert
import tiny
from decoder_families import CASES, DEEP_YARN, FALCON, FULL, MLA, ODD, PLAIN, SLIDING, Case, make_model
from fabula.cli.main import run
from fabula.engine.runner import Runner
from fabula.errors import EngineError, Unsupported
from fabula.export.quantize import quantize_model
from fabula.formats.checkpoint import DType
from fabula.formats.gguf import GgufFile
from fabula.formats.gguf_config import config_of as read_config
from fabula.formats.gguf_families import ARCHITECTURES
from fabula.formats.gguf_names import open_gguf
from fabula.formats.gguf_write import GgufWriter, NewTensor, Value
from fabula.models.opening import check_tensors, open_model
from llama_peer import LlamaCpp
from test_gguf_keys import FOLLOWED, NAMES, NO_EFFECT, rewritten

PLAIN_V2 = {"attention_bias": False, "norm_topk_prob": False}
IDS = np.random.default_rng(1).integers(3, 203, 60).astype(np.int32)
WHOLE = PLAIN | {"head_dim": 24}  # heads of hidden_size / n_heads
F = np.float32


@dataclass(frozen=True)
class Cut:
    """A case for GGUF.

    Attributes:
        of: the case of decoder_families.py.
        changes: to its settings.
        peer: why llama.cpp is not asked for the file's logits; "" if it is.
        converted: why llama.cpp's conversion is not compared; "" if it is.
        bound: of the difference from llama.cpp's logits. GELU is a table of float16 there.
        exact: whether logits are those of the safetensors file bit by bit: some numbers are float32 in GGUF.
        calm: whether what layers add is made a tenth: else many random layers make much of a small difference.
    """

    of: str
    changes: Mapping[str, Any] | None = None
    peer: str = ""
    converted: str = ""
    bound: float = 1e-4
    exact: bool = True
    calm: bool = False

    @property
    def case(self) -> Case:
        case = CASES[self.of]
        return replace(case, settings={**case.settings, **(self.changes or {})})


_UNKNOWN = "llama.cpp's conversion does not know the family"
_NO_BIAS = "llama.cpp has no such bias in this architecture"
_NO_MIXER = "llama.cpp has RMS norms and a plain softmax in this family; see test_sparse_families.py"
_LOSES_MSCALE = "it writes another factor on cos and sin than the config's"
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 10000.0}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500000.0,
}  # fmt: skip
# What llama.cpp has no keys for.
LLAMA4_RELEASED = {
    "attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1, "no_rope_layer_interval": 4,
}  # fmt: skip
GELU = 2e-3
CUTS: Mapping[str, Cut] = {
    "llama": Cut("internlm3"),
    "iquestcoder": Cut("iquestcoder"),
    "helium": Cut("helium", converted=_UNKNOWN),
    "ministral": Cut("ministral", converted=_UNKNOWN),
    "cwm": Cut("cwm", converted=_UNKNOWN),
    "ministral3": Cut(
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 10000.0,
                "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3, "beta_fast": 32.0, "beta_slow": 1.0,
            },
            "max_position_embeddings": 96,
        },
    ),
    "seed_oss": Cut("seed_oss"),
    "seed_oss-out-bias": Cut("seed_oss-out-bias", peer=_NO_BIAS),
    "smollm3": Cut("smollm3"),
    "granite": Cut("granite", converted="it drops head_dim"),
    "granite-whole": Cut("granite", {"hidden_size": 240}),
    "arcee": Cut("arcee", {"mlp_bias": False, "attention_bias": False}),
    "arcee-biased": Cut("arcee", peer=_NO_BIAS),
    "gemma": Cut("gemma", bound=GELU),
    "gemma2": Cut("gemma2", {"query_pre_attn_scalar": 40}, bound=GELU),
    "gemma3": Cut("gemma3", {"query_pre_attn_scalar": 40}, bound=GELU),
    "gemma3-linear": Cut(
        "gemma3",
        {
            "query_pre_attn_scalar": 40,
            "final_logit_softcapping": 7.0,
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                SLIDING: {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
        bound=GELU,
    ),
    "phi3": Cut("phi3", {"sliding_window": None}),
    "phi3-window": Cut("phi3", peer="llama.cpp ignores the window"),
    "phi4-mini": Cut("phi4-mini"),
    "phi3-longrope": Cut("phi3-longrope", exact=False),
    "olmo": Cut("olmo"),
    "olmo2": Cut("olmo2", {"attention_bias": False}),
    "olmo2-biased": Cut("olmo2", peer=_NO_BIAS),
    "olmo3": Cut("olmo3"),
    "glm": Cut("glm", {"hidden_size": 240, "head_dim": 40, "rms_norm_eps": 1e-5}),
    "glm-wide": Cut("glm", peer="llama.cpp wants whole heads", converted="it drops head_dim"),
    "glm4": Cut("glm4"),
    "exaone4": Cut("exaone4-full"),
    "exaone4-windows": Cut("exaone4", peer="llama.cpp has windows only in the model of 64 layers"),
    "cohere": Cut("cohere", {"use_qk_norm": False, "attention_bias": False}),
    "cohere-norms": Cut("cohere", peer="llama.cpp has norms of q and k only in the model of 64 layers"),
    "cohere2": Cut("cohere2"),
    "stablelm": Cut("stablelm"),
    "stablelm-parallel": Cut("stablelm-parallel", converted="it loses the norms of q and k"),
    "nemotron": Cut("nemotron", {"hidden_size": 240, "attention_bias": False}),
    "nemotron-wide": Cut("nemotron", peer="llama.cpp wants whole heads", converted="it rotates part of a whole head"),
    "starcoder2": Cut("starcoder2", {"sliding_window": None}, bound=GELU),
    "ernie4_5": Cut("ernie4_5", {"use_bias": False}),
    "ernie4_5-biased": Cut("ernie4_5", peer=_NO_BIAS),
    "hunyuan": Cut("hunyuan", {"attention_bias": False}),
    "hunyuan-alpha": Cut("hunyuan-alpha", converted="it takes the released sizes only", exact=False),
    "apertus": Cut("apertus", exact=False),
    "falcon": Cut("falcon", {"num_kv_heads": 1}, bound=GELU),
    "falcon-groups": Cut("falcon-groups", bound=GELU),
    "falcon-one-norm": Cut("falcon-groups-one-norm", {"bias": False, "num_kv_heads": 2}, bound=GELU),
    "gpt2": Cut("gpt2", bound=GELU),
    "gpt_neox": Cut("gpt_neox", bound=GELU),
    "gpt_neox-sequential": Cut("gpt_neox-sequential", {"attention_bias": True}, bound=GELU),
    "phi": Cut("phi", {"intermediate_size": 960, "num_key_value_heads": 6}, bound=GELU),
    "bloom": Cut("bloom", bound=GELU),
    "mpt": Cut("mpt", bound=GELU, converted=_UNKNOWN),
    "mpt-clipped": Cut(
        "mpt-scaled", {"attn_config": {"clip_qkv": 0.7, "alibi_bias_max": 12}}, bound=GELU, converted=_UNKNOWN
    ),
    # llama.cpp has the numbers of the released models, and another deviation: that of a sample.
    "gemma3n": Cut(
        "gemma3n",
        {
            "vocab_size_per_layer_input": 203,
            "num_hidden_layers": 22, "num_kv_shared_layers": 2, "laurel_rank": 64, "hidden_size_per_layer_input": 256,
            "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 12, "intermediate_size": 640,
        },
        bound=GELU, exact=False, calm=True,
    ),
    "gemma3n-small": Cut(
        "gemma3n", peer="llama.cpp has the released sizes only", exact=False,
        converted="tokens without an embedding of each layer get one of zeros",
    ),
    "gemma3n-three-streams": Cut(
        "gemma3n-three-streams", peer="llama.cpp has the released sizes only", converted="it takes four streams only",
        exact=False,
    ),
    "gemma4": Cut("gemma4", {"final_logit_softcapping": 4.0, "num_kv_shared_layers": 3}, bound=GELU),
    "gemma4-k-is-v": Cut("gemma4-k-is-v", {"num_kv_shared_layers": 3}, bound=3 * GELU),
    "gemma4-plain": Cut(
        "gemma4-plain", bound=GELU, converted="without a cap of logits it writes no key, which is read as 30"
    ),
    "gemma4-experts": Cut(
        "gemma4-experts", {"final_logit_softcapping": 4.0, "num_kv_shared_layers": 3}, bound=3 * GELU
    ),
    "gemma4-experts-k-is-v": Cut("gemma4-experts-k-is-v", bound=3 * GELU),
    "llama4": Cut("llama4-steps", LLAMA4_RELEASED),
    "llama4-scaled": Cut("llama4-steps", LLAMA4_RELEASED | {"num_experts_per_tok": 1, "rope_parameters": LLAMA3}),
    "phimoe": Cut("phimoe", {"sliding_window": None, "router_jitter_noise": 0.01}, peer=_NO_MIXER),
    "phimoe-longrope": Cut(
        "phimoe-longrope",
        {"rope_parameters": CASES["phimoe-longrope"].settings["rope_parameters"] | {"short_mscale": 1.3}},
        peer=_NO_MIXER, converted=_LOSES_MSCALE, exact=False,
    ),
    "mellum": Cut("mellum", {"rope_parameters": {FULL: _YARN, SLIDING: _PLAIN_ROPE}}),
    "mellum-thetas": Cut("mellum", peer="llama.cpp takes one theta for all layers"),
    "mixtral": Cut("mixtral", {"sliding_window": None}),
    "qwen2_moe": Cut("qwen2_moe", {"mlp_only_layers": []}),
    "qwen3_moe": Cut("qwen3_moe-steps", {"decoder_sparse_step": 1}),
    "olmoe": Cut("olmoe", {"norm_topk_prob": False, "num_key_value_heads": 6}),
    "granitemoe": Cut("granitemoe", converted=_UNKNOWN),
    "granitemoeshared": Cut("granitemoeshared"),
    "glm4_moe": Cut("glm4_moe"),
    "glm4_moe-groups": Cut("glm4_moe-groups"),
    "glm4_moe-dense-too": Cut("glm4_moe", {"first_k_dense_replace": 2, "norm_topk_prob": False}),
    "dots1": Cut("dots1", {"sliding_window": None, "num_key_value_heads": 6}),
    "ernie4_5_moe": Cut("ernie4_5_moe", {"intermediate_size": 160}),
    "ernie4_5_moe-alone": Cut("ernie4_5_moe-alone", peer="llama.cpp has no layers without experts between others"),
    "minimax_m2": Cut("minimax_m2"),
    "hunyuan_moe": Cut("hunyuan_moe", {"attention_bias": False}, converted="it wants a key that is not in the config"),
    "gpt_oss": Cut("gpt_oss-plain", {"attention_bias": True, "swiglu_limit": 7.0, "layer_types": None}),
    "gpt_oss-yarn": Cut("gpt_oss", peer="llama.cpp cuts the ends of YaRN's ramp; see test_gpt_oss.py"),
    "deepseek_v2": Cut("deepseek_v2", {"norm_topk_prob": False}),
    # llama.cpp knows models without a latent of queries by their number of layers.
    "deepseek_v2-lite": Cut(
        "deepseek_v2-groups",
        PLAIN_V2 | {"topk_method": "greedy", "num_hidden_layers": 26, "n_group": 1, "topk_group": 1},
    ),
    "deepseek_v2-groups": Cut(
        "deepseek_v2-groups", PLAIN_V2, peer="llama.cpp rates groups by their best two experts"
    ),
    "deepseek_v3": Cut("deepseek_v3", {"rope_parameters": DEEP_YARN}),
    "glm4_moe_lite": Cut("glm4_moe_lite", {"mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "sarvam_mla": Cut("sarvam_mla", {"q_lora_rank": 33}, converted=_UNKNOWN),
    "youtu": Cut("youtu"),
    "lfm2": Cut("lfm2", {"hidden_size": 240}),
    "lfm2-biased": Cut("lfm2-adjusted", peer=_NO_BIAS, converted="it fails at biases of a convolution"),
    "lfm2_moe": Cut("lfm2_moe"),
    "qwen3_next": Cut("qwen3_next", {"mlp_only_layers": [], "linear_value_head_dim": 20}),
    # v heads of a k head are apart in these files, so a projection adds columns in another order.
    "qwen3_5": Cut("qwen3_5", {"linear_value_head_dim": 20}, exact=False),
    "qwen3_5-wide": Cut("qwen3_5", peer="llama.cpp wants v heads as wide as k heads", exact=False),
    "qwen3_5-two-first": Cut("qwen3_5-two-first", {"linear_value_head_dim": 20}),
    "qwen3_5_moe": Cut("qwen3_5_moe", {"linear_value_head_dim": 20}, exact=False),
    "granitemoehybrid": Cut("granitemoehybrid"),
    "granitemoehybrid-dense": Cut(
        "granitemoehybrid-dense",
        {
            "time_step_limit": [0.0, float("inf")], "mamba_proj_bias": False, "intermediate_size": 60,
            "position_embedding_type": None,
        },
        peer="llama.cpp of llama-cpp-python 0.3.36 aborts on this file",
    ),
    "granitemoehybrid-biased": Cut(
        "granitemoehybrid-dense", {"time_step_limit": [0.0, float("inf")], "intermediate_size": 60}, peer=_NO_BIAS,
        converted="it takes it that nothing is rotated",
    ),
    "bamba": Cut("bamba", {"num_hidden_layers": 2}, peer="llama.cpp rotates other elements of a head"),
    "falcon_h1": Cut("falcon_h1-gate-first"),
    "falcon_h1-factors": Cut("falcon_h1", exact=False),
    "falcon_h1-tied": Cut("falcon_h1", {"tie_word_embeddings": True}, converted="it loses a factor", exact=False),
    "falcon_h1-biased": Cut("falcon_h1-normed", {"mamba_norm_before_gate": False}, peer=_NO_BIAS,
                            converted="it loses factors", exact=False),
    # llama.cpp has no least time step.
    "nemotron_h": Cut("nemotron_h", {"mamba_head_dim": 64}, bound=5e-3),
    "nemotron_h-biased": Cut(
        "nemotron_h-biased", {"mlp_hidden_act": "relu2"}, peer=_NO_BIAS, converted="it wants heads of 64"
    ),
    "internlm2-as-llama": Cut("internlm3", {"qkv_bias": False, "bias": False}),
}  # fmt: skip


class Made:
    """Checkpoints, and files of them, each made when it is asked for first."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self._logits: dict[str, npt.NDArray[np.float32]] = {}

    def folder(self, name: str) -> Path:
        folder = self.root / name / "m"
        if not folder.exists():
            folder.mkdir(parents=True)
            make_model(CUTS[name].case, folder)
            if CUTS[name].calm:
                tensors = load_file(folder / "model.safetensors")
                calmed = {key: 0.1 * x if "norm" in key and ".post_" in key else x for key, x in tensors.items()}
                save_file(calmed, folder / "model.safetensors", {"format": "pt"})
            (folder / "tokenizer.json").write_text(tiny.tokenizer_json())
            (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        return folder

    def file(self, name: str) -> Path:
        target = self.root / name / "out.gguf"
        if not target.exists():
            quantize_model(self.folder(name), target, "f32", threads=1)
        return target

    def logits(self, name: str) -> npt.NDArray[np.float32]:
        if name not in self._logits:
            self._logits[name] = logits(self.folder(name))
        return self._logits[name]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("gguf_families"))


def logits(path: Path) -> npt.NDArray[np.float32]:
    checkpoint, _ = open_model(path)
    try:
        # longrope depends on the context's length, which is that a model is loaded for.
        runner = Runner(checkpoint, weights=DType.F32, kv=(DType.F32, DType.F32), n_threads=1, context=len(IDS))
    finally:
        checkpoint.close()
    try:
        return np.array(next(runner.all_logits(IDS)))
    finally:
        runner.close()


def difference(ours: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """The largest, as a part of the largest logit."""
    return float(np.abs(ours - other).max() / np.abs(other).max())


@pytest.mark.parametrize("name", CUTS)
def test_what_is_written_is_the_same_model(made: Made, name: str) -> None:
    ours, theirs = logits(made.file(name)), made.logits(name)
    assert (ours == theirs).all() if CUTS[name].exact else difference(ours, theirs) <= 1e-5


def test_every_architecture_is_written_or_read_elsewhere(made: Made) -> None:
    written = set()
    for name in CUTS:
        with GgufFile(made.file(name)) as file:
            written.add(file.metadata["general.architecture"])
    # Others have no family of their own: their files are those of another with other names for keys.
    others = {"qwen2", "qwen3", "qwen2vl", "qwen3vl", "exaone", "internlm2", "baichuan", "minicpm"}
    assert written | others == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", CUTS)
def test_names_are_those_that_the_format_has(made: Made, name: str) -> None:
    """The gguf package lists each architecture's tensors."""
    with GgufFile(made.file(name)) as file:
        arch = file.metadata["general.architecture"]
        number = next((each for each, text in gguf.MODEL_ARCH_NAMES.items() if text == arch), None)
        if number is None:
            pytest.skip(f"the gguf package does not know {arch}")
        known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[number]}
        found = {
            ".".join(
                "{bid}" if part.isdecimal() else part
                for part in re.sub(r"\.(weight|bias|scale)$", "", tensor).split(".")
            )
            for tensor in file.tensors
        }
    assert found <= known


@pytest.mark.parametrize("name", [name for name, cut in CUTS.items() if not cut.peer])
def test_llama_cpp_computes_the_same(llama_cpp: LlamaCpp, made: Made, name: str) -> None:
    context = len(IDS) if "longrope" in name else 256
    theirs = llama_cpp.logits(made.file(name), IDS.tolist(), context=context)
    assert theirs is not None
    assert difference(made.logits(name), theirs) <= CUTS[name].bound


# ---- llama.cpp's conversion -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def converted(made: Made) -> Path:
    """A folder with all cases as llama.cpp's conversion writes them, made by one process."""
    source = os.environ.get("FABULA_TEST_LLAMA_SOURCE")
    if source is None:
        pytest.skip("llama.cpp's conversion is not at hand: FABULA_TEST_LLAMA_SOURCE names no source tree of it")
    names = [name for name, cut in CUTS.items() if not cut.converted]
    folder = made.root / "converted"
    folder.mkdir()
    paths = [path for name in names for path in (str(made.folder(name)), str(folder / f"{name}.gguf"))]
    run = [sys.executable, llama_convert.__file__, source, *paths]
    out = subprocess.run(run, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    problems = json.loads(out.stdout.splitlines()[-1])
    assert {folder: why for folder, why in problems.items() if why} == {}
    return folder


@pytest.mark.parametrize("name", [name for name, cut in CUTS.items() if not cut.converted])
def test_what_llama_cpp_converts_is_the_same_model(made: Made, converted: Path, name: str) -> None:
    ours = logits(converted / f"{name}.gguf")
    assert difference(ours, made.logits(name)) <= 1e-5


# ---- What GGUF cannot say -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (CASES["gemma2"], "'gemma2': layer 0 attention scale is 0.2236.*would be read as 0.158"),
        (CASES["gemma3"], "'gemma3': layer 0 attention scale"),
        (CASES["gpt2-scales"], "'gpt2': layer 1 attention scale"),
        (CASES["falcon-rows"], "'falcon': layer 0 parallel is False"),
        (CASES["smollm3-windows"], "no key for a window in family 'smollm3'"),
        (Case("SmolLM3", ODD | {"no_rope_layers": [1, 0, 1]}), "'smollm3': layer 1: rotation is none"),
        (CASES["starcoder2"], "no key for a window in family 'starcoder2'"),
        (CASES["falcon-rw"], "'falcon': layer 0"),
        (CASES["phi-norms"], "norm.*not part of this model's config"),
        (CASES["mpt-scaled"], "'mpt': layer 0 attention scale is 0.3"),
        (CASES["qwen3_moe-steps"], "no layers without experts in family 'qwen3_moe'"),
        (CASES["qwen3_moe"], "'qwen3moe': layer 0 experts router renormalized is False"),
        (CASES["olmoe"], "'olmoe': layer 0 experts router renormalized is True"),
        (CASES["mixtral"], "no key for a window in family 'mixtral'"),
        (CASES["gptj"], "not written for the family 'gptj'"),
        (CASES["llama4"], "written for mixtures of experts only"),
        (CASES["llama4-steps"], r"'llama4\.attention\.sliding_window': is 23; models of this architecture have chunks"),
        (CASES["phimoe-longrope"], "short_mscale is 1.1, long_mscale 1.3"),
        (CASES["phimoe"], "'phimoe': layer 0 experts router tolerance is 0.6"),
        (CASES["mellum-dense-too"], "no layers without experts in family 'mellum'"),
        (CASES["minicpm3"], "not written for the family 'minicpm3'"),
        (CASES["glm4_moe_lite"], "'deepseek2': layer 1 experts is None"),
        (CASES["deepseek_v2-groups"], "kv_a_proj_with_mqa.bias': not part of this model's config"),
        (CASES["deepseek_v3"], "has YaRN with 'mscale' equal to 'mscale_all_dim' only"),
        (Case("Youtu", MLA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9000.0}}),
         "has YaRN with 'mscale' equal to 'mscale_all_dim' only"),
        (Case("Falcon", FALCON | {"activation": "relu"}), "'falcon': layer 0 mlp activation is relu"),
        (Case("Starcoder2", WHOLE | {"sliding_window": None, "hidden_act": "gelu"}), "mlp activation is gelu,"),
        (Case("Olmo3", PLAIN | {"sliding_window": 19, "num_hidden_layers": 5, "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 9000.0},
            SLIDING: {"rope_type": "default", "rope_theta": 500.0},
        }}), "'olmo2': layer 0: the rotation's frequencies"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused_by_name(tmp_path: Path, case: Case, words: str) -> None:
    folder = tmp_path / "m"
    make_model(case, folder)
    (folder / "tokenizer.json").write_text(tiny.tokenizer_json())
    with pytest.raises(Unsupported, match=words):
        quantize_model(folder, tmp_path / "out.gguf", "f32")
    assert not (tmp_path / "out.gguf").exists()


# ---- Keys of single architectures -----------------------------------------------------------------------------------


def config_of(path: Path) -> Mapping[str, Any]:
    checkpoint = open_gguf(path)
    checkpoint.close()
    return checkpoint.config


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        # A pattern may be a number: each n-th layer has no window; 0: all have one. Without it, the architecture's.
        ("gemma3", {"attention.sliding_window_pattern": 3}, {"layer_types": [SLIDING, SLIDING, FULL] * 2 + [SLIDING]}),
        ("gemma3", {"attention.sliding_window_pattern": 0}, {"layer_types": [SLIDING] * 7}),
        ("gemma3", {"attention.sliding_window_pattern": None}, {"layer_types": [SLIDING] * 5 + [FULL, SLIDING]}),
        ("gemma2", {"attention.sliding_window_pattern": None}, {"layer_types": [SLIDING, FULL, SLIDING]}),
        ("gemma2", {"attention.sliding_window": None}, {"sliding_window": 4096}),
        ("cohere2", {"attention.sliding_window_pattern": None}, {"layer_types": [SLIDING] * 3 + [FULL, SLIDING]}),
        ("olmo3", {"attention.sliding_window_pattern": None}, {"layer_types": [SLIDING] * 3 + [FULL, SLIDING]}),
        ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None},
         {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
        ("gemma3", {"rope.freq_base_swa": None}, {"rope_local_base_freq": 10000.0}),
        ("granite", {"residual_scale": None, "embedding_scale": F(0), "attention.scale": None},
         {"residual_multiplier": 1.0, "embedding_multiplier": 1.0, "attention_multiplier": 40**-0.5}),
        ("cohere", {"logit_scale": None}, {"logit_scale": 1.0}),
        ("olmo", {"attention.clamp_kqv": None}, {"clip_qkv": None}),
        ("gemma3n", {"activation_sparsity_scale": None, "altup.num_inputs": None, "attention.shared_kv_layers": None},
         {"altup_num_inputs": 4, "num_kv_shared_layers": 2}),
        ("stablelm", {"use_parallel_residual": True}, {"use_parallel_residual": False}),  # the tensors decide
    ],
)  # fmt: skip
def test_keys_that_may_be_missing(
    made: Made, tmp_path: Path, name: str, changes: dict[str, Value | None], found: Mapping[str, Any]
) -> None:
    config = config_of(rewritten(made.file(name), tmp_path / "out.gguf", changes))
    assert {key: config[key] for key in found} == found


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("granite", {"rope.scaling.finetuned": False}, r"'granite\.rope\.scaling\.finetuned': is false"),
        ("granite", {"logit_scale": None}, r"'granite\.logit_scale': is missing"),
        ("cohere2", {"attention.sliding_window": None}, r"'cohere2\.attention\.sliding_window': is missing"),
        ("cohere2", {"logit_scale": None}, r"'cohere2\.logit_scale': is missing"),
        ("cohere2", {"rope.dimension_count": 12}, r"'cohere2\.rope\.dimension_count': is 12; only that of a whole"),
        ("gemma2", {"final_logit_softcapping": F(0)}, r"'gemma2\.final_logit_softcapping'"),
        ("gemma3", {"attention.scale": F(0.22)}, r"'gemma3\.attention\.scale'"),
        ("gemma3", {"rope.scaling.type": "yarn", "rope.scaling.factor": F(4)}, r"offered here: none, linear"),
        ("olmo", {"attention.layer_norm_epsilon": F(1e-6)}, r"'olmo\.attention\.layer_norm_epsilon': is not 1e-05"),
        ("olmo3", {"rope.freq_base_swa": F(77)}, r"'olmo2\.rope\.freq_base_swa'"),
        ("apertus", {"attention.sliding_window": 9}, r"'apertus\.attention\.sliding_window': is 9"),
        ("phi", {"rope.dimension_count": 7}, r"'phi2\.rope\.dimension_count': is 7, must be an even number"),
        ("glm4", {"nextn_predict_layers": 1}, r"'glm4\.nextn_predict_layers'"),
        ("glm4", {"rope.dimension_sections": np.array([4, 4, 2, 0], np.int32)}, r"'glm4\.rope\.dimension_sections'"),
        ("falcon", {"expert_count": 8}, r"'falcon\.expert_count': is 8"),
        ("mpt", {"attention.max_alibi_bias": F(0)}, r"'mpt\.attention\.max_alibi_bias': is 0"),
        ("bloom", {"attention.max_alibi_bias": F(4)}, r"'bloom\.attention\.max_alibi_bias'"),
        ("gemma3n-small", {"activation_sparsity_scale": np.zeros(3, F)}, "must be an array of 7 numbers"),
    ],
)  # fmt: skip
def test_keys_that_are_refused(
    made: Made, tmp_path: Path, name: str, changes: dict[str, Value | None], words: str
) -> None:
    with pytest.raises(EngineError, match=words):
        config_of(rewritten(made.file(name), tmp_path / "out.gguf", changes))


def test_numbers_of_xielu_are_needed(made: Made, tmp_path: Path) -> None:
    source = made.file("apertus")
    with GgufFile(source) as file:
        keys = {key: value for key, value in file.metadata.items() if key.startswith("xielu.")}
    assert {len(value) for value in keys.values() if isinstance(value, np.ndarray)} == {3} and len(keys) == 4
    for value, words in ((None, "is missing"), (np.zeros(2, F), "3 numbers"), ("x", "must be a number")):
        path = rewritten(source, tmp_path / "out.gguf", {"general.xielu": 1})
        with pytest.raises(EngineError, match=rf"'xielu\.beta': {words}|{words}"):
            config_of(_with_key(path, tmp_path / "other.gguf", "xielu.beta", value))


def _with_key(source: Path, target: Path, key: str, value: Any) -> Path:
    """A copy with another value of a key that does not start with the architecture's name."""
    with GgufFile(source) as file:
        metadata: dict[str, Any] = {**file.metadata, key: value}
        metadata = {name: each for name, each in metadata.items() if each is not None}
        new = [NewTensor(t.name, t.dtype, t.shape) for t in file.tensors.values()]
        with GgufWriter(target, metadata, new, overwrite=True) as writer:
            for tensor in file.tensors.values():
                writer.write(tensor.name, file.read(tensor.name))
    return target


@pytest.mark.parametrize(
    ("arch", "source", "changes", "model_type"),
    [
        ("qwen2vl", "internlm2-as-llama", {"rope.dimension_sections": np.array([4, 4, 4, 0], np.int32)}, "qwen2"),
        ("exaone", "internlm2-as-llama", {}, "llama"),
        ("internlm2", "internlm2-as-llama", {}, "llama"),
        ("minicpm", "granite", {"attention.scale": None}, "granite"),
    ],
)
def test_architectures_that_share_a_family(
    made: Made, tmp_path: Path, arch: str, source: str, changes: dict[str, Value | None], model_type: str
) -> None:
    path = rewritten(made.file(source), tmp_path / "out.gguf", changes, arch=arch)
    checkpoint, config = open_model(path)
    check_tensors(checkpoint, config)
    checkpoint.close()
    assert config.model_type == model_type and np.isfinite(logits(path)).all()


def test_a_baichuan_of_another_size_is_refused(made: Made, tmp_path: Path) -> None:
    path = rewritten(made.file("internlm2-as-llama"), tmp_path / "out.gguf", {}, arch="baichuan")
    with pytest.raises(Unsupported, match=r"'baichuan\.block_count': is 3: models of 32 layers have rotations"):
        config_of(path)


@pytest.mark.parametrize("n_layers", [32, 40])
def test_baichuan_rotates_or_has_alibi(llama_cpp: LlamaCpp, tmp_path: Path, n_layers: int) -> None:
    """By its number of layers; heads are 6, no power of 2."""
    folder = tmp_path / "m"
    make_model(
        replace(CUTS["iquestcoder"].case, settings=PLAIN | {"head_dim": 24, "num_hidden_layers": n_layers}), folder
    )
    (folder / "tokenizer.json").write_text(tiny.tokenizer_json())
    quantize_model(folder, tmp_path / "out.gguf", "f32", threads=1)
    path = rewritten(tmp_path / "out.gguf", tmp_path / "other.gguf", {}, arch="baichuan")
    checkpoint, config = open_model(path)
    checkpoint.close()
    assert bool(config.layers[0].attention.slopes) == (n_layers == 40)
    theirs = llama_cpp.logits(path, IDS.tolist(), context=256)
    assert theirs is not None
    assert difference(logits(path), theirs) <= 1e-4


def test_qwen3vl_is_qwen3_for_text(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    make_model(Case("Qwen3"), folder)
    (folder / "tokenizer.json").write_text(tiny.tokenizer_json())
    quantize_model(folder, tmp_path / "out.gguf", "f32", threads=1)
    keys: dict[str, Value | None] = {
        "rope.dimension_sections": np.array([7, 7, 6, 0], np.int32),  # with others it leaves slow pairs unrotated
        "n_deepstack_layers": 0,
    }
    path = rewritten(tmp_path / "out.gguf", tmp_path / "other.gguf", keys, arch="qwen3vl")
    ours, theirs = logits(path), llama_cpp.logits(path, IDS.tolist(), context=256)
    assert (ours == logits(folder)).all()
    assert theirs is not None and difference(ours, theirs) <= 1e-4


def test_inspect_says_that_it_runs_and_in_how_much(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    path = made.file("gemma3")
    with pytest.raises(SystemExit, match="0"):
        run(["inspect", str(path), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["runs"] and facts["n_windowed_layers"] == 6 and len(facts["ropes"]) == 2
    assert facts["kv_bytes_per_1000_tokens"]["f16"] == 1000 * 7 * 2 * (40 + 40) * 2
    with pytest.raises(SystemExit, match="0"):
        run(["inspect", str(path)])
    assert "yes, in" in capsys.readouterr().out


class _Changed:
    """A file with another value of one key, in memory."""

    def __init__(self, file: GgufFile, key: str, value: Any) -> None:
        self.path, self.tensors, self.read = file.path, file.tensors, file.read
        self.metadata = {**file.metadata, key: value}


@pytest.mark.parametrize("name", CUTS)
def test_keys_of_other_computations_are_refused_in_every_architecture(made: Made, name: str) -> None:
    """A key that this architecture does not read, with a value that no architecture ignores."""
    with GgufFile(made.file(name)) as file:
        arch = str(file.metadata["general.architecture"])
        read = ARCHITECTURES[arch].reads | FOLLOWED | NO_EFFECT.keys() | {"rope.freq_base_swa"}
        for key in sorted(NAMES - read - {"attention.rope_pattern"}):
            with pytest.raises(EngineError, match=rf"'{arch}\.{key}'"):
                read_config(_Changed(file, f"{arch}.{key}", 7))
