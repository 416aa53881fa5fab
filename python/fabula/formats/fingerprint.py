"""A fingerprint of a checkpoint, computed while a model is loaded, so that the files are read only once.

It covers each tensor's name, format and shape, and evenly spaced samples of its bytes. Training changes nearly every
number of the tensors it touches, so samples are enough. It does not detect a checkpoint forged to match another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fabula.formats.checkpoint import Checkpoint, Span, TensorInfo

SAMPLES, SAMPLE_BYTES = 16, 4096  # of each tensor


class Fingerprinting:
    """Wraps a checkpoint and hashes what is read through it.

    Args:
        checkpoint: to read from.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._digests: dict[str, bytes] = {}
        self.path: Path = checkpoint.path
        self.format: str = checkpoint.format
        self.config: Mapping[str, Any] = checkpoint.config
        self.metadata: Mapping[str, Any] = checkpoint.metadata
        self.tensors: Mapping[str, TensorInfo] = checkpoint.tensors

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """Reads one tensor's raw bytes; see `Checkpoint.read`."""
        raw = self._checkpoint.read(name)
        self._hash(name, raw.size, lambda start, n_bytes: raw.data[start : start + n_bytes])
        return raw

    def span(self, name: str) -> Span | None:
        """See `Checkpoint.span`; its `after` reads the samples."""
        span = self._checkpoint.span(name)
        return None if span is None else span._replace(after=partial(self._hash_span, name, span))

    def _hash_span(self, name: str, span: Span) -> None:
        def part(start: int, n_bytes: int) -> bytes:
            with suppress(OSError):  # whoever reads all of it reports that
                return os.pread(span.file, n_bytes, span.offset + start)
            return b""

        self._hash(name, self.tensors[name].n_bytes, part)

    def _hash(self, name: str, size: int, part: Callable[[int, int], bytes | memoryview]) -> None:
        """Hashes samples of a tensor of `size` bytes; part(start, n_bytes) gives one."""
        info = self.tensors[name]
        digest = blake2b(f"{name} {info.dtype.name} {info.shape}".encode(), digest_size=16)
        last, length = max(0, size - SAMPLE_BYTES), min(size, SAMPLE_BYTES)
        starts = sorted({i * last // (SAMPLES - 1) for i in range(SAMPLES)})
        digest.update(b"".join([part(start, length) for start in starts]))
        self._digests[name] = digest.digest()

    def close(self) -> None:
        """Closes the files; may be called twice."""
        self._checkpoint.close()

    @property
    def digest(self) -> str:
        """Hash of all tensors read so far, 32 hexadecimal digits; independent of the order of reads."""
        whole = blake2b(digest_size=16)
        for name in sorted(self._digests):
            whole.update(self._digests[name])
        return whole.hexdigest()
