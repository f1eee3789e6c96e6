"""Sampling sessions and samples."""

from __future__ import annotations

import attrs
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinker_core.errors import CheckpointMismatchError
from tinker_core.logs import note_in_log
from tinker_core.types import CreateSamplingSessionInput
from tinker_server.services import Services, answer
from tinker_server.wire.records import sampler_to_json
from tinker_server.wire.rejected import RejectedRequest
from tinker_server.wire.results import receipt
from tinker_server.wire.sampling import read_asample, read_create_sampling_session, read_join


class SamplingRoutes:
    """create_sampling_session, samplers and asample."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._engine = services.engine

    def routes(self) -> list[BaseRoute]:
        """All routes of this noun."""
        return [
            Route("/api/v1/create_sampling_session", self.create_sampling_session, methods=["POST"]),
            Route("/api/v1/join_sampling_session", self.join_sampling_session, methods=["POST"]),
            Route("/api/v1/samplers/{sampling_session_id}", self.sampler, methods=["GET"]),
            Route("/api/v1/asample", self.asample, methods=["POST"]),
        ]

    async def create_sampling_session(self, request: Request) -> Response:
        """Open a sampling session; answered at once."""
        owner = self._services.owner(request)
        wanted = await self._services.read(request, read_create_sampling_session)
        if wanted.base_model is not None and wanted.model_path is not None:
            wanted = await self._check_base_model(wanted, wanted.model_path, owner)
        sampler = await self._engine.create_sampling_session(wanted, owner)
        return answer({"type": "create_sampling_session", "sampling_session_id": sampler.sampling_session_id})

    async def _check_base_model(
        self, wanted: CreateSamplingSessionInput, model_path: str, owner: str
    ) -> CreateSamplingSessionInput:
        """Clients may name the base model beside a path; the path decides, so the two must agree."""
        checkpoint = await self._engine.library.checkpoint(model_path, owner)
        if checkpoint.base_model != wanted.base_model:
            raise CheckpointMismatchError(
                f"{model_path!r} is of base model {checkpoint.base_model!r}, not {wanted.base_model!r}; "
                "leave base_model out"
            )
        return attrs.evolve(wanted, base_model=None)

    async def join_sampling_session(self, request: Request) -> Response:
        """Give a clone of a sampling client, perhaps in another process, a number of its own."""
        sampling_session_id = await self._services.read(request, read_join)
        counter = await self._engine.join_sampling_session(sampling_session_id, self._services.owner(request))
        return answer({"type": "join_sampling_session", "client_counter": counter})

    async def sampler(self, request: Request) -> Response:
        """What a sampling session serves."""
        sampling_session_id = request.path_params["sampling_session_id"]
        return answer(sampler_to_json(await self._engine.sampler(sampling_session_id, self._services.owner(request))))

    async def asample(self, request: Request) -> Response:
        """Sample; the receipt names every sequence to come."""
        caller = self._services.caller(request)
        decoded = await self._services.read(request, read_asample, carries_data=True)
        if isinstance(decoded, RejectedRequest):
            accepted = await self._engine.submit_failed_sample(decoded.model_id, decoded.seq_id, decoded.error, caller)
        else:
            accepted = await self._engine.submit(decoded, caller)
        note_in_log(request_id=accepted.request_id, model_id=accepted.model_id)
        return answer(receipt(accepted))
