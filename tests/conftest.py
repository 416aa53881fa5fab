"""Fixtures: real models where they lie at hand, tiny random checkpoints made by transformers everywhere.

A real model is looked for where a user would have it (Fabula's cache) and, for the story model, in the folder
FABULA_TEST_MODELS or ../shared/models beside the project. Tests that need one skip with the reason when it is absent.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import environment  # noqa: F401 (first)
import tiny
from fabula import _native
from fabula.engine.scheduler import Load
from fabula.errors import DeviceError, EngineError, Unsupported
from fabula.formats.gguf import GgufFile
from fabula.formats.locate import locate
from fabula.model import Model
from fabula.text.tokenizer import Tokenizer
from waiting import wait_until

# The same examples every time, so that a change is judged by what it changed; FABULA_TEST_RANDOM=1 looks for new ones.
# How long one takes says something of the machine only.
hypothesis.settings.register_profile(
    "ours",
    derandomize=os.environ.get("FABULA_TEST_RANDOM") != "1",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ours")

pytest_plugins = [
    "desks",
    "llama_peer",
    "places",
    "scheduling",
    "serving",
    "spilling",
    "storing",
    "watchdog",
]  # fixtures that several files of tests share

PROJECT = Path(__file__).resolve().parent.parent

# So that tests of sessions and pages run on a GPU, real or emulated, or on several: where they say nothing, models are
# loaded there.
if "FABULA_TEST_DEVICE" in os.environ:
    _load = Model.load.__func__  # type: ignore[attr-defined]

    def _load_there(cls: type[Model], *args: Any, **options: Any) -> Model:
        there: dict[str, Any] = {"device": os.environ["FABULA_TEST_DEVICE"]}
        if "device" not in options:
            there["tensor_parallel"] = int(os.environ.get("FABULA_TEST_PARALLEL", "1"))
        loaded: Model = _load(cls, *args, **there | options)
        return loaded

    Model.load = classmethod(_load_there)  # type: ignore[assignment]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that need a GPU, real or emulated, say why they do not run."""
    if item.get_closest_marker("gpu"):
        try:
            _native.device_count()
        except (Unsupported, DeviceError) as error:
            pytest.skip(f"no GPU: {error}")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    try:
        return locate("smollm2-135m-instruct", fetch=os.environ.get("FABULA_TEST_DOWNLOAD") == "1")
    except EngineError as error:
        pytest.skip(f"SmolLM2 is not at hand (`fabula pull smollm2-135m-instruct` fetches it): {error}")


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    """SmolLM2's tokenizer, from the GGUF file."""
    file = GgufFile(smollm2_gguf)
    file.close()
    return Tokenizer.from_gguf(file.metadata, smollm2_gguf)


@pytest.fixture(scope="session")
def smollm2_transformers(smollm2_gguf: Path) -> Any:
    """transformers' own reading of SmolLM2's tokenizer: an independent conversion of the same file."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import pre_tokenizers

    loaded = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    # Its converter knows no pre-tokenizer kinds; SmolLM2's own tokenizer.json cuts digits one by one, then as GPT-2
    # does.
    loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    return loaded


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama; not to be changed, a test that wants another writes its own."""
    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def loaded_tiny(tiny_folder: Path) -> Iterator[Model]:
    with Model.load(tiny_folder, threads=1) as model:
        yield model


@pytest.fixture
def tiny_model(loaded_tiny: Model) -> Iterator[Model]:
    """The tiny model; every test must leave all its pages free."""
    yield loaded_tiny
    gc.collect()
    # until it has let go of what nobody reads any more
    wait_until(lambda: loaded_tiny._engine.scheduler.load == Load(0, 0), "requests do not come to rest")
    loaded_tiny.clear_cache()
    assert loaded_tiny._runner.pool.n_free == loaded_tiny._runner.pool.n_pages


@pytest.fixture(scope="session")
def story_folder() -> Path:
    """The TinyStories model: a 656K-parameter Llama in safetensors."""
    folders = [Path(os.environ["FABULA_TEST_MODELS"])] if "FABULA_TEST_MODELS" in os.environ else []
    folders.append(PROJECT.parent / "shared" / "models")
    for folder in folders:
        if (folder / "story" / "config.json").is_file():
            return folder / "story"
    pytest.skip("the story model is not at hand (set FABULA_TEST_MODELS to the folder that holds story/)")


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes writes fail, to be preloaded."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler (cc)")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", library, PROJECT / "tests" / "faults" / "shim.c"], check=True
    )
    return library


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Any]:
    """Starts `fabula` with the given words in a terminal of its own; all are ended at the end."""
    from test_cli import Terminal

    opened: list[Terminal] = []

    def start(*words: object) -> Terminal:
        opened.append(Terminal(tmp_path, *words))
        return opened[-1]

    yield start
    for each in opened:
        each.close()
