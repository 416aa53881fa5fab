"""Reads the tokenizer of a Hugging Face folder: tokenizer.json, its settings and chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from fabula.errors import TokenizerError
from fabula.formats.readfile import file_size, open_regular, read_at, read_json_object
from fabula.text.end_tokens import end_ids
from fabula.text.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer, build_backend

MAX_SETTINGS_BYTES = 16 << 20  # tokenizer_config.json repeats every added token
MAX_TEMPLATE_BYTES = 1 << 16
MAX_TEMPLATES = 64  # of one model; known models have up to four
_NAMED_TEMPLATES = "additional_chat_templates"  # a folder of them
_PROBES = ("a", "1", ".", "")  # texts to probe the post-processor with; any vocabulary has tokens for one of them


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
    for key in ("bos_token", "eos_token", "unk_token", "pad_token", "eot_token", "eom_token"):
        text = _token_text(settings.get(key)) or _token_text(special.get(key))
        if text is not None:
            names[key] = text
    bos_id = _first_id(backend, names.get("bos_token"), generation.get("bos_token_id"), config.get("bos_token_id"))
    named = []
    for key in ("eos_token", "eot_token", "eom_token"):
        if key in names and (token_id := backend.token_to_id(names[key])) is not None:
            named.append(token_id)
    for source in (generation, config):
        value = source.get("eos_token_id")
        named += [i for i in (value if isinstance(value, list) else [value]) if _is_id(i)]
    vocabulary = backend.get_vocab(with_added_tokens=True)
    ends = end_ids(vocabulary, named, {})
    prefix, suffix = _around(backend)
    if settings.get("add_eos_token") is True and not suffix and named:
        suffix = named[:1]
    return Tokenizer(
        backend,
        path=path,
        bos_id=bos_id,
        eos_ids=ends,
        prefix=prefix,
        suffix=suffix,
        chat_templates=_templates(folder, settings),
        named_special={key: text for key, text in names.items() if key not in ("eot_token", "eom_token")},
        vocabulary=vocabulary,
    )


def _around(backend: Any) -> tuple[list[int], list[int]]:
    """Ids that the post-processor, of any type, adds before and after a text."""
    for probe in _PROBES:
        plain = backend.encode(probe, add_special_tokens=False).ids
        whole = backend.encode(probe, add_special_tokens=True).ids
        if not plain:
            continue
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
    return [], []


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
    """The text of a token, given as a string or as an object with "content"."""
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


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name.

    Files have priority over the settings, as in transformers: chat_template.jinja is "default", and those in
    `additional_chat_templates/` have the names of their files. Without files, the settings have one template or a list
    of named ones; last comes chat_template.json, written by processors of images and sound.
    """
    found: dict[str, str] = {}
    path = folder / "chat_template.jinja"
    if path.is_file():
        found["default"] = _template(path)
    if (folder / _NAMED_TEMPLATES).is_dir():
        paths = sorted((folder / _NAMED_TEMPLATES).glob("*.jinja"))
        if len(paths) > MAX_TEMPLATES:
            raise TokenizerError(
                f"{folder}: {_NAMED_TEMPLATES} holds {len(paths)} templates, at most {MAX_TEMPLATES} are read",
                path=folder,
                field=_NAMED_TEMPLATES,
            )
        found |= {path.stem: _template(path) for path in paths}
    for value in (settings.get("chat_template"), _optional(folder / "chat_template.json").get("chat_template")):
        found = found or _named(value)
    return found


def _template(path: Path) -> str:
    return _read(path, MAX_TEMPLATE_BYTES).decode("utf-8", "replace")


def _named(value: object) -> dict[str, str]:
    """Templates by name, from settings: one string, a list of objects with name and template, or an object."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        entries = [(e.get("name"), e.get("template")) for e in value if isinstance(e, Mapping)]
    else:
        entries = list(value.items()) if isinstance(value, Mapping) else []
    return {name: text for name, text in entries if isinstance(name, str) and isinstance(text, str)}
