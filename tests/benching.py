"""Helpers of the tests of `fabula bench`: calls, a machine, and stand-ins for other engines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from fabula.bench.machine import Machine
from fabula.bench.row import KEYS
from fabula.cli.bench import bench

MACHINE = Machine(
    cpu="x",
    isa="avx2",
    cores=2,
    threads=2,
    read_bytes_per_s=1e10,
    flops_per_s=1e11,
    pairs_per_s=1.5e11,
    dots_per_s=2e11,
)
TEXT = "the winter in the lighthouse was long, and all the others were on the shore. " * 30


def call(*arguments: str) -> Result:
    return CliRunner().invoke(bench, list(arguments), catch_exceptions=False)


def rows_of(result: Result) -> list[dict[str, Any]]:
    """The JSON lines of a command that worked; each has every key, and whose machine it was."""
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    for row in rows:
        assert list(row)[: len(KEYS)] == list(KEYS) or row.keys() >= set(KEYS)
        assert row["machine"]["cpu"] and row["machine"]["threads"] > 0
    return rows


def peer_python(folder: Path, skew: float = 1.0) -> Path:
    """An "interpreter with llama-cpp-python" that is a stand-in: Fabula itself, its logits multiplied by `skew`."""
    script = folder / f"python-{skew}"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("peer_stand_in.py")} {skew} "$@"\n')
    script.chmod(0o755)
    return script


def picky_python(folder: Path) -> Path:
    """A stand-in that SIGILL ends unless weights stay as they lie in the file."""
    script = folder / "python-picky"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--as-in-file*) exec {peer_python(folder)} "$@";; esac\nread line; kill -ILL $$\n'
    )
    script.chmod(0o755)
    return script


def killed_python(folder: Path) -> Path:
    """An interpreter that something kills."""
    script = folder / "python-killed"
    script.write_text("#!/bin/sh\nread line; kill -KILL $$\n")
    script.chmod(0o755)
    return script


def broken_python(folder: Path) -> Path:
    """An interpreter that has no llama-cpp-python."""
    script = folder / "python-broken"
    script.write_text("#!/bin/sh\necho it is not here >&2\nexit 1\n")
    script.chmod(0o755)
    return script
