"""What running a server for real needs: counters, logs, traces, settings from everywhere, and its files in deploy/."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import tiny
from fabula import InvalidArgument, Workspace
from fabula.server import Settings, create_app
from fabula.server.logs import JsonLines, TextLines
from fabula.server.settings import gather
from serving import Running
from waiting import run_program

HOST = {"Host": "localhost"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("ops"), tiny_folder, "--log-format", "json") as running:
        yield running


def counted(served: Running) -> dict[str, float]:
    """Every sample, by name and labels."""
    text = served.client.get("/metrics").text
    return {
        sample.name + "".join(f"|{value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_move(served: Running) -> None:
    served.post("/chat", session_id="m", message="the whale", max_len=6, ignore_eos=True)
    before = counted(served)
    found = served.post("/chat", session_id="m", message="again", max_len=6, ignore_eos=True)
    served.client.get("/chat")
    for i in range(5):
        served.client.get(f"/nothing/{i}")
        served.client.request(f"X{i}", "/chat")
    after = counted(served)
    name = found["model"]

    def more(key: str) -> float:
        return after[key] - before.get(key, 0)

    assert more(f"fabula_answers_total|done|{name}") == 1
    assert more(f"fabula_tokens_total|generated|{name}") == 6
    assert more(f"fabula_tokens_total|prompt|{name}") == found["usage"]["prompt_tokens"]
    assert more(f"fabula_draft_tokens_total|drafted|{name}") == found["timings"]["drafted"]
    assert more(f"fabula_draft_tokens_total|accepted|{name}") == found["timings"]["accepted"]
    assert more(f"fabula_tokens_total|reused|{name}") == found["usage"]["reused_tokens"] > 0
    assert more(f"fabula_first_token_seconds_count|{name}") == 1
    assert more(f"fabula_between_tokens_seconds_count|{name}") == 5
    assert more("fabula_requests_total|POST|/chat|200") == 1 and more("fabula_requests_total|GET|none|404") == 5
    assert after["fabula_sessions"] == 1 and after[f"fabula_model_ready|{name}"] == 1
    assert after[f"fabula_kv_pages|used|{name}"] > 0 and after[f"fabula_kv_evicted_pages_total|{name}"] == 0
    assert more("fabula_requests_total|other|none|405") == 5
    assert not any("/nothing/" in key or "|X" in key for key in after)  # clients cannot make new labels


def test_logs_tell_what_happened_and_no_texts(served: Running) -> None:
    served.client.get("/sessions/x", headers={"X-Request-Id": "good-id_1.2"})
    served.client.get("/sessions/x%0d%0aevil=1", headers={"X-Request-Id": "bad id"})
    served.post("/chat", session_id="logged", message="a secret whale", max_len=4, ignore_eos=True, title="hush")
    lines = served.wait_for_log(message="answer", session="logged")
    answers = [line for line in lines if line["message"] == "answer" and line.get("session") == "logged"]
    assert answers[0]["generated_tokens"] == 4 and answers[0]["end"] == "length" and answers[0]["level"] == "info"
    lines = served.wait_for_log(message="request", request=answers[0]["request"])
    requests = [line for line in lines if line["message"] == "request"]
    assert any(line["request"] == "good-id_1.2" and line["status"] == 404 for line in requests)
    assert any(line["request"] == answers[0]["request"] and line["route"] == "/chat" for line in requests)
    text = "".join(served.errors)
    assert "secret" not in text and "hush" not in text and "evil" not in text and "bad id" not in text
    assert not any(line.get("route") == "/health" for line in requests)


@pytest.mark.parametrize("formatter", [TextLines(), JsonLines()])
def test_a_line_is_a_line(formatter: logging.Formatter) -> None:
    record = logging.LogRecord("fabula.server", logging.INFO, "", 0, "hello", None, None)
    record.fields = {"session": "a\r\nb\x1b[31m\u2028\u202ec", "key": "two words", "none": None}
    line = formatter.format(record)
    assert len(line.splitlines()) == 1 and "\x1b" not in line and "\u202e" not in line and "none" not in line


def in_process(workspace: Workspace, settings: Settings, observers: list[Any], *bodies: dict[str, Any]) -> list[int]:
    """Statuses of POST /chat with these bodies, in an app of this process."""

    async def ask() -> list[int]:
        app = create_app(workspace, settings)
        app.extensions["fabula"].observers += observers
        async with app.test_app():
            client = app.test_client()
            while (await client.get("/health", headers=HOST)).status_code != 200:
                await asyncio.sleep(0.01)
            return [(await client.post("/chat", json=body, headers=HOST)).status_code for body in bodies]

    return asyncio.run(ask())


def test_traces(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from fabula.server.telemetry import Traces

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with Workspace(tmp_path) as workspace:
        settings = Settings(model=(str(tiny_folder),))
        body = {"message": "the whale", "max_len": 3, "ignore_eos": True}
        assert in_process(workspace, settings, [Traces(provider)], body, {"message": 1}) == [200, 400]
    spans = {span.name: span for span in exporter.get_finished_spans()}
    answer = next(span for name, span in spans.items() if name.startswith("chat "))
    request = next(s for s in exporter.get_finished_spans() if s.context.span_id == answer.parent.span_id)
    assert request.name == "POST /chat" and request.attributes["http.response.status_code"] == 200
    assert answer.attributes["gen_ai.usage.output_tokens"] == 3
    assert "whale" not in str([dict(span.attributes) for span in exporter.get_finished_spans()])


# ---- Limits ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context for answers that last until they are read."""
    return tiny.write_model(tmp_path_factory.mktemp("long") / "m", config={"max_position_embeddings": 20_000})


