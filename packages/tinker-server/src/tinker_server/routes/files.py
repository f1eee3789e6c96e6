"""Downloads: signed links to the files of checkpoints and to traces, and what they lead to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from email.utils import format_datetime
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from tinker_core.errors import (
    InvalidRequestError,
    StorageError,
    TinkerError,
    UnknownCheckpointError,
    UnknownSessionError,
)
from tinker_core.storage.checkpoints import files_of
from tinker_core.types import CheckpointRecord, CheckpointType, TinkerPath
from tinker_server.services import Services, answer
from tinker_server.signing import Link, base_url_of
from tinker_server.tar_stream import PIECE, archive_pieces, archive_size

DOWNLOADS = "/download/"
"""What lies below needs a signed link and no key."""

_CHECKPOINT = "/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}"
_HEADERS = {"cache-control": "private, no-store", "x-content-type-options": "nosniff"}


class _File(FileResponse):
    chunk_size = PIECE  # each piece is a step from thread to thread


class _OfFiles:
    """A response that is made from a checkpoint's files, which stay until it is sent."""

    def __init__(
        self, files: AbstractAsyncContextManager[Path], respond: Callable[[Path], Awaitable[Response]]
    ) -> None:
        self._files = files
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._files as directory:
            response = await self._respond(directory)
            await response(scope, receive, send)


class FileRoutes:
    """Making links, and following them."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._engine = services.engine

    def routes(self) -> list[BaseRoute]:
        """All routes of this noun."""
        return [
            Route(_CHECKPOINT + "/external_weights_urls", self.external_weights_urls, methods=["GET"]),
            Route(_CHECKPOINT + "/archive", self.archive_url, methods=["GET"]),
            Route("/api/v1/sessions/{session_id}/trace_export", self.trace_export, methods=["GET"]),
            Route(DOWNLOADS + "files/{run_id}/{kind}/{name}/{file:path}", self.file, methods=["GET"]),
            Route(DOWNLOADS + "archives/{run_id}/{kind}/{name}", self.archive, methods=["GET"]),
            Route(DOWNLOADS + "traces/{session_id}", self.trace, methods=["GET"]),
        ]

    def _link(self, request: Request, path: str, version: str = "") -> Link:
        return self._services.signer.link(base_url_of(request, self._services.public_url), path, version)

    # --- making links -------------------------------------------------------------------------------------------------

    async def external_weights_urls(self, request: Request) -> Response:
        """A link to every file of an external checkpoint, by the file's name."""
        path = _tinker_path(request)
        if path.kind is not CheckpointType.EXTERNAL:
            raise InvalidRequestError(f"{str(path)!r} holds no external weights; save some with save_weights_external")
        found = await self._engine.library.files(str(path), self._services.caller(request), "external_weights_urls")
        below = f"{DOWNLOADS}files/{path.run_id}/{path.checkpoint_id}/"
        links = {name: self._link(request, below + name, found.record.request_id) for name in found.sizes}
        expires = min(link.expires for link in links.values())
        return answer({"urls": {name: link.url for name, link in links.items()}, "expires": expires.isoformat()})

    async def archive_url(self, request: Request) -> Response:
        """A link to all files in one archive, for clients up to 0.35: a redirect where they accept gzip, else JSON."""
        path = _tinker_path(request)
        found = await self._engine.library.files(str(path), self._services.caller(request), "archive")
        link = self._link(request, f"{DOWNLOADS}archives/{path.run_id}/{path.checkpoint_id}", found.record.request_id)
        # These clients send the header twice, with the type that they accept last.
        if "gzip" in ",".join(request.headers.getlist("accept")).lower():
            headers = {"location": link.url, "expires": format_datetime(link.expires, usegmt=True)}
            return Response(status_code=302, headers=headers)
        return answer({"url": link.url, "expires": link.expires.isoformat()})

    async def trace_export(self, request: Request) -> Response:
        """A link to the trace of a session's requests, once it is written."""
        session = await self._engine.session(request.path_params["session_id"], self._services.owner(request))
        writing = asyncio.ensure_future(self._engine.traces.export(session.session_id))
        await asyncio.wait([writing], timeout=self._services.poll_seconds)
        if not writing.done():
            return answer({"status": "pending"})
        try:
            writing.result()
        except StorageError as error:
            return answer({"status": "failed", "error": str(error)})
        return answer({"status": "ready", "url": self._link(request, f"{DOWNLOADS}traces/{session.session_id}").url})

    # --- following links ----------------------------------------------------------------------------------------------

    async def _record(self, request: Request) -> CheckpointRecord:
        version = self._services.signer.check(request)
        return await self._engine.library.version(_tinker_path(request), version)

    async def file(self, request: Request) -> _OfFiles:
        """One file of a checkpoint, or the range of it that is asked for."""
        record = await self._record(request)
        name = request.path_params["file"]

        async def respond(directory: Path) -> Response:
            missing = UnknownCheckpointError(f"{record.path}/{name}")
            if name not in await asyncio.to_thread(files_of, directory):
                raise missing
            return await _whole(directory / name, "application/octet-stream", missing)

        # Clients fetch large files in many ranges; checking all files for each would take them far too long.
        return _OfFiles(self._engine.library.reading(record, verify=False), respond)

    async def archive(self, request: Request) -> _OfFiles:
        """All files of a checkpoint as a tar archive."""
        record = await self._record(request)
        mtime = int(record.created_at.timestamp())

        async def respond(directory: Path) -> Response:
            sizes = await asyncio.to_thread(files_of, directory)
            headers = {
                **_HEADERS,
                "content-length": str(archive_size(sizes, mtime)),
                "content-disposition": f'attachment; filename="{record.path.name}.tar"',
            }
            if request.method == "HEAD":
                return Response(headers=headers, media_type="application/x-tar")
            pieces = archive_pieces(directory, sizes, mtime)
            return StreamingResponse(pieces, headers=headers, media_type="application/x-tar")

        return _OfFiles(self._engine.library.reading(record), respond)

    async def trace(self, request: Request) -> Response:
        """The trace that was last exported."""
        self._services.signer.check(request)
        session_id = request.path_params["session_id"]
        path = self._engine.traces.file_of(session_id)
        return await _whole(path, "application/json", UnknownSessionError(session_id))


async def _whole(path: Path, media_type: str, missing: TinkerError) -> Response:
    try:
        status = await asyncio.to_thread(path.stat)
    except FileNotFoundError:
        raise missing from None
    return _File(path, media_type=media_type, headers=_HEADERS, stat_result=status)


def _tinker_path(request: Request) -> TinkerPath:
    parts = request.path_params
    return TinkerPath.parse(f"tinker://{parts['run_id']}/{parts['kind']}/{parts['name']}")
