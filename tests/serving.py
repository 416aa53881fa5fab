"""A server as a process, for tests: started, asked, stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import waiting
from ticking import STOOD


class Running:
    """`fabula serve` as a process on a free port.

    Args:
        data: folder of its sessions.
        model: folder or file.
        flags: further ones.
        wait: whether to return only when the model is loaded.
        key: sent with each request.
        host: "hypercorn", or "uvicorn" to see that the app does not depend on its host.

    Attributes:
        address: URL.
        errors: what it wrote on stderr so far.
    """

    def __init__(
        self, data: Path, model: str | Path, *flags: str, wait: bool = True, key: str = "", host: str = "hypercorn"
    ) -> None:
        here = Path(__file__).parent
        program = [here / "ticking.py", "serve"] if host == "hypercorn" else [here / "under_uvicorn.py"]
        words = waiting.python(*map(str, program), "--port", 0, "--data", data, "--model", model)
        variables = {name: value for name, value in os.environ.items() if not name.startswith("FABULA_")}
        package = Path(__file__).resolve().parent.parent / "python"
        if "PYTHONPATH" in os.environ or (package / "fabula" / "_cdef.py").exists():
            variables["PYTHONPATH"] = os.environ.get("PYTHONPATH") or str(package)
        self.process = subprocess.Popen(
            [*words, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
            env=variables,
        )  # fmt: skip
        self.errors: list[str] = []
        waiting.heard[self.process.pid] = lambda: "".join(self.errors)
        assert self.process.stdout is not None and self.process.stderr is not None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        line = self.process.stdout.readline()
        if " at http" not in line:
            self.process.wait()
            self._reader.join()
            self.process.stdout.close()
            self.process.stderr.close()
            raise AssertionError(f"the server did not start: {line!r} {''.join(self.errors)}")
        self.address = line.split()[-1]
        self.port = int(self.address.rpartition(":")[2])
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(base_url=self.address, timeout=None, headers=headers)
        if wait:
            self.wait_until_ready()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line)

    def wait_until_ready(self) -> None:
        waiting.wait_until(
            lambda: self.client.get("/health").status_code == 200,
            lambda: self.client.get("/health").text,
            pause=lambda: time.sleep(0.05),
        )

    def wait_for_log(self, **fields: Any) -> list[dict[str, Any]]:
        """All lines of the log as JSON, as soon as one of them has these fields: it is written behind the reply, and
        read by another thread."""

        def lines() -> list[dict[str, Any]]:
            return [json.loads(line) for line in list(self.errors) if line.startswith("{")]

        waiting.wait_until(
            lambda: any(line | fields == line for line in lines()),
            lambda: f"no line of the log has {fields}: {''.join(self.errors)}",
            pause=lambda: time.sleep(0.01),
        )
        return lines()

    # ---- Asking -----------------------------------------------------------------------------------------------------

    def post(self, path: str, status: int = 200, /, **body: Any) -> Any:
        """The JSON that a route replies with."""
        response = self.client.post(path, json=body)
        assert response.status_code == status, response.text
        return response.json()

    def get(self, path: str, status: int = 200, /) -> Any:
        response = self.client.get(path)
        assert response.status_code == status, response.text
        return response.json()

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """Every event of a stream, with `id` and `event` beside its data."""
        with self.client.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            return list(parse(response.iter_lines()))

    def unread(self, **body: Any) -> socket.socket:
        """A connection that has asked for an answer and reads nothing.

        A stream of more than buffers hold, as of 15,000 tokens with alternatives, is in the making until he leaves.
        """
        data = json.dumps(body).encode()
        head = "POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(data)}\r\n\r\n"
        sock = socket.create_connection(("127.0.0.1", self.port))
        sock.sendall(head.encode() + data)
        return sock

    # ---- Ending -----------------------------------------------------------------------------------------------------

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Asks the process to end, and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            code = self.process.wait()
        except BaseException:
            self.process.kill()
            raise
        finally:
            self.client.close()
            self._reader.join()
            waiting.heard.pop(self.process.pid, None)
            for pipe in (self.process.stdout, self.process.stderr):
                if pipe is not None:
                    pipe.close()
        return code

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()
        log = "".join(self.errors)
        if STOOD in log:  # the reason comes last: where output is cut, its end is kept
            raise AssertionError(f"{log}\n\n{log[log.index(STOOD) :][:8000]}")


def lasting_port() -> int:
    """A free port for a server that comes back to it: none of those that the system hands out by itself, on Linux from
    32768 on, which another process might get meanwhile."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("there is no free port")


@pytest.fixture(scope="session")
def tiny_server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of the tiny model with the settings it has by itself, for every test whose sessions have names of their
    own and that sets nothing else."""
    with Running(tmp_path_factory.mktemp("server"), tiny_folder) as running:
        yield running


def parse(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Events of a stream's lines."""
    found: dict[str, Any] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "data":
            found |= json.loads(value)
        elif name in ("id", "event"):
            found[f"#{name}"] = value
        elif not line and found:
            yield found
            found = {}
