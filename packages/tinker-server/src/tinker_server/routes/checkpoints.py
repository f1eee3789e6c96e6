"""Checkpoints as records: listings and administration."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinker_server.services import Services, answer, page_of
from tinker_server.wire.records import checkpoint_to_json, cursor_to_json
from tinker_server.wire.sessions import read_ttl

_CHECKPOINTS = "/api/v1/training_runs/{run_id}/checkpoints"
_CHECKPOINT = _CHECKPOINTS + "/{checkpoint_id:path}"


class CheckpointRoutes:
    """What users do with the checkpoints that they have saved."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> list[BaseRoute]:
        """All routes of this noun; checkpoint ids contain a slash, so paths with a suffix come first."""
        return [
            Route(_CHECKPOINTS, self.of_run, methods=["GET"]),
            Route("/api/v1/models/{run_id}/checkpoints", self.of_run, methods=["GET"]),
            Route(_CHECKPOINT + "/publish", self.publish, methods=["POST"]),
            Route(_CHECKPOINT + "/publish", self.unpublish, methods=["DELETE"]),
            Route(_CHECKPOINT + "/ttl", self.set_ttl, methods=["PUT"]),
            Route(_CHECKPOINT, self.delete, methods=["DELETE"]),
            Route("/api/v1/checkpoints", self.of_owner, methods=["GET"]),
        ]

    async def of_run(self, request: Request) -> Response:
        """All checkpoints of one run that the caller may read."""
        run_id = request.path_params["run_id"]
        _, checkpoints = await self._services.engine.library.run(run_id, self._services.owner(request))
        return answer({"checkpoints": [checkpoint_to_json(item) for item in checkpoints], "cursor": None})

    async def of_owner(self, request: Request) -> Response:
        """A page of all checkpoints, newest first."""
        limit, offset = page_of(request, 100)
        owner = self._services.owner(request)
        found, total = await self._services.engine.library.checkpoints(owner, limit, offset)
        return answer(
            {
                "checkpoints": [checkpoint_to_json(item) for item in found],
                "cursor": cursor_to_json(offset, limit, total),
            }
        )

    async def delete(self, request: Request) -> Response:
        """Delete a checkpoint and its files."""
        await self._services.engine.library.delete(_path_of(request), self._services.caller(request))
        return answer({})

    async def set_ttl(self, request: Request) -> Response:
        """Set or lift the time after which a checkpoint is deleted."""
        ttl_seconds = await self._services.read(request, read_ttl)
        await self._services.engine.library.set_ttl(_path_of(request), ttl_seconds, self._services.caller(request))
        return answer({})

    async def publish(self, request: Request) -> Response:
        """Let everybody read a checkpoint; one that is public already stays so."""
        await self._services.engine.library.set_public(_path_of(request), True, self._services.caller(request))
        return answer({})

    async def unpublish(self, request: Request) -> Response:
        """Let only its owner read a checkpoint; one that is private already stays so."""
        await self._services.engine.library.set_public(_path_of(request), False, self._services.caller(request))
        return answer({})


def _path_of(request: Request) -> str:
    return f"tinker://{request.path_params['run_id']}/{request.path_params['checkpoint_id']}"
