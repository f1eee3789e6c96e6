"""The floor under an operation of two requests: uvicorn and Starlette, which read a body, answer an id, and a result.

Run as a script it serves on a free port and prints ``reference ready on URL``.
"""

from __future__ import annotations

import socket
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from support.stub import canned_pass

RESULT = canned_pass(1, 8)


async def submit(request: Request) -> Response:
    """Read a request and answer an id."""
    await request.body()
    return Response(b'{"request_id": "0123456789012345678901234567890123456789"}', media_type="application/json")


async def retrieve(request: Request) -> Response:
    """Read an id and answer a result."""
    await request.body()
    return Response(RESULT, media_type="application/x-protobuf")


app = Starlette(
    routes=[
        Route("/api/v1/retrieve_future", retrieve, methods=["POST"]),
        Route("/api/v1/{path:path}", submit, methods=["POST"]),
    ]
)


def main() -> None:
    """Serve until terminated."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    sys.stderr.write(f"reference ready on http://127.0.0.1:{listener.getsockname()[1]}\n")
    config = uvicorn.Config(
        app, log_level="warning", loop="uvloop", http="httptools", timeout_keep_alive=120, access_log=False
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
