"""The plugin for `llm`: conversations that the server keeps, from Python and from the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from serving import Running
from waiting import run_program

llm = pytest.importorskip("llm", reason="the llm package is not installed")
OPTIONS: dict[str, Any] = {"max_tokens": 4, "seed": 1}


@pytest.fixture
def model(tiny_server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The model as llm finds it."""
    from fabula.plugs import llm_models

    monkeypatch.setenv("FABULA_URL", tiny_server.address)
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    found: list[Any] = []
    llm_models.register_models(found.append)
    (model,) = found
    assert model.model_id == "fabula/" + tiny_server.get("/v1/models")["data"][0]["id"]
    return model


def test_a_conversation_is_a_session(model: Any, tiny_server: Running) -> None:
    talk = model.conversation()
    first = talk.prompt("the whale", system="Be brief.", **OPTIONS)
    streamed = "".join(first)
    second = talk.prompt("and then", stream=False, **OPTIONS)
    words = second.text()
    session = tiny_server.get(f"/sessions/{second.response_json['session_id']}")
    assert [turn["prompt"] for turn in session["path"]] == ["the whale", "and then"]
    assert session["system"] == "Be brief." and [turn["text"] for turn in session["path"]] == [streamed, words]
    assert second.usage().output == 4 and second.usage().input > first.usage().input


def test_going_back_and_branching(model: Any, tiny_server: Running) -> None:
    talk = model.conversation()
    for words in ("one", "two"):
        talk.prompt(words, **OPTIONS).text()
    other = model.fork(talk)
    model.rollback(talk)
    talk.prompt("three", **OPTIONS).text()
    other.prompt("four", **OPTIONS).text()
    paths = []
    for one in (talk, other):
        id = one.responses[-1].response_json["session_id"]
        assert id == f"llm-{one.id}"
        paths.append([turn["prompt"] for turn in tiny_server.get(f"/sessions/{id}")["path"]])
    assert paths == [["one", "three"], ["one", "two", "four"]]
    with pytest.raises(llm.ModelError, match="has 2 responses"):
        model.rollback(talk, 3)


def test_errors_are_the_servers_words(model: Any) -> None:
    with pytest.raises(llm.ModelError, match="do not fit the context"):
        model.prompt("a" * 5000).text()
    talk = model.conversation()
    talk.prompt("one", **OPTIONS).text()
    talk.responses[-1].response_json = None
    if not hasattr(llm, "user"):  # an older llm, whose conversations have their responses
        return
    lost = model.conversation()
    lost.loaded_messages = [llm.user("hi")]
    with pytest.raises(llm.ModelError, match="no session llm-"):
        lost.prompt("more").text()
    with pytest.raises(llm.ModelError, match="of another model"):
        talk.prompt("two").text()


def test_on_the_command_line(model: Any, tiny_server: Running) -> None:
    """In a process of its own, which finds the plugin and continues by what the log holds."""
    program = "import llm.cli, llm.plugins; from fabula.plugs import llm_models as m; " + (
        "llm.plugins.pm.is_registered(m) or llm.plugins.pm.register(m); llm.cli.cli()"
    )

    def say(*words: str) -> str:
        command = [sys.executable, "-c", program, "-m", model.model_id, "-o", "max_tokens", "4", *words]
        done = run_program(command, env=dict(os.environ), input="")
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    first = say("the whale")
    say("-c", "more")
    (one,) = tiny_server.get("/sessions?limit=1")["sessions"]
    path = tiny_server.get(f"/sessions/{one['session_id']}")["path"]
    assert [turn["prompt"] for turn in path] == ["the whale", "more"] and path[0]["text"] + "\n" == first
