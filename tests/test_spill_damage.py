"""The disk tier when its files are damaged, foreign, newer or missing: none of them is read as a page."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from fabula.errors import StoreCorrupt, StoreTooNew
from fabula.kv import spill
from fabula.kv.spill import Fingerprint, SpillFolder
from spilling import FILE_BYTES, FIRST, PAGE_BYTES, SECOND, content, file_of, files, key, n_pages_of, opened, page

# ---- Damage ----------------------------------------------------------------------------------------------------------


def assert_refused(spilled: SpillFolder, path: Path) -> None:
    """Page 0 is not found, its file is removed, and it can be written again."""
    before = spilled.n_damaged
    assert content(spilled, 0) is None
    assert spilled.n_damaged == before + 1 and isinstance(spilled.last_error, StoreCorrupt)
    assert not path.exists() and key(0) not in spilled and spilled.folder_bytes == 0
    assert spilled.put(key(0), page(0))
    np.testing.assert_array_equal(content(spilled, 0), page(0))


def test_every_flipped_bit_is_seen(spilled: SpillFolder, tmp_path: Path) -> None:
    spilled.put(key(0), page(0))
    path = file_of(tmp_path, 0)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert_refused(spilled, path)


@pytest.mark.parametrize("length", [0, 1, 4, 8, 31, 32, 33, FILE_BYTES - 1, FILE_BYTES + 1])
def test_cut_and_longer_files(spilled: SpillFolder, tmp_path: Path, length: int) -> None:
    spilled.put(key(0), page(0))
    path = file_of(tmp_path, 0)
    os.truncate(path, length)
    assert_refused(spilled, path)
    os.truncate(path, length)
    spilled.close()
    again = opened(tmp_path)
    assert again.n_damaged == 1 and again.n_pages == 0 and not path.exists(), "the scan sees a wrong length"
    again.close()


def test_files_of_another_key_model_or_format(spilled: SpillFolder, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill, "_FORMAT", 0)
        other = opened(tmp_path / "older")
        other.put(key(0), page(0))
        other.close()
    other = opened(tmp_path / "other", SECOND)
    other.put(key(0), page(0))
    other.close()
    spilled.put(key(1), page(1))
    path = file_of(tmp_path, 0)
    strangers = [
        file_of(tmp_path, 1).read_bytes(),
        file_of(tmp_path / "older", 0).read_bytes(),
        file_of(tmp_path / "other", 0, SECOND).read_bytes(),
    ]
    spilled.discard(key(1))
    for stranger in strangers:
        spilled.put(key(0), page(0))
        path.write_bytes(stranger)
        assert_refused(spilled, path)


def test_a_file_that_somebody_removed_is_no_damage(spilled: SpillFolder, tmp_path: Path) -> None:
    spilled.put(key(0), page(0))
    file_of(tmp_path, 0).unlink()
    assert content(spilled, 0) is None and spilled.n_damaged == 0 and spilled.folder_bytes == 0
    assert spilled.put(key(0), page(0))


def test_a_page_put_anew_while_it_was_read_stays(spilled: SpillFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> bool:
        spilled.discard(key(0))
        return not spilled.put(key(0), page(1))

    spilled.put(key(0), page(0))
    with monkeypatch.context() as patch:
        patch.setattr(spilled, "_read", read)
        assert content(spilled, 0) is None
    assert spilled.n_damaged == 0
    np.testing.assert_array_equal(content(spilled, 0), page(1))


def test_closing_during_a_write_leaves_nothing(
    spilled: SpillFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def header(*_: object) -> bytes:
        spilled.close()
        return b""

    monkeypatch.setattr(spilled, "_header", header)
    assert not spilled.put(key(0), page(0))
    assert not files(tmp_path) and spilled.folder_bytes == 0


def test_no_descriptor_left_keeps_the_page(spilled: SpillFolder) -> None:
    spilled.put(key(0), page(0))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        found, put = content(spilled, 0), spilled.put(key(1), page(1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found is None and not put and "open files" in str(spilled.last_error)
    np.testing.assert_array_equal(content(spilled, 0), page(0))


MANIFEST = {
    "format": 1,
    "fingerprint": {"weights": "w1", "tokenizer": "t1", "kv": "f16", "layout": "1: 2 x 1 x 8"},
    "page_bytes": PAGE_BYTES,
}


def test_the_manifest(tmp_path: Path) -> None:
    opened(tmp_path).close()
    assert json.loads((tmp_path / FIRST.key / "manifest.json").read_text()) == MANIFEST


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[" * 50_000,
        "[]",
        '{"format": 1}',
        b"\xff",
        json.dumps(MANIFEST | {"format": 0}),
        json.dumps(MANIFEST | {"format": "1"}),
        json.dumps(MANIFEST | {"page_bytes": PAGE_BYTES - 1}),
        json.dumps(MANIFEST | {"page_bytes": "100"}),
        json.dumps(MANIFEST | {"fingerprint": {"weights": "w1"}}),
        json.dumps(MANIFEST | {"fingerprint": ["w1", "t1", "f16", "1"]}),
        " " * 70_000 + json.dumps(MANIFEST),
    ],
    ids=range(14),
)
@pytest.mark.parametrize("mine", [True, False])
def test_a_damaged_manifest_empties_its_folder(tmp_path: Path, text: str | bytes | None, mine: bool) -> None:
    made = opened(tmp_path)
    made.put(key(0), page(0))
    made.close()
    manifest = tmp_path / FIRST.key / "manifest.json"
    if text is None:
        manifest.unlink()
    else:
        manifest.write_bytes(text if isinstance(text, bytes) else text.encode())
    foreign = tmp_path / FIRST.key / "notes.txt"
    foreign.write_text("somebody's")
    made = opened(tmp_path, FIRST if mine else SECOND)
    assert made.n_damaged == 1 and made.folder_bytes == 0
    assert files(tmp_path) == {"notes.txt"}
    assert made.put(key(0), page(0))
    made.close()
    assert n_pages_of(tmp_path, FIRST if mine else SECOND) == 1


@pytest.mark.parametrize("fingerprint", [FIRST, SECOND])
def test_a_newer_format_is_left_alone(tmp_path: Path, fingerprint: Fingerprint) -> None:
    made = opened(tmp_path)
    made.put(key(0), page(0))
    made.close()
    manifest = tmp_path / FIRST.key / "manifest.json"
    manifest.write_text('{"format": 2, "what": "is not known here"}')
    with pytest.raises(StoreTooNew, match="is of format 2, this version of Fabula reads 1"):
        opened(tmp_path, fingerprint)
    assert files(tmp_path) == {key(0).hex()}
    manifest.write_text(json.dumps(MANIFEST))
    assert n_pages_of(tmp_path) == 1, "the lock was given back"


def test_leftovers_are_removed_and_foreign_files_are_not(tmp_path: Path) -> None:
    made = opened(tmp_path)
    made.put(key(0), page(0))
    made.close()
    path = file_of(tmp_path, 0)
    home = tmp_path / FIRST.key
    drafts = [path.with_name(path.name + ".tmp"), home / "manifest.json.tmp"]
    foreign = [tmp_path / "a.txt", tmp_path / "photos" / path.name, home / "a.txt", path.parent / "a.tmp"]
    foreign += [home / "zz" / path.name, path.parent / ("ff" + path.name[2:])]
    for stray in drafts + foreign:
        stray.parent.mkdir(exist_ok=True)
        stray.write_bytes(b"?")
    (path.parent / (path.name[:-1] + "x")).mkdir()
    made = opened(tmp_path)
    assert made.n_pages == 1 and made.n_damaged == 0
    assert not any(draft.exists() for draft in drafts) and all(stray.exists() for stray in foreign)
    made.close()