HELD: dict[str, Any] = {"message": "on", "max_len": 15_000, "ignore_eos": True, "stream": True, "n_logprobs": 20}


def test_limits_at_the_limit_and_above(long_folder: Path, tmp_path: Path) -> None:
    limits = ("--max-sessions", "2", "--max-turns", "2", "--max-streams", "1", "--max-message-bytes", "20")
    with Running(tmp_path, long_folder, *limits) as running:
        running.post("/chat", session_id="a", message="m" * 20, max_len=1)
        told = running.post("/chat", 413, session_id="a", message="m" * 21, max_len=1)["error"]
        assert told["code"] == "message_too_long" and told["limit"] == 20 and "21" in told["message"]
        running.post("/chat", session_id="b", message="b", max_len=1)
        assert running.post("/chat", 429, session_id="c", message="c")["error"]["code"] == "too_many_sessions"
        assert running.post("/fork", 429, session_id="a")["error"]["limit"] == 2
        running.post("/chat", session_id="a", message="two", max_len=1)
        assert running.post("/chat", 409, session_id="a", message="three")["error"]["code"] == "too_many_turns"
        assert running.post("/branch", 429, session_id="b", n=2)["error"]["code"] == "too_many_streams"
        held = running.unread(**HELD, session_id="b")
        held.recv(100)
        response = running.client.post("/chat", json={"message": "x"})
        assert response.status_code == 429 and int(response.headers["Retry-After"]) >= 1
        held.close()


def test_tokens_per_minute(tiny_folder: Path, tmp_path: Path) -> None:
    with Running(tmp_path, tiny_folder, "--tokens-per-minute", "60") as running:
        running.post("/chat", message="the whale", max_len=500, ignore_eos=True)  # pays when it ends, for minutes
        response = running.client.post("/chat", json={"message": "more"})
        assert response.status_code == 429 and response.json()["error"]["code"] == "tokens_exceeded"
        assert 10 < int(response.headers["Retry-After"]) < 600


def test_a_full_queue(long_folder: Path, tmp_path: Path) -> None:
    with Running(tmp_path, long_folder, "--max-running", "1", "--max-waiting", "1") as running:
        held = running.unread(**HELD)
        held.recv(100)
        running.post("/chat", 202, message="on", background=True)
        full = running.client.post("/chat", json={"message": "on"})
        assert full.status_code == 503 and full.json()["error"]["code"] == "engine_busy"
        assert "Retry-After" in full.headers
        held.close()


