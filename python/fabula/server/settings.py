"""What can be set of a server, in one table: each field of `Settings` is a flag, a variable and a line of the TOML file.

The flag of `max_body_bytes` is `--max-body-bytes`, its variable FABULA_MAX_BODY_BYTES. A flag goes before a variable, a
variable before the file, the file before the default.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from fabula.errors import InvalidArgument
from fabula.formats.download import DEFAULT_MODEL
from fabula.workspace import SPILL_BYTES

MAX_FILE_BYTES = 1 << 20


def _setting(default: Any, text: str, *, group: str, low: float | None = None, high: float | None = None,
             choices: tuple[str, ...] = (), metavar: str = "") -> Any:  # fmt: skip
    """A row of the table: its default, what it means, and what is allowed."""
    about = {"text": text, "group": group, "low": low, "high": high, "choices": choices, "metavar": metavar}
    return field(default=default, metadata=about)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of `fabula serve`; what each means stands in its row.

    Raises:
        InvalidArgument: a value has the wrong type or is out of its range.
    """

    # fmt: off
    host: str = _setting("127.0.0.1", "Address to listen at.", group="Address")
    port: int = _setting(8000, "0 takes a free one.", group="Address", low=0, high=65535)
    certificate: Path | None = _setting(None, "PEM file for HTTPS; needs --private-key.", group="Address", metavar="FILE")
    private_key: Path | None = _setting(None, "PEM file of the certificate's key.", group="Address", metavar="FILE")

    model: tuple[str, ...] = _setting((DEFAULT_MODEL,), "Folder, .gguf file or name; `name=path` gives it a name. May be given several times; the first answers requests that name none.", group="Models", metavar="NAME")
    weights: str = _setting("auto", "Precision of the weights in memory.", group="Models", choices=("auto", "f32", "f16", "bf16"))
    kv: str = _setting("f16", "Precision of the KV cache.", group="Models", choices=("f16", "f32"))
    context: int | None = _setting(None, "Tokens a conversation may have; default: the model's own length.", group="Models", low=1, high=1 << 24)
    kv_memory: int | None = _setting(None, "Bytes of the KV cache, for each model; default: four texts of the whole context.", group="Models", low=1, high=1 << 50)
    threads: int | None = _setting(None, "Default: as many as this process may use.", group="Models", low=1, high=1024)
    fetch: bool = _setting(True, "Whether a missing model may be downloaded.", group="Models")

    data: Path | None = _setting(None, "Folder sessions are kept in; default: one of the user's.", group="Storage", metavar="FOLDER")
    store: str | None = _setting(None, "SQLAlchemy URL of another place for the sessions, such as PostgreSQL.", group="Storage", metavar="URL")
    spill_bytes: int = _setting(SPILL_BYTES, "Of pages of K and V on disk, for each model; 0 for none.", group="Storage", low=0, high=1 << 50)

    keys: Path | None = _setting(None, "File of API keys, a line each: `name:key`, or `name:sha256:` and the key's hash. Needed where other machines can reach the address.", group="Access", metavar="FILE")
    insecure: bool = _setting(False, "Serve other machines without keys.", group="Access")
    allow_host: tuple[str, ...] = _setting((), "Host names by which the server may be called, beside its own addresses.", group="Access", metavar="NAME")
    cors: tuple[str, ...] = _setting((), "Origins whose pages may call the API, such as https://example.org.", group="Access", metavar="ORIGIN")

    max_body_bytes: int = _setting(2_000_000, "Of a request's body.", group="Limits", low=1024, high=1 << 32)
    max_message_bytes: int = _setting(1_000_000, "Of one message, as UTF-8.", group="Limits", low=1, high=1 << 32)
    max_messages: int = _setting(1024, "Of one request.", group="Limits", low=1, high=1 << 20)
    max_sessions: int = _setting(1000, "Of one key.", group="Limits", low=1, high=1 << 30)
    max_turns: int = _setting(10_000, "Of one session.", group="Limits", low=1, high=1 << 30)
    max_streams: int = _setting(64, "Answers one key may have in the making.", group="Limits", low=1, high=1 << 20)
    tokens_per_minute: int = _setting(0, "Prompt and answer, of one key; 0 for no limit.", group="Limits", low=0, high=1 << 40)
    max_running: int = _setting(64, "Answers that share the engine's steps.", group="Limits", low=1, high=4096)
    max_waiting: int = _setting(128, "Answers that wait for one of those places; more get 503.", group="Limits", low=1, high=1 << 20)
    answer_s: float = _setting(600.0, "Seconds one answer may take; then it ends with reason timeout.", group="Limits", low=1, high=1e6)
    idle_s: float = _setting(15.0, "Seconds a connection may be idle, or take to send its headers.", group="Limits", low=1, high=1e6)
    body_s: float = _setting(60.0, "Seconds a request's body may take.", group="Limits", low=1, high=1e6)
    replay_s: float = _setting(300.0, "Seconds a finished stream can still be read again.", group="Limits", low=0, high=1e6)
    grace_s: float = _setting(30.0, "Seconds answers in the making have to end when the server stops.", group="Limits", low=0, high=1e6)

    log_format: str = _setting("text", "How logs are written.", group="Logs", choices=("text", "json"))
    log_level: str = _setting("info", "Least weight of what is logged.", group="Logs", choices=("debug", "info", "warning", "error"))
    log_texts: bool = _setting(False, "Log what users write and models answer.", group="Logs")
    traces: bool = _setting(False, "OpenTelemetry traces; needs fabula[otel], which the OTEL_ variables set up.", group="Logs")
    # fmt: on

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            about = _ABOUT[name]
            value = _typed(name, getattr(self, name), kind)
            object.__setattr__(self, name, value)
            if about["choices"] and value not in about["choices"]:
                raise InvalidArgument(f"{name} is {value!r}, must be one of {', '.join(about['choices'])}")
            if (
                isinstance(value, (int, float))
                and about["low"] is not None
                and not about["low"] <= value <= about["high"]
            ):
                raise InvalidArgument(f"{name} is {value!r}, must be in {about['low']:g} .. {about['high']:g}")
        if not self.model:
            raise InvalidArgument("model is empty, the server needs one at least")
        names = [name for name, _ in self.models]
        if len(set(names)) < len(names):
            raise InvalidArgument(f"model names {', '.join(names)} hold one twice")
        if (self.certificate is None) is not (self.private_key is None):
            raise InvalidArgument("certificate and private_key go together; one of them is missing")
        for origin in self.cors:
            if not origin.startswith(("http://", "https://")) or origin.rstrip("/").count("/") != 2:
                raise InvalidArgument(f"cors holds {origin!r}, must be an origin such as https://example.org")

    @property
    def models(self) -> tuple[tuple[str, str], ...]:
        """Name and place of each model. A path without a name is called by its last part."""
        found = []
        for text in self.model:
            name, equals, place = text.partition("=")
            if equals and name and place and "/" not in name:
                found.append((name, place))
            else:
                found.append((Path(text).name if Path(text).exists() else text, text))
        return tuple(found)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"

    def shown(self) -> dict[str, Any]:
        """Every setting as JSON, passwords left out."""
        values = dataclasses.asdict(self)
        if self.store is not None and "@" in self.store:
            scheme, _, rest = self.store.partition("://")
            values["store"] = f"{scheme}://***@{rest.rpartition('@')[2]}"
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


