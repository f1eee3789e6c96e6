"""Models, passes and optimizer steps."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinker_server.routes.submissions import submit
from tinker_server.services import Services, answer
from tinker_server.wire.custom_losses import read_create_custom_loss
from tinker_server.wire.models import read_create_model
from tinker_server.wire.records import model_info_to_json
from tinker_server.wire.sessions import read_text
from tinker_server.wire.training import read_forward_backward, read_optim_step


class TrainingRoutes:
    """create_model, create_custom_loss, get_info, forward_backward, forward (older clients) and optim_step."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._engine = services.engine

    def routes(self) -> list[BaseRoute]:
        """All routes of this noun."""
        return [
            Route("/api/v1/create_model", self.create_model, methods=["POST"]),
            Route("/api/v1/create_custom_loss", self.create_custom_loss, methods=["POST"]),
            Route("/api/v1/get_info", self.get_info, methods=["POST"]),
            Route("/api/v1/forward_backward", self.forward_backward, methods=["POST"]),
            Route("/api/v1/forward", self.forward, methods=["POST"]),
            Route("/api/v1/optim_step", self.optim_step, methods=["POST"]),
        ]

    async def create_model(self, request: Request) -> Response:
        """Make an adapter on a base model."""
        return await submit(self._services, request, read_create_model)

    async def create_custom_loss(self, request: Request) -> Response:
        """Keep a traced loss for the passes of its session."""
        return await submit(self._services, request, read_create_custom_loss)

    async def get_info(self, request: Request) -> Response:
        """What a model is."""
        model_id = await self._services.read(request, lambda body: read_text(body, "model_id"))
        run = await self._engine.training_run(model_id, self._services.owner(request))
        return answer(model_info_to_json(run, self._engine.architecture_of(run.base_model)))

    async def forward_backward(self, request: Request) -> Response:
        """Run a pass, with or without gradient."""
        return await submit(self._services, request, read_forward_backward, carries_data=True)

    async def forward(self, request: Request) -> Response:
        """Run a pass without gradient, as clients before 0.25 ask for it."""
        reader = partial(read_forward_backward, forward_only=True)
        return await submit(self._services, request, reader, carries_data=True)

    async def optim_step(self, request: Request) -> Response:
        """Apply and clear a model's gradient."""
        return await submit(self._services, request, read_optim_step)
