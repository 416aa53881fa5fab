"""Who may know whom: the order of layers, checked over `#include` and `import`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent

# From the bottom up; a folder may include itself and what stands before it.
C_LAYERS = ["base", "quant", "kernels", "kv", "ops", "program"]
# quant/weight.c packs with the kernels' converters, which themselves need quant/convert.h.
C_EXCEPTIONS = {("quant", "kernels")}

PYTHON_LAYERS: list[set[str]] = [
    {"errors", "choices", "lean_dataclasses", "_cdef", "_cdef_bench"},
    {"_ffi", "files", "keyed_lock", "strict_json"},
    {"_native"},
    {"_program", "_sampling", "_operators"},
    {"_parallel"},
    {"formats", "store"},
    {"models", "kv", "text"},
    {"engine"},
    {"sessions"},
    {"ops", "model", "export"},
    {"workspace"},
    {"bench", "server"},
    {"cli"},
    {"plugs"},
]
ONLY = {
    "_ffi": {"_native", "_program", "_sampling", "_operators", "_parallel"},
    "_cdef": {"_ffi"},
    "_cdef_bench": {"bench"},
}


@pytest.mark.skipif(not (PROJECT / "native").is_dir(), reason="needs a checkout")
def test_c_layers() -> None:
    checked = 0
    for path in sorted((PROJECT / "native" / "src").rglob("*.[ch]")):
        folder = path.parent.name
        if folder not in C_LAYERS:
            continue
        for layer in re.findall(r'#include "(\w+)/', path.read_text(encoding="utf-8")):
            checked += 1
            allowed = C_LAYERS.index(layer) <= C_LAYERS.index(folder) or (folder, layer) in C_EXCEPTIONS
            assert allowed, f"{path.name} in {folder}/ includes {layer}/"
    assert checked > 50


@pytest.mark.skipif(not (PROJECT / "native").is_dir(), reason="needs a checkout")
def test_the_serving_library_does_not_know_the_measuring_one() -> None:
    paths = [path for folder in ("src", "cuda", "include") for path in (PROJECT / "native" / folder).rglob("*.*")]
    assert len(paths) > 100
    assert [path.name for path in paths if re.search(r'#include "(fabula_bench|bench/)', path.read_text("utf-8"))] == []


@pytest.mark.skipif(not (PROJECT / "native").is_dir(), reason="needs a checkout")
def test_comments_in_c_are_as_they_were_written() -> None:
    """A formatter that wraps comments folds rule lines into the next and a comment after code into lines of its own."""
    paths = [path for folder in ("native", "tests/native") for path in (PROJECT / folder).rglob("*.*")]
    wrapped = re.compile(r"^ *\* -{5,}|[^\s/][^\n]*[;,{(] */\*(?!.*\*/)")
    found = [
        f"{path.relative_to(PROJECT)}:{i}"
        for path in paths
        if path.suffix in (".c", ".h", ".cu", ".cuh", ".cpp")
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if wrapped.search(line)
    ]
    assert len(paths) > 100 and found == []


def _imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, function bodies included, type checking included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module != "fabula" else {f"fabula.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("fabula.")}


@pytest.mark.skipif(not (PROJECT / "python").is_dir(), reason="needs a checkout")
def test_python_layers() -> None:
    level = {name: i for i, names in enumerate(PYTHON_LAYERS) for name in names}
    package = PROJECT / "python" / "fabula"
    checked = 0
    for path in sorted(package.rglob("*.py")):
        unit = path.relative_to(package).parts[0].removesuffix(".py")
        if unit in ("__init__", "__main__", "_cdef", "_cdef_bench"):
            continue
        for other in _imports(path) & level.keys():
            checked += 1
            assert level[other] < level[unit] or other == unit, f"{path.name} ({unit}) imports fabula.{other}"
            if other in ONLY:
                assert unit in ONLY[other] | {other}, f"{path.name} ({unit}) may not import fabula.{other}"
    assert checked > 50
