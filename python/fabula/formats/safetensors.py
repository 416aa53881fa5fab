"""Reads a Hugging Face model folder: config.json with model.safetensors, or with shards under an index.

A file is an 8-byte little-endian header length, a JSON header, then the tensors' bytes:

    [u64 n][header: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ..., "__metadata__"}][data]

Format: https://github.com/huggingface/safetensors#format. The `safetensors` library checks each header first. Then
stricter rules apply: every byte of data belongs to exactly one tensor, sizes equal shape x dtype, names are unique.
Bytes are read by position at the header's offsets, so BF16 needs no torch and no file is mapped into memory.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, Self, TypeGuard

import numpy as np
import numpy.typing as npt

from fabula.errors import ModelFileError, ModelFileWarning, Unsupported, shown
from fabula.formats import mxfp4
from fabula.formats.checkpoint import DType, Span, TensorInfo, TensorTable
from fabula.formats.quantized import refuse_quantized, refuse_quantized_tensors
from fabula.formats.readfile import file_size, open_regular, parse_json_object, read_at, read_json_object
from fabula.formats.tensor_names import canonical_names, is_head, is_leftover
from fabula.formats.text_part import text_part
from fabula.lean_dataclasses import dataclass

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Limits on what an untrusted file may claim. The first is the format's own; the others are far above every known model.
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 65_536
MAX_DIMS = 4  # of a supported tensor
MAX_RANK = 64  # of any tensor; as in NumPy and PyTorch
MAX_DIM = 2**40  # also of an empty tensor, whose other dimensions the file's size does not bound
MAX_SHARDS = 512  # each takes a file descriptor; the usual limit is 1,024 a process
MAX_CONFIG_BYTES = 1_000_000
MAX_INDEX_BYTES = 16_000_000
# Commas, colons and brackets of a header. A tensor needs about 13. Without the limit, 100 MB of "[],[]," would parse
# into gigabytes of objects.
_MAX_STRUCTURE = 2_000_000
_COMPARED = 1 << 22  # elements of two tensors compared at a time

_READABLE = {"F32": DType.F32, "F16": DType.F16, "BF16": DType.BF16}
# Bits of an element, from the format's list of dtypes. The library checks dtypes that are not listed here.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32,
    "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of a header; `offset` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class _Shard:
    """An open file with its checked header.

    Attributes:
        aliases: name -> tensor whose bytes it shares.
        unlisted: tensors in the file that the index does not list.
    """

    path: Path
    file: io.FileIO
    entries: dict[str, _Entry]
    aliases: dict[str, str]
    unlisted: frozenset[str] = frozenset()


class SafetensorsCheckpoint:
    """An opened model folder; see `fabula.formats.checkpoint.Checkpoint`. Made by `open_safetensors`.

    Tensors have the names of a `transformers` decoder with a head, whatever prefix they have in the files; see
    `formats/tensor_names.py`. Iterating over `tensors` skips those of other dtypes than F32, F16 and BF16 or of more
    than four dimensions; looking one of them up raises Unsupported. The two byte tensors of an MXFP4 one are that one
    (`formats/mxfp4.py`).
    """

    def __init__(self, path: Path, config: dict[str, Any], shards: list[_Shard]) -> None:
        self.path = path
        self.format = "safetensors"
        config = text_part(config)
        self.metadata: Mapping[str, Any] = {}
        self._files = [shard.file for shard in shards]
        self._places: dict[str, tuple[_Shard, _Entry]] = {}
        self._scales: dict[str, tuple[_Shard, _Entry]] = {}  # of MXFP4 tensors, whose blocks are at their place
        tensors: dict[str, TensorInfo] = {}
        unreadable: dict[str, str] = {}
        found = [name for shard in shards for name in (*shard.entries, *shard.aliases)]
        refuse_quantized_tensors(found, path)
        canonical = canonical_names(found, path, str(config.get("model_type")))
        for shard in shards:
            for name in shard.unlisted - canonical.keys():
                unreadable[name] = f"lies in {shard.path.name}, but {INDEX_FILE} does not name it"
        in_bytes: dict[str, tuple[_Shard, _Entry]] = {}
        for shard in shards:
            names = {name: name for name in shard.entries} | shard.aliases
            for found_name, stored in names.items():
                entry, name = shard.entries[stored], canonical[found_name]
                dtype = _READABLE.get(entry.dtype)
                if entry.dtype == "U8":
                    in_bytes[name] = shard, entry
                if dtype is None:
                    unreadable[name] = f"is {entry.dtype}; Fabula reads F32, F16 and BF16 from safetensors files"
                elif len(entry.shape) > MAX_DIMS:
                    unreadable[name] = f"has {len(entry.shape)} dimensions; Fabula reads at most {MAX_DIMS}"
                else:
                    tensors[name] = TensorInfo(name, dtype, entry.shape, entry.n_bytes)
                    self._places[name] = (shard, entry)
        for name, info in self._mxfp4(in_bytes).items():
            tensors[name] = info
            for ending in (mxfp4.BLOCKS, mxfp4.SCALES):
                del unreadable[name + ending]
        self.config: Mapping[str, Any] = self._settle_head(config, tensors)
        self.tensors: Mapping[str, TensorInfo] = TensorTable(path, tensors, unreadable)

    def _mxfp4(self, in_bytes: Mapping[str, tuple[_Shard, _Entry]]) -> dict[str, TensorInfo]:
        """Tensors in MXFP4, which are stored as two tensors of bytes each."""
        found = {}
        for stored in in_bytes:
            name = stored.removesuffix(mxfp4.BLOCKS)
            if name != stored and name + mxfp4.SCALES in in_bytes:
                self._places[name], self._scales[name] = in_bytes[stored], in_bytes[name + mxfp4.SCALES]
                shapes = self._places[name][1].shape, self._scales[name][1].shape
                found[name] = mxfp4.joined(name, *shapes, self.path)
        return found

    def _settle_head(self, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, Any]:
        """Corrects `tie_word_embeddings` of the config by the tensors that are present.

        As in transformers: if a tied model has only one of embedding and head, it serves as both; if it has both and
        they differ, the model is not tied.
        """
        if config.get("tie_word_embeddings") is not True or HEAD not in tensors:
            return config
        if EMBEDDING not in tensors:
            head = tensors.pop(HEAD)
            tensors[EMBEDDING] = TensorInfo(EMBEDDING, head.dtype, head.shape, head.n_bytes)
            self._places[EMBEDDING] = self._places.pop(HEAD)
        elif not self._are_equal(tensors[EMBEDDING], tensors[HEAD]):
            warnings.warn(
                f"{self.path}: config 'tie_word_embeddings' is true, but {HEAD} differs from {EMBEDDING}:"
                " the head's own is used",
                ModelFileWarning,
                stacklevel=3,
            )
            return config | {"tie_word_embeddings": False}
        return config

    def _are_equal(self, one: TensorInfo, other: TensorInfo) -> bool:
        """Whether two tensors hold the same numbers."""
        if self._places[one.name] == self._places[other.name]:
            return True
        if one.shape != other.shape:
            return False
        n = prod(one.shape)
        for start in range(0, n, _COMPARED):
            count = min(_COMPARED, n - start)
            if not np.array_equal(self._numbers(one, start, count), self._numbers(other, start, count)):
                return False
        return True

    def _numbers(self, info: TensorInfo, start: int, count: int) -> npt.NDArray[np.float32]:
        """Elements `start` .. `start + count` of a tensor, float32 [count]."""
        shard, entry = self._places[info.name]
        size = entry.n_bytes // prod(entry.shape)
        raw = read_at(shard.file, entry.offset + start * size, count * size, path=shard.path, field=info.name)
        if info.dtype == DType.BF16:
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        return raw.view("<f4" if info.dtype == DType.F32 else "<f2").astype(np.float32)

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """Reads one tensor's raw bytes by position, uint8 [n_bytes], row-major, little-endian.

        Raises:
            ModelFileError: no such tensor, the file ended early, or the checkpoint is closed.
            Unsupported: an unsupported dtype or number of dimensions.
            OutOfMemory: no room for the bytes.
        """
        if name not in self.tensors:
            raise ModelFileError(f"{self.path}: holds no tensor {shown(name)}", path=self.path, field=str(name))
        shard, entry = self._places[name]
        raw = read_at(shard.file, entry.offset, entry.n_bytes, path=shard.path, field=name)
        if name not in self._scales:
            return raw
        shard, entry = self._scales[name]
        scales = read_at(shard.file, entry.offset, entry.n_bytes, path=shard.path, field=name)
        return mxfp4.ggml_blocks(raw, scales)

    def span(self, name: str) -> Span | None:
        """Where a file has these bytes; see `Checkpoint.span`."""
        if name not in self.tensors or name in self._scales:
            return None
        shard, entry = self._places[name]
        return None if shard.file.closed else Span(shard.file.fileno(), entry.offset, shard.path)

    def close(self) -> None:
        """Closes the files; may be called twice."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_safetensors(path: Path) -> SafetensorsCheckpoint:
    """Opens a Hugging Face folder, or one .safetensors file next to a config.json.

    In a folder, reads `model.safetensors` if it exists, else the shards of `model.safetensors.index.json`. The path of
    one shard opens all of them.

    Raises:
        ModelFileError: a file is missing, damaged, incomplete or hostile; the message names file and reason.
        Unsupported: the weights are quantized, or the folder holds an adapter too.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    config = read_json_object(folder / CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES)
    refuse_quantized(config, folder)
    if path == folder and (folder / ADAPTER_FILE).exists():
        raise Unsupported(
            f"{folder}: {ADAPTER_FILE} is next to the weights, so transformers would apply an adapter to them; merge"
            " it first (peft: merge_and_unload(), then save_pretrained), or move that file away to load the model"
            " without it"
        )
    if path != folder and _is_listed(path):
        path = folder  # one of several shards: open all
    with ExitStack() as stack:
        if path != folder:
            shards = [_open_shard(path, stack)]
        elif (folder / WEIGHTS_FILE).exists():
            shards = [_open_shard(folder / WEIGHTS_FILE, stack)]
        elif (folder / INDEX_FILE).exists():
            shards = _open_indexed(folder, config, stack)
        else:
            raise ModelFileError(f"{folder}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}", path=folder)
        checkpoint = SafetensorsCheckpoint(folder, config, shards)
        stack.pop_all()  # the checkpoint owns the files now
    return checkpoint


def _is_listed(path: Path) -> bool:
    """Whether a file is a shard in the index of its folder."""
    index_path = path.parent / INDEX_FILE
    if not index_path.is_file():
        return False
    weight_map = read_json_object(index_path, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    return isinstance(weight_map, dict) and path.name in weight_map.values()


def _open_indexed(folder: Path, config: Mapping[str, Any], stack: ExitStack) -> list[_Shard]:
    """Opens the shards of an index and keeps of each only the tensors that the index assigns to it.

    Some indexes also list tensors that were not written: the head of a tied model, and unused buffers.
    """
    tied = config.get("tie_word_embeddings") is True

    def may_be_missing(name: str) -> bool:
        return is_leftover(name) or (tied and is_head(name))

    index_path = folder / INDEX_FILE
    weight_map = read_json_object(index_path, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(
            f"{index_path}: weight_map is not an object with entries", path=index_path, field="weight_map"
        )
    if len(weight_map) > MAX_TENSORS:
        raise ModelFileError(f"{index_path}: names {len(weight_map)} tensors, more than {MAX_TENSORS}", path=index_path)
    wanted: dict[str, list[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise ModelFileError(
                f"{index_path}: the file of tensor {shown(name)} is not text", path=index_path, field=name
            )
        wanted.setdefault(file_name, []).append(name)
    if len(wanted) > MAX_SHARDS:
        raise ModelFileError(f"{index_path}: names {len(wanted)} shards, more than {MAX_SHARDS}", path=index_path)
    for file_name in [file_name for file_name, names in wanted.items() if all(map(may_be_missing, names))]:
        if Path(file_name).name == file_name and not (folder / file_name).exists():
            del wanted[file_name]
    for file_name, names in wanted.items():  # check all names before opening a file
        _check_shard_name(folder, file_name, index_path, names[0])
    shards = []
    for file_name, names in wanted.items():
        whole = _open_shard(folder / file_name, stack)
        for name in names:
            if name not in whole.entries and name not in whole.aliases and not may_be_missing(name):
                raise ModelFileError(
                    f"{whole.path}: holds no tensor {shown(name)}, although {INDEX_FILE} places it there",
                    path=whole.path,
                    field=name,
                )
        keep = {whole.aliases.get(name, name) for name in names}
        shards.append(
            _Shard(
                whole.path,
                whole.file,
                {name: entry for name, entry in whole.entries.items() if name in keep},
                {name: stored for name, stored in whole.aliases.items() if stored in keep},
                frozenset(whole.entries.keys() - keep),
            )
        )
    return shards


def _check_shard_name(folder: Path, file_name: str, index_path: Path, tensor: str) -> None:
    """Refuses a shard name that leads outside the model's folder, by its text or through a symbolic link.

    The Hugging Face cache links snapshots/<commit>/<file> to blobs/<hash> of the same models--<owner>--<name> folder;
    links inside that folder are allowed.
    """

    def fail(reason: str) -> ModelFileError:
        return ModelFileError(
            f"{index_path}: tensor {shown(tensor)} is placed in {shown(file_name)}, {reason}",
            path=index_path,
            field=tensor,
        )

    if (
        not file_name.endswith(".safetensors")
        or "/" in file_name
        or "\\" in file_name
        or file_name.startswith(".")
        or not file_name.isprintable()
    ):
        raise fail("which is not the plain name of a .safetensors file")
    try:
        target = (folder / file_name).resolve(strict=True)
    except FileNotFoundError:
        raise fail(f"which is missing from {folder}; download the model again") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
        raise fail(f"which cannot be opened: {error}") from None
    home = folder.resolve()
    allowed = [home, *(parent for parent in home.parents if parent.name.startswith("models--"))][:2]
    if not any(target.is_relative_to(root) for root in allowed):
        raise fail("a symbolic link that leaves the model's folder")


def _open_shard(path: Path, stack: ExitStack) -> _Shard:
    """Opens one .safetensors file and checks its header; `stack` owns the file."""
    file = stack.enter_context(open_regular(path))
    size = file_size(file)
    if size < 8:
        raise ModelFileError(f"{path}: has {size} bytes, too few for a safetensors file", path=path)
    n_header = int.from_bytes(read_at(file, 0, 8, path=path).tobytes(), "little")
    if not 2 <= n_header <= MAX_HEADER_BYTES:
        raise ModelFileError(
            f"{path}: header length is {n_header}, must be 2 to {MAX_HEADER_BYTES}", path=path, field="header"
        )
    if n_header > size - 8:
        raise ModelFileError(
            f"{path}: header length is {n_header}, but only {size - 8} bytes follow;"
            " the file was cut or is not a safetensors file",
            path=path,
            field="header",
        )
    head = read_at(file, 0, 8 + n_header, path=path).tobytes()
    _ask_library(path, head, size)
    entries, aliases = _parse_header(path, head[8:], first=8 + n_header, size=size)
    return _Shard(path, file, entries, aliases)


def _ask_library(path: Path, head: bytes, size: int) -> None:
    """Checks the header with the `safetensors` library.

    The library maps the file into memory, and a file that shrinks meanwhile would crash the process. So it gets an
    anonymous file of the same size with the same header and no data; on systems without those, the file itself.
    """
    from safetensors import SafetensorError, safe_open  # GGUF files need no library

    try:
        fd = os.memfd_create("fabula-header")
    except (AttributeError, OSError):
        fd = -1
    try:
        shown_path = path
        if fd >= 0 and Path(f"/proc/self/fd/{fd}").exists():
            os.truncate(fd, size)
            os.pwrite(fd, head, 0)
            shown_path = Path(f"/proc/self/fd/{fd}")
        with safe_open(shown_path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"{path}: is not a valid safetensors file: {shown(error, 300)}", path=path, field="header"
        ) from None
    finally:
        if fd >= 0:
            os.close(fd)


def _parse_header(path: Path, raw: bytes, *, first: int, size: int) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Parses a header that the library accepted, and applies the stricter rules.

    Args:
        path: the file, for messages.
        raw: the JSON text, which may be padded with spaces at its end.
        first: offset of the first data byte in the file.
        size: of the whole file in bytes.

    Returns:
        Tensors by name, and aliases (name -> name of the tensor whose bytes it shares).
    """

    def fail(name: str, reason: str) -> ModelFileError:
        where = f"tensor {shown(name)}" if name else "header"
        return ModelFileError(f"{path}: {where} {reason}", path=path, field=name or "header")

    if raw[:1] != b"{" or raw.rstrip(b" ")[-1:] != b"}":
        raise fail("", "is not one JSON object padded with spaces")
    if sum(map(raw.count, (b",", b":", b"[", b"{"))) > _MAX_STRUCTURE:
        raise fail("", f"has more structure than {MAX_TENSORS} tensors need")
    header = parse_json_object(raw, path=path, what="header")
    metadata = header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise fail("", f"names {len(header)} tensors, more than {MAX_TENSORS}")

    entries: dict[str, _Entry] = {}
    for name, value in header.items():
        dtype, shape, offsets = (
            (value.get(key) for key in ("dtype", "shape", "data_offsets")) if isinstance(value, dict) else (None,) * 3
        )
        if not isinstance(dtype, str) or not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
            raise fail(name, "lacks a dtype, a shape or two data_offsets")
        if len(shape) > MAX_RANK or any(dim > MAX_DIM for dim in shape):
            raise fail(name, f"has {len(shape)} dimensions, {shape[:8]}; beyond {MAX_RANK} or {MAX_DIM}")
        begin, end = offsets
        if begin > end or first + end > size:
            raise fail(name, f"lies at bytes {begin} to {end} of {size - first}")
        bits = _BITS.get(dtype)
        if bits is not None and prod(shape) * bits != 8 * (end - begin):
            raise fail(name, f"has shape {shape[:8]} of {dtype}, which is not {end - begin} bytes")
        entries[name] = _Entry(dtype, tuple(shape), first + begin, end - begin)

    expected = first
    previous_offset = -1
    # By offset, empty tensors first: the next tensor has the same offset.
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].n_bytes)):
        if entry.offset == previous_offset:
            raise fail(name, "begins where another tensor begins")
        if entry.offset != expected:
            raise fail(name, "overlaps another tensor" if entry.offset < expected else "follows a gap")
        previous_offset = entry.offset
        expected += entry.n_bytes
    if expected != size:
        raise fail("", f"accounts for {expected} of {size} bytes; something is appended to the file")

    # safetensors.torch.save_model stores shared tensors once and records the others as name -> stored name.
    aliases = {
        name: stored
        for name, stored in (metadata if isinstance(metadata, dict) else {}).items()
        if isinstance(stored, str) and stored in entries and name not in entries
    }
    return entries, aliases


def _is_counts(value: object) -> TypeGuard[list[int]]:
    """Whether `value` is a list of integers >= 0; booleans do not count."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
