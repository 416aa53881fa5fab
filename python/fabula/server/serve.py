"""Runs the app in this process, under Hypercorn, until a signal stops it.

One process, because sessions live in its memory. A graceful stop refuses new requests, gives running answers
`grace_s` seconds, then ends their streams with an event that says so; every turn is on disk when the process ends. A
second signal skips the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
import socket
from collections.abc import Callable

from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config, Sockets
from hypercorn.typing import ASGIFramework
from quart import Quart

from fabula.errors import InvalidArgument, ModelNotFound
from fabula.formats.locate import can_be_fetched, locate
from fabula.server import logs
from fabula.server.app import check_access, create_app
from fabula.server.failures import stopped
from fabula.server.gate import Keys
from fabula.server.settings import Settings
from fabula.server.state import Server
from fabula.workspace import Workspace, default_folder

BACKLOG = 1024
MAX_FILES = 65_536  # a connection is an open file, and the usual limit is 1,024
CLOSE_S = 5.0  # for connections to close after the last answer has ended


def run(settings: Settings, *, ready: Callable[[str], None] = lambda _: None) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        settings: of the server.
        ready: called with the address once it can be reached; models may still be loading.

    Raises:
        InvalidArgument: the address cannot be used; or as `check`.
        ModelNotFound: as `check`.
        StoreError: the data folder cannot be used, or another process uses it.
    """
    check(settings)
    logs.set_up(settings)
    with contextlib.ExitStack() as stack:
        ports = [settings.port, *([] if settings.ollama_port is None else [settings.ollama_port])]
        socks = [stack.enter_context(contextlib.closing(listen(settings.host, port))) for port in ports]
        raise_file_limit()
        with Workspace(
            settings.data,
            store=settings.store,
            spill_bytes=settings.spill_bytes,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
        ) as workspace:
            app = create_app(workspace, settings)
            scheme = "http" if settings.certificate is None else "https"
            asyncio.run(_serve(app, settings, socks, lambda: ready(address(socks[0], scheme))))


def check(settings: Settings) -> dict[str, str]:
    """Checks whether a server with these settings can start, without loading or opening anything.

    Returns:
        For each model, by name: its path, or that it will be fetched.

    Raises:
        InvalidArgument: keys or the certificate are missing or unreadable, or the data folder is not writable.
        ModelNotFound: a model is not there and cannot be fetched.
    """
    check_access(settings)
    if settings.keys is not None:
        Keys.read(settings.keys)
    try:
        hypercorn_config(settings).create_ssl_context()
    except OSError as error:  # ssl.SSLError is one
        raise InvalidArgument(
            f"certificate: {settings.certificate} and {settings.private_key} cannot be used: {error}"
        ) from None
    folder = default_folder() if settings.data is None else settings.data
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InvalidArgument(f"data is {folder}, which is not writable")
    found = {}
    for name, place in settings.models:
        try:
            found[name] = str(locate(place, fetch=False))
        except ModelNotFound:
            if not settings.fetch or not can_be_fetched(place):
                raise
            found[name] = "will be fetched"
    return found


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address.

    Raises:
        InvalidArgument: the address cannot be used; says why.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InvalidArgument(f"host is {host!r}, which is not an address of this machine: {error}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
    except OSError as error:
        sock.close()
        hint = "; --port sets another port, 0 takes a free one" if error.errno == errno.EADDRINUSE else ""
        raise InvalidArgument(f"cannot listen at {host}:{port}: {error.strerror}{hint}") from None
    sock.setblocking(False)
    return sock


def address(sock: socket.socket, scheme: str) -> str:
    """URL of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def raise_file_limit() -> None:
    """Raises the limit of open files, hence of connections, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def hypercorn_config(settings: Settings) -> Config:
    """How Hypercorn serves the app."""
    config = Config()
    config.workers = 1
    config.backlog = BACKLOG
    config.include_server_header = False
    config.accesslog = config.errorlog = None  # the server's own logs know more
    # Also the time a client has for its headers. read_timeout stays off: it would end a stream whose client is silent.
    config.keep_alive_timeout = settings.idle_s
    config.graceful_timeout = CLOSE_S
    if settings.certificate is not None and settings.private_key is not None:
        config.certfile, config.keyfile = str(settings.certificate), str(settings.private_key)
    return config


async def _serve(app: Quart, settings: Settings, socks: list[socket.socket], ready: Callable[[], None]) -> None:
    config = hypercorn_config(settings)
    sockets = Sockets(socks, [], []) if config.ssl_enabled else Sockets([], socks, [])
    config.create_sockets = lambda: sockets  # type: ignore[method-assign]  # ours are bound already
    stop = Stop(app, settings)
    stop.listen()
    notifier = asyncio.create_task(_notify_when_up(socks[-1], ready))
    framework: ASGIFramework = app
    try:
        await hypercorn_serve(framework, config, shutdown_trigger=stop.wait, mode="asgi")
    finally:
        notifier.cancel()
        await app.extensions["fabula"].stop()


async def _notify_when_up(sock: socket.socket, ready: Callable[[], None]) -> None:
    """Calls `ready` when the socket accepts connections."""
    while True:
        with contextlib.suppress(OSError):
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                ready()
                return
        await asyncio.sleep(0.01)


class Stop:
    """Stops a server: gracefully at the first request, at once at the second.

    Args:
        app: of the server.
        settings: give the time that running answers have to end.
    """

    def __init__(self, app: Quart, settings: Settings) -> None:
        self._server: Server = app.extensions["fabula"]
        self._grace_s = settings.grace_s
        self._requested, self._urgent = asyncio.Event(), asyncio.Event()

    def listen(self) -> None:
        """Handles SIGINT and SIGTERM."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.request)

    def request(self) -> None:
        """Requests a stop; a second request ends running answers at once."""
        if self._requested.is_set():
            self._urgent.set()
        self._requested.set()

    async def wait(self) -> None:
        """Waits for a request to stop, then for the end of every answer."""
        await self._requested.wait()
        self._server.gate.is_draining = True
        end = asyncio.get_running_loop().time() + self._grace_s
        while self._server.runs.active() and not self._urgent.is_set():
            left = end - asyncio.get_running_loop().time()
            if left <= 0:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, 0.1)):
                    await self._urgent.wait()
        await asyncio.gather(*(run.stop(stopped()) for run in self._server.runs.active()))
        self._server.feed.close()
        await asyncio.sleep(0.05)  # readers get their last event
