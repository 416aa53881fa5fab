"""A disk tier for KV pages: files that outlive the process, each one page of one model's KV.

The recurrent states of a hybrid are files of another size, in a folder of their own. What is said of pages below holds
for them, too.

    <folder>/lock                           held (flock) by the one process that uses the folder
    <folder>/<fingerprint>/manifest.json    format, the fingerprint, bytes of a page
    <folder>/<fingerprint>/a3/a34f...       one page, the file name is its key: a header, then the bytes as in memory
    <folder>/<fingerprint'>/...             the same with states; its layout says so

A spilled page is only a cache: what cannot be written is skipped, what fails its checksum is removed; both are counted
instead of raised. Files come into place whole, by rename, and are not synced: one that a loss of power cut
short fails its checksum. The index lives in memory, made by one scan when the folder is opened; modification times
carry the order of use over a restart. Only names of this scheme are ever removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import struct
import threading
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fabula.errors import InvalidArgument, StoreCorrupt, StoreError, StoreFull, StoreReadOnly, StoreTooNew
from fabula.files import FileLock

KEY_BYTES = 16
_FORMAT = 1  # of manifest and page files
_MAGIC = b"FbKV"
_HEADER = struct.Struct("<4sIQ16s")  # magic, format, page_bytes, BLAKE2b-128 of key, fingerprint and page
_MANIFEST = "manifest.json"
_STATES = ", recurrent states"  # ends the layout of their fingerprint
_DRAFT = ".tmp"  # ends the name of a file that is being written
_HOME = re.compile("[0-9a-f]{32}")
_PAGE = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{30}(\.tmp)?")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_TOUCH_NS = 60_000_000_000  # a page's modification time is updated at most once a minute

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a page's bytes depend on besides its tokens; pages can be used only where all four are equal.

    Attributes:
        weights, tokenizer: digests.
        kv: format of K and V, "f32" or "f16".
        layout: the page layout in words, its version and shape.
    """

    weights: str
    tokenizer: str
    kv: str
    layout: str

    @property
    def key(self) -> str:
        """Digest of all four, 32 hexadecimal digits."""
        text = json.dumps([self.weights, self.tokenizer, self.kv, self.layout])
        return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()

    def difference(self, other: Fingerprint) -> str:
        """What differs, in words, `self` being "here" and `other` "there"; "" when nothing does."""
        parts = {
            "the weights differ": self.weights != other.weights,
            "the tokenizers differ": self.tokenizer != other.tokenizer,
            f"KV is {self.kv} here, {other.kv} there": self.kv != other.kv,
            f"the page layout is {self.layout} here, {other.layout} there": self.layout != other.layout,
        }
        return ", ".join(text for text, differs in parts.items() if differs)


class _Manifest(NamedTuple):
    fingerprint: Fingerprint
    page_bytes: int

    @property
    def file_bytes(self) -> int:
        return _HEADER.size + self.page_bytes


class _PageId(NamedTuple):
    home: str  # key of the fingerprint
    key: bytes


