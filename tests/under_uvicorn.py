"""Runs the server's app under uvicorn, as it must not depend on its host; takes the flags of `fabula serve`."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click
import uvicorn

from fabula import Workspace
from fabula.cli.serve import gathered, settings_options
from fabula.server import create_app
from fabula.server.serve import address, listen


@click.command()
@settings_options
def main(**given: Any) -> None:
    settings, _ = gathered(None, given)
    sock = listen(settings.host, settings.port)
    with Workspace(settings.data) as workspace:
        app = create_app(workspace, settings)
        host = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=5)
        )

        async def run() -> None:
            task = asyncio.create_task(host.serve(sockets=[sock]))
            while not host.started and not task.done():
                await asyncio.sleep(0.01)
            print(f"uvicorn serves it at {address(sock, 'http')}", flush=True)
            await task

        asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
