"""Training runs as records."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinker_server.services import Services, answer, page_of, wants_accessible
from tinker_server.wire.records import cursor_to_json, training_run_to_json


class RunRoutes:
    """Listings of training runs. A run of somebody else is accessible through its public checkpoints alone."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._engine = services.engine

    def routes(self) -> list[BaseRoute]:
        """All routes of this noun."""
        return [
            Route("/api/v1/training_runs", self.runs, methods=["GET"]),
            Route("/api/v1/training_runs/{run_id}", self.run, methods=["GET"]),
        ]

    async def runs(self, request: Request) -> Response:
        """A page of training runs."""
        owner = self._services.owner(request)
        limit, offset = page_of(request, 20)
        project_id = request.query_params.get("project_id")
        if wants_accessible(request):
            runs, total = await self._engine.library.accessible_runs(owner, limit, offset, project_id)
        else:
            runs, total = await self._engine.training_runs(owner, limit, offset, project_id)
        checkpoints = await self._engine.library.newest_of([run.model_id for run in runs], owner)
        return answer(
            {
                "training_runs": [training_run_to_json(run, checkpoints[run.model_id]) for run in runs],
                "cursor": cursor_to_json(offset, limit, total),
            }
        )

    async def run(self, request: Request) -> Response:
        """One training run."""
        owner, run_id = self._services.owner(request), request.path_params["run_id"]
        if not wants_accessible(request):
            await self._engine.training_run(run_id, owner)
        return answer(training_run_to_json(*await self._engine.library.run(run_id, owner)))
