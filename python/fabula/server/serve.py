"""Runs the app in this process, under Hypercorn, until somebody stops it.

One process, as sessions live in its memory. Stopping is gentle: nothing new begins, answers in the making get a while,
what is left is told that the server stops, and everything said is on disk when the process ends. Who asks twice does
not wait.
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
from fabula.server.gate import Keys
from fabula.server.settings import Settings
from fabula.server.state import Server
from fabula.workspace import Workspace, default_folder

BACKLOG = 1024
MAX_FILES = 65_536  # a connection is an open file, and the usual limit is 1,024
CLOSE_S = 5.0  # for connections to end once every answer has


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
    sock = listen(settings.host, settings.port)
    with contextlib.closing(sock):
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
            asyncio.run(_serve(app, settings, sock, lambda: ready(address(sock, scheme))))


def check(settings: Settings) -> dict[str, str]:
    """Whether a server with these settings could start, as far as one can tell before anything is opened.

    Returns:
        What is there and what is still to be fetched, by the names of models.

    Raises:
        InvalidArgument: keys are missing or cannot be read, neither can the certificate, or no data can be written.
        ModelNotFound: a model is nowhere, and nothing of its name can be fetched.
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
        raise InvalidArgument(f"data is {folder}, where nothing can be written")
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
    """A socket that is bound to the address.

    Raises:
        InvalidArgument: it cannot be; says why.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InvalidArgument(f"host is {host!r}, which is no address of this machine: {error}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
    except OSError as error:
        sock.close()
        hint = "; --port names another, 0 takes a free one" if error.errno == errno.EADDRINUSE else ""
        raise InvalidArgument(f"cannot listen at {host}:{port}: {error.strerror}{hint}") from None
    sock.setblocking(False)
    return sock


def address(sock: socket.socket, scheme: str) -> str:
    """URL of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def raise_file_limit() -> None:
    """Lets the process have as many connections as the system grants."""
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


async def _serve(app: Quart, settings: Settings, sock: socket.socket, ready: Callable[[], None]) -> None:
    config = hypercorn_config(settings)
    secure = [sock] if config.ssl_enabled else []
    sockets = Sockets(secure, [] if secure else [sock], [])
    config.create_sockets = lambda: sockets  # type: ignore[method-assign]  # ours is bound already
    stop = Stop(app, settings)
    stop.listen()
    told = asyncio.create_task(_tell_when_up(sock, ready))
    framework: ASGIFramework = app
    try:
        await hypercorn_serve(framework, config, shutdown_trigger=stop.wait, mode="asgi")
    finally:
        told.cancel()
        await app.extensions["fabula"].stop()


async def _tell_when_up(sock: socket.socket, ready: Callable[[], None]) -> None:
    """Calls `ready` when the socket takes connections."""
    while True:
        with contextlib.suppress(OSError):
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                ready()
                return
        await asyncio.sleep(0.01)


class Stop:
    """Ends a server: gently when it is asked once, at once when it is asked again.

    Args:
        app: the server's.
        settings: say how long answers in the making may take.
    """

    def __init__(self, app: Quart, settings: Settings) -> None:
        self._server: Server = app.extensions["fabula"]
        self._grace_s = settings.grace_s
        self._asked, self._urgent = asyncio.Event(), asyncio.Event()

    def listen(self) -> None:
        """Takes SIGINT and SIGTERM."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.ask)

    def ask(self) -> None:
        """Somebody wants it to end."""
        if self._asked.is_set():
            self._urgent.set()
        self._asked.set()

    async def wait(self) -> None:
        """Returns when the server may end: every answer has."""
        await self._asked.wait()
        self._server.gate.is_draining = True
        end = asyncio.get_running_loop().time() + self._grace_s
        while self._server.runs.active() and not self._urgent.is_set():
            left = end - asyncio.get_running_loop().time()
            if left <= 0:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, 0.1)):
                    await self._urgent.wait()
        await asyncio.gather(*(run.stop() for run in self._server.runs.active()))
        self._server.feed.close()
        await asyncio.sleep(0.05)  # readers get their last event
