"""`fabula launch`: what a client is started with."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from fabula.cli.launch import CLIENTS
from serving import Running
from waiting import run_program

URL = "http://127.0.0.1:1"


def launched(*words: str, path: Path | None = None) -> Any:
    """The finished process of `fabula launch`."""
    env = os.environ if path is None else os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    return run_program([sys.executable, "-m", "fabula", "launch", *words], env=dict(env))


@pytest.mark.parametrize("client", sorted(CLIENTS))
def test_a_client_gets_the_servers_address(client: str) -> None:
    made = CLIENTS[client](URL, "a model", "a key")
    told = " ".join([*made.words, *made.environment.values()])
    assert made.words[0] == client and URL in told and "a model" in told and "a key" in told
    assert shlex.split(made.as_shell())[-len(made.words) :] == list(made.words)


def test_settings_are_in_the_clients_own_form() -> None:
    config = json.loads(CLIENTS["opencode"](URL, "m", "k").environment["OPENCODE_CONFIG_CONTENT"])
    assert config["model"] == "fabula/m" and config["provider"]["fabula"]["options"]["baseURL"] == f"{URL}/v1"
    assert f'model_providers.fabula.base_url="{URL}/v1"' in CLIENTS["codex"](URL, "m", "k").words
    variables = CLIENTS["claude"](URL, "m", "k").environment
    assert variables["ANTHROPIC_BASE_URL"] == URL and variables["ANTHROPIC_API_KEY"] == ""


def test_it_runs(tmp_path: Path, tiny_server: Running) -> None:
    program = tmp_path / "aider"
    program.write_text('#!/bin/sh\necho "$OPENAI_API_BASE $@"\n')
    program.chmod(0o755)
    done = launched("aider", "--url", tiny_server.address + "/", "--", "--yes", "a b", path=tmp_path)
    name = tiny_server.get("/v1/models")["data"][0]["id"]
    assert done.stdout == f"{tiny_server.address}/v1 --model openai/{name} --yes a b\n", done.stderr
    shown = launched("claude", "--url", tiny_server.address, "--print")
    assert shown.stdout.startswith(f"ANTHROPIC_BASE_URL={tiny_server.address} ") and name in shown.stdout


def test_what_is_missing_is_said() -> None:
    done = launched("codex", "--url", URL)
    assert done.returncode == 1 and "fabula serve" in done.stderr
    if not any((Path(folder) / "opencode").exists() for folder in os.environ["PATH"].split(os.pathsep)):
        done = launched("opencode", "--url", URL, "--model", "m")
        assert done.returncode == 1 and "opencode is not installed" in done.stderr
