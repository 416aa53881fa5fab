"""A stuck disk blocks no other work: eviction, lookup and usage continue while a page is written or read."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from fabula import SamplingParams, Workspace
from fabula._native import PAGE_POSITIONS, kv_layers, page_bytes
from fabula.formats.checkpoint import DType
from fabula.kv import spill as spill_module
from fabula.kv.cache import KvEvictionList
from fabula.kv.pages import PagePool, Sequence
from fabula.kv.prefix import EVERYTHING, KeyChain
from fabula.kv.spill import SpillFolder
from fabula.kv.spill_writer import SpillWriter
from spilling import FILE_BYTES, FIRST, content, key, n_pages_of, opened
from spilling import page as a_page

N_PAGES = 8


class Gate:
    """Calls of a function stop here until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, only: Callable[..., bool]) -> None:
        self.reached, self._open, function = threading.Event(), threading.Event(), getattr(owner, name)

        def gated(*args: Any, **options: Any) -> Any:
            if only(*args):
                self.reached.set()
                self._open.wait()
            return function(*args, **options)

        monkeypatch.setattr(owner, name, gated)

    def open(self) -> None:
        self._open.set()


class Setting:
    """A pool with a disk tier."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.pool = PagePool(DType.F32, N_PAGES, kv_layers(1, 1, 4))
        self.cache = KvEvictionList(self.pool)
        spilled = SpillFolder(folder, FIRST, self.pool.page_bytes, 100 * (self.pool.page_bytes + 32))
        self.cache.spill = self.writer = SpillWriter(spilled, **options)

    def computed(self, token: int, n_pages: int) -> Sequence:
        """A sequence of full pages that are published; each byte of a page is its number in the text."""
        sequence, keys = Sequence(self.pool), self.keys(token, n_pages)
        for i, page in enumerate(sequence.reserve(n_pages * PAGE_POSITIONS).tolist()):
            self.pool.native.write(page, np.full(self.pool.page_bytes, token + i, np.uint8))
            self.pool.name(page, keys[i])
        sequence.n_tokens = n_pages * PAGE_POSITIONS
        return sequence

    def keys(self, token: int, n_pages: int) -> list[bytes]:
        return KeyChain("").keys(np.full(n_pages * PAGE_POSITIONS, token, np.int32))

    def check(self, token: int, n_pages: int) -> None:
        """Looks a text up and compares the bytes."""
        found = self.cache.find(self.keys(token, n_pages), EVERYTHING)
        assert found is not None and found.n_tokens == n_pages * PAGE_POSITIONS
        with found:
            for i, page in enumerate(found.pages):
                assert (self.pool.native.read(page) == token + i).all()


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    made = Setting(tmp_path)
    yield made
    made.writer.close()
    made.cache.close()
    made.pool.close()


HELD = {
    "writing": (SpillFolder, "_header", lambda *_: True),
    "renaming": (Path, "replace", lambda path, _: path.suffix == ".tmp"),
}


@pytest.mark.parametrize("held", HELD)
def test_others_go_on_while_the_disk_stands_still(held: str, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, *HELD[held])
    cache = setting.cache
    old = setting.computed(10, 4)
    cache.keep(old)
    cache.evict(old)
    gate.reached.wait()
    try:
        assert cache.usage().n_spilled == 4 and cache.usage().n_used == 0
        first = setting.computed(20, 4)  # append
        fork = first.fork()
        fork.reserve(fork.n_tokens + 1)
        assert cache.usage().n_used == 5 and cache.usage().n_shared == 4
        fork.close()
        cache.keep(first)
        assert cache.usage().n_cached == 4
        second = setting.computed(30, 6)  # evicts two pages of the first
        assert first.n_tokens == 2 * PAGE_POSITIONS and cache.usage().n_evicted == 2
        second.close()
        first.close()
        setting.check(10, 4)  # what is queued is found
        assert cache.usage().n_spilled == 6
    finally:
        gate.open()
    setting.writer.drain()
    assert setting.writer.folder.n_pages == 6
    setting.check(10, 4)


@pytest.mark.parametrize("held", ["removing", "touching", "renaming"])
def test_pages_are_read_while_another_file_is_worked_on(
    held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is locked for no file operation, whatever it is."""
    monkeypatch.setattr(spill_module, "_TOUCH_NS", 0 if held == "touching" else spill_module._TOUCH_NS)
    with closing(opened(tmp_path, n_pages=3)) as folder:
        for i in range(3):
            assert folder.put(key(i), a_page(i))
        owner, name = {
            "removing": (Path, "unlink"),
            "touching": (spill_module.os, "utime"),
            "renaming": (Path, "replace"),
        }[held]
        gate = Gate(monkeypatch, owner, name, lambda path, *_: key(1 if held == "touching" else 0).hex() in str(path))
        if held == "renaming":
            folder.discard(key(0))
        work = {
            "removing": lambda: folder.put(key(3), a_page(3)),
            "touching": lambda: content(folder, 1) is not None,
            "renaming": lambda: folder.put(key(0), a_page(0)),
        }
        results: list[bool] = []
        thread = threading.Thread(target=lambda: results.append(work[held]()))
        thread.start()
        gate.reached.wait()
        try:
            found = content(folder, 2)
            assert found is not None and (found == a_page(2)).all()
            assert folder.n_pages == {"removing": 2, "touching": 3, "renaming": 2}[held]
            assert folder.folder_bytes == 3 * FILE_BYTES and not folder.other_fingerprints()
            if held != "touching":
                assert not folder.put(key(0), a_page(0)), "its file is being worked on"
        finally:
            gate.open()
            thread.join()
        assert results == [True] and folder.n_pages == 3
    assert n_pages_of(tmp_path) == 3


