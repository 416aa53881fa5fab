"""The API does what its description says: no failure of the server, no status and no reply it does not describe."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from serving import Running
from waiting import run_program

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.parametrize(
    ("phases", "more"),
    [
        pytest.param("examples,fuzzing", (), id="random"),
        pytest.param("examples,fuzzing", ("--strict", "--model-names", "exact"), id="strict", marks=pytest.mark.heavy),
        pytest.param("coverage", (), id="every constraint", marks=pytest.mark.heavy),  # 7,500 requests
    ],
)
def test_as_described(tmp_path: Path, tiny_folder: Path, phases: str, more: tuple[str, ...]) -> None:
    pytest.importorskip("schemathesis")
    flags = ("--context", "100", "--max-sessions", "100000", "--answer-s", "5", "--max-waiting", "100000", *more)
    with Running(tmp_path, tiny_folder, *flags) as running:
        running.post("/chat", session_id="abc", message="the whale", max_len=2)
        (tmp_path / "openapi.json").write_text(json.dumps(running.get("/openapi.json")))  # it would wait for 10 s only
        program = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", running.address]
        command = [*program, "--checks", CHECKS]
        endless = ["--exclude-path", "/sessions/{id}/events"]  # no reply to wait for: it goes on as long as one listens
        limits = ["--max-examples", "6", "--seed", "1", "--phases", phases, "--no-color"]
        patient = ["--request-timeout", "86400", "--suppress-health-check", "too_slow"]
        done = run_program([*command, *endless, *limits, *patient], cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert running.get("/health")["ready"]
