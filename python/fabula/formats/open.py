"""Opens a model on disk with the reader of its format.

The choice depends only on the kind of the path and the file names in a folder. For what cannot be opened, the error
says what it is and what would work.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from fabula.errors import EngineError, ModelFileError, ModelFileWarning, ModelNotFound, shown
from fabula.formats.checkpoint import Checkpoint
from fabula.formats.contents import describe_file, describe_folder
from fabula.formats.quantized import refuse_quantized
from fabula.formats.readfile import read_json_object
from fabula.formats.safetensors import (
    ADAPTER_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    open_safetensors,
)
from fabula.formats.split_names import without_later_parts

_GGUF_MAGIC = b"GGUF"  # first four bytes of every GGUF file (ggml's docs/gguf.md)
_PROJECTOR = re.compile(r"(?:.*[-._])?mmproj(?:[-._].*)?\.gguf", re.IGNORECASE)  # an image encoder


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a model: a folder of config.json and safetensors or of one .gguf file, or a file of either kind.

    Raises:
        ModelNotFound: the path does not exist.
        ModelFileError: it is not a model, or a damaged one.
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
    # Imported here, so that safetensors models load without the GGUF reader.
    from fabula.formats.gguf_names import open_gguf

    return open_gguf(path)


def is_gguf(path: Path) -> bool:
    """Whether `path` is a regular file with GGUF's magic; False also if it cannot be read."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    except (OSError, ValueError):
        return False


def gguf_files(folder: Path) -> list[Path]:
    """The .gguf models of a folder, sorted by name; of a split model the first part."""
    files = sorted(path for path in folder.iterdir() if path.suffix == ".gguf" and path.is_file())
    firsts = without_later_parts(files)
    models = [file for file in firsts if not _PROJECTOR.fullmatch(file.name)]
    return models or firsts or files


def has_safetensors(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face checkpoint with safetensors."""
    return (folder / CONFIG_FILE).is_file() and any((folder / n).exists() for n in (WEIGHTS_FILE, INDEX_FILE))


def _find_weights(path: Path) -> Path:
    """Resolves `path` to a folder of safetensors, a .safetensors file or a GGUF file."""
    if not path.is_dir():
        if not path.exists():
            raise ModelNotFound(f"{path}: no such file or folder")
        if path.suffix in (".safetensors", ".gguf") or is_gguf(path):
            return path
        words = describe_file(path)
        raise ModelFileError(
            f"{path}: is neither a .gguf nor a .safetensors file" + (f"; {words}" if words else ""), path=path
        )
    found = gguf_files(path)
    if has_safetensors(path):
        if found:
            warnings.warn(
                f"{path}: holds safetensors and {_names(found)}; the safetensors are loaded. Give the path of a .gguf"
                " file for that instead",
                ModelFileWarning,
                stacklevel=3,
            )
        return path
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelFileError(
            f"{path}: holds {len(found)} .gguf files ({_names(found)}); give the path of one", path=path
        )
    if (path / CONFIG_FILE).is_file() and not (path / ADAPTER_FILE).exists():
        refuse_quantized(read_json_object(path / CONFIG_FILE, max_bytes=MAX_CONFIG_BYTES), path)
    if words := describe_folder(path):
        raise ModelFileError(f"{path}: holds no model that Fabula can load, but {words}", path=path)
    raise ModelFileError(
        f"{path}: holds no model; looked for {CONFIG_FILE} with {WEIGHTS_FILE} or {INDEX_FILE}, and for one .gguf file",
        path=path,
    )


def _names(files: list[Path]) -> str:
    return ", ".join(shown(file.name) for file in files[:8]) + (", ..." if len(files) > 8 else "")
