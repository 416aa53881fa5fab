"""What a loss of power may leave of files, worked out from the shim's journal."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_HEAD = struct.Struct("<IIqq")
_SECTOR = 512  # bytes that a disk writes as one


@dataclass(frozen=True, slots=True)
class Event:
    """A record of the journal.

    Attributes:
        what: "W" write, "T" truncation, "S" sync, "U" unlink, "N" a note of the program's.
        path: of the file.
        offset: of a write, or the size that a truncation leaves.
        data: what is written, or the note.
    """

    what: str
    path: str
    offset: int
    data: bytes


def events(journal: bytes) -> Iterator[Event]:
    at = 0
    while at < len(journal):
        what, n_path, offset, n_data = _HEAD.unpack_from(journal, at)
        at += _HEAD.size
        path, data = journal[at : at + n_path], journal[at + n_path : at + n_path + n_data]
        at += n_path + n_data
        yield Event(chr(what), path.decode(), offset, data)


@dataclass(slots=True)
class _File:
    synced: bytearray = field(default_factory=bytearray)
    pending: list[Event] = field(default_factory=list)
    unlinked: bool = False


class Disk:
    """Files as a disk holds them: what was synced for certain, and what was not as chance has it."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}

    def apply(self, event: Event) -> None:
        if event.what == "N":
            return
        if event.what == "S" and event.path not in self._files:  # a folder: names taken out of it stay out
            for path in [p for p, file in self._files.items() if file.unlinked and str(Path(p).parent) == event.path]:
                del self._files[path]
            return
        file = self._files.setdefault(event.path, _File())
        if event.what == "U":
            file.unlinked = True
            return
        if file.unlinked:  # a new file of that name; the old one is gone
            file = self._files[event.path] = _File()
        if event.what == "S":
            for write in file.pending:
                _apply(file.synced, write)
            file.pending = []
        else:
            file.pending.append(event)

    def images(self, rng: random.Random) -> Iterator[tuple[str, bytes]]:
        """Files after a loss of power now: of what was not synced nothing, all, or any sectors, in any mixture; a file
        unlinked last may be back."""
        for path, file in self._files.items():
            if file.unlinked and rng.random() < 0.5:
                continue
            image = bytearray(file.synced)
            share = rng.choice([0.0, 0.3, 0.8, 1.0])
            for event in file.pending:
                if event.what == "T":
                    if rng.random() < share:
                        _apply(image, event)
                    continue
                for start in range(0, len(event.data), _SECTOR):
                    if rng.random() < share:
                        part = event.data[start : start + _SECTOR]
                        _apply(image, Event("W", path, event.offset + start, part))
            yield path, bytes(image)

    def restore(self, folder: Path, rng: random.Random) -> None:
        """Writes the files after a loss of power to a folder."""
        for path, image in self.images(rng):
            (folder / Path(path).name).write_bytes(image)


def _apply(image: bytearray, event: Event) -> None:
    end = event.offset + len(event.data)
    if len(image) < end:
        image.extend(bytes(end - len(image)))
    if event.what == "T":
        del image[event.offset :]
        image.extend(bytes(event.offset - len(image)))
    else:
        image[event.offset : end] = event.data
