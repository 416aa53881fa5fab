"""The tokenizer of a Hugging Face folder: tokenizer.json, and the settings that lie in four files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from fabula.errors import TokenizerError
from fabula.formats.readfile import file_size, open_regular, read_at, read_json_object
from fabula.text.tokenizer import END_TOKENS, MAX_TOKENIZER_BYTES, Tokenizer, build_backend

MAX_SETTINGS_BYTES = 16 << 20  # tokenizer_config.json repeats every added token
MAX_TEMPLATE_BYTES = 1 << 16


def read_folder(folder: Path) -> Tokenizer:
    """See `Tokenizer.from_folder`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"{folder}: tokenizer.json is missing", path=folder, field="tokenizer.json")
    backend = build_backend(_read(path, MAX_TOKENIZER_BYTES), path)
    settings = _optional(folder / "tokenizer_config.json")
    special = _optional(folder / "special_tokens_map.json")
    generation = _optional(folder / "generation_config.json")
    config = _optional(folder / "config.json")

    names = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        text = _token_text(settings.get(key)) or _token_text(special.get(key))
        if text is not None:
            names[key] = text
    bos_id = _first_id(backend, names.get("bos_token"), generation.get("bos_token_id"), config.get("bos_token_id"))
    eos: list[int] = []
    if "eos_token" in names and (token_id := backend.token_to_id(names["eos_token"])) is not None:
        eos.append(token_id)
    for source in (generation, config):
        value = source.get("eos_token_id")
        eos += [i for i in (value if isinstance(value, list) else [value]) if _is_id(i)]
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    eos += [added[token] for token in END_TOKENS if token in added and token != names.get("bos_token")]
    return Tokenizer(
        backend,
        path=path,
        bos_id=bos_id,
        eos_ids=eos,
        add_bos=bool(backend.encode("", add_special_tokens=True).ids[:1] == [bos_id]),
        chat_template=_template(folder, settings),
        named_special=names,
    )


def _read(path: Path, most: int) -> bytes:
    with open_regular(path) as file:
        size = file_size(file)
        if size > most:
            raise TokenizerError(f"{path}: {size} bytes, at most {most} are read", path=path)
        return read_at(file, 0, size, path=path).tobytes()


def _optional(path: Path) -> Mapping[str, Any]:
    return read_json_object(path, max_bytes=MAX_SETTINGS_BYTES, wide_integers=True) if path.is_file() else {}


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _token_text(value: object) -> str | None:
    """A token is written as text, or as an object with its text in "content"."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _first_id(backend: Any, text: str | None, *ids: object) -> int | None:
    found: int | None = backend.token_to_id(text) if text is not None else None
    if found is not None:
        return found
    for value in ids:
        if _is_id(value) and backend.id_to_token(value) is not None:
            return value
    return None


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, else text in the settings, else the one named "default" of a list."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read(path, MAX_TEMPLATE_BYTES).decode("utf-8", "replace")
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {
            entry["name"]: entry["template"]
            for entry in value
            if isinstance(entry, Mapping)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("template"), str)
        }
        value = named.get("default", next(iter(named.values()), None))
    return value if isinstance(value, str) else None
