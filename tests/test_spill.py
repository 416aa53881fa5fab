"""The disk tier for KV pages: a page is read as it was written, or not found, whatever happened to its file."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from fabula.errors import InvalidArgument, StoreError, StoreFull, StoreLocked, StoreReadOnly
from fabula.kv import spill
from fabula.kv.spill import Bytes, Fingerprint, SpillFolder
from spilling import FILE_BYTES, FIRST, PAGE_BYTES, SECOND, content, file_of, files, key, n_pages_of, opened, page
from waiting import run_program

MINUTE_NS = 60_000_000_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that spill.py sees, in `.ns`."""
    made = SimpleNamespace(ns=10**18)
    made.time_ns = lambda: made.ns
    monkeypatch.setattr(spill, "time", made)
    return made


# ---- Fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprints_say_what_differs() -> None:
    assert FIRST.difference(FIRST) == ""
    assert FIRST.difference(SECOND) == "the weights differ, KV is f16 here, f32 there"
    other = Fingerprint("w1", "t2", "f16", "2")
    assert FIRST.difference(other) == "the tokenizers differ, the page layout is 1: 2 x 1 x 8 here, 2 there"


def test_fingerprint_keys_depend_on_every_field_and_its_place() -> None:
    prints = [Fingerprint(*fields) for fields in (("ab", "c", "", ""), ("a", "bc", "", ""), ("", "ab", "c", ""))]
    keys = {made.key for made in (*prints, FIRST, SECOND, Fingerprint("ж", '"', "\udcff", "\0"))}
    assert len(keys) == 6 and all(len(made) == 32 for made in keys)


# ---- Writing and reading ---------------------------------------------------------------------------------------------


def test_round_trip(spilled: SpillFolder) -> None:
    assert content(spilled, 0) is None and key(0) not in spilled
    assert spilled.put(key(0), page(0))
    assert not spilled.put(key(0), page(1)), "it is there already"
    assert spilled.put(key(1), page(1))
    np.testing.assert_array_equal(content(spilled, 0), page(0))
    np.testing.assert_array_equal(content(spilled, 1), page(1))
    assert (spilled.n_pages, spilled.n_bytes, spilled.folder_bytes) == (2, 2 * FILE_BYTES, 2 * FILE_BYTES)
    assert key(0) in spilled and "no key" not in spilled
    spilled.discard(key(0))
    spilled.discard(key(0))
    assert content(spilled, 0) is None and spilled.n_pages == 1
    assert spilled.last_error is None and spilled.n_damaged == 0


def test_pages_survive_reopening(tmp_path: Path) -> None:
    with_two = opened(tmp_path)
    assert with_two.put(key(0), page(0)) and with_two.put(key(1), page(1))
    with_two.close()
    with_two.close()
    assert not with_two.put(key(2), page(2)) and content(with_two, 0) is None, "closed"
    again = opened(tmp_path)
    assert again.n_pages == 2
    np.testing.assert_array_equal(content(again, 0), page(0))
    again.clear()
    assert again.n_pages == 0 == again.folder_bytes and not files(tmp_path)
    again.close()


