"""Before the first token: imports, the order in which tensors are read, and work that is deferred."""

from __future__ import annotations

import ast
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fabula import Model, ModelFileError, SamplingParams, _native
from fabula.formats.checkpoint import Checkpoint, DType, TensorInfo
from fabula.models import packing
from fabula.models.packing import Packer, Packing, Part, Place
from fabula.text.tokenizer import Tokenizer
from waiting import run_program

COLUMNS = 32


class Files:
    """A checkpoint in memory that knows how much of what it gave out is still held."""

    path, format = Path("files"), "safetensors"
    config: Mapping[str, Any] = {}
    metadata: Mapping[str, Any] = {}

    def __init__(self, rows: list[int], broken: tuple[int, ...] = ()) -> None:
        rng = np.random.default_rng(5)
        self.arrays = {f"t{i}": rng.standard_normal((n, COLUMNS)).astype(np.float32) for i, n in enumerate(rows)}
        self.tensors = {n: TensorInfo(n, DType.F32, a.shape, a.nbytes) for n, a in self.arrays.items()}
        self.broken = {f"t{i}" for i in broken}
        self.held = self.most_held = 0
        self.threads: set[str] = set()
        self._lock = threading.Lock()

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        self.threads.add(threading.current_thread().name)
        if name in self.broken:
            raise ModelFileError(f"{name} is broken")
        raw = self.arrays[name].view(np.uint8).reshape(-1).copy()
        with self._lock:
            self.held += raw.nbytes
            self.most_held = max(self.most_held, self.held)
        weakref.finalize(raw, self._drop, raw.nbytes)
        return raw

    def span(self, name: str) -> None:
        """In no file."""

    def _drop(self, n_bytes: int) -> None:
        with self._lock:
            self.held -= n_bytes

    def close(self) -> None:
        pass


def whole(info: TensorInfo, first_row: int) -> Part:
    return Part(info, [Place(first_row, range(info.shape[0]), range(COLUMNS))])


def packings_of(files: Files) -> list[Packing]:
    """Each tensor a weight, but the last two one weight: they share a panel."""
    infos = list(files.tensors.values())
    found = [Packing([_native.Weight(DType.F16, i.shape[0], COLUMNS)], [whole(i, 0)]) for i in infos[:-2]]
    first, second = infos[-2:]
    both = _native.Weight(DType.F16, first.shape[0] + second.shape[0], COLUMNS)
    return [*found, Packing([both], [whole(first, 0), whole(second, first.shape[0])])]


