"""Models of the Hugging Face hub, with a stand-in for the huggingface_hub package: names, checks, errors."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fabula.errors import DownloadError, EngineError, ModelNotFound
from fabula.formats import hub, locate
from waiting import wait_until


class Recorder:
    def __init__(self) -> None:
        self.updates: list[tuple[int, int | None]] = []

    def update(self, done_bytes: int, total_bytes: int | None) -> None:
        self.updates.append((done_bytes, total_bytes))


class FakeHub:
    """Stands in for huggingface_hub: one repository in its cache layout, or an error to raise."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.error: Exception | None = None
        self.calls: list[tuple[Any, ...]] = []
        self.bars: list[str] = []
        self.content = b"weights" * 100
        self.damage = False
        self.may_end: Callable[[], bool] = lambda: True
        self.snapshot = root / "models--owner--repo" / "snapshots" / "abc"
        package, utils, constants = (ModuleType(f"huggingface_hub{s}") for s in ("", ".utils", ".constants"))
        vars(package).update(snapshot_download=self.snapshot_download, hf_hub_download=self.hf_hub_download)
        vars(utils).update(
            are_progress_bars_disabled=lambda: False,
            disable_progress_bars=lambda: self.bars.append("off"),
            enable_progress_bars=lambda: self.bars.append("on"),
        )
        vars(constants).update(HF_HUB_CACHE=str(root))
        for module in (package, utils, constants):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(hub, "hub_installed", lambda: True)

    def _put(self, name: str) -> None:
        blob = self.root / "models--owner--repo" / "blobs" / hashlib.sha256(self.content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        self.snapshot.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(bytes(len(self.content)) if self.damage else self.content)
        (self.snapshot / name).unlink(missing_ok=True)
        (self.snapshot / name).symlink_to(f"../../blobs/{blob.name}")

    def _download(self, file: str, options: dict[str, Any]) -> None:
        if options.get("local_files_only"):
            if not (self.snapshot / file).exists():
                raise FileNotFoundError(file)
            return
        if self.error is not None:
            raise self.error
        self._put(file)
        wait_until(self.may_end)

    def snapshot_download(self, repo: str, **options: Any) -> str:
        self.calls.append((repo, options))
        self._download("model.safetensors", options)
        (self.snapshot / "config.json").write_text("{}")
        return str(self.snapshot)

    def hf_hub_download(self, repo: str, file: str, **options: Any) -> str:
        self.calls.append((repo, file, options))
        self._download(file, options)
        return str(self.snapshot / file)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setenv("FABULA_CACHE", str(tmp_path / "cache"))
    return FakeHub(tmp_path / "hub", monkeypatch)


def test_hub_names() -> None:
    assert hub.parse_hub_name("owner/repo") == hub.HubName("owner/repo", None)
    assert hub.parse_hub_name("o/R-2.5_x:sub/a.gguf") == hub.HubName("o/R-2.5_x", "sub/a.gguf")
    for name in (
        "repo",
        "a/b/c",
        "/a/b",
        "a/../b",
        "a/b:c.txt",
        "a/b.gguf",
        "a/b:../c.gguf",
        "-a/b",
        "a/b ",
        "a/" + "b" * 97,
    ):
        assert hub.parse_hub_name(name) is None, name


def test_hub_repository(fake_hub: FakeHub) -> None:
    progress = Recorder()
    fake_hub.may_end = lambda: (len(fake_hub.content), None) in progress.updates
    assert locate.locate("owner/repo", progress=progress) == fake_hub.snapshot
    assert (len(fake_hub.content), None) in progress.updates
    repo, options = fake_hub.calls[-1]
    assert repo == "owner/repo"
    allowed = set(options["allow_patterns"])
    assert {"config.json", "*.safetensors", "tokenizer.json", "chat_template.jinja"} <= allowed
    assert not any(pattern.endswith((".bin", ".py", ".pt")) or pattern == "*" for pattern in allowed)
    assert fake_hub.bars == ["off", "on"] * len(fake_hub.calls)
    n = len(fake_hub.calls)
    assert locate.locate("owner/repo", fetch=False) == fake_hub.snapshot
    assert [call[-1].get("local_files_only") for call in fake_hub.calls[n:]] == [True]
    assert locate.pull("owner/repo", force=True) == fake_hub.snapshot
    assert fake_hub.calls[-1][-1]["force_download"] is True


def test_hub_gguf(fake_hub: FakeHub) -> None:
    with pytest.raises(ModelNotFound, match="fabula pull"):
        locate.locate("owner/repo:x.gguf", fetch=False)
    assert locate.locate("owner/repo:x.gguf") == fake_hub.snapshot / "x.gguf"
    assert locate.locate("owner/repo:x.gguf", fetch=False) == fake_hub.snapshot / "x.gguf"


def test_hub_incomplete_snapshots_are_completed(fake_hub: FakeHub) -> None:
    locate.pull("owner/repo")
    (fake_hub.snapshot / "model.safetensors").unlink()
    (fake_hub.snapshot / "one.safetensors").write_bytes(b"")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (fake_hub.snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not hub._is_complete(fake_hub.snapshot)
    (fake_hub.snapshot / "two.safetensors").write_bytes(b"")
    assert hub._is_complete(fake_hub.snapshot)


def test_hub_wrong_bytes_of_the_right_size(fake_hub: FakeHub) -> None:
    fake_hub.damage = True
    with pytest.raises(DownloadError, match="fabula pull --force owner/repo"):
        locate.locate("owner/repo")
    assert not list((fake_hub.root / "models--owner--repo" / "blobs").iterdir())
    fake_hub.damage = False
    assert locate.locate("owner/repo") == fake_hub.snapshot


def _hub_error(*names: str) -> Exception:
    base: type[Exception] = Exception
    for name in reversed(names):
        base = type(name, (base,), {})
    return base("what the hub said\nand more")


@pytest.mark.parametrize(
    ("error", "expected", "word"),
    [
        (_hub_error("RepositoryNotFoundError", "HfHubHTTPError"), ModelNotFound, "knows no owner/repo"),
        (_hub_error("GatedRepoError", "RepositoryNotFoundError"), DownloadError, "accept its terms"),
        (_hub_error("RevisionNotFoundError"), ModelNotFound, "what the hub said"),
        (_hub_error("HFValidationError"), ModelNotFound, "what the hub said"),
        (_hub_error("LocalEntryNotFoundError", "EntryNotFoundError"), DownloadError, "cannot be reached"),
        (_hub_error("EntryNotFoundError"), ModelNotFound, "knows no"),
        (ConnectionError("no route"), DownloadError, "no route"),
        (OSError(28, "No space left on device"), DownloadError, "No space"),
        (RuntimeError(), DownloadError, "RuntimeError"),
    ],
)
def test_hub_errors(fake_hub: FakeHub, error: Exception, expected: type[EngineError], word: str) -> None:
    fake_hub.error = error
    with pytest.raises(expected, match=word):
        locate.locate("owner/repo")
    assert fake_hub.bars.count("on") == fake_hub.bars.count("off")


def test_no_hub_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FABULA_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "hub_installed", lambda: False)
    with pytest.raises(ModelNotFound, match="pip install huggingface_hub"):
        locate.locate("owner/repo")
    with pytest.raises(DownloadError, match="pip install huggingface_hub"):
        locate.pull("owner/repo")


def test_hub_repository_without_safetensors(fake_hub: FakeHub) -> None:
    put: Callable[[str], None] = fake_hub._put
    fake_hub._put = lambda _name: put("pytorch_model.bin")  # type: ignore[method-assign]
    with pytest.raises(ModelNotFound, match=r"owner/repo:FILE\.gguf"):
        locate.locate("owner/repo")
