"""Settings of a server, in a table: each row of `Settings` is a flag, an environment variable and a key of a TOML file.

The flag of `max_body_bytes` is `--max-body-bytes`, its variable FABULA_MAX_BODY_BYTES. A flag overrides a variable, a
variable overrides the file, and the file overrides the default.
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

from fabula.choices import (
    BF16_INPUTS,
    DEFAULT_MODEL,
    KV_NAMES,
    MAX_DEVICES,
    SPECULATION_NAMES,
    WEIGHTS_NAMES,
    WINDOW_KV,
)
from fabula.engine.device import check_device, check_parallel, check_products
from fabula.errors import InvalidArgument
from fabula.server.origins import check_origin
from fabula.workspace import SPILL_BYTES

MAX_FILE_BYTES = 1 << 20


def _about(
    group: str,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    metavar: str = "",
) -> dict[str, Any]:
    """Metadata of a row: its help text, group and allowed values."""
    return {"text": text, "group": group, "low": low, "high": high, "choices": choices, "metavar": metavar}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of `fabula serve`; each row has its help text.

    Raises:
        InvalidArgument: a value has the wrong type or is out of its range.
    """

    # ---- Address ----------------------------------------------------------------------------------------------------

    host: str = field(default="127.0.0.1", metadata=_about("Address", "Address to listen at."))
    port: int = field(default=8000, metadata=_about("Address", "0 takes a free one.", low=0, high=65535))
    ollama_port: int | None = field(
        default=None,
        metadata=_about(
            "Address", "A second port, such as 11434, for clients that look for Ollama there.", low=1, high=65535
        ),
    )
    certificate: Path | None = field(
        default=None, metadata=_about("Address", "PEM file for HTTPS; needs --private-key.", metavar="FILE")
    )
    private_key: Path | None = field(
        default=None, metadata=_about("Address", "PEM file of the certificate's key.", metavar="FILE")
    )

    # ---- Models -----------------------------------------------------------------------------------------------------

    model: tuple[str, ...] = field(
        default=(DEFAULT_MODEL,),
        metadata=_about(
            "Models",
            "Folder, .gguf file or name; `name=path` names it. May be given several times; the first answers "
            "requests without a model.",
            metavar="NAME",
        ),
    )
    weights: str = field(
        default="auto",
        metadata=_about("Models", "Precision of the weights in memory.", choices=WEIGHTS_NAMES),
    )
    kv: str = field(default="f16", metadata=_about("Models", "Format of the KV cache; K:V for two.", choices=KV_NAMES))
    context: int | None = field(
        default=None,
        metadata=_about("Models", "Context length in tokens; default: the model's own.", low=1, high=1 << 24),
    )
    kv_memory: int | None = field(
        default=None,
        metadata=_about(
            "Models",
            "Bytes of each model's KV cache; default: four sequences of the full context length.",
            low=1,
            high=1 << 50,
        ),
    )
    state_memory: int | None = field(
        default=None,
        metadata=_about(
            "Models",
            "Bytes of each hybrid model's recurrent states; default: 1 GiB.",
            low=1,
            high=1 << 50,
        ),
    )
    window_kv: str = field(
        default="keep",
        metadata=_about(
            "Models",
            "KV left of the windows of windowed layers: keep, until memory runs out; drop, at once.",
            choices=WINDOW_KV,
        ),
    )
    ignore_memory: bool = field(
        default=False, metadata=_about("Models", "Load weights that do not fit the available memory, too.")
    )
    bf16_inputs: str = field(
        default="auto",
        metadata=_about(
            "Models",
            "Inputs of products with BF16 weights: bf16, f32, or auto, what this CPU is faster with; results differ.",
            choices=BF16_INPUTS,
        ),
    )
    device: str = field(
        default="cpu",
        metadata=_about(
            "Models",
            "Where models run: cpu; cuda or cuda:N, a GPU; auto, a GPU with enough memory, else the CPU.",
            metavar="NAME",
        ),
    )
    device_memory: int | None = field(
        default=None,
        metadata=_about(
            "Models",
            "GPU memory in bytes for each model with its KV cache; default: what is free.",
            low=1,
            high=1 << 50,
        ),
    )
    tensor_parallel: int = field(
        default=1,
        metadata=_about(
            "Models", "Number of GPUs that run each model together, starting at --device.", low=1, high=MAX_DEVICES
        ),
    )
    device_products: str = field(
        default="own",
        metadata=_about(
            "Models",
            "Matrix products on a GPU: own; library, cuBLASLt for long prompts, whose results depend on the batch.",
            metavar="NAME",
        ),
    )
    speculation: str = field(
        default="auto",
        metadata=_about(
            "Models",
            "Guess several tokens and verify them in one step, with the same results: auto, where it is faster; off.",
            choices=SPECULATION_NAMES,
        ),
    )
    draft_model: str | None = field(
        default=None,
        metadata=_about(
            "Models",
            "A smaller model with the same vocabulary that guesses, too: a folder, .gguf file or name.",
            metavar="NAME",
        ),
    )
    threads: int | None = field(
        default=None, metadata=_about("Models", "Default: as many as this process may use.", low=1, high=1024)
    )
    pin_threads: bool = field(
        default=False,
        metadata=_about(
            "Models",
            "Bind each thread to a CPU of its own: for machines of several sockets that run nothing else.",
        ),
    )
    fetch: bool = field(default=True, metadata=_about("Models", "Whether a missing model may be downloaded."))
    pull: bool = field(
        default=False, metadata=_about("Models", "Whether /api/pull may download further models and have them served.")
    )

    # ---- Storage ----------------------------------------------------------------------------------------------------

    data: Path | None = field(
        default=None,
        metadata=_about("Storage", "Folder for sessions and KV; default: in the user's data folder.", metavar="FOLDER"),
    )
    store: str | None = field(
        default=None,
        metadata=_about(
            "Storage", "SQLAlchemy URL of another database for sessions, such as PostgreSQL.", metavar="URL"
        ),
    )
    spill_bytes: int = field(
        default=SPILL_BYTES,
        metadata=_about("Storage", "Bytes of KV pages on disk, for each model; 0 for none.", low=0, high=1 << 50),
    )

    # ---- Access -----------------------------------------------------------------------------------------------------

    keys: Path | None = field(
        default=None,
        metadata=_about(
            "Access",
            "File of API keys, one per line: `name:key`, or `name:sha256:` and the key's hash. Required if "
            "other machines can reach the address.",
            metavar="FILE",
        ),
    )
    insecure: bool = field(default=False, metadata=_about("Access", "Serve other machines without API keys."))
    allow_host: tuple[str, ...] = field(
        default=(),
        metadata=_about("Access", "Host names under which the server may be called, besides its own.", metavar="NAME"),
    )
    cors: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            "Access",
            "Origins whose pages may call the API, such as https://example.org or app://obsidian.md; * at the end "
            "of one stands for anything, loopback for pages of this machine, * for every page.",
            metavar="ORIGIN",
        ),
    )

    # ---- OpenAI's API -----------------------------------------------------------------------------------------------

    strict: bool = field(
        default=False,
        metadata=_about("OpenAI's API", "Refuse unknown fields below /v1; otherwise they are ignored and named."),
    )
    model_names: str = field(
        default="any",
        metadata=_about(
            "OpenAI's API",
            "any: where one model is served, it answers to any name; exact: an unknown name gives 404.",
            choices=("any", "exact"),
        ),
    )

    # ---- Limits -----------------------------------------------------------------------------------------------------

    max_body_bytes: int = field(
        default=2_000_000, metadata=_about("Limits", "Bytes of a request's body.", low=1024, high=1 << 32)
    )
    max_message_bytes: int = field(
        default=1_000_000, metadata=_about("Limits", "Bytes of one message, as UTF-8.", low=1, high=1 << 32)
    )
    max_messages: int = field(default=1024, metadata=_about("Limits", "Messages of one request.", low=1, high=1 << 20))
    max_sessions: int = field(default=1000, metadata=_about("Limits", "Sessions of one key.", low=1, high=1 << 30))
    max_turns: int = field(default=10_000, metadata=_about("Limits", "Turns of one session.", low=1, high=1 << 30))
    max_streams: int = field(
        default=64, metadata=_about("Limits", "Answers of one key that may run or wait at a time.", low=1, high=1 << 20)
    )
    tokens_per_minute: int = field(
        default=0,
        metadata=_about("Limits", "Computed and generated tokens of one key; 0 for no limit.", low=0, high=1 << 40),
    )
    max_running: int = field(
        default=64, metadata=_about("Limits", "Answers that run at a time, in one batch.", low=1, high=4096)
    )
    max_waiting: int = field(
        default=128,
        metadata=_about("Limits", "Answers that wait to run; more get 503.", low=1, high=1 << 20),
    )
    answer_s: float = field(
        default=600.0,
        metadata=_about("Limits", "Seconds an answer may take; then it ends with reason timeout.", low=1, high=1e6),
    )
    idle_s: float = field(
        default=15.0,
        metadata=_about("Limits", "Seconds a connection may be idle, or take to send its headers.", low=1, high=1e6),
    )
    body_s: float = field(
        default=60.0, metadata=_about("Limits", "Seconds a request's body may take.", low=1, high=1e6)
    )
    replay_s: float = field(
        default=300.0, metadata=_about("Limits", "Seconds a finished stream can be replayed.", low=0, high=1e6)
    )
    grace_s: float = field(
        default=30.0,
        metadata=_about("Limits", "Seconds that running answers have to end when the server stops.", low=0, high=1e6),
    )

    # ---- Logs -------------------------------------------------------------------------------------------------------

    log_format: str = field(default="text", metadata=_about("Logs", "Format of the log.", choices=("text", "json")))
    log_level: str = field(
        default="info",
        metadata=_about("Logs", "Lowest level that is logged.", choices=("debug", "info", "warning", "error")),
    )
    log_texts: bool = field(default=False, metadata=_about("Logs", "Log prompts and answers."))
    traces: bool = field(
        default=False,
        metadata=_about("Logs", "OpenTelemetry traces; needs opentelemetry-sdk, configured by OTEL_ variables."),
    )

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
        check_device(self.device)
        check_parallel(self.tensor_parallel, self.device)
        check_products(self.device_products)
        if not self.model:
            raise InvalidArgument("model is empty: the server needs at least one")
        names = [name for name, _ in self.models]
        if len(set(names)) < len(names):
            raise InvalidArgument(f"the model names {', '.join(names)} are not distinct")
        if (self.certificate is None) is not (self.private_key is None):
            raise InvalidArgument("certificate and private_key go together; one of them is missing")
        for origin in self.cors:
            check_origin(origin)

    @property
    def models(self) -> tuple[tuple[str, str], ...]:
        """Name and location of each model. The default name of a path is its last part."""
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
        """Every setting as JSON, without passwords."""
        values = dataclasses.asdict(self)
        if self.store is not None and "@" in self.store:
            scheme, _, rest = self.store.partition("://")
            values["store"] = f"{scheme}://***@{rest.rpartition('@')[2]}"
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


