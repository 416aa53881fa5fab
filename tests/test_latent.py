"""Multi-head latent attention: its operators alone, values that are a part of K, and its matrices in files.

Whole families are in decoder_families.py.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

import tiny
from decoder_families import CASES, make_model
from fabula import _native, ops
from fabula._native import F32, KvLayer, PagePool, page_bytes
from fabula._program import BatchSequence, Heads, Op, Program, RopeTable, Shape
from fabula.engine.runner import Runner
from fabula.errors import InvalidArgument, ModelFileError, Unsupported
from fabula.export.quantize import quantize_model
from fabula.formats.checkpoint import DType
from fabula.formats.gguf import GgufFile
from fabula.formats.gguf_write import GgufWriter, NewTensor
from fabula.models import builder as kinds
from fabula.models.opening import open_model
from llama_peer import LlamaCpp
from test_decoder_families import I32, Logits, assert_close, expected, load, text
from test_experts import ISAS, Rows, held, pack, random

KV = [DType.F32, DType.F16, DType.BF16, DType.Q8_0]


# ---- A matrix for each head -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16, DType.Q8_0, DType.Q4_0])
@pytest.mark.parametrize(("n_rows", "copied"), [(40, 12), (27, 0), (150, 3)])
def test_each_head_is_multiplied_by_its_matrix(dtype: DType, n_rows: int, copied: int) -> None:
    n, n_columns, n_tokens = 5, 64, 71
    x, matrices = random(1, n_tokens, n * (copied + n_columns)), random(2, n, n_rows, n_columns)
    weight = pack(matrices, dtype)
    width = n * (copied + n_rows)
    program = Rows([x], [width], [Op(kind=kinds.HEAD_LINEAR, input=0, out=1, weight=weight)], 1)
    ours = program.everywhere()
    np.testing.assert_array_equal(program.run(n_threads=3), ours)
    for rows in ([7], [3, 70], list(range(40))):
        np.testing.assert_array_equal(program.run(rows, n_threads=2), ours[rows])
    heads = x.reshape(n_tokens, n, -1).astype(np.float64)
    products = np.einsum("thk,hrk->thr", heads[..., copied:], held(weight))
    wanted = np.concatenate([heads[..., :copied], products], axis=2)
    bound = 1e-6 if dtype in (DType.F32, DType.F16) else 1e-2  # inputs are rounded as the weight wants them
    assert np.abs(ours.reshape(wanted.shape) - wanted).max() <= bound * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("in_width", "out_width", "rest", "words"),
    [
        (128, 120, {}, "3 matrices of 40 columns for a buffer of 128"),
        (90, 120, {}, "3 matrices of 40 columns"),
        (120, 59, {}, "do not fit buffer 1 of 59"),
        (120, 90, {"vector": np.ones(60, np.float32)}, "has no column, bias or activation"),
    ],
)
def test_what_a_product_of_heads_refuses(in_width: int, out_width: int, rest: dict[str, Any], words: str) -> None:
    op = Op(kind=kinds.HEAD_LINEAR, input=0, out=1, weight=pack(random(1, 3, 20, 40), DType.F32), **rest)
    with pytest.raises(InvalidArgument, match=words):
        Rows([random(2, 4, in_width)], [out_width], [op], 1).run()


def test_a_buffer_may_be_filled_from_both_ends() -> None:
    """The end first, then columns from 0 on; a gap or an overlap is refused, and the next round begins anew."""
    x, a, b, c = random(1, 6, 24), random(2, 10, 24), random(3, 7, 24), random(4, 5, 24)

    def linear(matrix: F32, column: int) -> Op:
        return Op(kind=kinds.LINEAR, input=0, out=1, weight=ops.pack(matrix), column=column)

    ends = [linear(c, 17), linear(a, 0), linear(b, 10)]
    wanted = np.concatenate([x @ a.T, x @ b.T, x @ c.T], axis=1)
    for operators in (ends, [*ends, *ends], [linear(a, 0), linear(c, 17), linear(b, 10)]):
        np.testing.assert_allclose(Rows([x], [22], operators, 1).everywhere(), wanted, atol=1e-5)
    for operators, words in (
        ([linear(c, 17), linear(a, 0)], "before all of it was written"),
        ([linear(c, 17), linear(b, 8)], "does not follow"),
        ([linear(c, 17), linear(a, 0), linear(b, 9)], "does not follow"),
        ([linear(c, 17), linear(a, 0), linear(a, 10)], "does not follow"),
        ([linear(c, 5), linear(a, 0)], "does not follow"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            Rows([x], [22], operators, 1).run()


# ---- Values that are a part of K ------------------------------------------------------------------------------------


class Attending:
    """Attention over K that holds V, or over both: each token's row of a table is its q, k (and v) heads."""

    def __init__(self, table: F32, heads: Heads, *, norm: F32 | None = None, rotated: int = 0) -> None:
        self.heads, self.n = heads, len(table)
        width = heads.n_heads * heads.v_dim
        head = {"input": 0, "heads": 0}
        norms = (
            [Op(kind=kinds.HEAD_NORM, **head, vector2=norm, eps=1e-6, flags=kinds.HEADS_LATENT)]
            if norm is not None
            else []
        )
        self.operators = [
            Op(kind=kinds.EMBED, out=0, weight=ops.pack(table)),
            *norms,
            *([Op(kind=kinds.ROPE, **head)] if rotated else []),
            Op(kind=kinds.KV_WRITE, **head),
            Op(kind=kinds.ATTENTION, **head, out=1, scale=0.2),
            Op(kind=kinds.GATHER_OUTPUTS, input=1, out=2),
            Op(kind=kinds.LOGITS, input=2, weight=ops.pack(np.eye(width, dtype=np.float32))),
        ]
        self.widths = [table.shape[1], width, width]
        self.ropes = (RopeTable(np.linspace(1, 0.1, rotated // 2, dtype=np.float32)),) if rotated else ()
        self.layer = KvLayer(heads.n_kv_heads, heads.k_dim, 0 if heads.v_in_k else heads.v_dim)

    def run(self, dtype: DType, steps: list[int], isa: _native.Isa = "auto", n_threads: int = 1) -> F32:
        """All tokens in one sequence, in steps of so many."""
        shape = Shape(n_layers=1, vocab_size=self.n, max_tokens=self.n, heads=(self.heads,), ropes=self.ropes)
        program = Program(shape, self.widths, self.operators, n_threads=n_threads, isa=isa)
        n_pages = -(-self.n // 32)
        pool = PagePool(dtype, n_pages, [self.layer])
        pages, past, found = np.arange(n_pages, dtype=np.int32), 0, []
        for n in steps:
            tokens = np.arange(past, past + n, dtype=np.int32)
            found.append(program.run(pool, [BatchSequence(pages[: -(-(past + n) // 32)], past, tokens)], np.arange(n)))
            past += n
        return np.concatenate(found)


@pytest.mark.parametrize("n_heads", [3, 20, 60])  # 60: more heads than a tile has rows
@pytest.mark.parametrize("v_dim", [40, 48])
@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16])
def test_values_in_keys_have_the_bits_of_stored_ones(n_heads: int, v_dim: int, dtype: DType) -> None:
    n, rotated = 301, 12
    k_dim = rotated + v_dim
    q, k = random(1, n, n_heads * k_dim), random(2, n, k_dim)
    apart = Attending(np.concatenate([q, k, k[:, rotated:]], axis=1), Heads(n_heads, 1, k_dim, v_dim), rotated=rotated)
    inside = Attending(np.concatenate([q, k], axis=1), Heads(n_heads, 1, k_dim, v_dim, 0, 1), rotated=rotated)
    wanted = apart.run(dtype, [n])
    np.testing.assert_array_equal(inside.run(dtype, [n]), wanted)
    np.testing.assert_array_equal(inside.run(dtype, [31, 1, 1, 200, 1, 67], n_threads=2), wanted)


@pytest.mark.parametrize("dtype", KV)
def test_latent_attention(dtype: DType) -> None:
    """The latent is normed, the rest rotated; both in prefill and, fused into attention, in decode."""
    n, n_heads, rotated, rank = 70, 4, 6, 25
    q, k, weight = random(1, n, n_heads * (rotated + rank)), random(2, n, rotated + rank), 1 + random(3, rank) / 4
    made = Attending(
        np.concatenate([q, k], axis=1), Heads(n_heads, 1, rotated + rank, rank, 0, 1), norm=weight, rotated=rotated
    )
    ours = made.run(dtype, [n])
    for isa in ISAS:
        np.testing.assert_array_equal(made.run(dtype, [n], isa=isa), ours)
    for steps in ([1] * n, [33, 1, 36], [1, 69]):
        np.testing.assert_array_equal(made.run(dtype, steps, n_threads=2), ours)
    latent = k[:, rotated:].astype(np.float64)
    latent = latent / np.sqrt((latent**2).mean(axis=1, keepdims=True) + 1e-6) * weight
    angles = np.arange(n)[:, None] * np.linspace(1, 0.1, rotated // 2)
    turn = np.exp(1j * angles)

    def turned(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        half = rotated // 2
        pairs = (x[..., :half] + 1j * x[..., half:]) * turn.reshape(n, *[1] * (x.ndim - 2), half)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    keys = np.concatenate([turned(k[:, :rotated]), latent], axis=1)
    queries = q.reshape(n, n_heads, -1).astype(np.float64)
    queries = np.concatenate([turned(queries[..., :rotated]), queries[..., rotated:]], axis=2)
    scores = 0.2 * np.einsum("thd,sd->hts", queries, keys) + np.where(np.tri(n) > 0, 0, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    wanted = np.einsum("hts,sr->thr", weights, latent).reshape(n, -1)
    bound = {DType.F32: 1e-5, DType.F16: 2e-3}.get(dtype, 3e-2)
    assert np.abs(ours - wanted).max() <= bound * np.abs(wanted).max()


def test_a_page_holds_latents_once() -> None:
    """DeepSeek V3: 576 numbers a position and layer."""
    assert page_bytes(DType.F16, [KvLayer(1, 576, 0)]) == 32 * 576 * 2
    assert page_bytes((DType.Q8_0, DType.F16), [KvLayer(1, 576, 0)]) == 32 * (576 + 4)


@pytest.mark.parametrize(
    ("heads", "layer", "words"),
    [
        (Heads(4, 1, 16, 24, -1, 1), KvLayer(1, 16, 0), "v_in_k is 1 with heads of 16 and 24"),
        (Heads(4, 1, 24, 16, -1, 2), KvLayer(1, 24, 0), "v_in_k is 2"),
        (Heads(4, 1, 24, 16, -1, 1), KvLayer(1, 24, 16), "layer 0 of the page pool has 1 KV heads of 24 and 16"),
    ],
)
def test_geometries_and_pages_that_do_not_fit(heads: Heads, layer: KvLayer, words: str) -> None:
    made = Attending(random(1, 5, 5 * heads.k_dim), heads)
    made.layer = layer
    with pytest.raises(InvalidArgument, match=words):
        made.run(DType.F32, [5])


def test_a_norm_of_latents_needs_latents() -> None:
    with pytest.raises(InvalidArgument, match="a norm of latents needs k heads that hold v, 16 weights"):
        Attending(random(1, 5, 4 * 24 + 24 + 16), Heads(4, 1, 24, 16, -1), norm=np.ones(16, np.float32)).run(
            DType.F32, [5]
        )
    with pytest.raises(InvalidArgument, match="16 weights"):
        Attending(random(1, 5, 5 * 24), Heads(4, 1, 24, 16, -1, 1), norm=np.ones(24, np.float32)).run(DType.F32, [5])


# ---- Models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("deepseek")
    return folder, make_model(CASES["deepseek_v3"], folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Without experts, of which rounding may choose others; all matrices are whole blocks."""
    folder, case = tmp_path_factory.mktemp("dense"), CASES["youtu"]
    sizes = {"hidden_size": 96, "intermediate_size": 96, "kv_lora_rank": 64, "q_lora_rank": 64}
    sizes |= {"qk_nope_head_dim": 32, "v_head_dim": 32}
    return folder, make_model(replace(case, settings=case.settings | sizes), folder)


def bits(runner: Runner, ids: I32, splits: list[int]) -> Logits:
    """The logits of a text, the same in one step and in several."""
    (ours,) = runner.all_logits(ids)
    with runner.sequence() as sequence:
        parts = [runner.step([(sequence, part)], np.arange(len(part))) for part in np.split(ids, splits)]
    assert (np.concatenate(parts) == ours).all()
    return np.asarray(ours)


@pytest.mark.parametrize("kv", KV)
def test_a_tokens_bits_do_not_depend_on_its_step(deepseek: tuple[Path, Any], kv: DType) -> None:
    ids, runners = text(1, 90), [load(deepseek[0], kv=(kv, kv), n_threads=n) for n in (1, 3)]
    try:
        one, other = (bits(runner, ids, [1, 34, 35, 88]) for runner in runners)
        assert (one == other).all()
        assert runners[0].pool.page_bytes == page_bytes(kv, [KvLayer(1, 52, 0)] * 3)
    finally:
        for runner in runners:
            runner.close()


@pytest.mark.parametrize("weights", [DType.F16, DType.BF16, DType.Q8_0, DType.Q4_0])
@pytest.mark.parametrize("kv", [DType.F16, DType.Q8_0])
def test_formats_of_weights_and_latents(dense: tuple[Path, Any], weights: DType, kv: DType) -> None:
    folder, model = dense
    ids, runner = text(3, 70), load(folder, weights=weights, kv=(kv, kv))
    try:
        ours, theirs = bits(runner, ids, [3, 69]), expected(model, ids)
        bound = {DType.F16: 0.05, DType.BF16: 0.05, DType.Q8_0: 0.1}.get(weights, 0.8)
        assert np.linalg.norm(ours - theirs) <= bound * np.linalg.norm(theirs)
    finally:
        runner.close()


def test_kimi_k2_is_deepseek_v3_under_another_name(deepseek: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = deepseek
    config = json.loads((folder / "config.json").read_text())
    published = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(config | published | {"model_type": "kimi_k2"}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    runner = load(tmp_path)
    ids = text(2, 40)
    try:
        assert runner.config.model_type == "kimi_k2"
        assert_close(next(runner.all_logits(ids)), expected(model, ids))
    finally:
        runner.close()


def test_layers_that_predict_further_tokens_are_left_out(deepseek: tuple[Path, Any], tmp_path: Path) -> None:
    """Without a warning: published files have them."""
    tensors = load_file(deepseek[0] / "model.safetensors")
    extra = {
        f"model.layers.3.{name}.weight": np.ones((2, 2), np.float32) for name in ("eh_proj", "mlp.up_proj", "enorm")
    }
    save_file(tensors | extra, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((deepseek[0] / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path).close()


def test_published_fp8_files_are_refused_by_name(deepseek: tuple[Path, Any], tmp_path: Path) -> None:
    config = json.loads((deepseek[0] / "config.json").read_text())
    fp8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))
    (tmp_path / "model.safetensors").symlink_to(deepseek[0] / "model.safetensors")
    with pytest.raises(Unsupported, match="FP8"):
        open_model(tmp_path)


def test_a_joined_matrix_of_another_shape_is_refused(deepseek: tuple[Path, Any], tmp_path: Path) -> None:
    tensors = load_file(deepseek[0] / "model.safetensors")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    save_file(tensors | {name: np.ascontiguousarray(tensors[name][:-1])}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((deepseek[0] / "config.json").read_text())
    with pytest.raises(ModelFileError, match=r"layers\.1\.self_attn\.kv_b_proj\.weight' has shape"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 2}, "'num_key_value_heads' is 2, must be num_attention_heads: 6"),
        ({"kv_lora_rank": 1020}, "'kv_lora_rank' is 1020: with qk_rope_head_dim it makes more than 1024"),
        ({"qk_rope_head_dim": 7}, "'head_dim' is 7, must be even"),
        ({"v_head_dim": None}, "'v_head_dim' is missing"),
    ],
)
def test_configs_that_are_refused(
    deepseek: tuple[Path, Any], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    config = json.loads((deepseek[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    (tmp_path / "model.safetensors").symlink_to(deepseek[0] / "model.safetensors")
    with pytest.raises((ModelFileError, Unsupported), match=words):
        load(tmp_path)


# ---- Older files in GGUF --------------------------------------------------------------------------------------------


def joined_file(folder: Path, target: Path, kind: str) -> None:
    """Writes a model as llama.cpp once did: k_b and v_b in one matrix, in the format that `kind` names."""
    (folder / "tokenizer.json").write_text(tiny.tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    new = target.with_suffix(".new.gguf")
    quantize_model(folder, new, "f32", threads=1)
    with contextlib.closing(GgufFile(new)) as file:
        metadata: dict[str, Any] = dict(file.metadata)
        heads, rank = metadata["deepseek2.attention.head_count"], metadata["deepseek2.attention.kv_lora_rank"]
        for part in ("key", "value"):
            metadata[f"deepseek2.attention.{part}_length"] = metadata.pop(f"deepseek2.attention.{part}_length_mla")
        metadata["deepseek2.attention.head_count_kv"] = heads
        dtype, tensors = DType[kind.upper()], {}
        for name, info in file.tensors.items():
            raw = file.read(name)
            if name.endswith("attn_k_b.weight"):
                value = name.replace("attn_k_b", "attn_v_b")
                k = raw.view(np.float32).reshape(info.shape).swapaxes(1, 2)
                v = file.read(value).view(np.float32).reshape(file.tensors[value].shape)
                both = np.concatenate([k, v], axis=1).reshape(-1, rank)
                joined = name.replace("attn_k_b", "attn_kv_b")
                tensors[joined] = NewTensor(joined, dtype, both.shape), _native.quantize(dtype, both, 1)
            elif not name.endswith("attn_v_b.weight"):
                tensors[name] = NewTensor(name, info.dtype, info.shape), raw
        with GgufWriter(target, metadata, [tensor for tensor, _ in tensors.values()]) as writer:
            for name, (_, raw) in tensors.items():
                writer.write(name, raw)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_older_files_have_keys_and_values_in_one_matrix(dense: tuple[Path, Any], tmp_path: Path, kind: str) -> None:
    target, ids = tmp_path / "old.gguf", text(4, 40)
    joined_file(dense[0], target, kind)
    theirs, checkpoint = expected(dense[1], ids), open_model(target)[0]
    with contextlib.closing(checkpoint):
        runner = Runner(checkpoint, weights=lambda info: info.dtype, kv=(DType.F32, DType.F32), n_threads=1)
    try:
        error = np.abs(bits(runner, ids, [11]) - theirs).max() / np.abs(theirs).max()
    finally:
        runner.close()
    assert error <= {"f32": 1e-4, "f16": 5e-3, "q8_0": 5e-2}[kind]


def test_llama_cpp_reads_an_older_file_alike(llama_cpp: LlamaCpp, dense: tuple[Path, Any], tmp_path: Path) -> None:
    joined_file(dense[0], tmp_path / "old.gguf", "f32")
    ids = text(4, 40)
    theirs = llama_cpp.logits(tmp_path / "old.gguf", ids.tolist())
    assert theirs is not None
    assert_close(theirs, expected(dense[1], ids))