def rows_of(weight: _native.Weight) -> npt.NDArray[np.float32]:
    return np.stack([weight.row(i) for i in range(weight.n_rows)])


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("large", [1, 5000, 1 << 20])
def test_weights_are_packed_alike_by_any_threads(n_threads: int, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LARGE", large)
    files = Files([400, *[20 + i for i in range(60)], 7, 12])
    packings, told = packings_of(files), list[int]()
    checkpoint: Checkpoint = files
    assert Packer(checkpoint, n_threads, told.append).pack(packings) == []
    for item in packings:
        wanted = np.concatenate([files.arrays[part.info.name] for part in item.parts])
        np.testing.assert_array_equal(rows_of(item.weights[0]), wanted.astype(np.float16).astype(np.float32))
    assert sum(told) == sum(info.n_bytes for info in files.tensors.values())
    assert files.most_held <= files.tensors["t0"].n_bytes  # no more than the largest tensor


def test_threads_that_no_tensor_is_large_enough_for_are_not_started() -> None:
    files = Files([30] * 40)
    Packer(files, 8, lambda _: None).pack(packings_of(files))
    assert files.threads == {threading.current_thread().name}
    assert files.most_held == files.tensors["t0"].n_bytes


@pytest.mark.parametrize("n_threads", [1, 4])
def test_a_tensor_that_cannot_be_read_ends_it(n_threads: int) -> None:
    files = Files([400, *[20] * 60], broken=(30, 31, 32, 33))
    with pytest.raises(ModelFileError, match=r"t3[0-3] is broken"):
        Packer(files, n_threads, lambda _: None).pack(packings_of(files))
    assert not [thread for thread in threading.enumerate() if thread.name == "fabula-pack"]
    assert not files.held


def test_what_is_not_finite_is_told_in_order() -> None:
    files = Files([400, *[20] * 60])
    for name in ("t40", "t3", "t60"):
        files.arrays[name][5, 5] = 1e30  # beyond f16
    damaged = Packer(files, 4, lambda _: None).pack(packings_of(files))
    assert [name for name, _ in damaged] == ["t3", "t40", "t60"]


def test_progress_comes_from_the_thread_that_loads(tiny_folder: Path) -> None:
    steps: list[tuple[int, int]] = []
    threads: set[int] = set()

    def progress(done: int, total: int) -> None:
        steps.append((done, total))
        threads.add(threading.get_ident())

    Model.load(tiny_folder, threads=3, load_progress=progress).close()
    assert threads == {threading.get_ident()}
    assert steps == sorted(steps) and len({total for _, total in steps}) == 1
    done, total = steps[-1]
    assert 0 < done <= total


def test_a_progress_that_raises_ends_loading(tiny_folder: Path) -> None:
    def progress(done: int, total: int) -> None:
        raise KeyError(done, total)

    with pytest.raises(KeyError):
        Model.load(tiny_folder, threads=2, load_progress=progress)
    assert not [thread for thread in threading.enumerate() if thread.name == "fabula-pack"]


# ---- Put off ---------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_found_when_it_is_asked_for(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    found = Tokenizer.fingerprint.fget
    assert found is not None

    def fingerprint(tokenizer: Tokenizer) -> str:
        asked.append(1)
        return str(found(tokenizer))

    monkeypatch.setattr(Tokenizer, "fingerprint", property(fingerprint))
    with Model.load(tiny_folder, threads=1) as model:
        model.generate("a", SamplingParams(max_tokens=1)).text()
        assert not asked
        first = model.fingerprint
        assert first.tokenizer == found(model.tokenizer)
        assert model.session()._handle.fingerprint == first.key
        assert model.fingerprint is first and len(asked) == 1
    with Model.load(tiny_folder, threads=1) as again:
        session = again.session()
    assert session._handle.fingerprint == first.key  # also when the model is closed


# Modules that cost time and that few answers need; which of them a program imported is printed as its last line.
HEAVY = (
    *("pydantic", "sqlalchemy", "alembic", "quart", "hypercorn", "asyncio", "jinja2", "llguidance", "rich", "click"),
    *("subprocess", "zipfile", "dataclasses", "statistics", "secrets", "difflib", "ssl", "http.client", "logging"),
    *("torch", "transformers", "huggingface_hub", "matplotlib"),
    *("fabula.server", "fabula.store", "fabula.bench", "fabula.export", "fabula.sessions.session", "fabula.workspace"),
    *("fabula.engine.grammar", "fabula.engine.gbnf", "fabula.engine.json_schema", "fabula.engine.embedding"),
    *("fabula.engine.draft_model", "fabula.text.reasoning", "fabula.kv.spill"),
)
PRINTS = f"print([name for name in {HEAVY!r} if name in sys.modules])"
NATIVE = ("numpy", "tokenizers", "cffi", "_cffi_backend", "fabula._ffi", "fabula.model")


def imported(code: str, *arguments: object) -> list[str]:
    done = run_program([sys.executable, "-c", code, *arguments], input="")
    assert done.returncode == 0, done.stderr
    found: list[str] = ast.literal_eval(done.stdout.splitlines()[-1])
    return found


def test_a_first_token_imports_no_more_than_it_needs(tiny_folder: Path) -> None:
    code = (
        "import sys; from fabula import Model, SamplingParams; m = Model.load(sys.argv[1], threads=1);"
        f"next(m.generate('a', SamplingParams(max_tokens=1))); m.close(); {PRINTS}"
    )
    assert imported(code, tiny_folder) == []


def test_import_and_help_load_nothing() -> None:
    native = f"print([name for name in {NATIVE!r} if name in sys.modules])"
    assert imported(f"import sys, fabula; {PRINTS}") == imported(f"import sys, fabula; {native}") == []
    for word in ("--help", "--version"):
        code = f"import sys, fabula.cli.main as m\ntry: m.run(['{word}'])\nfinally: "
        assert set(imported(code + PRINTS)) <= {"click", "dataclasses", "logging"}
        assert imported(code + native) == []


def test_a_story_without_a_terminal_imports_no_server_or_store(tiny_folder: Path) -> None:
    """`fabula run` in a pipe: the command line and a chat template, and nothing else."""
    code = (
        "import sys, fabula.cli.main as m\n"
        f"try: m.run(['run', '-m', sys.argv[1], '-t', '1', '-n', '1'])\nfinally: {PRINTS}"
    )
    assert set(imported(code, tiny_folder)) <= {"click", "jinja2", "logging", "dataclasses", "difflib"}