def test_others_go_on_while_a_page_is_read(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    old = setting.computed(10, 3)
    setting.cache.keep(old)
    setting.cache.clear()
    assert setting.writer.folder.n_pages == 3 and setting.pool.n_free == N_PAGES
    gate = Gate(monkeypatch, SpillFolder, "_read", lambda *_: True)
    readers = [threading.Thread(target=setting.check, args=(10, 3)) for _ in range(2)]
    for reader in readers:
        reader.start()
    gate.reached.wait()
    try:
        other = setting.computed(20, 2)
        setting.cache.keep(other)
        assert setting.cache.usage().n_cached == 2
        setting.check(20, 2)
        setting.cache.evict(other)
    finally:
        gate.open()
    for reader in readers:
        reader.join()
    assert setting.pool.n_free == N_PAGES
    setting.pool.check([])


def test_a_full_queue_refuses_pages_but_saving_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, max_queued_bytes=2 * PagePool(DType.F32, 1, kv_layers(1, 1, 4)).page_bytes)
    gate = Gate(monkeypatch, SpillFolder, "_header", lambda *_: True)
    old = setting.computed(10, 4)
    setting.cache.keep(old)
    setting.cache.evict(old)
    assert setting.writer.n_pages == 2  # the first of the text: those serve without the others
    gate.open()
    setting.check(10, 2)
    monkeypatch.setattr("fabula.kv.cache.DRAIN_BYTES", 0)
    with setting.computed(20, 5) as new:
        setting.cache.keep(new)
        setting.cache.save_all()
        assert setting.writer.folder.n_pages == 7
    setting.writer.close()
    setting.writer.close()
    assert not setting.writer.put(b"x" * 16, np.zeros(setting.pool.page_bytes, np.uint8))


def test_a_failing_write_ends_nothing(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill_module.os, "utime", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    old = setting.computed(10, 4)
    setting.cache.keep(old)
    setting.cache.clear()
    assert setting.writer.n_pages == 0 and setting.writer.folder.last_error is not None
    monkeypatch.undo()
    setting.cache.keep(new := setting.computed(10, 4))
    setting.cache.evict(new)
    setting.check(10, 4)


def test_a_destructor_waits_for_no_lock(setting: Setting) -> None:
    """The collector may run it in a thread that has a lock for which the owner of the pool's lock waits."""
    old = setting.computed(10, 3)
    setting.cache.keep(old)
    with setting.pool.lock:
        thread = threading.Thread(target=lambda sequences: sequences.clear(), args=([old],))
        del old
        thread.start()
        thread.join()
    assert setting.cache.usage().n_used == 0 == setting.cache.usage().n_cached
    assert setting.pool.n_free == N_PAGES
    setting.pool.check([])


def test_collected_sequences_leave_the_list(setting: Setting) -> None:
    """Also one whose id another sequence has by now."""
    kept = [Sequence(setting.pool) for _ in range(50)]
    for sequence in kept:
        setting.cache.keep(sequence)
    del sequence
    kept.clear()
    gc.collect()
    again = [Sequence(setting.pool) for _ in range(50)]  # likely with the same ids
    for sequence in again:
        setting.cache.keep(sequence)
    assert len(setting.cache._sequences()) == 50 == len(setting.cache._kept)


def test_answers_of_a_workspace_do_not_wait_for_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions push each other out of memory while nothing can be written."""
    n_bytes = 8 * page_bytes(DType.F16, kv_layers(2, 2, 6))
    folder, params = tiny.write_model(tmp_path / "m"), SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    alone: list[str] = []
    for gated in (False, True):
        data = tmp_path / f"data{gated}"
        with Workspace(data) as workspace:
            model = workspace.load(folder, name="tiny", threads=1, context=256, kv_memory=n_bytes)
            gate = Gate(monkeypatch, SpillFolder, "_header", lambda *_: True)
            try:
                if not gated:
                    gate.open()
                sessions = [workspace.session(f"s{i}", sampling=params) for i in range(6)]
                texts = [session.say("the lion and the mouse " * 2 + str(session.id)).text() for session in sessions]
                usage = model.kv_usage
                assert usage.n_evicted and usage.n_spilled
            finally:
                gate.open()
            if gated:
                assert texts == alone and gate.reached.is_set()
            alone = texts
        with closing(SpillFolder(next((data / "pages").iterdir()), FIRST, 1, 1 << 30)) as pages:
            assert pages.folder_bytes, "closing wrote what was queued"
