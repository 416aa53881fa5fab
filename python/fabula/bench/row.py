"""A row of benchmark results, with the keys of `fabula bench ... --json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fabula.errors import InvalidArgument

KEYS = (
    "case", "model", "weights", "kv", "threads", "unit", "ours", "peer", "peer_name", "peer_settings", "ratio", "limit",
    "limit_share",
)  # fmt: skip
LOWER_IS_BETTER = ("ms", "ms/token", "MB", "perplexity")  # units; for all others higher is better
_MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The result of one case, with at most one other engine. None where a key does not apply.

    Attributes:
        case: what was measured, with its size.
        ours, peer, limit: in `unit`; the limit is of this machine.
        more: other keys of the JSON object.
    """

    case: str
    unit: str
    ours: float | None
    model: str | None = None
    weights: str | None = None
    kv: str | None = None
    threads: int | None = None
    peer: float | None = None
    peer_name: str | None = None
    peer_settings: str | None = None
    limit: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times better ours is than the peer; > 1 is better for all units."""
        return better(self.unit, self.ours, self.peer)

    @property
    def limit_share(self) -> float | None:
        """Share of the limit reached; <= 1 for a true limit."""
        return better(self.unit, self.ours, self.limit)

    def to_json(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in KEYS} | dict(self.more)


def better(unit: str, ours: float | None, other: float | None) -> float | None:
    """ours / other if higher is better, else other / ours; None if one of them is missing or 0."""
    if not ours or not other:
        return None
    return other / ours if unit in LOWER_IS_BETTER else ours / other


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads rows from a file of JSON lines, the output of `--json`.

    Raises:
        InvalidArgument: it cannot be read, is too large, or a line is not such a row.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InvalidArgument(f"{path}: is larger than {_MAX_FILE_BYTES} bytes")
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InvalidArgument(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path}: is not UTF-8 text (byte {error.start})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(_checked(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise InvalidArgument(
                    f"{path}: line {number} is not what `fabula bench ... --json` prints: {error}"
                ) from None
    if not rows:
        raise InvalidArgument(f"{path}: holds no rows")
    return rows


_TEXTS = ("model", "weights", "kv", "peer_name", "peer_settings")
_LOWEST, _HIGHEST = 1e-30, 1e30
_NUMBERS = ("ours", "peer", "ratio", "limit", "limit_share", "operations_per_byte", "gop_per_s")


def _checked(row: Any) -> dict[str, Any]:
    """Checks the keys that plots use."""
    if not isinstance(row, dict):
        raise ValueError("not an object")
    if missing := [key for key in KEYS if key not in row]:
        raise ValueError(f"{', '.join(missing)} missing")
    _of_kind(row, ("case", "unit"), str, "a string")
    _of_kind(row, _TEXTS, (str, type(None)), "a string or null")
    _numbers(row, _NUMBERS)
    machine = row.get("machine", {})
    if not isinstance(machine, dict):
        raise ValueError("machine is not an object")
    _of_kind(machine, ("cpu", "isa"), (str, type(None)), "a string")
    _numbers(machine, ("read_bytes_per_s", "flops_per_s", "pairs_per_s", "dots_per_s"))
    return row


def _numbers(values: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        value = values.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Also refuses NaN, infinity and numbers that cannot be plotted.
        if value is not None and not (is_number and (value == 0 or _LOWEST <= value <= _HIGHEST)):
            raise ValueError(f"{key} is not a number, or out of range")


def _of_kind(values: Mapping[str, Any], keys: Sequence[str], kind: Any, name: str) -> None:
    for key in keys:
        if key in values and not isinstance(values[key], kind):
            raise ValueError(f"{key} is not {name}")