_ABOUT: Mapping[str, Mapping[str, Any]] = {row.name: row.metadata for row in fields(Settings)}


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Converts a value to its type: only numbers to floats, lists to tuples and strings to paths."""
    kinds = get_args(kind) if get_origin(kind) is not tuple else (kind,)
    plain = kinds[0] if kinds else kind
    if value is None and type(None) in kinds:
        return None
    if get_origin(plain) is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) and item for item in items):
            return tuple(items)
        raise InvalidArgument(f"{name} is {value!r}, must be a list of strings")
    if plain is Path and isinstance(value, (str, Path)) and str(value):
        return Path(value)
    if plain is float and type(value) in (int, float):
        return float(value)
    if type(value) is plain:
        return value
    word = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", Path: "a path"}[plain]
    raise InvalidArgument(f"{name} is {value!r}, must be {word}")


# ---- Where values come from -----------------------------------------------------------------------------------------


def from_text(name: str, text: str) -> Any:
    """Parses a setting from the text of a variable; items of lists are separated by commas.

    Raises:
        InvalidArgument: the text is not a value of the setting.
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
    """Reads settings from a TOML file.

    Raises:
        InvalidArgument: it cannot be read, is not TOML, or has an unknown key; names the file and the line or key.
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
    """Combines settings of all sources.

    Args:
        flags: values given on the command line.
        file: TOML; None for that of FABULA_CONFIG, if it is set.
        environment: variables.

    Returns:
        The settings, and the source of each that is not the default.

    Raises:
        InvalidArgument: a value is invalid; names the setting and its source.
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
