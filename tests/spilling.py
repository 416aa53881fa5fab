"""Pages for tests of the disk tier, and folders of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fabula.kv.spill import Bytes, Fingerprint, SpillFolder

PAGE_BYTES = 100
FILE_BYTES = PAGE_BYTES + 32
FIRST = Fingerprint("w1", "t1", "f16", "1: 2 x 1 x 8")
SECOND = Fingerprint("w2", "t1", "f32", "1: 2 x 1 x 8")


def key(i: int) -> bytes:
    """Key number i; two in a row lie in different subfolders."""
    return i.to_bytes(2, "little") * 8


def page(i: int) -> Bytes:
    return np.random.default_rng(i).integers(0, 256, PAGE_BYTES).astype(np.uint8)


def opened(folder: Path, fingerprint: Fingerprint = FIRST, n_pages: int = 100) -> SpillFolder:
    """The folder with a budget of so many pages."""
    return SpillFolder(folder, fingerprint, PAGE_BYTES, n_pages * FILE_BYTES)


def n_pages_of(folder: Path, fingerprint: Fingerprint = FIRST) -> int:
    """Pages that are found when the folder is opened."""
    with contextlib.closing(opened(folder, fingerprint)) as spilled:
        return spilled.n_pages


def content(spilled: SpillFolder, i: int) -> Bytes | None:
    out = np.zeros(PAGE_BYTES, np.uint8)
    return out if spilled.get(key(i), out) else None


def file_of(folder: Path, i: int, fingerprint: Fingerprint = FIRST) -> Path:
    name = key(i).hex()
    return folder / fingerprint.key / name[:2] / name


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()} - {"lock", "manifest.json"}


@pytest.fixture
def spilled(tmp_path: Path) -> Iterator[SpillFolder]:
    made = opened(tmp_path)
    yield made
    made.close()