_ABOUT: Mapping[str, Mapping[str, Any]] = {row.name: row.metadata for row in fields(Settings)}


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value as its type; numbers may become floats, lists tuples and text paths, and nothing else."""
    kinds = get_args(kind) if get_origin(kind) is not tuple else (kind,)
    plain = kinds[0] if kinds else kind
    if value is None and type(None) in kinds:
        return None
    if get_origin(plain) is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) and item for item in items):
            return tuple(items)
        raise InvalidArgument(f"{name} is {value!r}, must be a list of texts")
    if plain is Path and isinstance(value, (str, Path)) and str(value):
        return Path(value)
    if plain is float and type(value) in (int, float):
        return float(value)
    if type(value) is plain:
        return value
    word = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}[plain]
    raise InvalidArgument(f"{name} is {value!r}, must be {word}")


# ---- Where values come from -----------------------------------------------------------------------------------------


def from_text(name: str, text: str) -> Any:
    """A setting from the text of a variable; lists are separated by commas.

    Raises:
        InvalidArgument: the text is none of its values.
    """
    kind = get_type_hints(Settings)[name]
    plain = kind if get_origin(kind) is tuple else (get_args(kind) or (kind,))[0]
    if get_origin(plain) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if plain is bool:
        words = {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }
        if text.strip().lower() not in words:
            raise InvalidArgument(f"{name} is {text!r}, must be true or false")
        return words[text.strip().lower()]
    if plain in (int, float):
        try:
            return plain(text)
        except ValueError:
            raise InvalidArgument(f"{name} is {text!r}, must be a number") from None
    return text


def read_file(path: Path) -> dict[str, Any]:
    """Settings from a TOML file.

    Raises:
        InvalidArgument: it cannot be read, is not TOML, or sets what does not exist; names file and line or name.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise InvalidArgument(f"{path}: has more than {MAX_FILE_BYTES} bytes")
        values = tomllib.loads(data.decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidArgument(f"{path}: {error}") from None
    unknown = [name for name in values if name not in _ABOUT]
    if unknown:
        raise InvalidArgument(f"{path}: there is no setting {unknown[0]!r}; there are {', '.join(_ABOUT)}")
    return values


def gather(
    flags: Mapping[str, Any], file: Path | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[Settings, dict[str, str]]:
    """The settings, and where each that is not the default comes from.

    Args:
        flags: values given on the command line.
        file: TOML; None for that of FABULA_CONFIG, or none.
        environment: variables.

    Raises:
        InvalidArgument: a value cannot be; names the setting and where it stands.
    """
    if file is None and environment.get("FABULA_CONFIG"):
        file = Path(environment["FABULA_CONFIG"])
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def take(found: Mapping[str, Any], source: str) -> None:
        values.update(found)
        sources.update(dict.fromkeys(found, source))

    if file is not None:
        take(read_file(file), str(file))
    for name in _ABOUT:
        variable = f"FABULA_{name.upper()}"
        if environment.get(variable):
            try:
                take({name: from_text(name, environment[variable])}, variable)
            except InvalidArgument as error:
                raise InvalidArgument(f"{variable}: {error}") from None
    take(flags, "command line")
    try:
        return Settings(**values), sources
    except InvalidArgument as error:
        place = sources.get(str(error).split(" ", 1)[0], "")
        raise InvalidArgument(f"{place}: {error}" if place else str(error)) from None
