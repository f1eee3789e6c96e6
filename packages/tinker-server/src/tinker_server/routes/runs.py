"""Training runs, checkpoints and sessions as records."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinker_core.types import JsonObject, TrainingRunRecord
from tinker_server.services import Services, answer, page_of
from tinker_server.wire.records import checkpoint_to_json, cursor_to_json, training_run_to_json
from tinker_server.wire.sessions import read_ttl

_RUN = "/api/v1/training_runs/{run_id}"
_CHECKPOINT = _RUN + "/checkpoints/{checkpoint_id:path}"


class RunRoutes:
    """Listings and the administration of checkpoints."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._engine = services.engine

    def routes(self) -> list[BaseRoute]:
        """All routes of this noun; checkpoint ids contain a slash, so paths with a suffix come first."""
        return [
            Route("/api/v1/training_runs", self.runs, methods=["GET"]),
            Route(_RUN + "/checkpoints", self.run_checkpoints, methods=["GET"]),
            Route(_CHECKPOINT + "/ttl", self.set_ttl, methods=["PUT"]),
            Route(_CHECKPOINT, self.delete, methods=["DELETE"]),
            Route(_RUN, self.run, methods=["GET"]),
            Route("/api/v1/checkpoints", self.checkpoints, methods=["GET"]),
            Route("/api/v1/sessions", self.sessions, methods=["GET"]),
            Route("/api/v1/sessions/{session_id}", self.session, methods=["GET"]),
        ]

    async def _run_json(self, run: TrainingRunRecord, owner: str) -> JsonObject:
        checkpoints, _ = await self._engine.checkpoints(owner, run_id=run.model_id)
        return training_run_to_json(run, checkpoints)

    async def runs(self, request: Request) -> Response:
        """A page of training runs."""
        owner = self._services.owner(request)
        limit, offset = page_of(request, 20)
        project_id = request.query_params.get("project_id")
        runs, total = await self._engine.training_runs(owner, limit, offset, project_id)
        return answer(
            {
                "training_runs": [await self._run_json(run, owner) for run in runs],
                "cursor": cursor_to_json(offset, limit, total),
            }
        )

    async def run(self, request: Request) -> Response:
        """One training run."""
        owner = self._services.owner(request)
        run = await self._engine.training_run(request.path_params["run_id"], owner)
        return answer(await self._run_json(run, owner))

    async def run_checkpoints(self, request: Request) -> Response:
        """All checkpoints of one run."""
        owner = self._services.owner(request)
        run = await self._engine.training_run(request.path_params["run_id"], owner)
        checkpoints, _ = await self._engine.checkpoints(owner, run_id=run.model_id)
        return answer({"checkpoints": [checkpoint_to_json(item) for item in checkpoints], "cursor": None})

    async def checkpoints(self, request: Request) -> Response:
        """A page of all checkpoints, newest first."""
        limit, offset = page_of(request, 100)
        found, total = await self._engine.checkpoints(self._services.owner(request), limit=limit, offset=offset)
        return answer(
            {
                "checkpoints": [checkpoint_to_json(item) for item in found],
                "cursor": cursor_to_json(offset, limit, total),
            }
        )

    async def delete(self, request: Request) -> Response:
        """Delete a checkpoint and its files."""
        await self._engine.delete_checkpoint(_path_of(request), self._services.owner(request))
        return answer({})

    async def set_ttl(self, request: Request) -> Response:
        """Set or lift the time after which a checkpoint is deleted."""
        ttl_seconds = await self._services.read(request, read_ttl)
        await self._engine.set_checkpoint_ttl(_path_of(request), ttl_seconds, self._services.owner(request))
        return answer({})

    async def sessions(self, request: Request) -> Response:
        """A page of session ids."""
        limit, offset = page_of(request, 20)
        found, _ = await self._engine.sessions(self._services.owner(request), limit, offset)
        return answer({"sessions": [session.session_id for session in found]})

    async def session(self, request: Request) -> Response:
        """What was made in a session."""
        owner = self._services.owner(request)
        session = await self._engine.session(request.path_params["session_id"], owner)
        contents = await self._engine.session_contents(session.session_id, owner)
        return answer(
            {
                "training_run_ids": list(contents.training_run_ids),
                "sampler_ids": list(contents.sampler_ids),
                "user_metadata": session.user_metadata,
                "display_name": session.display_name,
            }
        )


def _path_of(request: Request) -> str:
    return f"tinker://{request.path_params['run_id']}/{request.path_params['checkpoint_id']}"
