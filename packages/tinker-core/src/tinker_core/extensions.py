"""What plugins add to a server besides models: services with routes of their own, and commands of ``tinker-server``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from tinker_core.interfaces import Option, OptionValue
from tinker_core.types import BaseModelSpec, Caller, CheckpointRecord, ModelMetadata

if TYPE_CHECKING:
    import argparse

    from tinker_core.engine.clock import Clock
    from tinker_core.plugins import Plugins
    from tinker_core.storage.database import Database


class Service(Protocol):
    """A part of a server that lives as long as the server does."""

    def routes(self) -> Sequence[Any]:
        """Starlette routes. Unlike those of ``tinker_register_routes`` they may lie inside ``/api/v1``: they are tried
        after the API's own, so they can shadow none of them."""

    async def start(self, server: RunningServer) -> None:
        """Begin; the control database is open, no request has arrived, models may still be starting.

        Raises `ConfigurationError` for settings that cannot work; the server then does not start.
        """

    async def close(self) -> None:
        """End, leaving what can go on after the next start; called before the engine closes, also if `start` failed."""


class RunningServer(Protocol):
    """The server, as a service knows it."""

    @property
    def url(self) -> str | None:
        """Where programs of this machine reach the server; None where nobody told the application."""

    @property
    def database(self) -> Database:
        """The control database, for tables of one's own; `tinker_core.storage.schema.Schema` migrates them."""

    @property
    def clock(self) -> Clock:
        """The engine's time."""

    @property
    def server_id(self) -> str:
        """This server's name in a control database that several share."""

    @property
    def base_models(self) -> tuple[BaseModelSpec, ...]:
        """The base models that are served, ready or not."""

    def ready_models(self) -> tuple[ModelMetadata, ...]:
        """Those that are ready, as clients see them."""

    async def wait_ready(self) -> None:
        """Return when all base models can work."""

    async def find_checkpoint(self, path: str, owner: str) -> CheckpointRecord:
        """A checkpoint that an owner may read; raises `UnknownCheckpointError`."""

    async def issue_key(self, key_id: str | None, name: str, expires_at: datetime) -> IssuedKey | None:
        """A key with owner and limits of another one, to act for whoever holds that.

        ``key_id`` is the other's; None is the caller of a server without keys, for whom no key is needed and None is
        the answer. Raises `AuthenticationError` when that key opens nothing any more.
        """

    async def extend_key(self, key_id: str, expires_at: datetime) -> None:
        """Let a key expire at another time; raises `UnknownKeyError`."""

    async def revoke_key(self, key_id: str) -> None:
        """Make a key useless at once; raises `UnknownKeyError`."""

    async def check_key(self, key_id: str) -> None:
        """Raise `AuthenticationError` when a key opens nothing any more."""


@attrs.frozen(kw_only=True)
class IssuedKey:
    """A new API key, which is shown this once."""

    key: str = attrs.field(repr=False)
    key_id: str


@attrs.frozen(kw_only=True)
class ServiceContext:
    """What a service is built with, before anything runs."""

    data_dir: Path
    plugins: Plugins
    caller_of: Callable[[Any], Caller]
    """Who sent a Starlette request."""
    read_body: Callable[[Any], Awaitable[bytes]]
    """Async: the whole body of a Starlette request, within the server's limits of control bodies, size and time."""
    until_stopping: Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]
    """Async: what something that is waited for results in, or None once the server begins to stop. An answer that
    lasts waits by this, for the server closes only after its connections."""
    options: Mapping[str, OptionValue] = attrs.field(factory=dict)
    """The plugin's own `Option` values by name."""


@attrs.frozen(kw_only=True)
class ServicePlugin:
    """A service of a server."""

    name: str
    build: Callable[[ServiceContext], Service]
    options: tuple[Option, ...] = ()
    """Settings, each a flag of ``tinker-server``."""


@attrs.frozen(kw_only=True)
class CommandPlugin:
    """A command of ``tinker-server``: ``tinker-server NAME …``."""

    name: str
    help: str
    """One line, without a full stop."""
    run: Callable[[Sequence[str]], int]
    """Takes the arguments after the name and returns the exit status. A `TinkerError` becomes one line of text."""
    make_parser: Callable[[], argparse.ArgumentParser]
    """What the arguments are, for the reference."""
