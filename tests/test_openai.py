"""OpenAI's API as its clients use it, against a server in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import tiny

openai = pytest.importorskip("openai")

PROJECT = Path(__file__).resolve().parent.parent
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CITY = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "people": {"type": "integer", "maximum": 999}},
    "required": ["name", "people"],
    "additionalProperties": False,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Served:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *words: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = (folder / "log").open("w+")
        command = [sys.executable, "-m", "fabula", "serve", "--port", "0", "--data", str(folder / "data"), *map(str, words)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        self.address = first.rpartition(" at ")[2].strip()
        assert self.address.startswith("http"), first + (folder / "log").read_text()
        end = time.monotonic() + 60
        while httpx.get(self.address + "/health").status_code != 200:
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.05)

    @property
    def client(self) -> Any:
        return openai.OpenAI(base_url=self.address + "/v1", api_key="none", max_retries=0, timeout=60)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of a tiny random model."""
    folder = tmp_path_factory.mktemp("small")
    model = tiny.write_model(folder / "tiny")
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    served = Served(folder, "--model", f"tiny={model}", "--threads", 1)
    yield served
    served.close()


@pytest.fixture(scope="session")
def real(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of SmolLM2."""
    served = Served(tmp_path_factory.mktemp("real"), "--model", f"smollm2={smollm2_gguf}")
    yield served
    served.close()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# ---- Chat -----------------------------------------------------------------------------------------------------------


def test_a_chat_answers(real: Served) -> None:
    with real.client as client:
        done = client.chat.completions.create(
            model="smollm2", messages=user("What is the capital of France?"), temperature=0, max_tokens=20
        )
        assert "Paris" in done.choices[0].message.content
        assert done.object == "chat.completion" and done.id.startswith("chatcmpl-") and done.model == "smollm2"
        assert done.choices[0].finish_reason in ("stop", "length") and done.system_fingerprint.startswith("fp_")
        assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
        again = client.chat.completions.create(
            model="smollm2", messages=user("What is the capital of France?"), temperature=0, max_tokens=20
        )
        assert again.choices[0].message.content == done.choices[0].message.content
        assert again.usage.prompt_tokens_details.cached_tokens > 0
