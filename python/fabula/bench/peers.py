"""Other engines on the weights of a loaded model, for `fabula bench model --peers`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from fabula.bench.model import Engine
from fabula.bench.peer_torch import torch_backends
from fabula.bench.status import Status
from fabula.errors import EngineError
from fabula.model import Model

INSTALL = "pip install llama-cpp-python torch transformers gguf"


def make_peers(
    model: Model, n_positions: int, status: Status, *, llama: Mapping[str, Any] | None = None
) -> list[Engine]:
    """All engines that are installed and can run this model; `status` gets a line for each that cannot.

    Args:
        model: a loaded model; its file is read again.
        n_positions: max length of a sequence.
        status: callback for progress.
        llama: further arguments of `LlamaCpp.of`.
    """
    options = dict(llama or {})
    engines: list[Engine] = []
    for name, modules, make in _PEERS:
        if name == "llama.cpp" and options.get("python"):
            modules = ()  # checked by that interpreter
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            status(f"{name} is not measured: {' and '.join(missing)} missing; {INSTALL}")
            continue
        try:
            engines.append(make(model, n_positions, status, options))
        except (EngineError, ImportError, OSError, RuntimeError) as error:
            status(f"{name} is not measured: {error}")
    return [*engines, *torch_backends(model, status, options.get("python"))]


def _llama_cpp(model: Model, n_positions: int, status: Status, options: dict[str, Any]) -> Engine:
    from fabula.bench.peer_llama_cpp import LlamaCpp

    return LlamaCpp.of(model, n_positions, status, **options)


def _transformers(model: Model, n_positions: int, status: Status, options: dict[str, Any]) -> Engine:
    from fabula.bench.peer_transformers import Transformers

    del n_positions, options  # its cache grows on demand
    return Transformers.of(model, status)


_Make = Callable[[Model, int, Status, dict[str, Any]], Engine]
_PEERS: tuple[tuple[str, tuple[str, ...], _Make], ...] = (
    ("llama.cpp", ("llama_cpp",), _llama_cpp),
    ("transformers", ("torch", "transformers"), _transformers),
)
