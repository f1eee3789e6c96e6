"""Saving and loading weights."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinker_core.errors import CheckpointMismatchError, UserError
from tinker_core.types import LoadWeightsInput, LoraConfig
from tinker_server.routes.submissions import accept, submit
from tinker_server.services import Services, answer
from tinker_server.wire.models import ALPHA_KEY, TARGETS_KEY, AdapterSettings, read_adapter_settings
from tinker_server.wire.records import weights_info_to_json
from tinker_server.wire.rejected import RejectedRequest
from tinker_server.wire.results import receipt
from tinker_server.wire.sessions import read_text
from tinker_server.wire.weights import (
    read_copy_weights,
    read_load_weights,
    read_save_weights,
    read_save_weights_external,
    read_save_weights_for_sampler,
    read_unload_model,
    reject_load,
)

_ACCESS_TOKEN = "x-tinker-weights-access-token"
_IDEMPOTENCY_KEY = "x-idempotency-key"


class WeightsRoutes:
    """Saving, loading, copying and unloading weights, and weights_info."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._engine = services.engine

    def routes(self) -> list[BaseRoute]:
        """All routes of this noun."""
        return [
            Route("/api/v1/save_weights", self.save_weights, methods=["POST"]),
            Route("/api/v1/save_weights_for_sampler", self.save_weights_for_sampler, methods=["POST"]),
            Route("/api/v1/save_weights_external", self.save_weights_external, methods=["POST"]),
            Route("/api/v1/copy_weights", self.copy_weights, methods=["POST"]),
            Route("/api/v1/unload_model", self.unload_model, methods=["POST"]),
            Route("/api/v1/load_weights", self.load_weights, methods=["POST"]),
            Route("/api/v1/weights_info", self.weights_info, methods=["POST"]),
        ]

    async def save_weights(self, request: Request) -> Response:
        """Save a training checkpoint."""
        return await submit(self._services, request, read_save_weights)

    async def save_weights_for_sampler(self, request: Request) -> Response:
        """Save weights for sampling, under a name or as a sampling session."""
        return await submit(self._services, request, read_save_weights_for_sampler)

    async def save_weights_external(self, request: Request) -> Response:
        """Export an adapter as files for use outside."""
        return await submit(self._services, request, read_save_weights_external)

    async def unload_model(self, request: Request) -> Response:
        """Release a model; clients up to 0.26."""
        return await submit(self._services, request, read_unload_model)

    async def copy_weights(self, request: Request) -> Response:
        """Copy a checkpoint that the caller, or the holder of an access token, may read."""
        token, key = request.headers.get(_ACCESS_TOKEN), request.headers.get(_IDEMPOTENCY_KEY)
        wanted = await self._services.read(request, lambda body: read_copy_weights(body, token, key))
        copy = await self._engine.library.copy(wanted, self._services.caller(request))
        return answer({"tinker_path": str(copy.path)})

    async def load_weights(self, request: Request) -> Response:
        """Load a checkpoint into a model, or make a model from it."""
        caller = self._services.caller(request)
        decoded = await self._services.read(request, read_load_weights)
        if isinstance(decoded, LoadWeightsInput):
            decoded = await self._check_settings(decoded, caller.owner)
        return answer(receipt(await accept(self._services, decoded, caller)))

    async def _check_settings(self, load: LoadWeightsInput, owner: str) -> LoadWeightsInput | RejectedRequest:
        """A checkpoint fixes alpha and target modules: metadata that says otherwise must not be ignored."""
        settings = read_adapter_settings(load.user_metadata)
        if settings == AdapterSettings():
            return load
        try:
            _check_same(settings, await self._lora_config_of(load, owner))
        except UserError as error:
            return reject_load(load, error)
        return load

    async def _lora_config_of(self, load: LoadWeightsInput, owner: str) -> LoraConfig:
        return (await self._engine.library.checkpoint(load.path, owner, load.weights_access_token)).lora_config

    async def weights_info(self, request: Request) -> Response:
        """What a checkpoint holds."""
        path = await self._services.read(request, lambda body: read_text(body, "tinker_path"))
        return answer(weights_info_to_json(await self._engine.library.checkpoint(path, self._services.owner(request))))


def _check_same(settings: AdapterSettings, saved: LoraConfig) -> None:
    if settings.alpha is not None and settings.alpha != saved.alpha:
        raise CheckpointMismatchError(
            f"user_metadata[{ALPHA_KEY!r}] is {settings.alpha}, but the checkpoint was trained with {saved.alpha}; "
            "leave it out"
        )
    if settings.target_modules is not None and settings.target_modules != saved.target_modules:
        raise CheckpointMismatchError(
            f"user_metadata[{TARGETS_KEY!r}] differs from the checkpoint's own target modules; leave it out"
        )
