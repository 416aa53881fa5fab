"""`fabula bench model --peers` with libraries that replace torch's operators, and how a llama.cpp was built."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from benching import broken_python, peer_python
from fabula import Model
from fabula.bench import model as bench_model
from fabula.bench.model import prompt_ids
from fabula.bench.peer_torch import TorchBackend, torch_backends
from fabula.bench.peers import make_peers
from fabula.errors import Unsupported


def test_libraries_of_the_peers_python(tiny_folder: Path, tmp_path: Path) -> None:
    python, told = str(peer_python(tmp_path)), list[str]()
    with Model.load(tiny_folder, weights="f32", kv="f32", threads=1) as model:
        peers = make_peers(model, 100, told.append, llama={"python": python})
        found = [peer for peer in peers if "," in peer.name]
        assert [peer.name for peer in found] == ["transformers, zentorch"]
        assert found[0].settings["decode"] == "zentorch of a stand-in"
        assert "transformers with ipex is not measured: transformers: made for another torch" in told
        prompt = prompt_ids(model, 20)
        assert found[0].run(prompt, 8).tokens == bench_model.Fabula(model).run(prompt, 8).tokens
        assert found[0].together([prompt], 0, 8) is None
        for peer in [*peers, *found]:
            peer.close()


def test_none_where_there_are_none(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with Model.load(tiny_folder, threads=1) as model:
        assert torch_backends(model, told.append, str(broken_python(tmp_path))) == []
        assert torch_backends(model, told.append, str(tmp_path / "nothing")) == []
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        assert torch_backends(model, told.append) == []
    with Model.load(tiny_folder, weights="q8_0", threads=1) as model:
        assert torch_backends(model, told.append, str(peer_python(tmp_path))) == []
        with pytest.raises(Unsupported, match="the weights are q8_0"):
            TorchBackend(model, "zentorch", str(peer_python(tmp_path)))
    assert told == []


@pytest.mark.heavy
def test_the_worker_itself(tiny_folder: Path) -> None:
    pytest.importorskip("transformers")
    with Model.load(tiny_folder, weights="f32", kv="f32", threads=1) as model:
        peer = TorchBackend(model, "", sys.executable)
        assert "torch" in peer.settings["prefill"] and "float32" in peer.settings["prefill"]
        prompt = prompt_ids(model, 32)
        assert peer.run(prompt, 16).tokens == bench_model.Fabula(model).run(prompt, 16).tokens
        peer.close()
        with pytest.raises(Unsupported):
            TorchBackend(model, "zentorch" if importlib.util.find_spec("zentorch") is None else "ipex")
