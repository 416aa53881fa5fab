"""Models in several GGUF files, and files that are no model: what opens, and what an error says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fabula import Model
from fabula.cli.main import run
from fabula.errors import EngineError, ModelFileError, Unsupported
from fabula.export.quantize import quantize_model
from fabula.formats import hub, locate
from fabula.formats.gguf import GgufFile
from fabula.formats.gguf_names import open_gguf
from fabula.formats.gguf_split import open_gguf_file
from fabula.formats.gguf_write import GgufWriter, NewTensor
from fabula.formats.open import open_checkpoint
from fabula.formats.split_names import part_names, part_of, without_later_parts
from gguf_builder import STRING, UINT16, Tensor, build, key, replaced, small_keys, small_tensors
from llama_peer import LlamaCpp
from test_export import make_folder
from test_hub import FakeHub, fake_hub  # noqa: F401
from waiting import n_open_files

IDS = [5, 6, 7, 8, 9, 10]


def split(source: Path, folder: Path, stem: str, sizes: list[int]) -> list[Path]:
    """Writes a file's tensors as parts of so many tensors each, as llama.cpp's tool for it does."""
    folder.mkdir(exist_ok=True)
    paths = []
    with GgufFile(source) as file:
        tensors = list(file.tensors.values())
        assert sum(sizes) == len(tensors)
        for i, size in enumerate(sizes):
            first = sum(sizes[:i])
            metadata: dict[str, Any] = dict(file.metadata) if i == 0 else {}
            metadata |= {
                "split.no": np.uint16(i),
                "split.count": np.uint16(len(sizes)),
                "split.tensors.count": np.int32(len(tensors)),
            }
            paths.append(folder / f"{stem}-{i + 1:05}-of-{len(sizes):05}.gguf")
            part = tensors[first : first + size]
            new = [NewTensor(t.name, t.dtype, t.shape) for t in part]
            with GgufWriter(paths[-1], metadata, new, overwrite=True) as writer:
                for tensor in part:
                    writer.write(tensor.name, file.read(tensor.name))
    return paths


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    quantize_model(make_folder(folder / "m", {}), folder / "model.gguf", "f32")
    return folder / "model.gguf"


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    """Three parts; the first has no tensors, as `--no-tensor-first-split` makes it."""
    return split(whole, tmp_path / "parts", "model", [0, 8, 13])


def loaded(path: Path | str) -> tuple[np.ndarray, str]:
    with Model.load(path, weights="f32", kv="f32") as model:
        return model.logits(IDS), model.fingerprint.weights


# ---- Split models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[0, 8, 13], [21, 0], [1] * 21, [20, 1]])
def test_a_split_model_is_the_whole_one(whole: Path, tmp_path: Path, sizes: list[int]) -> None:
    paths = split(whole, tmp_path / "parts", "my model-00001-of-2", sizes)
    wanted, fingerprint = loaded(whole)
    for path in (paths[0], str(paths[0]), paths[0].parent):
        found, same = loaded(path)
        assert np.array_equal(found, wanted) and same == fingerprint
    (tmp_path / "parts" / "note.txt").write_text("no part")
    checkpoint = open_checkpoint(tmp_path / "parts")
    checkpoint.close()
    assert checkpoint.path == paths[0]


def test_a_split_model_from_the_hub(fake_hub: FakeHub, parts: list[Path]) -> None:  # noqa: F811
    put = fake_hub._put

    def put_part(name: str) -> None:
        fake_hub.content = parts[0].with_name(Path(name).name).read_bytes()
        put(name)

    fake_hub._put = put_part  # type: ignore[method-assign]
    path = locate.locate(f"owner/repo:{parts[0].name}")
    assert path == fake_hub.snapshot / parts[0].name
    assert loaded(path)[0].shape == (len(IDS), 118)
    assert sorted(p.name for p in fake_hub.snapshot.iterdir()) == [p.name for p in parts]
    assert locate.locate(f"owner/repo:{parts[0].name}", fetch=False) == path
    (fake_hub.snapshot / parts[2].name).unlink()  # not there any more: fetched again
    assert hub.find_downloaded(hub.HubName("owner/repo", parts[0].name)) is None
    assert locate.locate(f"owner/repo:{parts[0].name}") == path
    assert (fake_hub.snapshot / parts[2].name).exists()


def test_inspect_and_quantize_take_the_first_part(
    whole: Path, parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*words: object) -> str:
        with pytest.raises(SystemExit) as end:
            run([str(word) for word in words])
        assert end.value.code == 0
        return capsys.readouterr().out

    split_facts, facts = (json.loads(call("inspect", path, "--json", "--tensors")) for path in (parts[0], whole))
    assert split_facts.pop("path") == str(parts[0]) and facts.pop("path") == str(whole)
    assert split_facts == facts
    for source, name in ((parts[0], "a.gguf"), (parts[0].parent, "b.gguf"), (whole, "c.gguf")):
        call("quantize", source, tmp_path / name, "--type", "q8_0")
    files = [(tmp_path / f"{name}.gguf").read_bytes() for name in "abc"]
    assert files[0] == files[1] == files[2]


def test_llama_cpp_reads_the_same_parts(llama_cpp: LlamaCpp, parts: list[Path]) -> None:
    theirs = llama_cpp.logits(parts[0], IDS)
    assert theirs is not None and np.abs(loaded(parts[0])[0] - theirs).max() < 1e-3


def refused(path: Path, *words: str, error: type[EngineError] = ModelFileError) -> None:
    with pytest.raises(error) as caught:
        open_gguf(path)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_another_part_than_the_first(parts: list[Path], tmp_path: Path) -> None:
    refused(parts[1], "part 2 of 3", f"give the first part, {parts[0].name}")
    shutil.copy(parts[2], tmp_path / parts[2].name)
    refused(tmp_path / parts[2].name, "part 3 of 3", f"{parts[0].name} must be in the same folder, and is missing")
    with pytest.raises(ModelFileError, match="part 2 of 3"):
        parts[0].unlink()
        Model.load(parts[0].parent)
    shutil.copy(parts[1], tmp_path / "renamed.gguf")
    refused(tmp_path / "renamed.gguf", "part 2 of 3", "give the first part")


def test_a_part_that_is_missing(parts: list[Path]) -> None:
    parts[1].unlink()
    refused(parts[0], "part 2 of 3 is missing", f"{parts[1].name} must be in the same folder")
    refused(parts[0].parent / parts[0].name, "missing")
    with pytest.raises(ModelFileError, match="part 2 of 3 is missing"):
        Model.load(parts[0].parent)


def test_a_part_that_is_damaged(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[2].read_bytes()[:-100])
    refused(parts[0], parts[2].name, "it is cut")
    parts[2].write_bytes(b"")
    refused(parts[0], parts[2].name)


def test_parts_of_different_models(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    other = split(whole, tmp_path / "other", "model", [0, 9, 12])
    shutil.copy(other[1], parts[1])
    refused(parts[0], "is in", parts[1].name, "different models")
    other = split(whole, tmp_path / "other", "model", [0, 8, 12, 1])
    shutil.copy(other[2], parts[2])
    refused(parts[0], parts[2].name, "split.count", "is 4, must be 3")
    shutil.copy(parts[1], parts[2])
    refused(parts[0], parts[2].name, "split.no", "is 1, must be 2")


def test_fewer_tensors_than_stated(whole: Path, parts: list[Path]) -> None:
    with GgufFile(whole) as file:
        tensor = next(reversed(file.tensors.values()))
        with GgufWriter(
            parts[2],
            {"split.no": np.uint16(2), "split.count": np.uint16(3), "split.tensors.count": np.int32(21)},
            [NewTensor(tensor.name, tensor.dtype, tensor.shape)],
            overwrite=True,
        ) as writer:
            writer.write(tensor.name, file.read(tensor.name))
    refused(parts[0], "split.tensors.count", "is 21, but the parts have 9")


def test_names_that_do_not_tell_the_parts(parts: list[Path], tmp_path: Path) -> None:
    for name in ("model.gguf", "model-00001-of-00002.gguf", "model-00002-of-00003.gguf", "model-1-of-3.gguf"):
        shutil.copy(parts[0], tmp_path / name)
        refused(tmp_path / name, "NAME-00001-of-00003.gguf", "--merge", error=Unsupported)


def test_open_files_are_closed(parts: list[Path]) -> None:
    before = n_open_files()
    with open_gguf_file(parts[0]) as file:
        assert n_open_files() == before + 3
        file.close()
        with pytest.raises(ModelFileError, match="closed"):
            file.read("token_embd.weight")
        with pytest.raises(ModelFileError, match="no tensor"):
            file.read("nothing")
    parts[2].unlink()
    with pytest.raises(ModelFileError):
        open_gguf_file(parts[0])
    assert n_open_files() == before


def test_names_of_parts() -> None:
    assert part_of("a-00002-of-00003.gguf") == ("a", 2, 3)
    assert part_of("a-00001-of-00001-00002-of-00009.gguf") == ("a-00001-of-00001", 2, 9)
    for name in ("a.gguf", "a-00000-of-00003.gguf", "a-00004-of-00003.gguf", "a-1-of-3.gguf", "a-00001-of-00003.bin",
                 "a-00001-of-99999.gguf"):  # fmt: skip
        assert part_of(name) is None and part_names(name) == [name]
    assert part_names("a-00002-of-00003.gguf") == ["a-00002-of-00003.gguf"]
    files = [Path(name) for name in ("b.gguf", *part_names("a-00001-of-00003.gguf"), "a-00002-of-00002.gguf")]
    assert [str(path) for path in without_later_parts(files)] == [
        "a-00001-of-00003.gguf", "a-00002-of-00002.gguf", "b.gguf",
    ]  # fmt: skip


def test_folders_with_several_models(whole: Path, parts: list[Path]) -> None:
    shutil.copy(whole, parts[0].with_name("other.gguf"))
    with pytest.raises(ModelFileError, match=r"holds 2 \.gguf files \('model-00001-of-00003\.gguf', 'other\.gguf'\)"):
        open_checkpoint(parts[0].parent)


# ---- No model of an offered family ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["bert", "mamba", "clip", "whisper", "flux", "nomic-bert", "rwkv7", "t5"])
def test_other_families_are_refused_before_anything_else(tmp_path: Path, arch: str) -> None:
    """Before tokenizer, sizes and tensors, however strange those are."""
    keys = [key("general.architecture", STRING, arch), key("tokenizer.ggml.model", STRING, "klingon")]
    path = tmp_path / "model.gguf"
    for tensors in ([], [Tensor("v.patch", [256], 16)], [Tensor("a", [8], offset=99)]):
        path.write_bytes(build(keys, tensors))
        refused(path, f"'general.architecture': is '{arch}'", "offered are llama, qwen2, qwen3", error=Unsupported)
        with pytest.raises(Unsupported, match=arch):
            Model.load(path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"general.architecture": "llama", "general.type": "adapter"}, ("a LoRA adapter", "merge it")),
        ({"general.architecture": "clip", "general.type": "mmproj"}, ("encoder", "mmproj", "next to it")),
        ({"general.architecture": "clip"}, ("encoder", "mmproj")),
        ({"general.type": "imatrix"}, ("importance matrix",)),
        ({"general.architecture": "controlvector"}, ("control vector",)),
        ({"general.architecture": "bert"}, ("an encoder", "vectors")),
        ({"general.architecture": "sdxl"}, ("images",)),
    ],
)
def test_what_is_no_model_is_named(tmp_path: Path, keys: dict[str, str], words: tuple[str, ...]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(build([key(name, STRING, value) for name, value in keys.items()], [Tensor("a.lora_a", [8])]))
    refused(path, *words, error=Unsupported)


def test_types_that_are_not_offered_are_named_with_their_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    kinds = {16: "IQ2_XXS", 23: "IQ4_XS", 34: "TQ1_0", 40: "NVFP4", 77: "unknown"}
    for kind, name in kinds.items():
        tensors = [*small_tensors(), *(Tensor(f"blk.{i}.more.weight", [256], kind) for i in range(5))]
        path.write_bytes(build(small_keys(), tensors))
        refused(path, "tensors 'blk.0.more.weight', 'blk.1.more.weight'", "and 2 more", f"type {kind} ({name})",
                "Q4_K", error=Unsupported)  # fmt: skip
    path.write_bytes(build(small_keys(), [Tensor("a", [256], 16), Tensor("b", [256], 23), Tensor("c", [256], 16)]))
    refused(path, "tensors 'a', 'c': type 16 (IQ2_XXS)", "tensor 'b': type 23 (IQ4_XS)", error=Unsupported)


def test_a_count_of_one_is_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "any name.gguf"
    for count in (0, 1):
        path.write_bytes(build(replaced(small_keys(), key("split.count", UINT16, count)), small_tensors()))
        open_gguf(path).close()
