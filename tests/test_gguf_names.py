"""GGUF in Hugging Face's words: config, names, the order of rows, and every refusal.

transformers' own GGUF code is the second opinion on the order of rows.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from fabula.errors import EngineError, ModelFileError, Unsupported
from fabula.formats.checkpoint import Checkpoint, DType
from fabula.formats.gguf import GgufFile
from fabula.formats.gguf_names import open_gguf
from gguf_builder import (
    ARRAY,
    BLOCKS,
    F16,
    F32,
    FLOAT32,
    FLOAT64,
    HEADS,
    HIDDEN,
    INT32,
    INT64,
    KV_HEADS,
    LAYERS,
    Q4_0,
    Q5_1,
    Q8_0,
    STRING,
    UINT16,
    UINT32,
    VOCAB,
    Key,
    Tensor,
    array,
    build,
    key,
    replaced,
    small_keys,
    small_tensors,
)  # fmt: skip
from waiting import n_open_files

HEAD_DIM = HIDDEN // HEADS


@pytest.fixture
def checkpoint(tmp_path: Path):
    """A function that writes a file and opens it; closes what it opened."""
    opened = []

    def checkpoint(keys: list[Key], tensors: list[Tensor]) -> Checkpoint:
        path = tmp_path / "model.gguf"
        path.write_bytes(build(keys, tensors))
        opened.append(open_gguf(path))
        return opened[-1]

    yield checkpoint
    for one in opened:
        one.close()


# ---- Config ------------------------------------------------------------------------------------------


def test_config_of_llama(checkpoint) -> None:
    model = checkpoint(small_keys(), small_tensors())
    assert model.format == "gguf"
    assert model.path.name == "model.gguf"
    assert model.metadata["general.architecture"] == "llama"
    assert model.config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "vocab_size": 8,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }


@pytest.mark.parametrize(("arch", "bias"), [("qwen2", True), ("qwen3", False)])
def test_config_of_qwen(checkpoint, arch: str, bias: bool) -> None:
    model = checkpoint(small_keys(arch), small_tensors(arch))
    assert model.config["model_type"] == arch
    assert model.config["architectures"] == [f"Qwen{arch[-1]}ForCausalLM"]
    assert model.config["attention_bias"] is bias
    assert ("model.layers.1.self_attn.q_proj.bias" in model.tensors) is bias
    assert ("model.layers.1.self_attn.q_norm.weight" in model.tensors) is (arch == "qwen3")


def test_what_keys_change(checkpoint) -> None:
    def config(*new: Key, without: str | None = None, tensors: list[Tensor] | None = None):
        keys = small_keys()
        for one in new:
            keys = replaced(keys, one)
        if without is not None:
            keys = replaced(keys, None, without)
        return checkpoint(keys, small_tensors() if tensors is None else tensors).config

    assert config(without="llama.attention.head_count_kv", tensors=[])["num_key_value_heads"] == HEADS
    assert config(without="llama.rope.freq_base")["rope_theta"] == 10000.0
    assert config(key("llama.rope.freq_base", FLOAT32, 1e6))["rope_theta"] == 1e6
    assert config(key("llama.attention.layer_norm_rms_epsilon", FLOAT64, 1.25e-6))["rms_norm_eps"] == 1.25e-6
    wide = config(key("llama.attention.key_length", UINT32, 32), tensors=[])
    assert wide["head_dim"] == 32
    output = [*small_tensors(), Tensor("output.weight", [HIDDEN, VOCAB])]
    assert config(tensors=output)["tie_word_embeddings"] is False
    sliding = config(key("llama.attention.sliding_window", UINT32, 77))
    assert (sliding["model_type"], sliding["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert sliding["sliding_window"] == 77
    no_window = config(key("llama.attention.sliding_window", UINT32, 0))
    assert (no_window["model_type"], no_window["sliding_window"]) == ("llama", None)
    assert config(without="tokenizer.ggml.tokens")["vocab_size"] == VOCAB  # from the embedding
    assert config(tensors=[])["vocab_size"] == VOCAB  # from the tokens
    ends = config(key("tokenizer.ggml.eot_token_id", UINT32, 5), key("tokenizer.ggml.eom_token_id", UINT32, 2))
    assert ends["eos_token_id"] == [2, 5]
    assert config(without="tokenizer.ggml.eos_token_id")["eos_token_id"] is None


def test_rope_scaling(checkpoint) -> None:
    def scaling(*new: Key, factors: np.ndarray | None = None):
        tensors = small_tensors()
        if factors is not None:
            tensors.append(Tensor("rope_freqs.weight", [len(factors)], F32, factors.astype("<f4").tobytes()))
        return checkpoint([*small_keys(), *new], tensors)

    kind, factor = "llama.rope.scaling.type", key("llama.rope.scaling.factor", FLOAT32, 4.0)
    assert scaling(key(kind, STRING, "none"), factor).config["rope_scaling"] is None
    linear = scaling(key(kind, STRING, "linear"), factor).config["rope_scaling"]
    assert linear == {"rope_type": "linear", "factor": 4.0}
    original = key("llama.rope.scaling.original_context_length", UINT32, 32)
    yarn = scaling(key(kind, STRING, "yarn"), factor, original).config["rope_scaling"]
    assert yarn == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    attention = key("llama.rope.scaling.attn_factor", FLOAT32, 1.0)
    fast = key("llama.rope.scaling.yarn_beta_fast", FLOAT32, 16.0)
    yarn = scaling(key(kind, STRING, "yarn"), factor, attention, fast).config["rope_scaling"]
    assert yarn["attention_factor"] == pytest.approx(0.1 * np.log(4.0) + 1.0)
    assert yarn["beta_fast"] == 16.0
    model = scaling(factors=np.arange(1, HEAD_DIM // 2 + 1))
    wanted = {"rope_type": "frequency_factors", "factors": [float(i) for i in range(1, HEAD_DIM // 2 + 1)]}
    assert model.config["rope_scaling"] == wanted
    assert not any("rope" in name for name in model.tensors)

    for bad in (
        np.zeros(8),
        np.full(8, np.nan),
        np.full(8, np.inf),
        np.full(8, -1.0),
        np.ones(7),
        np.ones(16),
    ):
        with pytest.raises(ModelFileError, match=r"rope_freqs\.weight"):
            scaling(factors=bad)
    with pytest.raises(Unsupported, match="only one of them may be given"):
        scaling(key(kind, STRING, "linear"), factor, factors=np.ones(8))
    with pytest.raises(Unsupported, match="longrope"):
        scaling(key(kind, STRING, "longrope"), factor)
    with pytest.raises(ModelFileError, match=r"scaling\.factor.*missing"):
        scaling(key(kind, STRING, "linear"))


# ---- Tensors -----------------------------------------------------------------------------------------


def test_names_shapes_and_formats(checkpoint) -> None:
    source = small_tensors(kind=Q8_0)
    model = checkpoint(small_keys(), source)
    layer = [
        "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    names = {f"model.layers.{i}.{name}.weight" for i in range(LAYERS) for name in layer}
    assert set(model.tensors) == names | {"model.embed_tokens.weight", "model.norm.weight"}
    down = model.tensors["model.layers.1.mlp.down_proj.weight"]
    assert (down.dtype, down.shape, down.n_bytes) == (DType.Q8_0, (64, 96), 64 * 96 // 32 * 34)
    for name, info in model.tensors.items():
        assert info.name == name
        assert model.read(name).size == info.n_bytes
    down_bytes = next(t for t in source if t.name == "blk.1.ffn_down.weight").bytes()
    assert model.read("model.layers.1.mlp.down_proj.weight").tobytes() == down_bytes
    with pytest.raises(ModelFileError, match="no tensor"):
        model.read("blk.1.ffn_down.weight")
    model.close()
    model.close()
    with pytest.raises(ModelFileError, match="closed"):
        model.read("model.norm.weight")


def _permuted(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Hugging Face's rows into GGUF's order, as the converter does it; rows [n_heads * head_dim, ...]."""
    split = rows.reshape(n_heads, 2, rows.shape[0] // n_heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("kind", [F32, F16, Q4_0, Q5_1, Q8_0])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_rows_of_q_and_k(checkpoint, arch: str, kind: int) -> None:
    rng = np.random.default_rng(2)
    size, n_bytes = BLOCKS[kind]
    tensors = small_tensors(arch, kind)
    wanted = {}
    for name, n_heads in (("q", HEADS), ("k", KV_HEADS)):
        rows = rng.integers(0, 256, (n_heads * HEAD_DIM, HIDDEN // size * n_bytes), dtype=np.uint8)
        wanted[f"model.layers.1.self_attn.{name}_proj.weight"] = rows
        stored = _permuted(rows, n_heads) if arch == "llama" else rows
        next(t for t in tensors if t.name == f"blk.1.attn_{name}.weight").data = stored.tobytes()
    model = checkpoint(small_keys(arch), tensors)
    for name, rows in wanted.items():
        assert np.array_equal(model.read(name).reshape(rows.shape), rows)


@pytest.mark.parametrize(("kind", "n_bytes"), [(F32, 4), (F16, 2)])
def test_biases_of_q_and_k_are_put_back_too(checkpoint, kind: int, n_bytes: int) -> None:
    bias = np.random.default_rng(3).integers(0, 256, (KV_HEADS * HEAD_DIM, n_bytes), dtype=np.uint8)
    stored = Tensor("blk.0.attn_k.bias", [len(bias)], kind, _permuted(bias, KV_HEADS).tobytes())
    model = checkpoint(small_keys(), [*small_tensors(), stored])
    assert np.array_equal(model.read("model.layers.0.self_attn.k_proj.bias").reshape(bias.shape), bias)


# ---- Refusals ----------------------------------------------------------------------------------------


def _refused(checkpoint, keys: list[Key], tensors: list[Tensor], error: type[EngineError], *words: str) -> None:
    before = n_open_files()
    with pytest.raises(error) as caught:
        checkpoint(keys, tensors)
    for word in ("model.gguf", *words):
        assert word in str(caught.value), str(caught.value)
    assert n_open_files() == before


@pytest.mark.parametrize("arch", ["rwkv7", "LLAMA", "", "x" * 1000, "clip"])
def test_unknown_architectures(checkpoint, arch: str) -> None:
    keys = replaced(small_keys(), key("general.architecture", STRING, arch))
    _refused(checkpoint, keys, small_tensors(), Unsupported, "general.architecture", "llama, qwen2, qwen3")


NEEDED = [
    "general.architecture", "llama.block_count", "llama.context_length", "llama.embedding_length",
    "llama.feed_forward_length", "llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon",
]  # fmt: skip
OPTIONAL = ["llama.attention.head_count_kv", "llama.rope.freq_base", "tokenizer.ggml.bos_token_id"]


@pytest.mark.parametrize("name", NEEDED)
def test_missing_keys(checkpoint, name: str) -> None:
    _refused(checkpoint, replaced(small_keys(), None, name), small_tensors(), ModelFileError, name, "missing")


@pytest.mark.parametrize("name", [*NEEDED, *OPTIONAL, "tokenizer.ggml.tokens"])
def test_keys_of_a_wrong_type(checkpoint, name: str) -> None:
    wrong = [Key(name, ARRAY, array(INT32, [1, 2]))]
    wrong.append(key(name, UINT32, 1) if "epsilon" in name or "freq" in name else key(name, FLOAT32, 1.0))
    for one in wrong:
        _refused(checkpoint, replaced(small_keys(), one), small_tensors(), ModelFileError, name, "must be")


@pytest.mark.parametrize("value", [0, -1, 2**31, -(2**63)])
@pytest.mark.parametrize("name", [n for n in NEEDED if n.endswith(("count", "length"))])
def test_counts_out_of_range(checkpoint, name: str, value: int) -> None:
    keys = replaced(small_keys(), key(name, INT64, value))
    _refused(checkpoint, keys, small_tensors(), ModelFileError, name, str(value))


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"])
def test_numbers_out_of_range(checkpoint, name: str, value: float) -> None:
    keys = replaced(small_keys(), key(name, FLOAT32, value))
    _refused(checkpoint, keys, small_tensors(), ModelFileError, name, str(value))


@pytest.mark.parametrize("name", ["bos", "eos", "eot", "eom"])
def test_token_ids_beyond_the_vocabulary(checkpoint, name: str) -> None:
    wrong = key(f"tokenizer.ggml.{name}_token_id", UINT32, VOCAB)
    _refused(checkpoint, replaced(small_keys(), wrong), small_tensors(), ModelFileError, str(wrong.name), "0 to 7")


def test_vocabulary_and_embedding_disagree(checkpoint) -> None:
    for words in (["a"] * (VOCAB - 1), ["a"] * (VOCAB + 1), []):
        wrong = Key("tokenizer.ggml.tokens", ARRAY, array(STRING, words))
        keys = replaced(small_keys(), wrong)
        _refused(checkpoint, keys, small_tensors(), ModelFileError, "tokenizer.ggml.tokens")
    _refused(checkpoint, replaced(small_keys(), None, "tokenizer.ggml.tokens"), [], ModelFileError, "missing")


@pytest.mark.parametrize(
    ("new", "word"),
    [
        (key("split.count", UINT16, 3), "join"),
        (key("llama.expert_count", UINT32, 8), "experts"),
        (key("general.quantization_version", UINT32, 1), "quantize"),
        (key("llama.rope.dimension_count", UINT32, 8), "16"),
        (key("llama.attention.value_length", UINT32, 32), "16"),
    ],
)
def test_kinds_of_files_not_offered(checkpoint, new: Key, word: str) -> None:
    keys = [*small_keys(), new]
    _refused(checkpoint, keys, small_tensors(kind=Q8_0), Unsupported, str(new.name), word)


def test_harmless_values_of_the_same_keys(checkpoint) -> None:
    keys = [key("split.count", UINT16, 1), key("llama.expert_count", UINT32, 0)]
    keys += [key("general.quantization_version", UINT32, 2), key("llama.rope.dimension_count", UINT32, 16)]
    assert checkpoint([*small_keys(), *keys], small_tensors(kind=Q8_0)).config["head_dim"] == 16


@pytest.mark.parametrize(
    "name",
    ["blk.0.ffn_gate_inp.weight", "blk.0.attn_q.scale", "blk.00.attn_q.weight", "blk.-1.attn_q.weight",
     "blk.0.attn_q.weight.lora_a", "blk.9999999999.attn_q.weight", "v.patch_embd.weight", "output.bias",
     "model.norm.weight", "blk.0.attn_q.weight\n"],
)  # fmt: skip
def test_unknown_tensors(checkpoint, name: str) -> None:
    tensors = [*small_tensors(), Tensor(name, [HIDDEN])]
    _refused(checkpoint, small_keys(), tensors, Unsupported, repr(name))


def test_layers_beyond_block_count(checkpoint) -> None:
    tensors = [*small_tensors(), Tensor(f"blk.{LAYERS}.attn_norm.weight", [HIDDEN])]
    _refused(checkpoint, small_keys(), tensors, ModelFileError, "layer 2", "block_count is 2")


def test_q_and_k_that_do_not_fit_the_heads(checkpoint) -> None:
    for name, rows in (("attn_q", HIDDEN - 2), ("attn_k", HIDDEN), ("attn_q", 1)):
        tensors = [t for t in small_tensors() if t.name != f"blk.0.{name}.weight"]
        tensors.append(Tensor(f"blk.0.{name}.weight", [HIDDEN, rows]))
        _refused(checkpoint, small_keys(), tensors, ModelFileError, f"blk.0.{name}.weight", f"{rows} rows")
    keys = replaced(small_keys(), key("llama.attention.head_count", UINT32, 3))
    _refused(checkpoint, keys, small_tensors(), ModelFileError, "head_count", "64")
    odd = [Tensor("blk.0.attn_q.weight", [HIDDEN, 5 * HEADS])]
    keys = [*small_keys(), key("llama.attention.key_length", UINT32, 5)]
    _refused(checkpoint, keys, odd, ModelFileError, "even")
    quantised = [*small_tensors(), Tensor("blk.0.attn_q.bias", [HIDDEN], Q8_0)]
    _refused(checkpoint, small_keys(), quantised, ModelFileError, "vector")


# ---- A real model ------------------------------------------------------------------------------------


def test_smollm2_config(smollm2_gguf: Path) -> None:
    model = open_gguf(smollm2_gguf)
    model.close()
    assert len(model.tensors) == 272
    assert model.config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def test_smollm2_values_as_transformers_loads_them(smollm2_gguf: Path) -> None:
    loader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    model = open_gguf(smollm2_gguf)
    theirs = loader.LlamaTensorProcessor(config=dict(model.config))
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "mlp.up_proj": "ffn_up",
    }
    with GgufFile(smollm2_gguf) as raw:
        for layer in (0, 1, 15, 29):
            for ours, name in parts.items():
                full = f"blk.{layer}.{name}.weight"
                values = gguf.quants.dequantize(raw.read(full).reshape(raw.tensors[full].shape[0], -1), q4_1)
                wanted = theirs.process(weights=values, name=full).weights
                found = model.read(f"model.layers.{layer}.{ours}.weight").reshape(wanted.shape[0], -1)
                assert np.array_equal(gguf.quants.dequantize(found, q4_1), wanted), full
    model.close()