def test_other_fingerprints_lie_beside(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.put(key(0), page(0))
    first.close()
    second = opened(tmp_path, SECOND)
    assert second.other_fingerprints() == [FIRST]
    assert second.n_pages == 0 and content(second, 0) is None and second.folder_bytes == FILE_BYTES
    second.clear()
    second.close()
    first = opened(tmp_path)
    assert first.other_fingerprints() == [] and first.n_pages == 1
    assert {made.name for made in tmp_path.iterdir()} == {"lock", FIRST.key}, "a folder without pages is removed"
    first.close()


@pytest.mark.parametrize("bad", [page(0)[:-1], page(0)[None], page(0).view(np.int8), np.repeat(page(0), 2)[::2]])
def test_pages_of_a_wrong_shape(spilled: SpillFolder, bad: Bytes) -> None:
    with pytest.raises(InvalidArgument, match="a page is contiguous uint8 \\[100\\]"):
        spilled.put(key(0), bad)
    with pytest.raises(InvalidArgument):
        spilled.get(key(0), bad)
    with pytest.raises(InvalidArgument, match="a key has 16 bytes, this one 3"):
        spilled.put(b"abc", page(0))


def test_arguments_out_of_range(tmp_path: Path) -> None:
    for page_bytes, budget in ((0, 1), (1, -1)):
        with pytest.raises(InvalidArgument):
            SpillFolder(tmp_path / "new", FIRST, page_bytes, budget)
    assert not (tmp_path / "new").exists()


# ---- Budget and order of use -----------------------------------------------------------------------------------------


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    made = opened(tmp_path, n_pages=3)
    for i in range(3):
        assert made.put(key(i), page(i))
    assert content(made, 0) is not None
    assert not made.put(key(1), page(1)), "being put again is a use"
    assert made.put(key(3), page(3))
    assert files(tmp_path) == {key(i).hex() for i in (0, 1, 3)} and made.folder_bytes == 3 * FILE_BYTES
    made.close()


def test_the_order_survives_reopening(tmp_path: Path, clock: SimpleNamespace) -> None:
    made = opened(tmp_path)
    for i in range(4):
        made.put(key(i), page(i))  # all within the same ns of the clock
    clock.ns += MINUTE_NS - 1
    content(made, 0)
    clock.ns += 10
    content(made, 1)
    made.close()
    made = opened(tmp_path, n_pages=2)
    assert files(tmp_path) == {key(1).hex(), key(3).hex()}, "0 was read within its minute, so its time stayed"
    clock.ns -= 10**17
    made.put(key(4), page(4))
    made.close()
    made = opened(tmp_path, n_pages=2)
    made.put(key(5), page(5))
    assert files(tmp_path) == {key(4).hex(), key(5).hex()}, "a clock that was put back changes nothing"
    made.close()


def test_a_page_is_touched_once_a_minute(spilled: SpillFolder, tmp_path: Path, clock: SimpleNamespace) -> None:
    spilled.put(key(0), page(0))
    times = []
    for _ in range(5):
        clock.ns += MINUTE_NS // 2
        content(spilled, 0)
        times.append(file_of(tmp_path, 0).stat().st_mtime_ns)
    assert len(set(times)) == 3


def test_the_budget_holds_over_all_fingerprints(tmp_path: Path) -> None:
    first = opened(tmp_path, n_pages=3)
    for i in range(3):
        first.put(key(i), page(i))
    first.close()
    second = opened(tmp_path, SECOND, n_pages=3)
    assert second.put(key(0), page(0)) and second.put(key(1), page(1))
    assert second.folder_bytes == 3 * FILE_BYTES and second.n_pages == 2
    assert file_of(tmp_path, 2).exists() and not file_of(tmp_path, 1).exists()
    second.close()


def test_a_budget_below_one_page(tmp_path: Path) -> None:
    made = SpillFolder(tmp_path, FIRST, PAGE_BYTES, FILE_BYTES - 1)
    assert not made.put(key(0), page(0))
    assert isinstance(made.last_error, StoreFull) and "budget of 131 bytes" in str(made.last_error)
    made.close()


# ---- States ----------------------------------------------------------------------------------------------------------

STATE_BYTES = 250


def state(i: int) -> Bytes:
    return np.random.default_rng(1000 + i).integers(0, 256, STATE_BYTES).astype(np.uint8)


def with_states(folder: Path, fingerprint: Fingerprint = FIRST, budget: int = 10_000) -> SpillFolder:
    return SpillFolder(folder, fingerprint, PAGE_BYTES, budget, STATE_BYTES)


def state_of(spilled: SpillFolder, i: int) -> Bytes | None:
    out = np.zeros(STATE_BYTES, np.uint8)
    return out if spilled.get(key(i), out) else None


def test_states_lie_beside_pages_and_survive_reopening(tmp_path: Path) -> None:
    made = with_states(tmp_path)
    assert made.put(key(0), page(0)) and made.put(key(1), state(1)) and made.put(key(2), state(2))
    assert not made.put(key(1), state(1)) and key(1) in made and key(9) not in made
    made.close()
    made = with_states(tmp_path)
    assert (made.n_pages, made.n_states) == (1, 2) and made.other_fingerprints() == []
    assert made.folder_bytes == made.n_bytes == FILE_BYTES + 2 * (STATE_BYTES + 32)
    np.testing.assert_array_equal(content(made, 0), page(0))
    np.testing.assert_array_equal(state_of(made, 2), state(2))
    assert content(made, 1) is None and state_of(made, 0) is None, "a state is no page"
    made.discard(key(1))
    assert (made.n_pages, made.n_states) == (1, 1)
    made.clear()
    assert (made.n_pages, made.n_states, made.folder_bytes) == (0, 0, 0) and files(tmp_path) == set()
    made.close()


def test_pages_and_states_share_a_budget(tmp_path: Path) -> None:
    made = with_states(tmp_path, budget=2 * FILE_BYTES + STATE_BYTES + 32)
    assert made.put(key(0), state(0)) and made.put(key(1), page(1)) and made.put(key(2), page(2))
    assert made.put(key(3), page(3)), "the state was used the longest time ago"
    assert (made.n_pages, made.n_states) == (3, 0)
    assert made.put(key(4), state(4)) and (made.n_pages, made.n_states) == (2, 1)
    made.close()


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_a_damaged_state_is_removed(tmp_path: Path, harm: str) -> None:
    made = with_states(tmp_path)
    made.put(key(1), state(1))
    (path,) = [path for path in tmp_path.rglob(key(1).hex()) if path.is_file()]
    data = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    else:
        data[100] ^= 1
        path.write_bytes(bytes(data) if harm == "flip" else bytes(data[:-1]))
    assert state_of(made, 1) is None and made.n_states == 0 and made.folder_bytes == 0
    assert isinstance(made.last_error, StoreError) and files(tmp_path) == set()
    assert made.put(key(1), state(1)) and state_of(made, 1) is not None
    made.close()


def test_states_of_another_fingerprint_are_not_found(tmp_path: Path) -> None:
    first = with_states(tmp_path)
    first.put(key(1), state(1))
    first.close()
    second = with_states(tmp_path, SECOND)
    assert second.n_states == 0 and state_of(second, 1) is None and second.folder_bytes == STATE_BYTES + 32
    second.close()
    with pytest.raises(InvalidArgument, match="state_bytes 100 must be 0 or more, and not page_bytes"):
        SpillFolder(tmp_path / "new", FIRST, PAGE_BYTES, 1, PAGE_BYTES)


# ---- Disks and folders that refuse -----------------------------------------------------------------------------------


def test_a_write_cut_short_leaves_nothing(spilled: SpillFolder, tmp_path: Path) -> None:
    """The system refuses the end of a file: what a full disk does, provoked by the limit on file sizes."""
    spilled.put(key(0), page(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES // 2, limits[1]))
    try:
        put = spilled.put(key(1), page(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not put and isinstance(spilled.last_error, StoreFull)
    assert files(tmp_path) == {key(0).hex()} and spilled.folder_bytes == FILE_BYTES
    np.testing.assert_array_equal(content(spilled, 0), page(0))
    assert spilled.put(key(1), page(1))


FULL_DISK = """
import subprocess, sys
from pathlib import Path
import numpy as np
from fabula.errors import StoreFull
from fabula.kv.spill import Fingerprint, SpillFolder

folder = Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=64", "tmpfs", folder]).returncode:
    sys.exit(77)
pages = SpillFolder(folder, Fingerprint("w", "t", "f16", "1"), 20_000, 1 << 30)
data = np.arange(20_000, dtype=np.uint32).astype(np.uint8)
n = 0
while pages.put(bytes([n] * 16), data):
    n += 1
assert 5 < n < 13 and pages.n_pages == n, n
assert isinstance(pages.last_error, StoreFull) and "No space left" in str(pages.last_error), pages.last_error
assert not list(folder.rglob("*.tmp"))
out = np.zeros_like(data)
assert all(pages.get(bytes([i] * 16), out) and (out == data).all() for i in range(n))
pages.discard(bytes(16))
assert pages.put(bytes([n] * 16), data)
pages.close()
try:
    for i in range(99):
        (folder / str(i)).touch()
except OSError:
    pass
try:
    SpillFolder(folder, Fingerprint("w", "t", "f32", "1"), 20_000, 1 << 30)
except StoreFull as error:
    print(error)
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """On a file system of 256 KiB, in a mount namespace of its own."""
    command = ["unshare", "--mount", "--user", "--map-root-user", sys.executable, "-c", FULL_DISK, str(tmp_path)]
    try:
        ended = run_program(command)
    except FileNotFoundError:
        pytest.skip("unshare (util-linux) is not at hand")
    if ended.returncode == 77 or "unshare" in ended.stderr:
        pytest.skip(f"no file system of its own is allowed here: {ended.stderr}")
    assert ended.returncode == 0, ended.stderr
    assert "No space left" in ended.stdout


@pytest.mark.parametrize("place", ["file", "under a file", "/proc/no folder", "lock is a folder"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    """Refusals that hold for root, too."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "lock").mkdir(parents=True)
    folder = {
        "file": tmp_path / "file",
        "under a file": tmp_path / "file" / "x",
        "lock is a folder": tmp_path / "folder",
    }
    with pytest.raises(StoreReadOnly, match="cannot write"):
        opened(folder.get(place, Path(place)))


def test_a_folder_without_the_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:
        monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    tmp_path.chmod(0o500)
    with pytest.raises(StoreReadOnly):
        opened(tmp_path)
    tmp_path.chmod(0o700)


def test_a_folder_that_vanishes_is_made_again(spilled: SpillFolder, tmp_path: Path) -> None:
    spilled.put(key(0), page(0))
    (tmp_path / FIRST.key).rename(tmp_path / "gone")
    assert content(spilled, 0) is None
    assert spilled.put(key(1), page(1)) and content(spilled, 1) is not None
    (tmp_path / FIRST.key).rename(tmp_path / "gone too")
    (tmp_path / FIRST.key).write_text("a file is in the way")
    assert not spilled.put(key(2), page(2)) and isinstance(spilled.last_error, StoreReadOnly)


HOLDER = """
import sys
from pathlib import Path
from fabula.kv.spill import Fingerprint, SpillFolder

held = SpillFolder(Path(sys.argv[1]), Fingerprint("w", "t", "f16", "1"), 8, 1000)
print("held", flush=True)
sys.stdin.read()
"""


def test_only_one_process_at_a_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreLocked, match="another process uses it"):
            opened(tmp_path)
        holder.kill()
        holder.communicate()
    made = opened(tmp_path)
    with pytest.raises(StoreLocked):
        opened(tmp_path, SECOND)
    made.close()
    opened(tmp_path, SECOND).close()


# ---- Against a model -------------------------------------------------------------------------------------------------


class Pages(RuleBasedStateMachine):
    """Any order of calls, damage and reopening against a dict that keeps the order of use."""

    BUDGET = 5

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.clock = SimpleNamespace(time_ns=self.now)
        self.patch.setattr(spill, "time", self.clock)
        self.ns = 10**18
        self.place = tempfile.TemporaryDirectory()
        self.folder = Path(self.place.name)
        self.model: OrderedDict[tuple[Fingerprint, int], int] = OrderedDict()  # (whose, key) -> content
        self.fingerprint = FIRST
        self.n_damaged = 0
        self.spilled = opened(self.folder, n_pages=self.BUDGET)

    def now(self) -> int:
        self.ns += 2 * MINUTE_NS  # so that every use is written down
        return self.ns

    @rule(i=st.integers(0, 7), seed=st.integers(0, 1000))
    def put(self, i: int, seed: int) -> None:
        at = (self.fingerprint, i)
        assert self.spilled.put(key(i), page(seed)) == (at not in self.model)
        self.model.setdefault(at, seed)
        self.model.move_to_end(at)
        if len(self.model) > self.BUDGET:
            self.model.popitem(last=False)

    @rule(i=st.integers(0, 7))
    def get(self, i: int) -> None:
        found = content(self.spilled, i)
        seed = self.model.get((self.fingerprint, i))
        assert (found is None) == (seed is None)
        if seed is not None:
            np.testing.assert_array_equal(found, page(seed))
            self.model.move_to_end((self.fingerprint, i))

    @rule(i=st.integers(0, 7))
    def discard(self, i: int) -> None:
        self.spilled.discard(key(i))
        self.model.pop((self.fingerprint, i), None)

    @rule(i=st.integers(0, 7), at=st.integers(0, FILE_BYTES - 1))
    def damage(self, i: int, at: int) -> None:
        if self.model.pop((self.fingerprint, i), None) is not None:
            path = file_of(self.folder, i, self.fingerprint)
            raw = bytearray(path.read_bytes())
            raw[at] ^= 255
            path.write_bytes(raw)
            assert content(self.spilled, i) is None
            self.n_damaged += 1

    @rule()
    def clear(self) -> None:
        self.spilled.clear()
        for at in [at for at in self.model if at[0] == self.fingerprint]:
            del self.model[at]

    @rule(fingerprint=st.sampled_from([FIRST, SECOND]))
    def reopen(self, fingerprint: Fingerprint) -> None:
        self.spilled.close()
        self.fingerprint, self.n_damaged = fingerprint, 0
        self.spilled = opened(self.folder, fingerprint, n_pages=self.BUDGET)

    @invariant()
    def agrees(self) -> None:
        mine = {i for whose, i in self.model if whose == self.fingerprint}
        assert {i for i in range(8) if key(i) in self.spilled} == mine
        assert self.spilled.n_pages == len(mine) and self.spilled.n_damaged == self.n_damaged
        assert self.spilled.folder_bytes == len(self.model) * FILE_BYTES
        assert len(self.spilled.other_fingerprints()) == (len(self.model) > len(mine))
        expected = {file_of(self.folder, i, whose) for whose, i in self.model}
        assert {path for path in self.folder.glob("*/*/*") if path.is_file()} == expected

    def teardown(self) -> None:
        self.spilled.close()
        self.place.cleanup()
        self.patch.undo()


def test_any_order_of_calls() -> None:
    run_state_machine_as_test(Pages, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))


def test_four_threads(tmp_path: Path) -> None:
    """Each page's content follows from its key, so a reader can check it."""
    made = opened(tmp_path, n_pages=6)
    expected = [page(i) for i in range(10)]
    failures: list[str] = []
    together = threading.Barrier(4)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        together.wait()
        try:
            for step in range(400):
                i = int(rng.integers(10))
                made.put(key(i), expected[i])
                found = content(made, i)
                if found is not None and not np.array_equal(found, expected[i]):
                    failures.append(f"page {i} holds other bytes")
                if step % 7 == 0:
                    made.discard(key(i))
                if step % 50 == 0:
                    made.clear()
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and made.n_damaged == 0 and made.last_error is None
    assert made.folder_bytes == made.n_bytes <= 6 * FILE_BYTES
    assert files(tmp_path) == {key(i).hex() for i in range(10) if key(i) in made}
    n_pages = made.n_pages
    made.close()
    assert n_pages_of(tmp_path) == n_pages