# ---- Settings -------------------------------------------------------------------------------------------------------


def test_settings_come_from_flags_then_variables_then_the_file(tmp_path: Path) -> None:
    file = tmp_path / "fabula.toml"
    file.write_text('port = 1\nmax_streams = 2\nmodel = ["a", "b=c"]\nlog_level = "debug"\n')
    variables = {
        "FABULA_CONFIG": str(file),
        "FABULA_MAX_STREAMS": "3",
        "FABULA_LOG_LEVEL": "error",
        "FABULA_TRACES": "yes",
    }
    settings, sources = gather({"log_level": "warning"}, None, variables)
    assert (settings.port, settings.max_streams, settings.log_level, settings.traces) == (1, 3, "warning", True)
    assert settings.models == (("a", "a"), ("b", "c"))
    assert sources["port"] == str(file) and sources["max_streams"] == "FABULA_MAX_STREAMS"


@pytest.mark.parametrize(
    ("flags", "variables", "text", "message"),
    [
        ({"port": 70000}, {}, "", "command line: port is 70000, must be in 0 .. 65535"),
        ({}, {"FABULA_PORT": "many"}, "", "FABULA_PORT: port is 'many', must be a number"),
        ({}, {"FABULA_INSECURE": "perhaps"}, "", "must be true or false"),
        ({}, {}, "prot = 1", "there is no setting 'prot'"),
        ({}, {}, "port = ", "fabula.toml"),
        ({}, {}, "port = true", "port is True, must be a whole number"),
        ({}, {}, 'cors = ["example.org"]', "must be an origin"),
        ({"model": ("a", "a")}, {}, "", "are not distinct"),
        ({"certificate": Path("x")}, {}, "", "go together"),
    ],
)
def test_bad_settings(flags: Any, variables: Any, text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "fabula.toml"
    file.write_text(text)
    with pytest.raises(InvalidArgument) as caught:
        gather(flags, file, variables)
    assert message in str(caught.value)


def fabula(*words: str) -> subprocess.CompletedProcess[str]:
    return run_program([sys.executable, "-m", "fabula", *words])


def test_config_check() -> None:
    good = fabula("config", "check", "--port", "9", "--json")
    assert good.returncode == 0 and json.loads(good.stdout)["settings"]["port"] == 9
    assert json.loads(good.stdout)["from"] == {"port": "command line"}
    bad = fabula("config", "check", "--host", "0.0.0.0")
    assert bad.returncode == 1 and "API keys are needed" in bad.stderr and "Traceback" not in bad.stderr


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    made = [fabula("keys", "alice"), fabula("keys", "bob", "--hash")]
    file.write_text("# ours\n" + "".join(done.stdout for done in made))
    good = fabula("config", "check", "--host", "0.0.0.0", "--keys", str(file))
    assert good.returncode == 0 and "2 keys" in good.stderr
    file.write_text("alice:short\n")
    bad = fabula("serve", "--keys", str(file))
    assert bad.returncode == 1 and "line 1" in bad.stderr and "short" not in bad.stderr


def test_the_settings_file_shows_every_setting() -> None:
    import dataclasses

    path = Path(__file__).resolve().parent.parent / "deploy" / "fabula.toml"
    text = path.read_text(encoding="utf-8")
    comments = " ".join(text.replace("\n## ", " ").split())
    for row in dataclasses.fields(Settings):
        assert f"{row.metadata['text']} # {row.name} = " in comments, f"{row.name} is missing or has another text"
    uncommented = "\n".join(line[2:] for line in text.splitlines() if line.startswith("# ") and " = " in line)
    import tomllib

    values = tomllib.loads(uncommented)
    for row in dataclasses.fields(Settings):
        if row.default is not None:
            default = list(row.default) if isinstance(row.default, tuple) else row.default
            assert values[row.name] == default, row.name
