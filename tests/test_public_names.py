"""The SDK's public names: they exist, are documented, and cost nothing until they are used."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest

import fabula
from waiting import run_program


@pytest.mark.parametrize("name", fabula.__all__)
def test_documented(name: str) -> None:
    value = getattr(fabula, name)
    if name != "__version__":
        assert inspect.getdoc(value), f"{name} has no docstring"
    if inspect.isclass(value):
        for method, function in inspect.getmembers(value, inspect.isroutine):
            if not method.startswith("_") and str(getattr(function, "__module__", "")).startswith("fabula"):
                assert inspect.getdoc(function), f"{name}.{method} has no docstring"


def test_the_list_is_sorted_and_whole() -> None:
    assert fabula.__all__ == sorted(fabula.__all__)
    assert set(fabula._HOMES) | {"__version__"} == set(fabula.__all__)
    tree = ast.parse(Path(fabula.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(fabula._HOMES)
    assert dir(fabula) == fabula.__all__


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        fabula.nope  # noqa: B018


def test_import_loads_nothing() -> None:
    code = (
        "import sys, fabula; print([m for m in ('numpy', 'tokenizers', 'jinja2', 'fabula._ffi') if m in sys.modules])"
    )
    done = run_program([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
