"""What the compiler made of the tiles of quantized products: their loops keep sums in registers.

GCC may move the loads of a whole tile to its start and spill them to the stack: the same bits at two thirds of the
speed. So the accesses to the stack in each loop are counted in the disassembled library, which keeps the names of its
functions for this (install.strip in pyproject.toml).
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fabula import _cdef

LIBRARY = Path(_cdef.__file__).with_name("libfabula.so")
MULTIPLIES = re.compile(r"(\{vex\} )?(vpmaddubsw|vpdpbusd)")
LEAST_MULTIPLIES = 16  # of a block of one token


class Loop(NamedTuple):
    """An innermost loop that multiplies lines of codes."""

    function: str
    n_instructions: int
    n_stack: int  # instructions that read or write a vector on the stack

    @property
    def share(self) -> float:
        return self.n_stack / self.n_instructions


def objdump(*arguments: str) -> str:
    return subprocess.run(["objdump", *arguments, str(LIBRARY)], capture_output=True, text=True, check=True).stdout


def functions_of(source: str) -> dict[str, tuple[int, int]]:
    """Start and end address of each function with internal linkage in a source file."""
    found: dict[str, tuple[int, int]] = {}
    file = ""
    for line in objdump("-t").splitlines():
        if match := re.search(r" df \*ABS\*\s+\S+\s*(\S*)$", line):
            file = match[1]
        elif match := re.match(r"([0-9a-f]+) l\s+F \.text\s+([0-9a-f]+)\s+(\S+)$", line):
            start, size = int(match[1], 16), int(match[2], 16)
            if file == source:
                found[match[3]] = (start, start + size)
    return found


def loops_of(function: str, start: int, end: int) -> Iterator[Loop]:
    text = objdump("-d", "--no-show-raw-insn", f"--start-address={start}", f"--stop-address={end}")
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"^\s*([0-9a-f]+):\t(.*)$", text, re.MULTILINE)]
    index = {address: i for i, (address, _) in enumerate(code)}
    jumps = ((i, re.match(r"j\w+\s+([0-9a-f]+)", instruction)) for i, (_, instruction) in enumerate(code))
    targets = [(index.get(int(jump[1], 16), len(code)), i) for i, jump in jumps if jump]
    loops = [(first, last) for first, last in targets if first <= last]
    for first, last in loops:
        if any((a, b) != (first, last) and first <= a and b <= last for a, b in loops):
            continue
        body = [instruction for _, instruction in code[first : last + 1]]
        if sum(bool(MULTIPLIES.match(instruction)) for instruction in body) >= LEAST_MULTIPLIES:
            on_stack = [line for line in body if "ymm" in line and re.search(r"\(%r[sb]p", line)]
            yield Loop(function, len(body), len(on_stack))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the tiles of other CPUs have more registers")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump")
@pytest.mark.parametrize(("source", "n_spilled"), [("avx2.c", 0), ("avx_vnni.c", 4)])
def test_tiles_stay_in_registers(source: str, n_spilled: int) -> None:
    functions = functions_of(source)
    if not functions:
        pytest.skip(f"{LIBRARY} was stripped of the names of its functions")
    names = [name for name in functions if name.startswith("tiles_")]
    loops = [loop for name in names for loop in loops_of(name, *functions[name])]
    few = list(loops_of("gemm_blocks", *functions["gemm_blocks"]))
    assert len(loops) >= 2 * len(names) and len(few) >= 11 * 2  # the loops are found
    # Sums of 5- and 6-bit codes do not all fit in registers. Spilled loads were a quarter to a third.
    assert [loop for loop in loops if loop.share > 0.14] == []
    # AVX-VNNI: three tokens of the formats with two groups a block, as halves of a panel are slower in all others.
    assert len([loop for loop in few if loop.share > 0.2]) <= n_spilled