class SpillFolder:
    """Pages and states of one fingerprint in a folder that several fingerprints, but only one process at a time, may
    use.

    A key is KEY_BYTES bytes, a page contiguous uint8 [page_bytes], a state uint8 [state_bytes]. Thread-safe; no lock is
    held over file operations.
    After `close()` nothing is found and nothing is written.

    Args:
        folder: made if missing, for this user alone.
        fingerprint: what the pages are computed from.
        page_bytes: bytes of a page.
        budget_bytes: files of pages of all fingerprints together; the least recently used go first.
        state_bytes: bytes of a state, other than those of a page; 0 for a model without states.

    Attributes:
        n_pages: pages of this fingerprint.
        n_states: states of it.
        folder_bytes: files of pages of all fingerprints, what the budget limits.
        n_damaged: files that were damaged, truncated, foreign or of an older format, and were removed.
        last_error: why a page was last not written or not found where it should be; None before.

    Raises:
        StoreLocked: another process, or another SpillFolder of this one, uses the folder.
        StoreReadOnly, StoreFull: the folder cannot be written, or the disk has no room even for the manifest.
        StoreTooNew: a newer version of Fabula keeps pages in the folder; nothing was changed.
    """

    def __init__(
        self, folder: Path, fingerprint: Fingerprint, page_bytes: int, budget_bytes: int, state_bytes: int = 0
    ) -> None:
        if page_bytes < 1 or budget_bytes < 0:
            raise InvalidArgument(f"page_bytes {page_bytes} must be 1 or more, budget_bytes {budget_bytes} 0 or more")
        if state_bytes < 0 or state_bytes == page_bytes:
            raise InvalidArgument(f"state_bytes {state_bytes} must be 0 or more, and not page_bytes")
        self.folder = folder
        self.fingerprint = fingerprint
        self.page_bytes = page_bytes
        self.budget_bytes = budget_bytes
        self.n_damaged = 0
        self.last_error: StoreError | None = None
        self._home = fingerprint.key
        self._manifests = {self._home: _Manifest(fingerprint, page_bytes)}  # of every fingerprint with pages here
        self._homes = {page_bytes: self._home}  # of this fingerprint, by the size of what is there
        self._state_home = ""
        if state_bytes:
            of_states = replace(fingerprint, layout=fingerprint.layout + _STATES)
            self._state_home = self._homes[state_bytes] = of_states.key
            self._manifests[self._state_home] = _Manifest(of_states, state_bytes)
        self._stamps: OrderedDict[_PageId, int] = OrderedDict()  # files' modification times, least recently used first
        self._busy: set[_PageId] = set()  # pages whose files are being written or removed
        self.n_pages = self.n_states = 0
        self.folder_bytes = 0
        self._stamp = 0  # the last one given
        # Guards the index, never held over file operations. `in`, `n_pages` and `folder_bytes` do not take it.
        # Re-entrant: the garbage collector may discard a page in the middle of another call.
        self._lock = threading.RLock()
        self._closed = False
        try:
            self._file_lock = _take_lock(folder)
            with contextlib.ExitStack() as undo:
                undo.callback(self.close)
                self._scan()
                undo.pop_all()
        except OSError as error:
            raise error if isinstance(error, StoreError) else _store_error(folder, error) from None

    def put(self, key: bytes, data: Bytes) -> bool:
        """Writes a page; the least recently used ones are removed to make room.

        Returns:
            Whether it was written. False when it is there already, or was refused: then `last_error` says why.
        """
        page = _PageId(self._check(key, data), key)
        file_bytes = self._manifests[page.home].file_bytes
        if page in self._stamps:
            self._use(page)
            return False
        with self._lock:
            if self._closed or page in self._busy or page in self._stamps:
                return False
            victims, fits = self._make_room(file_bytes)
            if fits:
                self._busy.add(page)
                self.folder_bytes += file_bytes
            stamp = self._next_stamp()
        self._remove(victims)
        if not fits:
            return False
        path = self._path(page)
        draft = path.with_name(path.name + _DRAFT)
        written = False
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with draft.open("wb") as file:
                file.write(self._header(page, data))
                file.write(data.data)
                file.flush()
                os.utime(file.fileno(), ns=(stamp, stamp))
            if not self._closed:
                draft.replace(path)
                written = True
        except OSError as error:
            self.last_error = _store_error(path, error)
        finally:
            if not written:
                with contextlib.suppress(OSError):
                    draft.unlink()
            with self._lock:
                self._busy.discard(page)
                kept = written and not self._closed
                if kept:
                    self._stamps[page] = stamp
                    self._count(page, 1)
                else:
                    self.folder_bytes -= file_bytes
        return kept

    def get(self, key: bytes, out: Bytes) -> bool:
        """Reads a page into `out`, whose bytes count only when True is returned.

        Returns:
            Whether the page is there and whole. One that is not whole is removed.
        """
        page = _PageId(self._check(key, out), key)
        stamp = self._use(page)
        if stamp is None:
            return False
        path = self._path(page)
        try:
            if self._read(path, page, out):
                return True
            error: StoreError = StoreCorrupt(f"{path}: not the bytes that were written; removed", path=path)
        except OSError as cause:
            error = StoreError(f"cannot read {path}: {cause.strerror or cause}", path=path)
            if cause.errno not in (
                errno.ENOENT,
                errno.EIO,
            ):  # such as too many open files: not the page's fault
                self.last_error = error
                return False
        with self._lock:
            ours = self._stamps.get(page) == stamp  # else another call removed the page, and perhaps wrote it again
            if ours:
                self._forget(page)
                self.last_error = error
                self.n_damaged += isinstance(error, StoreCorrupt)
        self._remove([page] if ours else [])
        return False

    def __contains__(self, key: object) -> bool:
        stamps = self._stamps  # no lock: it is called under the pool's
        return (self._home, key) in stamps or (bool(self.n_states) and (self._state_home, key) in stamps)

    def discard(self, key: bytes) -> None:
        """Removes a page, or a state, if it is there."""
        with self._lock:
            found = [page for home in self._homes.values() if self._forget(page := _PageId(home, key))]
        self._remove(found)

    def clear(self) -> None:
        """Removes every page and state of this fingerprint; those of others stay."""
        with self._lock:
            own = [page for page in self._stamps if page.home in self._homes.values()]
            found = [page for page in own if self._forget(page)]
        self._remove(found)

    @property
    def n_bytes(self) -> int:
        """Bytes of this fingerprint's files."""
        counts = {self._home: self.n_pages, self._state_home: self.n_states}
        return sum(counts[home] * self._manifests[home].file_bytes for home in self._homes.values())

    def other_fingerprints(self) -> list[Fingerprint]:
        """Fingerprints of the other pages in the folder, the most recently used first."""
        with self._lock:
            homes = dict.fromkeys(page.home for page in reversed(self._stamps))
            others = [self._manifests[home].fingerprint for home in homes if home not in self._homes.values()]
            return [other for other in others if not other.layout.endswith(_STATES)]

    def close(self) -> None:
        """Lets other processes use the folder; may be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._stamps.clear()
            self.n_pages = self.n_states = 0
        self._file_lock.close()

    # ---- Index and files ---------------------------------------------------------------------------------------------

    def _path(self, page: _PageId) -> Path:
        name = page.key.hex()
        return self.folder / page.home / name[:2] / name

    def _next_stamp(self) -> int:
        """The time in ns, but later than any given before: the order must survive coarse and corrected clocks."""
        self._stamp = max(self._stamp + 1, time.time_ns())
        return self._stamp

    def _use(self, page: _PageId) -> int | None:
        """Makes a page the most recently used, and returns its stamp; None if it is not there."""
        with self._lock:
            if page not in self._stamps:
                return None
            self._stamps.move_to_end(page)
            before, stamp = self._stamps[page], self._next_stamp()
            if stamp - before < _TOUCH_NS:
                return before
            self._stamps[page] = stamp
        with contextlib.suppress(OSError):
            os.utime(self._path(page), ns=(stamp, stamp))
        return stamp

    def _make_room(self, n_bytes: int) -> tuple[list[_PageId], bool]:
        """Takes the least recently used out of the index until `n_bytes` more fit the budget; the caller holds the
        lock.

        Returns:
            Pages to `_remove`, and whether there is room then.
        """
        victims: list[_PageId] = []
        while self.folder_bytes + n_bytes > self.budget_bytes:
            page = next(iter(self._stamps), None)
            if n_bytes > self.budget_bytes or page is None:
                text = f"{self.folder}: the budget of {self.budget_bytes} bytes has no room for a page of {n_bytes}"
                self.last_error = StoreFull(text, path=self.folder)
                return victims, False
            self._forget(page)
            victims.append(page)
        return victims, True

    def _forget(self, page: _PageId) -> bool:
        """Takes a page out of the index, if it is there: the caller holds the lock and then calls `_remove`."""
        if self._stamps.pop(page, None) is None:
            return False
        self.folder_bytes -= self._manifests[page.home].file_bytes
        self._count(page, -1)
        self._busy.add(page)  # or a new file of that name would be removed
        return True

    def _remove(self, pages: list[_PageId]) -> None:
        """Removes the files of pages that are not in the index any more; the caller holds no lock."""
        for page in pages:
            try:
                self._path(page).unlink(missing_ok=True)
            except OSError as error:
                self.last_error = _store_error(self._path(page), error)
            with self._lock:
                self._busy.discard(page)

    def _count(self, page: _PageId, n: int) -> None:
        self.n_pages += n * (page.home == self._home)
        self.n_states += n * (page.home == self._state_home)

    def _check(self, key: bytes, page: Bytes) -> str:
        """Checks a key and a page, or a state, and returns which folder it belongs in."""
        if len(key) != KEY_BYTES:
            raise InvalidArgument(f"a key has {KEY_BYTES} bytes, this one {len(key)}")
        home = self._homes.get(page.size)
        if page.dtype != np.uint8 or page.ndim != 1 or home is None or not page.flags.c_contiguous:
            sizes = " or ".join(f"[{n}]" for n in self._homes)
            raise InvalidArgument(f"a page is contiguous uint8 {sizes}, not {page.dtype} {page.shape}")
        return home

    def _header(self, page: _PageId, data: Bytes) -> bytes:
        checksum = hashlib.blake2b(page.key + page.home.encode("ascii"), digest_size=16)
        checksum.update(data.data)
        return _HEADER.pack(_MAGIC, _FORMAT, data.nbytes, checksum.digest())

    def _read(self, path: Path, page: _PageId, out: Bytes) -> bool:
        """Whether the file is whole and this page's; its bytes are then in `out`."""
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
            whole = file.readinto(out.data) == out.nbytes and not file.read(1)
        return whole and header == self._header(page, out)

    def _scan(self) -> None:
        """Fills the index, removes unusable files, and makes this fingerprint's folder."""
        homes = [home for home in self.folder.iterdir() if _HOME.fullmatch(home.name) and home.is_dir()]
        found: list[tuple[int, _PageId]] = []
        for home, manifest in [(home, _read_manifest(home)) for home in homes]:
            own, n_before = self._manifests.get(home.name, manifest), len(found)
            (home / (_MANIFEST + _DRAFT)).unlink(missing_ok=True)
            for path in list(home.glob("??/*")):
                named = _PAGE.fullmatch(f"{path.parent.name}/{path.name}")
                if not named or not path.is_file():
                    continue
                info = path.stat()
                if not named[2] and manifest and manifest == own and info.st_size == manifest.file_bytes:
                    found.append((info.st_mtime_ns, _PageId(home.name, bytes.fromhex(path.name))))
                else:
                    self.n_damaged += not named[2]  # a draft of a process that died is no damage
                    path.unlink()
            if len(found) == n_before:
                _remove_empty(home)
            elif manifest:
                self._manifests[home.name] = manifest
        for stamp, page in sorted(found):
            self._stamps[page] = self._stamp = stamp
            self.folder_bytes += self._manifests[page.home].file_bytes
            self._count(page, 1)
        for key in self._homes.values():
            home = self.folder / key
            home.mkdir(mode=0o700, exist_ok=True)
            if not (home / _MANIFEST).exists():
                _write_manifest(home, self._manifests[key])
        self._remove(self._make_room(0)[0])


