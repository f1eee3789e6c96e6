"""Services of plugins: built with the app, started and ended with it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from datetime import datetime

import attrs
from starlette.requests import Request
from starlette.routing import BaseRoute

from tinker_core.engine import Engine
from tinker_core.engine.clock import Clock
from tinker_core.errors import PluginError
from tinker_core.extensions import IssuedKey, Service, ServiceContext, ServicePlugin
from tinker_core.interfaces import OptionValue
from tinker_core.plugins import Plugins
from tinker_core.storage.database import Database
from tinker_core.types import BaseModelSpec, CheckpointRecord, ModelMetadata
from tinker_server.auth import caller_of
from tinker_server.services import Services


@attrs.frozen(kw_only=True)
class HostingServer:
    """What a service may know and do of the server around it: `tinker_core.extensions.RunningServer`."""

    url: str | None
    server_id: str
    engine: Engine

    @property
    def database(self) -> Database:
        """The control database."""
        return self.engine.database

    @property
    def clock(self) -> Clock:
        """The engine's time."""
        return self.engine.clock

    @property
    def base_models(self) -> tuple[BaseModelSpec, ...]:
        """The base models that are served, ready or not."""
        return self.engine.config.base_models

    def ready_models(self) -> tuple[ModelMetadata, ...]:
        """Those that are ready."""
        return self.engine.supported_models()

    async def wait_ready(self) -> None:
        """Return when all base models can work."""
        await self.engine.wait_ready()

    async def find_checkpoint(self, path: str, owner: str) -> CheckpointRecord:
        """A checkpoint that an owner may read; raises `UnknownCheckpointError`."""
        return await self.engine.library.checkpoint(path, owner)

    async def issue_key(self, key_id: str | None, name: str, expires_at: datetime) -> IssuedKey | None:
        """A key that acts for the holder of another one; None where no key is needed."""
        return await self.engine.accounts.keys.issue(key_id, name, expires_at)

    async def extend_key(self, key_id: str, expires_at: datetime) -> None:
        """Let a key expire at another time."""
        await self.engine.accounts.keys.extend(key_id, expires_at)

    async def revoke_key(self, key_id: str) -> None:
        """Make a key useless at once."""
        await self.engine.accounts.keys.revoke(key_id)

    async def check_key(self, key_id: str) -> None:
        """Raise `AuthenticationError` when a key opens nothing any more."""
        await self.engine.accounts.keys.caller_with_key_id(key_id)


class Extensions:
    """The services of all plugins."""

    def __init__(self, plugins: Plugins, services: Services, own_url: str | None) -> None:
        self._engine = services.engine
        self._own_url = own_url
        self._services = [_build(plugin, plugins, services) for _, plugin in sorted(plugins.services().items())]

    def routes(self) -> Sequence[BaseRoute]:
        """The routes of all services; raises `PluginError` for what is none."""
        found = [route for service in self._services for route in service.routes()]
        for route in found:
            if not isinstance(route, BaseRoute):
                raise PluginError(f"a service offers {route!r} as a route; offer Starlette Route or Mount objects")
        return found

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The services run for the length of a block."""
        async with contextlib.AsyncExitStack() as stack:
            for service in self._services:
                server_id = self._engine.database.server_id
                assert server_id is not None
                stack.push_async_callback(service.close)
                await service.start(HostingServer(url=self._own_url, server_id=server_id, engine=self._engine))
            yield


def _build(plugin: ServicePlugin, plugins: Plugins, services: Services) -> Service:
    config = services.engine.config
    options: dict[str, OptionValue] = {option.name: option.default for option in plugin.options}

    async def read_body(request: Request) -> bytes:
        return await services.read(request, lambda body: body.plain())

    return plugin.build(
        ServiceContext(
            data_dir=config.data_dir,
            plugins=plugins,
            caller_of=caller_of,
            read_body=read_body,
            until_stopping=services.gate.wait,
            options={name: config.options.get(name, default) for name, default in options.items()},
        )
    )
