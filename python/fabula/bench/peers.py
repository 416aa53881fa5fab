"""Other engines on the weights that a loaded model has, for `fabula bench model --peers`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from fabula.bench.model import Engine
from fabula.bench.status import Status
from fabula.errors import EngineError
from fabula.model import Model

INSTALL = 'pip install "fabula[peers]"'


def make_peers(model: Model, n_positions: int, status: Status) -> list[Engine]:
    """Every engine that is installed and can run this model; one line to `status` for each that cannot.

    Args:
        model: a loaded model; its file is read again.
        n_positions: positions a sequence must have room for.
        status: told what is being done.
    """
    engines: list[Engine] = []
    for name, modules, make in _PEERS:
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            status(f"{name} is not measured: {' and '.join(missing)} missing; {INSTALL}")
            continue
        try:
            engines.append(make(model, n_positions, status))
        except (EngineError, ImportError, OSError, RuntimeError) as error:
            status(f"{name} is not measured: {error}")
    return engines


def _llama_cpp(model: Model, n_positions: int, status: Status) -> Engine:
    from fabula.bench.peer_llama_cpp import LlamaCpp

    return LlamaCpp.of(model, n_positions, status)


def _transformers(model: Model, n_positions: int, status: Status) -> Engine:
    from fabula.bench.peer_transformers import Transformers

    del n_positions  # its cache grows
    return Transformers.of(model, status)


_PEERS: tuple[tuple[str, tuple[str, ...], Callable[[Model, int, Status], Engine]], ...] = (
    ("llama.cpp", ("llama_cpp", "gguf"), _llama_cpp),
    ("transformers", ("torch", "transformers"), _transformers),
)
