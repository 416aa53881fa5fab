"""Hugging Face folders: what a good one gives, and that a broken or hostile one is refused by a typed error.

Each bad file breaks one rule and nothing else, so that a refusal shows that rule at work.
"""

from __future__ import annotations

import gc
import json
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fabula.errors import EngineError, ModelFileError, ModelNotFound, OutOfMemory, Unsupported
from fabula.formats import safetensors as reader
from fabula.formats.checkpoint import DType
from fabula.formats.open import open_checkpoint
from fabula.formats.safetensors import open_safetensors
from waiting import n_open_files

CONFIG = {"model_type": "llama", "hidden_size": 4}


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32", **extra: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **extra}


def file_bytes(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


GOOD = {
    "a": tensor(0, 16, [2, 2]),
    "b": tensor(16, 22, [3], "BF16"),
    "c": tensor(22, 26, [1, 2, 1], "F16"),
    "__metadata__": {"format": "pt"},
}
GOOD_DATA = bytes(range(26))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[..., Path]:
    def write_(header: object, data: bytes = b"", name: str = "model.safetensors") -> Path:
        (folder / name).write_bytes(file_bytes(header, data))
        return folder

    return write_


def refuse(path: Path, *words: str, error: type[EngineError] = ModelFileError) -> EngineError:
    with pytest.raises(error) as caught:
        open_safetensors(path)
    for word in words:
        assert word in str(caught.value)
    return caught.value


# ---- Good files


def test_reads_names_shapes_and_bytes(write: Callable[..., Path], folder: Path) -> None:
    with open_safetensors(write(GOOD, GOOD_DATA)) as checkpoint:
        assert checkpoint.path == folder
        assert checkpoint.format == "safetensors"
        assert checkpoint.config == CONFIG
        assert checkpoint.metadata == {}
        assert {n: (t.dtype, t.shape, t.n_bytes) for n, t in checkpoint.tensors.items()} == {
            "a": (DType.F32, (2, 2), 16),
            "b": (DType.BF16, (3,), 6),
            "c": (DType.F16, (1, 2, 1), 4),
        }
        assert checkpoint.read("a").dtype == np.uint8
        assert b"".join(checkpoint.read(name).tobytes() for name in "abc") == GOOD_DATA


def test_takes_a_file_beside_its_config(write: Callable[..., Path]) -> None:
    path = write(GOOD, GOOD_DATA, "other.safetensors") / "other.safetensors"
    with open_safetensors(path) as checkpoint:
        assert checkpoint.path == path.parent
        assert list(checkpoint.tensors) == ["a", "b", "c"]


def test_header_may_be_padded_with_spaces(write: Callable[..., Path]) -> None:
    with open_safetensors(write(json.dumps(GOOD).encode() + b"   ", GOOD_DATA)) as checkpoint:
        assert checkpoint.read("b").tobytes() == GOOD_DATA[16:22]


def test_a_file_without_tensors_is_valid(write: Callable[..., Path]) -> None:
    with open_safetensors(write({})) as checkpoint:
        assert len(checkpoint.tensors) == 0


def test_scalars_and_a_lone_empty_tensor(write: Callable[..., Path]) -> None:
    with open_safetensors(write({"s": tensor(0, 4, []), "e": tensor(4, 4, [0, 7])}, b"1234")) as checkpoint:
        assert checkpoint.read("s").tobytes() == b"1234"
        assert checkpoint.read("e").size == 0


def test_other_dtypes_are_refused_only_when_asked_for(write: Callable[..., Path]) -> None:
    header = {
        "w": tensor(0, 4, [1]),
        "ids": tensor(4, 12, [1], "I64"),
        "big": tensor(12, 16, [1, 1, 1, 1, 1]),
    }
    with open_safetensors(write(header, bytes(16))) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
        with pytest.raises(Unsupported, match="'ids' is I64"):
            checkpoint.read("ids")
        with pytest.raises(Unsupported, match="I64"):
            checkpoint.tensors.get("ids")
        with pytest.raises(Unsupported, match="5 dimensions"):
            checkpoint.read("big")


def test_names_that_share_a_tensor(write: Callable[..., Path]) -> None:
    header = {
        "lm_head": tensor(0, 4, [1]),
        "__metadata__": {"embed": "lm_head", "x": "nothing", "format": "pt"},
    }
    with open_safetensors(write(header, b"1234")) as checkpoint:
        assert set(checkpoint.tensors) == {"lm_head", "embed"}
        assert checkpoint.tensors["embed"].name == "embed"
        assert checkpoint.read("embed").tobytes() == b"1234"


def test_reading_an_unknown_tensor_or_after_close(write: Callable[..., Path]) -> None:
    checkpoint = open_safetensors(write(GOOD, GOOD_DATA))
    with pytest.raises(ModelFileError, match="holds no tensor 'zz'"):
        checkpoint.read("zz")
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(ModelFileError, match="closed"):
        checkpoint.read("a")


def test_the_story_model(story_folder: Path) -> None:
    with open_safetensors(story_folder) as checkpoint:
        config = checkpoint.config
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        expected = {
            f"model.layers.{i}.{part}.weight": shape
            for i in range(config["num_hidden_layers"])
            for part, shape in shapes.items()
        }
        expected["model.norm.weight"] = (hidden,)
        for name in ("lm_head.weight", "model.embed_tokens.weight"):  # stored once, under the first name
            expected[name] = (config["vocab_size"], hidden)
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == expected
        weights = checkpoint.read("model.norm.weight").view("<f4")
        assert weights.shape == (hidden,)
        assert np.isfinite(weights).all()
        assert np.abs(weights).max() > 0


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_files_by_torch_round_trip(folder: Path, name: str) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(1)
    dtype = getattr(torch, name)
    weights = {"x.weight": torch.randn(5, 7).to(dtype), "y": torch.randn(3).to(dtype)}
    save_file(weights, folder / "model.safetensors")
    with open_safetensors(folder) as checkpoint:
        for key, value in weights.items():
            assert checkpoint.tensors[key].shape == tuple(value.shape)
            expected = value.view(torch.uint8).numpy().tobytes()
            assert checkpoint.read(key).tobytes() == expected


# ---- M10: the header


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
        (struct.pack("<Q", 0), "header length is 0"),
        (struct.pack("<Q", 1) + b"{", "header length is 1"),
        (struct.pack("<Q", 100) + b"{}", "only 2 bytes follow"),
        (struct.pack("<Q", 100_000_001) + b"{}", "header length is 100000001"),
        (struct.pack("<Q", 2**63) + b"{}", "header length"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "header length"),
        (file_bytes(b"[]"), ""),
        (file_bytes(b'"{}"'), ""),
        (file_bytes(b" {}"), ""),
        (file_bytes(b"{}\n"), "padded"),
        (file_bytes(b"{} x"), ""),
        (file_bytes(b'{"\xff":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), ""),
        (file_bytes(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), ""),
        (file_bytes(b"[" * 500_000), ""),
        (file_bytes(b'{"a":' * 100_000), ""),
        (file_bytes({"a": {"dtype": "F32", "shape": [1]}}, b"1234"), ""),
        (file_bytes({"a": tensor(0, 4, [1], "Q7")}, b"1234"), ""),
        (file_bytes({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"), ""),
        (file_bytes({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"1234"), ""),
        (file_bytes({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"), ""),
        (file_bytes({"a": tensor(0, 4, [1]), "__metadata__": {"n": 1}}, b"1234"), ""),
    ],
)
def test_m10_headers(folder: Path, content: bytes, word: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    error = refuse(folder, "model.safetensors", word)
    assert len(str(error)) < 1000


def test_m10_a_name_twice(write: Callable[..., Path]) -> None:
    one = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    refuse(write(b"{" + one + b"," + one + b"}", b"1234"), "'a' appears twice")
    twice = b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    refuse(write(twice, b"1234"))


def test_m10_structure_that_would_take_gigabytes(write: Callable[..., Path]) -> None:
    bomb = b"[" + b"[]," * 3_000_000 + b"[]]"
    started = time.process_time()
    refuse(
        write(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":' + bomb + b"}}", b"1234"),
        "structure",
    )
    assert time.process_time() - started < 10


def test_m10_too_many_tensors(write: Callable[..., Path]) -> None:
    header = {f"t{i}": tensor(i, i + 1, [1], "U8") for i in range(reader.MAX_TENSORS + 1)}
    refuse(write(header, bytes(len(header))), "65537 tensors")


# ---- M11, M12, M13: ranges


@pytest.mark.parametrize(
    ("header", "n_data"),
    [
        ({"a": tensor(4, 0, [1])}, 4),
        ({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, 12),
        ({"a": tensor(0, 4, [1]), "b": tensor(0, 4, [1])}, 4),
        ({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, 12),
        ({"a": tensor(4, 8, [1])}, 8),
        ({"a": tensor(0, 4, [1])}, 3),
        ({"a": tensor(0, 4, [1])}, 5),
        ({"a": tensor(0, 4, [2])}, 4),
        ({"a": tensor(0, 8, [1])}, 8),
        ({"a": tensor(0, 4, [1], "F16")}, 4),
        ({"a": tensor(0, 4, [0])}, 4),
        ({"a": tensor(0, 0, [1])}, 0),
        ({"a": tensor(0, 4, [1]), "z": tensor(0, 0, [0])}, 4),
        ({"a": tensor(0, 4, [1]), "y": tensor(4, 4, [0]), "z": tensor(4, 4, [0])}, 4),
        ({"a": tensor(0, 4, [1]), "z": tensor(2, 2, [0])}, 4),
        ({"a": tensor(0, 4, [1]), "z": tensor(9, 9, [0])}, 4),
    ],
)
def test_m11_ranges(write: Callable[..., Path], header: dict[str, Any], n_data: int) -> None:
    refuse(write(header, bytes(n_data)), "model.safetensors")


@pytest.mark.parametrize(
    "shape",
    [
        [2**62, 4],
        [2**32, 2**32],
        [2**63, 2],
        [2**61 + 1, 8],
        [0, 2**63, 2**63],
        [3] * 3000,
        [2**64],
        [1] * 65,
    ],
)
def test_m12_shapes_that_wrap(write: Callable[..., Path], shape: list[int]) -> None:
    started = time.process_time()
    for n in (0, 4, 8):
        refuse(write({"a": tensor(0, n, shape)}, bytes(n)))
    assert time.process_time() - started < 10


@pytest.mark.parametrize("tail", [b"\0", b"PK\x05\x06" + bytes(18), b"%PDF-1.7\n%%EOF\n"])
def test_m13_polyglots(write: Callable[..., Path], tail: bytes) -> None:
    refuse(write(GOOD, GOOD_DATA + tail), "model.safetensors")


# The library refuses most of M10 to M13 too; our own rules must hold without it.
@pytest.mark.parametrize(
    "header",
    [
        {"a": tensor(8, 0, [1]), "b": tensor(0, 8, [2])},
        {"a": tensor(0, 4, [1]), "b": tensor(0, 8, [2])},
        {"a": tensor(0, 8, [2]), "b": tensor(4, 8, [1])},
        {"a": tensor(0, 4, [1]), "b": tensor(2, 6, [1])},  # as much overlap as gap
        {"a": tensor(0, 4, [1])},
        {"a": tensor(4, 8, [1])},
        {"a": tensor(0, 8, [1])},
        {"a": tensor(0, 8, [3], "F16")},
        {"a": tensor(0, 8, [2**32, 2**32])},
        {"a": tensor(0, 8, [2]), "b": tensor(8, 8, [0, 2**41])},
        {"\ud800": tensor(0, 8, [2])},
        {"a": tensor(0, 16, [4])},
        {"a": tensor(0, 8, [True, 2])},
        {"a": tensor(0, 8, [2], 7)},  # type: ignore[arg-type]
        {"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"a": [0, 8]},
        {"a": None},
    ],
)
def test_own_rules_without_the_library(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, header: dict[str, Any]
) -> None:
    monkeypatch.setattr(reader, "_ask_library", lambda *_: None)
    refuse(write(header, bytes(8)), "model.safetensors")


# ---- M8, M9, M20: cut, shortened, mutated


def test_m8_cut_at_every_byte(folder: Path) -> None:
    whole = file_bytes(GOOD, GOOD_DATA)
    for n in range(len(whole)):
        (folder / "model.safetensors").write_bytes(whole[:n])
        refuse(folder, "model.safetensors")


def test_m9_shortened_after_opening(write: Callable[..., Path], folder: Path) -> None:
    with open_safetensors(write(GOOD, GOOD_DATA)) as checkpoint:
        os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 2)
        assert checkpoint.read("a").tobytes() == GOOD_DATA[:16]
        with pytest.raises(ModelFileError, match="2 bytes too early") as caught:
            checkpoint.read("c")
        assert caught.value.field == "c"
        assert caught.value.path.endswith("model.safetensors")
        os.truncate(folder / "model.safetensors", 0)
        with pytest.raises(ModelFileError):
            checkpoint.read("a")


def test_m20_random_mutations(folder: Path) -> None:
    """5,000 mutated files: each is refused by a typed error, or is valid to the last byte."""
    whole = file_bytes(GOOD, GOOD_DATA)
    path = folder / "model.safetensors"
    seed = 20
    rng = random.Random(seed)
    pieces = [b"0", b"-1", b"9" * 20, b"[", b"{", b'"', b"\0", b"1e9", b"NaN", b",", b"F64", b"\xff", b"null"]
    outcomes = {"valid": 0, "refused": 0}
    for i in range(5000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at : at + rng.randint(0, 4)] = rng.choice(pieces)
                case 2:
                    del data[at : at + rng.randint(1, 8)]
                case _:
                    data[at:at] = data[rng.randrange(len(data)) :][: rng.randint(1, 16)]
            data = data or bytearray(1)
        if rng.random() < 0.5:  # mend the length, so that the header after it is read
            data[:8] = struct.pack("<Q", max(0, len(data) - 8 - len(GOOD_DATA)))
        path.write_bytes(data)
        try:
            with open_safetensors(folder) as checkpoint:
                total = 8 + int.from_bytes(data[:8], "little")
                for name, info in checkpoint.tensors.items():
                    assert checkpoint.read(name).size == info.n_bytes
                    total += info.n_bytes
                assert total <= len(data), (seed, i)
            outcomes["valid"] += 1
        except (ModelFileError, Unsupported, OutOfMemory):
            outcomes["refused"] += 1
    assert outcomes["valid"] > 50
    assert outcomes["refused"] > 2500


def test_refused_files_are_closed(write: Callable[..., Path]) -> None:
    gc.collect()  # files that earlier tests left
    before = n_open_files()
    for _ in range(20):
        refuse(write(GOOD, GOOD_DATA + b"x"))
    assert n_open_files() == before


def test_pipes_and_folders_in_place_of_files(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors")
    refuse(folder, "not a regular file")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refuse(folder, "not a regular file")


def test_a_sparse_file_beyond_memory_is_refused_or_out_of_memory(folder: Path) -> None:
    n = 2**42
    head = file_bytes({"a": tensor(0, n, [2**40])})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        try:
            file.truncate(len(head) + n)
        except OSError:
            pytest.skip("the file system takes no file of 4 TiB")
    with open_safetensors(folder) as checkpoint, pytest.raises(OutOfMemory):
        checkpoint.read("a")


# ---- M14: shards


def write_shards(folder: Path, weight_map: object) -> None:
    (folder / "one.safetensors").write_bytes(
        file_bytes({"a": tensor(0, 4, [1]), "unlisted": tensor(4, 8, [1])}, b"1234abcd")
    )
    (folder / "two.safetensors").write_bytes(file_bytes({"b": tensor(0, 4, [2], "F16")}, b"5678"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(folder: Path) -> None:
    write_shards(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    with open_checkpoint(folder) as checkpoint:  # type: ignore[attr-defined]
        assert set(checkpoint.tensors) == {"a", "b"}
        assert checkpoint.read("a").tobytes() + checkpoint.read("b").tobytes() == b"12345678"


@pytest.mark.parametrize(
    "name",
    [
        "../one.safetensors",
        "../../etc/one.safetensors",
        "/etc/passwd",
        "/one.safetensors",
        "sub/one.safetensors",
        "..",
        ".",
        "",
        "..\\one.safetensors",
        "C:\\one.safetensors",
        ".hidden.safetensors",
        "one.bin",
        "one\0.safetensors",
        "one\n.safetensors",
        7,
        None,
        ["one.safetensors"],
    ],
)
def test_m14_shard_names(folder: Path, name: object) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "one.safetensors").write_bytes(file_bytes({"a": tensor(0, 4, [1])}, b"1234"))
    (folder.parent / "one.safetensors").write_bytes(file_bytes({"a": tensor(0, 4, [1])}, b"1234"))
    write_shards(folder, {"a": name})
    refuse(folder, "index.json", "'a'")


def test_m14_missing_shard_and_missing_tensor(folder: Path) -> None:
    write_shards(folder, {"a": "one.safetensors", "b": "three.safetensors"})
    refuse(folder, "three.safetensors", "'b'", "missing")
    write_shards(folder, {"a": "one.safetensors", "zz": "two.safetensors"})
    refuse(folder, "two.safetensors", "'zz'")


def test_m14_links(tmp_path: Path) -> None:
    def linked(folder: Path, target: str) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        write_shards(folder, {"c": "link.safetensors"})
        (folder / "link.safetensors").symlink_to(target)
        return folder

    content = file_bytes({"c": tensor(0, 4, [1])}, b"1234")
    (tmp_path / "outside").write_bytes(content)
    refuse(linked(tmp_path / "plain", "../outside"), "link.safetensors", "leaves the model's folder")
    refuse(linked(tmp_path / "loop", "link.safetensors"), "link.safetensors")
    refuse(linked(tmp_path / "dangling", "nowhere"), "link.safetensors")
    repo = tmp_path / "models--owner--name"
    (repo / "blobs").mkdir(parents=True)
    (repo / "blobs" / "0123").write_bytes(content)
    refuse(linked(repo / "snapshots" / "evil", "../../../outside"), "leaves")
    with open_safetensors(linked(repo / "snapshots" / "commit", "../../blobs/0123")) as checkpoint:
        assert checkpoint.read("c").tobytes() == b"1234"


@pytest.mark.parametrize("weight_map", [None, [], {}, "one.safetensors", 1])
def test_m14_index_shapes(folder: Path, weight_map: object) -> None:
    write_shards(folder, weight_map)
    refuse(folder, "weight_map")


def test_m14_too_many_shards_and_tensors(folder: Path) -> None:
    write_shards(folder, {f"t{i}": f"s{i}.safetensors" for i in range(reader.MAX_SHARDS + 1)})
    refuse(folder, "513 shards")
    write_shards(folder, {f"t{i}": "one.safetensors" for i in range(reader.MAX_TENSORS + 1)})
    refuse(folder, "65537 tensors")


def test_a_bad_shard_is_named_and_the_others_closed(folder: Path) -> None:
    write_shards(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    (folder / "two.safetensors").write_bytes(b"garbage!garbage!")
    before = n_open_files()
    refuse(folder, "two.safetensors")
    assert n_open_files() == before


# ---- config.json and the door


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "not JSON"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": 18446744073709551616}', "64 bits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "64 bits"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' appears twice"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": ["\\ud800"]}', "UTF-16"),
        (b'{"\\udfff": 1}', "UTF-16"),
        (b'{"a": ' + b"[" * 100_000, ""),
        (b'{"a": "' + b"x" * 1_000_000 + b'"}', "more than the 1000000 allowed"),
    ],
)
def test_config(write: Callable[..., Path], folder: Path, text: bytes, word: str) -> None:
    write(GOOD, GOOD_DATA)
    (folder / "config.json").write_bytes(text)
    refuse(folder, "config.json", word)


def test_what_the_door_looks_for(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(ModelFileError, match=r"looked for config\.json .* one \.gguf"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelFileError, match=r"neither a \.gguf nor"):
        open_checkpoint(tmp_path / "notes.txt")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match=r"2 \.gguf files \('a.gguf', 'b.gguf'\)"):
        open_checkpoint(tmp_path)
    with pytest.raises(EngineError):
        open_checkpoint(tmp_path / ("x" * 5000))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"neither model\.safetensors nor"):
        open_safetensors(tmp_path)


def test_the_door_opens_both_formats(story_folder: Path, smollm2_gguf: Path) -> None:
    for path, format_ in [
        (story_folder, "safetensors"),
        (story_folder / "model.safetensors", "safetensors"),
        (smollm2_gguf, "gguf"),
    ]:
        checkpoint = open_checkpoint(path)
        try:
            assert checkpoint.format == format_
            assert checkpoint.config["model_type"] == "llama"
        finally:
            checkpoint.close()