def _store_error(path: Path, error: OSError) -> StoreError:
    kind = StoreFull if error.errno in _FULL else StoreReadOnly if error.errno in _READ_ONLY else StoreError
    return kind(f"cannot write {path}: {error.strerror or error}", path=path)


def _take_lock(folder: Path) -> FileLock:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreReadOnly(f"cannot write {folder}", path=folder)
    return FileLock(folder / "lock", folder)


def _remove_empty(home: Path) -> None:
    """Removes the folder of a fingerprint without pages, unless other files are in it."""
    (home / _MANIFEST).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for folder in [*home.iterdir(), home]:
            folder.rmdir()


def _read_manifest(home: Path) -> _Manifest | None:
    """A fingerprint's manifest; None when it is missing or not as `_write_manifest` left it. Raises StoreTooNew."""
    try:
        with (home / _MANIFEST).open("rb") as file:
            value = json.loads(file.read(65_536))
        version = value["format"]
        if type(version) is int and version > _FORMAT:
            raise StoreTooNew(f"{home} is of format {version}, this version of Fabula reads {_FORMAT}", path=home)
        manifest = _Manifest(Fingerprint(**value["fingerprint"]), value["page_bytes"])
        sound = version == _FORMAT and type(manifest.page_bytes) is int and manifest.fingerprint.key == home.name
    except (FileNotFoundError, IsADirectoryError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return manifest if sound else None


def _write_manifest(home: Path, manifest: _Manifest) -> None:
    fields = {"format": _FORMAT, "fingerprint": asdict(manifest.fingerprint), "page_bytes": manifest.page_bytes}
    draft = home / (_MANIFEST + _DRAFT)
    with draft.open("w", encoding="utf-8") as file:
        json.dump(fields, file, indent=2)
        file.flush()
        os.fsync(file.fileno())  # once a model; a manifest lost with the power would cost every page
    draft.replace(home / _MANIFEST)
