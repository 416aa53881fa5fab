"""Clients that are libraries for constrained generation, or whole programs, for try_clients.py.

aider, Claude Code, Open WebUI and promptfoo are found on the PATH, each in an environment of its own. They work in a
folder that is deleted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

Check = Callable[[str, str], str]
QUESTION = "What is the capital of France?"


# ---- Libraries ------------------------------------------------------------------------------------------------------


def outlines(base: str, model: str) -> str:
    """`from_openai`: text, a class, a choice; and the same through `from_vllm`, with a regular expression."""
    import openai
    import outlines as library
    from outlines.types import Regex
    from pydantic import BaseModel

    class City(BaseModel):
        name: str

    with openai.OpenAI(base_url=base, api_key="none") as api:
        plain = library.from_openai(api, model)
        assert plain(QUESTION, max_tokens=20) and list(plain.stream(QUESTION, max_tokens=20))
        assert City.model_validate_json(str(plain(QUESTION, City, max_tokens=100)))
        vllm = library.from_vllm(api, model)
        assert City.model_validate_json(str(vllm(QUESTION, City, max_tokens=100)))
        assert re.fullmatch("[0-9]{2}", str(vllm("A number:", Regex("[0-9]{2}"), max_tokens=10)))
    return "from_openai, from_vllm: text, stream, JSON, a regular expression"


def guidance(base: str, model: str) -> str:
    """`models.OpenAI`: roles, `gen`, `json`."""
    import guidance as library
    from guidance import assistant, gen, models, user

    lm: Any = models.OpenAI(model, base_url=base, api_key="none", echo=False)
    with user():
        lm += QUESTION
    with assistant():
        lm += gen("answer", max_tokens=20)
    assert lm["answer"]
    with user():
        lm += "As JSON, please."
    with assistant():
        schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}}, "required": ["name"]}
        lm += library.json("city", schema=schema, max_tokens=100)
    assert json.loads(lm["city"])["name"] is not None
    return "gen, json"


# ---- Programs -------------------------------------------------------------------------------------------------------


def aider(base: str, model: str) -> str:
    """`aider --message` about a file: the answer arrives. So small a model would repeat itself up to its context's end,
    so the answer is limited, and aider says that it met the limit."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.py").write_text("def add(a, b):\n    return a - b\n")
        words = ["aider", "--model", f"openai/{model}", "--no-git", "--yes-always", "--no-check-update", "--no-pretty"]
        words += ["--no-show-model-warnings", "--analytics-disable", "--chat-mode", "ask", "--message", "Is a wrong?"]
        settings = [{"name": f"openai/{model}", "extra_params": {"max_tokens": 60}}]
        Path(folder, "settings.yml").write_text(json.dumps(settings))
        words += ["--model-settings-file", "settings.yml", "a.py"]
        done = _run(words, folder, OPENAI_API_BASE=base, OPENAI_API_KEY="none", HOME=folder)
        assert re.search(r"Tokens: .* received|Output tokens: ~[1-9]", done), done[-2000:]
    return "--message, in the mode ask"


def claude_code(base: str, _: str) -> str:
    """`claude -p` through `fabula launch`, with a short system prompt: its own has 20,000 tokens."""
    url = base.removesuffix("/v1")
    with tempfile.TemporaryDirectory() as folder:
        words = ["fabula", "launch", "claude", "--url", url, "--", "-p", "Name a river."]
        words += ["--system-prompt", "Be brief.", "--tools", "", "--output-format", "json"]
        found = json.loads(_run(words, folder, HOME=folder).splitlines()[-1])
    assert found["is_error"] is False and found["result"] and found["usage"]["output_tokens"], found
    return "-p, started by `fabula launch claude`, with a short system prompt"


