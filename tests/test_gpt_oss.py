"""gpt-oss with experts in MXFP4, as published: blocks and scales in safetensors files, the same bits in GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import tiny
from decoder_families import GPT_OSS, ODD, Case, make_model
from fabula import _native, ops
from fabula.cli.main import cli
from fabula.engine.runner import Runner
from fabula.errors import InvalidArgument, ModelFileError, Unsupported
from fabula.export.quantize import quantize_model
from fabula.formats.checkpoint import DType, TensorInfo
from fabula.formats.gguf import GgufFile
from fabula.formats.mxfp4 import ggml_blocks, joined
from fabula.models.opening import open_model
from fabula.models.precision import precision_of
from fabula.models.rope import make_rope
from llama_peer import LlamaCpp

CASE = Case(
    "GptOss",
    ODD | GPT_OSS | {"hidden_size": 96, "intermediate_size": 64}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
)  # fmt: skip
ISAS = [cast(_native.Isa, isa) for isa in get_args(_native.Isa) if isa != "auto" and _native.isa_available(isa)]
IDS = np.random.default_rng(2).integers(3, 203, 60).astype(np.int32)
F32 = npt.NDArray[np.float32]


def packed(rng: np.random.Generator, *shape: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Random blocks [..., n, 16] and scales [..., n] of a tensor [..., rows, 32 n]."""
    *rows, n_columns = shape
    blocks = rng.integers(0, 256, (*rows, n_columns // 32, 16), dtype=np.uint8)
    return blocks, rng.integers(119, 123, (*rows, n_columns // 32), dtype=np.uint8)


class Published:
    """A folder as OpenAI published its models, and the same model in transformers, dequantized."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_model(CASE, folder)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        rng = np.random.default_rng(5)
        self.blocks: dict[str, npt.NDArray[np.uint8]] = {}
        for layer in range(3):
            for part, shape in (("gate_up_proj", (7, 128, 96)), ("down_proj", (7, 96, 64))):
                name = f"model.layers.{layer}.mlp.experts.{part}"
                blocks, scales = packed(rng, *shape)
                del tensors[name]
                tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
                self.blocks[name] = ggml_blocks(blocks, scales)
                whole = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
                with torch.no_grad():
                    getattr(self.model.model.layers[layer].mlp.experts, part).copy_(whole)
        save_file(tensors, file)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "tokenizer.json").write_text(tiny.tokenizer_json(), encoding="utf-8")
        ends = json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
        (folder / "tokenizer_config.json").write_text(ends, encoding="utf-8")

    def expected(self) -> F32:
        with torch.no_grad():
            logits = self.model(torch.tensor(IDS[None].astype(np.int64)), use_cache=False).logits[0]
        return np.asarray(logits.numpy())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return Published(tmp_path_factory.mktemp("gpt_oss"))


def logits(path: Path, **options: Any) -> F32:
    checkpoint, _ = open_model(path)
    try:
        settings: dict[str, Any] = {"weights": DType.F32, "kv": (DType.F32, DType.F32), "n_threads": 2}
        runner = Runner(checkpoint, **(settings | options))
    finally:
        checkpoint.close()
    try:
        return np.array(next(runner.all_logits(IDS)))
    finally:
        runner.close()


def difference(ours: F32, theirs: F32) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_blocks_are_the_numbers_of_transformers() -> None:
    blocks, scales = packed(np.random.default_rng(1), 3, 10, 96)
    blocks[0, 0, 0] = np.arange(16) * 0x11
    scales[0, 0] = 0, 1, 252
    theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
    ours = _native.dequantize(DType.MXFP4, ggml_blocks(blocks, scales), 3 * 10 * 96).reshape(3, 10, 96)
    np.testing.assert_array_equal(ours, theirs.transpose(1, 2).numpy())


@pytest.mark.parametrize("n_tokens", [1, 2, 5, 30, 47])
def test_products_have_the_same_bits_on_every_instruction_set(n_tokens: int) -> None:
    rng = np.random.default_rng(n_tokens)
    matrix, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((53, 288), (n_tokens, 288)))
    weight = ops.pack(matrix, precision="mxfp4")
    first, *others = [ops.linear(x, weight, isa=isa) for isa in ISAS]
    for other in others:
        np.testing.assert_array_equal(other, first)
    exact = x.astype(np.float64) @ np.stack([weight.row(i) for i in range(53)]).astype(np.float64).T
    np.testing.assert_allclose(first, exact, atol=0.02 * np.abs(exact).max())


def test_logits_are_those_of_transformers(published: Published) -> None:
    theirs = published.expected()
    assert difference(logits(published.folder), theirs) <= 1e-4
    as_it_is = logits(published.folder, weights=lambda info: info.dtype)
    assert 1e-5 < difference(as_it_is, theirs) <= 0.05  # products take their input in 8 bits


def test_experts_keep_their_bits_in_gguf(published: Published, tmp_path: Path) -> None:
    quantize_model(published.folder, tmp_path / "out.gguf", "mxfp4")
    with GgufFile(tmp_path / "out.gguf") as file:
        kinds = {name.removeprefix("blk.0."): tensor.dtype for name, tensor in file.tensors.items()}
        assert {kinds[f"ffn_{part}_exps.weight"] for part in ("gate", "up", "down")} == {DType.MXFP4}
        assert kinds["attn_q.weight"] is DType.Q8_0 and kinds["ffn_gate_inp.weight"] is DType.F32
        for layer in range(3):
            stored = {part: file.read(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up", "down")}
            both = published.blocks[f"model.layers.{layer}.mlp.experts.gate_up_proj"].reshape(7, 128, -1)
            np.testing.assert_array_equal(stored["gate"], both[:, ::2].reshape(-1))
            np.testing.assert_array_equal(stored["up"], both[:, 1::2].reshape(-1))
            np.testing.assert_array_equal(
                stored["down"], published.blocks[f"model.layers.{layer}.mlp.experts.down_proj"]
            )
    assert difference(logits(tmp_path / "out.gguf"), published.expected()) <= 0.05  # the others are in Q8_0


def test_llama_cpp_reads_it_alike(published: Published, tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    quantize_model(published.folder, tmp_path / "out.gguf", "mxfp4")
    theirs = llama_cpp.logits(tmp_path / "out.gguf", IDS.tolist())
    assert theirs is not None
    exact, ours = logits(tmp_path / "out.gguf"), logits(tmp_path / "out.gguf", weights=lambda info: info.dtype)
    assert difference(ours, exact) <= 1.5 * difference(theirs, exact)


def test_llama_cpp_cuts_the_ramp_of_yarn(tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    """Its logits are those of the model whose config has truncate true, and of no other: the ends of the ramp are cut
    to whole numbers there. The published config, its reference code and transformers do not cut them."""
    folder = tmp_path / "m"
    settings = {**ODD, **GPT_OSS, "attention_bias": True}  # transformers' rope for this family: YaRN, not cut
    model = make_model(Case("GptOss", settings), folder)
    (folder / "tokenizer.json").write_text(tiny.tokenizer_json(), encoding="utf-8")
    quantize_model(folder, tmp_path / "out.gguf", "f32", threads=1)
    theirs = llama_cpp.logits(tmp_path / "out.gguf", IDS.tolist(), context=256)
    assert theirs is not None
    with torch.no_grad():
        exact = model(torch.tensor(IDS[None].astype(np.int64)), use_cache=False).logits[0].numpy()
    assert difference(logits(tmp_path / "out.gguf"), exact) <= 1e-4 < 1e-3 < difference(theirs, exact)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["rope_parameters"]["truncate"] is False
    config["rope_parameters"]["truncate"] = True
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert difference(logits(folder), theirs) <= 1e-5


@pytest.mark.parametrize(("head_dim", "largest"), [(64, 0.43), (40, 0.083)])
def test_what_the_cut_does_to_angles(head_dim: int, largest: float) -> None:
    """By how much frequencies differ, as a part of those that are cut: by nothing else than the cut."""
    rope = {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "rope_theta": 150000.0,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    exact, cut = (make_rope(rope | {"truncate": is_cut}, head_dim, 131072, 131072, Path("x")) for is_cut in (0, 1))
    assert exact.scale == cut.scale == pytest.approx(0.1 * np.log(32) + 1)
    apart = np.abs(exact.inv_freq / cut.inv_freq - 1)
    assert apart.max() == pytest.approx(largest, rel=0.01) and (apart > 1e-5).sum() == (9 if head_dim == 64 else 5)


def test_experts_in_one_tensor_have_the_role_of_an_mlp(published: Published) -> None:
    """`--weights` takes the formats in memory that `fabula quantize` writes."""
    checkpoint, config = open_model(published.folder)
    checkpoint.close()
    choose, prefix = precision_of("mxfp4", config), "model.layers.0.mlp."
    matrices = ("experts.gate_up_proj", "experts.down_proj", "experts.3.up_proj.weight", "experts.up_proj.weight")
    for name in matrices:
        assert choose(TensorInfo(prefix + name, DType.BF16, (7, 128, 96), 7 * 128 * 96 * 2)) is DType.MXFP4
    assert choose(TensorInfo(prefix + "gate.weight", DType.BF16, (7, 96), 7 * 96 * 2)) is DType.F32
    assert choose(TensorInfo("model.layers.0.self_attn.q_proj.weight", DType.BF16, (96, 96), 96 * 96 * 2)) is DType.Q8_0
    last = precision_of("q4_k_m", config)
    assert last(TensorInfo("model.layers.2.mlp.experts.down_proj", DType.F32, (7, 96, 256), 1)) is DType.Q6_K


def test_shapes_that_do_not_belong_together(tmp_path: Path) -> None:
    assert joined("m", (2, 3, 4, 16), (2, 3, 4), tmp_path).shape == (2, 3, 128)
    for blocks, scales in [((3, 4, 16), (3, 5)), ((3, 4, 8), (3, 4)), ((4, 16), (4,)), ((16,), ())]:
        with pytest.raises(ModelFileError, match=r"'m_blocks' has shape .*, must be \[\.\.\., rows, n, 16\]"):
            joined("m", blocks, scales, tmp_path)


def test_blocks_without_scales_are_named(published: Published, tmp_path: Path) -> None:
    tensors = load_file(published.folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((published.folder / "config.json").read_bytes())
    with pytest.raises((ModelFileError, Unsupported), match=r"layers\.1\.mlp\.experts"):
        logits(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("swiglu_alpha", 1.5, Unsupported),
        ("swiglu_limit", 0.0, ModelFileError),
        ("num_local_experts", 0, ModelFileError),
    ],
)
def test_fields_of_experts(published: Published, tmp_path: Path, field: str, value: float, error: type) -> None:
    config = json.loads((published.folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes((published.folder / "model.safetensors").read_bytes())
    with pytest.raises(error, match=field):
        open_model(tmp_path)


def test_a_clamped_gate_is_for_gates_only() -> None:
    import test_experts
    from fabula._program import Op
    from fabula.models import builder as kinds

    x = test_experts.random(3, 4, 32)
    op = Op(kind=kinds.LINEAR, input=0, out=1, weight=test_experts.ops.pack(x), activation=10, limit=7.0)
    with pytest.raises(InvalidArgument, match="activation 10 is one of gates"):
        test_experts.Rows([x], [4], [op], 1).run()


def test_inspect_shows_what_a_token_reads(published: Published) -> None:
    found = CliRunner().invoke(cli, ["inspect", str(published.folder), "--json"])
    facts = json.loads(found.output)
    assert (facts["n_experts"], facts["n_chosen_experts"]) == (7, 3)
    checkpoint, _ = open_model(published.folder)
    try:
        infos = list(checkpoint.tensors.values())
    finally:
        checkpoint.close()
    experts = [info for info in infos if ".mlp.experts." in info.name]
    embedding = next(info for info in infos if info.name == "model.embed_tokens.weight")
    others = sum(info.n_bytes for info in infos) - sum(info.n_bytes for info in experts) - embedding.n_bytes
    read = others + 3 / 7 * sum(info.n_bytes for info in experts) + embedding.n_bytes / embedding.shape[0]
    assert abs(facts["active_bytes"] - read) <= 1
    assert facts["n_active_parameters"] < facts["n_parameters"]
    assert facts["bytes_on_disk"]["MXFP4"] == 3 * 7 * (128 * 3 + 96 * 2) * 17
    shown = CliRunner().invoke(cli, ["inspect", str(published.folder)]).output
    assert "3 of 7 in a layer: a token reads" in shown
