"""The comparison of trainer and sampler, for whoever runs the server."""

from __future__ import annotations

import attrs
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinker_core.errors import InvalidRequestError
from tinker_core.types import AgreementReport, JsonObject
from tinker_server.services import Services, answer

PATH = "/agreement"


class AgreementRoutes:
    """Compares on demand."""

    def __init__(self, services: Services) -> None:
        self._engine = services.engine

    def routes(self) -> list[BaseRoute]:
        """All routes of this noun."""
        return [Route(PATH, self.compare, methods=["POST"])]

    async def compare(self, request: Request) -> Response:
        """200 with the figures when they are within the tolerance, else 503 with them and what to suspect."""
        base_model = request.query_params.get("base_model")
        if not base_model:
            raise InvalidRequestError(f"name a base model: POST {PATH}?base_model=NAME")
        report = await self._engine.compare_sides(base_model)
        return answer(report_to_json(report), 200 if report.agrees else 503)


def report_to_json(report: AgreementReport) -> JsonObject:
    """A report as JSON; an infinite figure is null."""
    return {
        "base_model": report.base_model,
        "dtype": report.dtype,
        "agrees": report.agrees,
        "suspect": report.suspect,
        "figures": {compared: attrs.asdict(figures) for compared, figures in report.figures.items()},
        "tolerance": attrs.asdict(report.tolerance),
        "notes": list(report.notes),
    }
