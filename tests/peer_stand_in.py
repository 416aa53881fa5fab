"""Stands in for a Python with llama-cpp-python: answers as bench/llama_worker.py does, or serves OpenAI's streams.

Called as the interpreter would be, with a factor for its logits in front.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SETTINGS = "a stand-in"


class Answers:
    def __init__(self, skew: float) -> None:
        self.skew = skew
        self.model: Any = None
        self.n_read = 0

    def _load(self, path: str, threads: int, positions: int) -> None:
        from fabula.model import Model

        self.model = Model.load(path, threads=threads, context=positions)

    def load(self, path: str, threads: int, kv: str, positions: int, sequences: int, choose: bool) -> dict[str, Any]:
        del kv, sequences, choose
        self._load(path, threads, positions)
        return {"settings": {"prefill": SETTINGS, "decode": SETTINGS}}

    def logits(self, tokens: list[int], file: str) -> dict[str, Any]:
        rows = self.model.logits(tokens)[:-1] * self.skew
        rows.astype("float32").tofile(file)
        return {"rows": len(rows)}

    def first(self, path: str, threads: int, kv: str, positions: int, prompt: list[int]) -> dict[str, Any]:
        del kv
        self._load(path, threads, positions)
        return {"token": int(self.model.logits(prompt)[-1].argmax()), "settings": SETTINGS}

    def hold(self, path: str, threads: int, kv: str, positions: int) -> dict[str, Any]:
        assert path.endswith(".gguf") and threads and kv and positions
        return {"settings": SETTINGS}

    def read(self, tokens: list[int]) -> dict[str, Any]:
        self.n_read = len(tokens)
        return {"bytes": 10 * self.n_read}

    def save_and_load(self) -> dict[str, Any]:
        return {"seconds": 1e-3 * self.n_read}


class TorchAnswers:
    """Answers as bench/torch_worker.py does: zentorch works, ipex does not."""

    model: Any = None

    def backends(self) -> dict[str, Any]:
        return {"backends": ["zentorch", "ipex"]}

    def load(self, path: str, options: dict[str, str], dtype: str, threads: int, backend: str) -> dict[str, Any]:
        from fabula.model import Model

        if backend == "ipex":
            return {"error": "made for another torch"}
        assert dtype == "float32" and not options
        self.model = Model.load(path, threads=threads, kv="f32")
        return {"settings": f"{backend} of {SETTINGS}"}

    def run(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        from fabula.bench.model import Fabula

        run = Fabula(self.model).run(prompt, tokens)
        return {"prefill_s": run.prefill_s, "decode_s": run.decode_s, "tokens": list(run.tokens)}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._reply(b"{}")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["stream"] and asked["messages"][0]["role"] == "user"
        event = json.dumps({"choices": [{"delta": {"content": "word "}}]})
        self._reply(b"".join(f"data: {event}\n\n".encode() for _ in range(asked["max_tokens"])) + b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def _reply(self, body: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    skew, words = float(sys.argv[1]), sys.argv[2:]
    if words[:2] == ["-m", "llama_cpp.server"]:
        port = int(words[words.index("--port") + 1])
        ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
    answers: Any = TorchAnswers() if words[0].endswith("torch_worker.py") else Answers(skew)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(answers, request.pop("do"))(**request)), flush=True)


if __name__ == "__main__":
    main()
