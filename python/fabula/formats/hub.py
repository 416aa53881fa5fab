"""Models from the Hugging Face hub, fetched by the optional `huggingface_hub` package into its own cache.

Only what a checkpoint needs is fetched: config, tokenizer, chat template and safetensors weights, or one named .gguf
file. The cache stores large files under the SHA-256 that the server stated; it is checked here, since the package does
not. The package chooses the host ($HF_ENDPOINT).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fabula.errors import DownloadError, EngineError, ModelFileError, ModelNotFound
from fabula.formats.cache import has_sha256
from fabula.formats.download import Progress
from fabula.formats.open import has_safetensors
from fabula.formats.readfile import read_json_object
from fabula.formats.safetensors import INDEX_FILE, MAX_INDEX_BYTES, WEIGHTS_FILE
from fabula.formats.split_names import part_names
from fabula.lean_dataclasses import dataclass

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"  # of a repository's name, at most 96 characters
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?::(?P<file>[A-Za-z0-9._/-]+\.gguf))?")
_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    # Quantized weights and adapters, which must be refused rather than misread.
    "adapter_config.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
]
_SUBFOLDERS = ["*/*.safetensors", "*/*.safetensors.index.json"]  # other formats and training states
_SHA256 = re.compile(r"[0-9a-f]{64}")
_POLL_SECONDS = 0.25
_NOT_FOUND = {"RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError", "HFValidationError"}


@dataclass(frozen=True, slots=True)
class HubName:
    """A model on the hub: a repository ("owner/name"), and one of its .gguf files or None for safetensors."""

    repo: str
    file: str | None


def parse_hub_name(name: str) -> HubName | None:
    """`owner/repo` or `owner/repo:file.gguf`; None when the name is neither."""
    match = _NAME.fullmatch(name)
    if match is None or ".." in name or (name.endswith((".gguf", ".safetensors")) and ":" not in name):
        return None
    return HubName(match["repo"], match["file"])


def hub_installed() -> bool:
    """Whether the huggingface_hub package can be imported."""
    try:
        return importlib.util.find_spec("huggingface_hub") is not None
    except (ImportError, ValueError):  # ValueError: a module without a spec took the name
        return False


def find_downloaded(name: HubName) -> Path | None:
    """The model in huggingface_hub's cache, complete and checked; None if it is not there. Uses no network.

    Raises:
        DownloadError: its SHA-256 was wrong; the file was removed.
    """
    try:
        path = _call_hub(name, local_files_only=True)
    except Exception:  # the exception for "not cached" differs between versions of the package
        return None
    if name.file is None and not _is_complete(path):
        return None
    _verify(name, path)
    return path


def fetch(name: HubName, *, force: bool = False, progress: Progress | None = None) -> Path:
    """Downloads a model: the files that are missing or changed.

    Raises:
        ModelNotFound: no such repository or file.
        DownloadError: the network or the server failed, access is refused, or the bytes are wrong.
    """
    try:
        with _reporting(name, progress):
            path = _call_hub(name, force_download=force)
    except Exception as error:  # translate whatever the package raises
        raise _translate(name, error) from error
    if name.file is None and not has_safetensors(path):
        raise ModelNotFound(
            f"{name.repo} on the hub holds no {WEIGHTS_FILE}; a .gguf file in it would be named {name.repo}:FILE.gguf"
        )
    _verify(name, path)
    return path


def _call_hub(name: HubName, **options: Any) -> Path:
    """Calls the package's download function without its progress bars."""
    hub = importlib.import_module("huggingface_hub")
    bars = importlib.import_module("huggingface_hub.utils")
    silenced = bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        if name.file is not None:  # with all parts of a split model
            folder, _, file = name.file.rpartition("/")
            parts = [f"{folder}/{part}" if folder else part for part in part_names(file)]
            first, *_ = [Path(hub.hf_hub_download(name.repo, part, **options)) for part in parts]
            return first
        return Path(hub.snapshot_download(name.repo, allow_patterns=_FILES, ignore_patterns=_SUBFOLDERS, **options))
    finally:
        if not silenced:
            bars.enable_progress_bars()


def _translate(name: HubName, error: Exception) -> EngineError:
    """Our exception for one of the package's, chosen by class name, since its modules have moved."""
    classes = {cls.__name__ for cls in type(error).__mro__}
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    what = name.repo if name.file is None else f"{name.file} of {name.repo}"
    if "GatedRepoError" in classes:
        return DownloadError(f"{what} requires consent: accept its terms on the hub, then run `hf auth login`")
    if "LocalEntryNotFoundError" in classes:
        return DownloadError(f"{what} is not in the local cache and the hub cannot be reached: {reason}")
    if classes & _NOT_FOUND:
        return ModelNotFound(f"the hub knows no {what} (a private one needs `hf auth login`): {reason}")
    return DownloadError(f"{what} could not be downloaded from the hub: {reason}")


def _is_complete(folder: Path) -> bool:
    """Whether a snapshot has its config and all shards of its weights."""
    with contextlib.suppress(OSError, EngineError):
        if not has_safetensors(folder):
            return False
        if (folder / WEIGHTS_FILE).exists():
            return True
        weight_map = read_json_object(folder / INDEX_FILE, max_bytes=MAX_INDEX_BYTES).get("weight_map")
        if isinstance(weight_map, dict):
            return all((folder / str(file)).is_file() for file in set(map(str, weight_map.values())))
    return False


def _verify(name: HubName, path: Path) -> None:
    """Checks large files against the SHA-256 in their cache name, and removes wrong ones."""
    for file in sorted(path.iterdir()) if path.is_dir() else map(path.with_name, part_names(path.name)):
        blob = file.resolve()
        if not file.is_symlink() or not _SHA256.fullmatch(blob.name):
            continue  # small files are named by a Git hash; a cache without links has no hash
        try:
            genuine = has_sha256(blob, blob.name)
        except OSError as error:
            raise ModelFileError(f"{file}: cannot be read: {error.strerror}", path=file) from None
        if not genuine:
            for wrong in (file, blob):
                wrong.unlink(missing_ok=True)
            raise DownloadError(
                f"{file.name} of {name.repo} did not have the SHA-256 the hub stated and was removed;"
                f" run `fabula pull --force {name.repo if name.file is None else f'{name.repo}:{name.file}'}`"
            )


@contextlib.contextmanager
def _reporting(name: HubName, progress: Progress | None) -> Iterator[None]:
    """Reports the growth of the repository's cache folder while the body runs."""
    if progress is None:
        yield
        return
    constants = importlib.import_module("huggingface_hub.constants")
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{name.repo.replace('/', '--')}" / "blobs"
    ended = threading.Event()
    before = _size(blobs)

    def watch(report: Callable[[int, int | None], None]) -> None:
        while not ended.wait(_POLL_SECONDS):
            report(max(0, _size(blobs) - before), None)

    thread = threading.Thread(target=watch, args=(progress.update,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _size(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                total += path.stat().st_size
    return total
