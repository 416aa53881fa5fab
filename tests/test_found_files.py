"""Model folders as people have them: tensors under other names, weights in other forms, and the messages for each.

`load` and `fabula inspect` have the same messages; every refusal names what was found and what would work.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import tiny
from fabula.cli.main import run
from fabula.errors import EngineError, InvalidArgument, ModelFileError, ModelFileWarning, Unsupported
from fabula.formats import hub, locate
from fabula.formats.open import open_checkpoint
from fabula.formats.safetensors import INDEX_FILE
from fabula.model import Model
from fabula.models.opening import check_tensors, open_model

TIED = {"tie_word_embeddings": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = list(range(3, 40))
SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


def logits(folder: Path) -> Any:
    with Model.load(folder, threads=1, weights="f32", kv="f32") as model:
        return model.logits(IDS)


@pytest.fixture
def fabula(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """The command line in this process: exit status and what it wrote on stderr."""

    def call(*words: object) -> SimpleNamespace:
        with pytest.raises(SystemExit) as end:
            run([str(word) for word in words])
        return SimpleNamespace(code=int(end.value.code or 0), err=capsys.readouterr().err)

    return call


def without(tensors: tiny.Tensors, *words: str) -> tiny.Tensors:
    return {name: value for name, value in tensors.items() if not any(word in name for word in words)}


def said(folder: Path, fabula: Any) -> str:
    """What load says, which inspect must say, too."""
    with pytest.raises(EngineError) as caught:
        Model.load(folder, threads=1)
    text = str(caught.value)
    result = fabula("inspect", folder)
    assert result.code == 1
    assert _words(text) in _words(result.err)
    return text


def _words(text: str) -> str:
    return re.sub(r"\s+", "", text)


# ---- Names


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return logits(tiny.write_model(tmp_path_factory.mktemp("plain") / "m"))


@pytest.mark.parametrize(
    ("trunk", "head"),
    [
        ("", ""),
        ("model.", "model."),
        ("language_model.model.", "language_model."),
        ("language_model.", ""),
        ("model.language_model.", ""),
        ("_orig_mod.model.", "_orig_mod."),
        ("model._orig_mod.", ""),
        ("module.model.", "module."),
        ("module._orig_mod.model.", "module._orig_mod."),
        ("base_model.model.model.", "base_model.model."),
        ("transformer.", ""),
        ("model.model.", "model."),
    ],
)
def test_prefixes(trunk: str, head: str, plain: Any, tmp_path: Path) -> None:
    def renamed(name: str) -> str:
        return head + name if name == HEAD else trunk + name.removeprefix("model.")

    tensors = {renamed(name): value for name, value in tiny.random_tensors().items()}
    np.testing.assert_array_equal(logits(tiny.write_model(tmp_path / "m", tensors=tensors)), plain)


def test_wrapped_modules_inside_a_name(plain: Any, tmp_path: Path) -> None:
    tensors = {
        re.sub(r"(layers\.\d)", r"\1._checkpoint_wrapped_module", name): value
        for name, value in tiny.random_tensors().items()
    }
    np.testing.assert_array_equal(logits(tiny.write_model(tmp_path / "m", tensors=tensors)), plain)


def test_prefixes_that_are_mixed(plain: Any, tmp_path: Path) -> None:
    tensors = tiny.random_tensors()
    for name in (EMBEDDING, "model.norm.weight"):
        tensors[name.removeprefix("model.")] = tensors.pop(name)
    np.testing.assert_array_equal(logits(tiny.write_model(tmp_path / "m", tensors=tensors)), plain)


def test_a_tied_model_without_prefix_and_head(tmp_path: Path) -> None:
    """As Qwen3-Embedding and whatever AutoModel saves."""
    tensors = without(tiny.random_tensors(), "lm_head")
    named = logits(tiny.write_model(tmp_path / "a", config=TIED, tensors=tensors))
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    folder = tiny.write_model(tmp_path / "b", config=TIED | {"architectures": ["LlamaModel"]}, tensors=bare)
    np.testing.assert_array_equal(logits(folder), named)


def test_a_base_model_without_a_head_gives_embeddings(tmp_path: Path, fabula: Any) -> None:
    """As AutoModel saves one that is not tied (the Mistral embedding models): the same vectors, and no text."""
    tensors = tiny.random_tensors()
    bare = {name.removeprefix("model."): value for name, value in without(tensors, "lm_head").items()}
    folder = tiny.write_model(tmp_path / "a", config={"architectures": ["LlamaModel"]}, tensors=bare)
    whole = tiny.write_model(tmp_path / "b", tensors=tensors)
    with Model.load(folder, threads=1) as model, Model.load(whole, threads=1) as other:
        np.testing.assert_array_equal(model.embed(["the whale"]).vectors, other.embed(["the whale"]).vectors)
        for call in (lambda: model.generate("the whale"), lambda: model.logits([3]), lambda: model.session().say("x")):
            with pytest.raises(Unsupported, match="without a head"):
                call()
    assert fabula("inspect", folder).code == 0
    with pytest.raises(ModelFileError, match=r"lm_head\.weight"):  # of one that should have a head
        Model.load(tiny.write_model(tmp_path / "c", tensors=bare), threads=1)


@pytest.mark.parametrize("double", ["norm.weight", "language_model.model.embed_tokens.weight", "model.lm_head.weight"])
def test_two_names_of_one_tensor(double: str, tmp_path: Path) -> None:
    tensors = tiny.random_tensors()
    original = HEAD if "lm_head" in double else "model." + double.removeprefix("language_model.model.")
    tensors[double] = tensors[original] + 1
    if double.startswith("language_model"):
        tensors |= {"language_model.model.layers.0.mlp.up_proj.weight": tensors["model.layers.0.mlp.up_proj.weight"]}
    with pytest.raises(ModelFileError, match="unclear") as caught:
        Model.load(tiny.write_model(tmp_path / "m", tensors=tensors), threads=1)
    assert double in str(caught.value) or "language_model" in str(caught.value)


def test_adapters_that_are_not_merged(tmp_path: Path) -> None:
    tensors = tiny.random_tensors()
    tensors["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = np.zeros((2, 24), np.float32)
    with pytest.raises(Unsupported, match=r"lora_A.*merge"):
        Model.load(tiny.write_model(tmp_path / "m", tensors=tensors), threads=1)


def test_the_case_without_a_prefix() -> None:
    folder = SHARED / "cases" / "11_no_model_prefix"
    if not folder.is_dir():
        pytest.skip("../shared/cases is absent")
    with Model.load(folder, threads=1) as model:
        assert model.generate("Once upon a time").text()


# ---- Tensors that are not needed, and those that may be missing


def test_unused_tensors_are_named(plain: Any, tmp_path: Path) -> None:
    tensors = tiny.random_tensors()
    tensors |= {"score.weight": np.zeros((2, 24), np.float32), "model.layers.0.extra.weight": np.zeros(3, np.float32)}
    folder = tiny.write_model(tmp_path / "m", tensors=tensors)
    with pytest.warns(ModelFileWarning, match=r"2 tensors .* model\.layers\.0\.extra\.weight, score\.weight"):
        np.testing.assert_array_equal(logits(folder), plain)


def test_leftovers_are_passed_over(plain: Any, tmp_path: Path) -> None:
    tensors = tiny.random_tensors()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    tensors["model.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    np.testing.assert_array_equal(logits(tiny.write_model(tmp_path / "m", tensors=tensors)), plain)


def test_layers_beyond_the_config(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "m", config={"num_hidden_layers": 1})
    with pytest.warns(ModelFileWarning, match=r"9 tensors .*model\.layers\.1"):
        Model.load(folder, threads=1).close()


def test_a_head_that_differs_from_its_embedding_is_used(plain: Any, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "m", config=TIED)
    with pytest.warns(ModelFileWarning, match="tie_word_embeddings"):
        np.testing.assert_array_equal(logits(folder), plain)
    with pytest.warns(ModelFileWarning, match="tie_word_embeddings"):
        checkpoint, config = open_model(folder)
    checkpoint.close()
    assert not config.tied


@pytest.mark.parametrize("head", [np.float32, np.float16])
def test_a_tied_head_that_is_written_twice(head: Any, tmp_path: Path) -> None:
    tensors = tiny.random_tensors()
    tensors[EMBEDDING] = tensors[EMBEDDING].astype(np.float16).astype(np.float32)
    tensors[HEAD] = tensors[EMBEDDING].astype(head)
    twice = logits(tiny.write_model(tmp_path / "a", config=TIED, tensors=tensors))
    once = logits(tiny.write_model(tmp_path / "b", config=TIED, tensors=without(tensors, "lm_head")))
    as_head = logits(tiny.write_model(tmp_path / "c", config=TIED, tensors=without(tensors, "embed_tokens")))
    np.testing.assert_array_equal(twice, once)
    if head is np.float32:
        np.testing.assert_array_equal(as_head, once)


def write_shards(folder: Path, *missing: str) -> Path:
    """A tied model in two shards; its index also names tensors that no shard holds."""
    tiny.write_model(folder, config=TIED)
    (folder / "model.safetensors").unlink()
    tensors = without(tiny.random_tensors(), "lm_head")
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in parts.items() for name in held} | dict.fromkeys(
        missing, "two.safetensors"
    )
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_indexes_that_name_what_was_not_written(tmp_path: Path) -> None:
    whole = logits(write_shards(tmp_path / "a"))
    leftover = "model.layers.0.self_attn.rotary_emb.inv_freq"
    np.testing.assert_array_equal(logits(write_shards(tmp_path / "b", HEAD, leftover)), whole)
    folder = write_shards(tmp_path / "c")
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"][HEAD] = "three.safetensors"  # a shard that was not written either
    (folder / INDEX_FILE).write_text(json.dumps(index))
    np.testing.assert_array_equal(logits(folder), whole)
    with pytest.raises(ModelFileError, match=r"model\.layers\.7"):
        logits(write_shards(tmp_path / "d", "model.layers.7.mlp.up_proj.weight"))


def test_the_path_of_a_shard_stands_for_all(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m")
    np.testing.assert_array_equal(logits(folder / "two.safetensors"), logits(folder))


def test_biases_without_that_of_o(tmp_path: Path) -> None:
    """Equal to one of zeros; where one layer has it, all must."""
    tensors = tiny.random_tensors()
    for layer in range(2):
        for part, width in (("q", 24), ("k", 12), ("v", 12), ("o", 24)):
            bias = np.zeros(24) if part == "o" else np.linspace(-1, 1, width)
            tensors[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = bias.astype(np.float32)
    config = {"attention_bias": True}
    with_zeros = logits(tiny.write_model(tmp_path / "a", config=config, tensors=tensors))
    folder = tiny.write_model(tmp_path / "b", config=config, tensors=without(tensors, "o_proj.bias"))
    np.testing.assert_array_equal(logits(folder), with_zeros)
    with pytest.raises(ModelFileError, match=r"layers\.1\.self_attn\.o_proj\.bias"):
        logits(tiny.write_model(tmp_path / "c", config=config, tensors=without(tensors, "1.self_attn.o_proj.bias")))


# ---- Weights that others quantized

QUANTIZED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # config, files, what is said
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}, "GPTQ, 4 bits"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4, "zero_point": True}}, {}, "AWQ"),
    "fp8": ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, {}, "FP8"),
    "nf4": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, {}, "bitsandbytes, 4"),
    "bnb, older": ({"quantization_config": {"load_in_8bit": True}}, {}, "bitsandbytes, 8"),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, {}, "MLX, 4 bits"),
    "nvfp4": ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, {}, "ModelOpt, NVFP4"),
    "modelopt": ({}, {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}}, "ModelOpt, NVFP4"),
    "ct": ({"quantization_config": {"quant_method": "compressed-tensors"}}, {}, "compressed-tensors"),
    "eetq": ({"quantization_config": {"quant_method": "eetq"}}, {}, "EETQ"),
    "hqq": ({"quantization_config": {"quant_method": "hqq"}}, {}, "HQQ"),
    "quanto": ({"quantization_config": {"quant_method": "quanto", "weights": "int8"}}, {}, "Quanto, int8"),
    "torchao": ({"quantization_config": {"quant_method": "torchao"}}, {}, "TorchAO"),
    "auto-gptq": ({}, {"quantize_config.json": {"bits": 4, "group_size": 128}}, "GPTQ, 4 bits"),
    "unknown": ({"quantization_config": {"quant_method": "brand-new"}}, {}, "brand-new"),
    "no name": ({"quantization_config": {}}, {}, "quantization_config"),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_weights_are_named(case: str, tmp_path: Path, fabula: Any) -> None:
    config, files, words = QUANTIZED[case]
    folder = tiny.write_model(tmp_path / "m", config=config)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    text = said(folder, fabula)
    assert words in text
    assert "fabula quantize" in text


@pytest.mark.parametrize(
    ("ending", "word"),
    [("qweight", "GPTQ or AWQ"), ("weight_packed", "compressed-tensors"), ("scales", "MLX"), ("SCB", "bitsandbytes")],
)
def test_quantized_tensors_without_a_word_in_the_config(ending: str, word: str, tmp_path: Path, fabula: Any) -> None:
    tensors = tiny.random_tensors()
    tensors[f"model.layers.0.mlp.up_proj.{ending}"] = np.zeros((4, 4), np.int32)
    assert word in said(tiny.write_model(tmp_path / "m", tensors=tensors), fabula)


# ---- Other things in a folder


def bare(folder: Path, *files: str, **jsons: Any) -> Path:
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    for name, content in jsons.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


LLAMA = {"model_type": "llama"}
FOUND: dict[str, tuple[tuple[str, ...], dict[str, Any], list[str]]] = {  # files, JSON files, words
    "adapter": (
        ("adapter_model.safetensors",),
        {"adapter_config": {"base_model_name_or_path": "some/base"}},
        ["adapter", "some/base", "merge"],
    ),
    "pickle": (("pytorch_model.bin",), {"config": LLAMA}, ["pytorch_model.bin", "pickle", "save_pretrained"]),
    "pickled shards": (
        ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
        {"config": LLAMA, "pytorch_model.bin.index": {}},
        ["00001-of-00002", "pickle"],
    ),
    "pth": (("consolidated.00.pth",), {"params": {"dim": 1}}, ["params.json", "consolidated.00.pth", "convert"]),
    "mistral": (("consolidated.safetensors", "tekken.json"), {"params": {}}, ["Mistral", "consolidated.safetensors"]),
    "onnx": (("model.onnx",), {"config": LLAMA}, ["ONNX", "safetensors"]),
    "tensorflow": (("tf_model.h5",), {"config": LLAMA}, ["tf_model.h5", "safetensors"]),
    "flax": (("flax_model.msgpack",), {"config": LLAMA}, ["flax_model.msgpack"]),
    "openvino": (("openvino_model.xml", "openvino_model.bin"), {"config": LLAMA}, ["openvino_model"]),
    "diffusers": (("unet/x.safetensors",), {"model_index": {}}, ["diffusers", "model_index.json"]),
    "tokenizer": (("tokenizer.model",), {}, ["tokenizer.model", "no weights"]),
    "no weights": (("tokenizer.json",), {"config": LLAMA}, ["config.json", "llama", "no weights"]),
    "no config": (("model.safetensors", "tokenizer.json"), {}, ["model.safetensors", "without config.json"]),
    "below": (("0_Transformer/model.safetensors", "0_Transformer/config.json"), {"modules": {}}, ["0_Transformer"]),
    "other names": (("weights.safetensors",), {"config": LLAMA}, ["weights.safetensors", "model.safetensors"]),
    "mlx": (("weights.npz",), {"config": LLAMA}, ["MLX"]),
    "bert": (("pytorch_model.bin",), {"config": {"model_type": "bert"}}, ["family 'bert'", "llama"]),
    "gguf files": (("a.gguf", "b.gguf"), {}, ["'a.gguf', 'b.gguf'", "path of one"]),
    "nothing": ((), {}, ["holds no model"]),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found_and_what_would_work(case: str, tmp_path: Path, fabula: Any) -> None:
    files, jsons, words = FOUND[case]
    text = said(bare(tmp_path / "m", *files, **jsons), fabula)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("name", "word"), [("model.bin", "pickle"), ("model.onnx", "ONNX"), ("config.json", "folder"), ("x.txt", "neither")]
)
def test_files_of_other_kinds(name: str, word: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ModelFileError, match=word):
        open_checkpoint(tmp_path / name)


def test_the_family_is_refused_before_the_tokenizer_is_looked_at(tmp_path: Path, fabula: Any) -> None:
    folder = tiny.write_model(tmp_path / "m", config={"model_type": "bert"})
    (folder / "tokenizer.json").unlink()
    assert "family 'bert'" in said(folder, fabula)


def test_an_adapter_beside_the_weights(tmp_path: Path, fabula: Any) -> None:
    folder = tiny.write_model(tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    text = said(folder, fabula)
    assert "adapter_config.json" in text
    assert "merge" in text


@pytest.mark.parametrize("fault", ["missing tensor", "other shape", "rope", "tokenizer"])
def test_inspect_says_what_load_says(fault: str, tmp_path: Path, fabula: Any) -> None:
    tensors = tiny.random_tensors()
    config: dict[str, Any] = {}
    if fault == "missing tensor":
        del tensors["model.layers.1.mlp.down_proj.weight"]
    elif fault == "other shape":
        tensors["model.norm.weight"] = np.ones(25, np.float32)
    elif fault == "rope":
        config = {"rope_scaling": {"type": "su", "factor": 2.0}}
    more = 2 if fault == "tokenizer" else 0
    said(tiny.write_model(tmp_path / "m", tensors=tensors, config=config, n_more_tokens=more), fabula)


def test_checking_reads_no_tensor(tiny_folder: Path) -> None:
    checkpoint, config = open_model(tiny_folder)
    checkpoint.close()  # from here on a read fails
    check_tensors(checkpoint, config)


def test_a_folder_with_both_formats_says_which_it_takes(plain: Any, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "m")
    (folder / "other.gguf").write_bytes(b"GGUF")
    with pytest.warns(ModelFileWarning, match=r"other\.gguf"):
        np.testing.assert_array_equal(logits(folder), plain)


def test_parts_and_projectors_are_no_choices(tmp_path: Path) -> None:
    from fabula.formats.open import gguf_files

    bare(tmp_path / "a", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "mmproj-model-f16.gguf")
    assert [file.name for file in gguf_files(tmp_path / "a")] == ["m-00001-of-00002.gguf"]
    bare(tmp_path / "b", "mmproj.gguf")
    assert [file.name for file in gguf_files(tmp_path / "b")] == ["mmproj.gguf"]


# ---- Where is looked, and how long a text may be


def test_a_folder_of_ones_own_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> Path:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "hub_installed", lambda: True)
    for function in ("find_downloaded", "fetch"):
        monkeypatch.setattr(hub, function, asked)
    monkeypatch.chdir(tmp_path)
    Path("owner").mkdir()
    bare(Path("owner/repo"), "pytorch_model.bin")
    assert locate.locate("owner/repo") == Path("owner/repo")
    assert locate.locate("owner/repo:x.gguf") == Path("owner/repo/x.gguf")
    assert not locate.can_be_fetched("owner/repo")
    with pytest.raises(ModelFileError, match="pickle"):
        Model.load("owner/repo")
    bare(Path("mine"), "model.onnx")
    with pytest.raises(ModelFileError, match="ONNX"):
        Model.load("mine")
    assert locate.can_be_fetched("owner/other")


ROPES: dict[str, tuple[dict[str, Any] | None, int]] = {  # scaling, positions it reaches of 600
    "none": (None, 600),
    "linear": ({"rope_type": "linear", "factor": 2.0}, 1200),
    "dynamic": ({"rope_type": "dynamic", "factor": 1.5}, 900),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 300}, 1200),
    "yarn within": ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 300}, 600),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64}, 600,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPES)
def test_contexts_beyond_the_models_length(case: str, tmp_path: Path) -> None:
    rope, longest = ROPES[case]
    folder = tiny.write_model(tmp_path / "m", config={"rope_scaling": rope})
    with Model.load(folder, threads=1, context=longest) as model:
        assert model.context == longest
    with pytest.raises(InvalidArgument, match=rf"context is {longest + 1}.* {longest} positions.*rope_scaling"):
        Model.load(folder, threads=1, context=longest + 1)


def test_the_command_line_refuses_long_contexts(tiny_folder: Path, fabula: Callable[..., Any]) -> None:
    result = fabula("story", "hello", "--model", tiny_folder, "--context", 601)
    assert result.code == 1
    assert "601" in result.err
    assert "600" in result.err


def test_copies_of_a_folder_load_alike(plain: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """A folder under any name, also with files of Python or git next to the weights."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "x.y-z"))
    for name in (".gitattributes", "README.md", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(b"x")
    np.testing.assert_array_equal(logits(folder), plain)