def promptfoo(base: str, model: str) -> str:
    """`promptfoo eval` of one prompt with two assertions."""
    about = {
        "prompts": ["{{question}}"],
        "providers": [{
            "id": f"openai:chat:{model}",
            "config": {"apiBaseUrl": base, "apiKey": "none", "max_tokens": 20, "temperature": 0},
        }],
        "tests": [{"vars": {"question": QUESTION}, "assert": [{"type": "javascript", "value": "output.length > 0"}]}],
    }  # fmt: skip
    quiet = {
        "PROMPTFOO_DISABLE_TELEMETRY": "1",
        "PROMPTFOO_DISABLE_UPDATE": "1",
        "PROMPTFOO_DISABLE_REMOTE_GENERATION": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "promptfooconfig.json").write_text(json.dumps(about))
        words = ["promptfoo", "eval", "-c", "promptfooconfig.json", "-o", "out.json", "--no-cache", "--no-table"]
        _run(words, folder, HOME=folder, **quiet)
        counts = json.loads(Path(folder, "out.json").read_text())["results"]["stats"]
    assert counts["successes"] == 1 and not counts["errors"], counts
    return "eval"


def open_webui(base: str, model: str) -> str:
    """Open WebUI with an OpenAI and an Ollama connection: the models, a chat by its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "DATA_DIR": folder, "WEBUI_SECRET_KEY": "none", "WEBUI_AUTH": "False", "OFFLINE_MODE": "True",
            "HF_HUB_OFFLINE": "1", "OPENAI_API_BASE_URL": base, "OPENAI_API_KEY": "none", "ENABLE_OLLAMA_API": "True",
            "OLLAMA_BASE_URL": base.removesuffix("/v1"), "RAG_EMBEDDING_ENGINE": "openai", "RAG_OPENAI_API_KEY": "none",
            "SCARF_NO_ANALYTICS": "true", "DO_NOT_TRACK": "true", "ANONYMIZED_TELEMETRY": "false",
        }  # fmt: skip
        words = ["open-webui", "serve", "--host", "127.0.0.1", "--port", str(port)]
        with (
            Path(folder, "log").open("w+") as log,
            subprocess.Popen(words, cwd=folder, stdout=log, stderr=log, env=os.environ | settings) as process,
        ):
            try:
                _wait_for(f"{url}/health", process, Path(folder, "log"))
                signed = _post(f"{url}/api/v1/auths/signin", {"email": "", "password": ""})
                token = signed["token"]
                names = [one["id"] for one in _get(f"{url}/api/models", token)["data"]]
                assert model in names, names
                chat = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 20}
                assert _post(f"{url}/api/chat/completions", chat, token)["choices"][0]["message"]["content"]
                tags = _get(f"{url}/ollama/api/tags", token)["models"]
                ollama = {"model": tags[0]["model"], "messages": chat["messages"], "stream": False}
                found = _post(f"{url}/ollama/api/chat", ollama | {"options": {"num_predict": 20}}, token)
                assert found["message"]["content"]
            finally:
                process.terminate()
    return "a chat by its API, over the OpenAI and the Ollama connection"


def _run(words: list[str], folder: str, **variables: str) -> str:
    """What a program writes; it must succeed."""
    done = subprocess.run(
        words, cwd=folder, env=os.environ | variables, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{words[0]} ended with {done.returncode}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    return done.stdout


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            time.sleep(0.5)


def _get(url: str, token: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})) as reply:
        return json.load(reply)


def _post(url: str, body: dict[str, Any], token: str = "") -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(f"{url} replied {error.code}: {error.read()[:500]!r}") from None


def version_of(program: str) -> str | None:
    """The version of a program on the PATH, which it says or which its Python environment knows; None without it."""
    path = shutil.which(program)
    if path is None:
        return None
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    found = re.search(r"\d+\.\d+[.\w]*", done.stdout) if done.returncode == 0 else None
    if found is not None:
        return found[0]
    python = Path(path).read_text(errors="replace").splitlines()[0].removeprefix("#!").strip()
    code = f"import importlib.metadata as m; print(m.version({program!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


CHECKS: dict[str, tuple[str, Check]] = {"outlines": ("outlines", outlines), "guidance": ("guidance", guidance)}
# By name: the program.
PROGRAMS: dict[str, tuple[str, Check]] = {
    "aider": ("aider", aider),
    "Claude Code": ("claude", claude_code),
    "promptfoo": ("promptfoo", promptfoo),
    "Open WebUI": ("open-webui", open_webui),
}
