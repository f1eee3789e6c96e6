"""An ASGI app behind real HTTP, in a thread of the test process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette

from tinker_server.serving import open_socket, url_of


@contextlib.contextmanager
def serve_in_thread(app: Starlette, *, port: int = 0, **options: Any) -> Iterator[str]:
    """Serve an app on a free port for the length of a block; yields its base URL. ``options`` go to uvicorn."""
    listener = open_socket("127.0.0.1", port)
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: object = None) -> None:
            try:
                await super().startup([listener])
            finally:
                started.set()

        async def shutdown(self, sockets: object = None) -> None:
            if hasattr(app.state, "gate"):
                app.state.gate.close()
            await super().shutdown([listener])

    config = uvicorn.Config(app, log_config=None, lifespan="on", ws="none", timeout_graceful_shutdown=5, **options)
    server = Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    started.wait()
    try:
        yield url_of(listener)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
