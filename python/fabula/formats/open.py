"""One door to every model on disk: looks at what lies at a path and opens it with the reader of its format.

Only the path's kind and the names in a folder decide; what a file holds is its reader's business.
"""

from __future__ import annotations

from pathlib import Path

from fabula.errors import EngineError, ModelFileError, ModelNotFound
from fabula.formats.checkpoint import Checkpoint
from fabula.formats.readfile import shown
from fabula.formats.safetensors import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, open_safetensors
from fabula.formats.split_names import without_later_parts

_GGUF_MAGIC = b"GGUF"  # first four bytes of every GGUF file (ggml's docs/gguf.md)


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a model: a folder of config.json and safetensors or of one .gguf file, or a file of either kind.

    Raises:
        ModelNotFound: nothing is there.
        ModelFileError: something is there, but no model, or a damaged one.
    """
    path = Path(path)
    try:
        path = _find_weights(path)
    except EngineError:
        raise
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error}", path=path) from None
    if path.is_dir() or path.suffix == ".safetensors":
        return open_safetensors(path)
    # Imported here so that a folder of safetensors opens without the GGUF reader.
    from fabula.formats.gguf_names import open_gguf

    return open_gguf(path)


def is_gguf(path: Path) -> bool:
    """Whether a regular file at `path` begins as a GGUF file does; False also when it cannot be read."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    except (OSError, ValueError):
        return False


def gguf_files(folder: Path) -> list[Path]:
    """The .gguf files of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix == ".gguf" and path.is_file())


def has_safetensors(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face checkpoint with safetensors."""
    return (folder / CONFIG_FILE).is_file() and any((folder / n).exists() for n in (WEIGHTS_FILE, INDEX_FILE))


def _find_weights(path: Path) -> Path:
    """The folder of safetensors, .safetensors file or GGUF file that `path` means."""
    if not path.is_dir():
        if not path.exists():
            raise ModelNotFound(f"{path}: no such file or folder")
        if path.suffix in (".safetensors", ".gguf") or is_gguf(path):
            return path
        raise ModelFileError(f"{path}: is neither a .gguf nor a .safetensors file", path=path)
    if has_safetensors(path):
        return path
    found = without_later_parts(gguf_files(path))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(shown(file.name) for file in found[:8])
        raise ModelFileError(f"{path}: holds {len(found)} .gguf files ({names}); give the path of one", path=path)
    raise ModelFileError(
        f"{path}: holds no model; looked for {CONFIG_FILE} with {WEIGHTS_FILE} or {INDEX_FILE}, and for one .gguf file",
        path=path,
    )
