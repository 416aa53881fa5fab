"""Models split over several GGUF files, read as one.

    NAME-00001-of-00003.gguf   all key-values, the first tensors (or none)
    NAME-00002-of-00003.gguf   split.no 1, split.count 3, split.tensors.count of all parts together; more tensors
    NAME-00003-of-00003.gguf   ...

The parts are in one folder and are found by the name of the first. Each part's keys must agree with its name and with
the first part's count, and together they must hold split.tensors.count tensors.

Source: llama.cpp's tools/gguf-split and src/llama-model-loader.cpp.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from fabula.errors import ModelFileError, Unsupported, shown
from fabula.formats.checkpoint import Span
from fabula.formats.gguf import MAX_TENSORS, GgufFile, GgufTensor
from fabula.formats.gguf_config import check_kind
from fabula.formats.gguf_keys import Keys
from fabula.formats.split_names import MAX_PARTS, part_name, part_names, part_of


def open_gguf_file(path: str | os.PathLike[str]) -> GgufFile | GgufParts:
    """Opens a model's GGUF file, with all its parts if it is split.

    Raises:
        ModelFileError: damaged, a part is missing or belongs to another model, or it is not the first part.
        Unsupported: another family, not a model, or an unsupported feature of the format.
        OutOfMemory: no room for the header.
    """
    first = GgufFile(path, check_kind=_check_first)
    try:
        count = Keys(first.path, first.metadata).integer("split.count", 1, low=0)
        return GgufParts(first, count) if count > 1 else first
    except BaseException:
        first.close()
        raise


class GgufParts:
    """The parts of a split model as one `GgufFile`; owns them.

    Args:
        first: the first part, opened.
        count: number of parts.

    Raises:
        ModelFileError: a part is missing, damaged, or belongs to another model.
        Unsupported: the first part's name has not the form above, or there are too many parts.

    Attributes:
        path: the first part.
        version: its version of GGUF.
        metadata: its key-values.
        tensors: of all parts, by GGUF name. An offset counts in the part that holds the tensor.
    """

    def __init__(self, first: GgufFile, count: int) -> None:
        self.path = first.path
        self.version = first.version
        self.metadata = first.metadata
        self.tensors: dict[str, GgufTensor] = {}
        self._part_of: dict[str, GgufFile] = {}
        with contextlib.ExitStack() as opened:
            opened.enter_context(first)
            self._add(first)
            for name in _names(first, count)[1:]:
                self._add(opened.enter_context(self._open(first, self.path.with_name(name), count)))
            self._check_total(first)
            self._opened = opened.pop_all()

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """Reads a tensor's bytes; see `GgufFile.read`."""
        if name not in self._part_of:
            raise ModelFileError(f"{self.path}: has no tensor {shown(name)}", path=self.path, field=name)
        return self._part_of[name].read(name)

    def span(self, name: str) -> Span:
        """Where a part has a tensor's bytes; errors as `read`."""
        if name not in self._part_of:
            raise ModelFileError(f"{self.path}: has no tensor {shown(name)}", path=self.path, field=name)
        return self._part_of[name].span(name)

    def close(self) -> None:
        """Closes the files; may be called twice."""
        self._opened.close()
        for part in self._part_of.values():
            part.close()

    def __enter__(self) -> GgufParts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, first: GgufFile, path: Path, count: int) -> GgufFile:
        """Opens a later part; its keys must agree with its name and with the first part."""
        _, number, _ = part_of(path.name) or ("", 0, 0)
        if not path.exists():
            raise ModelFileError(
                f"{first.path}: part {number} of {count} is missing: {path.name} must be in the same folder",
                path=first.path,
                field="split.count",
            )
        part = GgufFile(path)
        try:
            keys = Keys(path, part.metadata)
            for key, wanted in (("split.no", number - 1), ("split.count", count)):
                if (found := keys.integer(key, low=0)) != wanted:
                    raise keys.error(key, f"is {found}, must be {wanted} in part {number} of {count} of {first.path}")
            for key, value in part.metadata.items():
                known = first.metadata.get(key, value)
                if key.startswith("split.") or key == "general.alignment" or _same(value, known):
                    continue
                raise keys.error(key, f"differs from that of {first.path.name}: the parts are of different models")
        except BaseException:
            part.close()
            raise
        return part

    def _add(self, part: GgufFile) -> None:
        for name, tensor in part.tensors.items():
            if name in self.tensors:
                raise ModelFileError(
                    f"{part.path}: tensor {shown(name)}: is in {self._part_of[name].path.name} too: "
                    "the parts are of different models",
                    path=part.path,
                    field=name,
                )
            self.tensors[name] = tensor
            self._part_of[name] = part
        if len(self.tensors) > MAX_TENSORS:
            raise ModelFileError(f"{part.path}: the parts have more than {MAX_TENSORS} tensors", path=part.path)

    def _check_total(self, first: GgufFile) -> None:
        keys = Keys(first.path, first.metadata)
        if (stated := keys.integer("split.tensors.count", low=0)) != len(self.tensors):
            raise keys.error(
                "split.tensors.count",
                f"is {stated}, but the parts have {len(self.tensors)} tensors together: one of another model is among "
                "them, or one was not downloaded to its end",
            )


def _check_first(path: Path, metadata: Mapping[str, object]) -> None:
    """Refuses later parts and files that are not a model of a supported family."""
    keys = Keys(path, metadata)
    if keys.integer("split.count", 1, low=0) > 1 and (number := keys.integer("split.no", 0, low=0)) > 0:
        count = keys.integer("split.count")
        split = part_of(path.name)
        first = None if split is None else path.with_name(part_name(split[0], 1, split[2]))
        advice = "give the first part"
        if first is not None:
            missing = f": {first.name} must be in the same folder, and is missing"
            advice += f", {first.name}" if first.exists() else missing
        raise keys.error("split.no", f"is {number}: this is part {number + 1} of {count} of a split model; {advice}")
    check_kind(path, metadata)


def _names(first: GgufFile, count: int) -> list[str]:
    """The names of all parts."""
    if count > MAX_PARTS:
        raise Unsupported(f"{first.path}: key 'split.count': is {count}, at most {MAX_PARTS} parts are read")
    split = part_of(first.path.name)
    if split is None or split[1:] != (1, count):
        raise Unsupported(
            f"{first.path}: key 'split.count': is {count}: this is the first part of a split model, which must be "
            f"called NAME-00001-of-{count:05}.gguf, in one folder with the others; name the files so, or join them "
            "(llama-gguf-split --merge)"
        )
    return part_names(first.path.name)


def _same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and np.array_equal(one, other)
    return one == other
