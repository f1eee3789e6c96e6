"""Running the app: socket, uvicorn, the ready line, and a shutdown that ends long polls at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import uvicorn
import uvloop

from tinker_core.engine import Engine, EngineConfig
from tinker_core.errors import ConfigurationError, TinkerError
from tinker_core.plugins import Plugins
from tinker_core.storage import ControlStore, database_url
from tinker_server.app import create_app
from tinker_server.config import ServerConfig, is_loopback
from tinker_server.limits import Limits
from tinker_server.protocol import RefusalFilter, make_protocol
from tinker_server.services import PollGate

_LOGGER = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 120
"""Longer than any pause between two polls of a client, so that its connections live on."""
DRAIN_SECONDS = 10
"""How long answers in progress may take after the signal to stop."""
WANTED_FILES = 65536
"""One client may hold thousands of long polls open, each with a connection of its own."""
FEW_FILES = 4096
OWN_FILES = 512
"""Files that the server itself may have open; connections must leave them."""


def serve(config: ServerConfig, engine_config: EngineConfig, plugins: Plugins) -> int:
    """Serve until a signal stops it; the exit status. 0 is a clean stop, 1 a model that did not start."""
    logging.getLogger("uvicorn.access").setLevel(logging.INFO if config.access_log else logging.WARNING)
    raise_file_limit()
    logging.getLogger("uvicorn.error").addFilter(RefusalFilter())
    if not is_loopback(config.host):
        require_keys(engine_config.data_dir, config.host)
    listener = open_socket(config.host, config.port)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, engine_config, plugins, listener))
    finally:
        listener.close()


def require_keys(data_dir: Path, host: str) -> None:
    """Refuse, with `ConfigurationError`, to serve other machines before there is a key to demand of them.

    Keys are revoked but never removed, so a server that has begun to demand them goes on.
    """
    if not data_dir.is_dir() or not asyncio.run(_has_keys(data_dir)):
        raise ConfigurationError(
            f"--host {host} would let everyone who reaches this machine use it, for there are no API keys yet; "
            f"make one with 'tinker-server keys create --data-dir {data_dir} --owner NAME', or keep --host 127.0.0.1"
        )


async def _has_keys(data_dir: Path) -> bool:
    control = await ControlStore.open(database_url(data_dir))
    try:
        return bool(await control.keys.list())
    finally:
        await control.close()


async def _serve(config: ServerConfig, engine_config: EngineConfig, plugins: Plugins, listener: socket.socket) -> int:
    engine = Engine(engine_config, plugins)
    limits = within_file_limit(config.limits())
    app = create_app(
        engine,
        plugins=plugins,
        limits=limits,
        public_url=config.public_url,
        prices=config.prices(),
        jwt_auth=config.jwt_auth,
        flags=config.flags(),
    )
    server = TinkerUvicorn(
        uvicorn.Config(
            app,
            http=make_protocol(limits),
            limit_concurrency=limits.max_connections + 1,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=config.access_log,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            server_header=False,
        ),
        engine=engine,
        gate=app.state.gate,
        ready_line=f"tinker-server ready on {url_of(listener)} "
        f"(models: {', '.join(model.name for model in config.base_models)})",
    )
    await server.serve(sockets=[listener])
    return server.exit_status


class TinkerUvicorn(uvicorn.Server):
    """A uvicorn server that says when the engine is ready and stops when it cannot become so."""

    def __init__(self, config: uvicorn.Config, *, engine: Engine, gate: PollGate, ready_line: str) -> None:
        super().__init__(config)
        self.exit_status = 0
        self._engine = engine
        self._gate = gate
        self._ready_line = ready_line
        self._announcement: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start serving, then wait for the engine in the background."""
        await super().startup(sockets)
        self._announcement = asyncio.create_task(self._announce())

    async def _announce(self) -> None:
        try:
            await self._engine.wait_ready()
        except TinkerError as error:
            self._fail(str(error))
            return
        except Exception as error:
            _LOGGER.exception("the engine did not start")
            self._fail(f"the engine did not start: {type(error).__name__}: {error}")
            return
        sys.stderr.write(f"{self._ready_line}\n")
        sys.stderr.flush()

    def _fail(self, reason: str) -> None:
        sys.stderr.write(f"tinker-server: {reason}\n")
        self.exit_status = 1
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End long polls, drain, stop the engine."""
        self._gate.close()
        await super().shutdown(sockets)
        if self._announcement is not None:
            self._announcement.cancel()
            await asyncio.wait([self._announcement])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGINT and SIGTERM, and end with an exit status of our own instead of the signal's."""
        loop = asyncio.get_running_loop()
        handled = (signal.SIGINT, signal.SIGTERM)
        for number in handled:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket; raises `ConfigurationError` when the address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --host or --port"
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The base URL for clients."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def within_file_limit(limits: Limits) -> Limits:
    """The limits, with no more connections than this process may have files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or limits.max_connections <= soft - OWN_FILES:
        return limits
    fewer = max(soft - OWN_FILES, soft // 2)
    _LOGGER.warning("at most %d connections, not %d: no more files may be open", fewer, limits.max_connections)
    return attrs.evolve(limits, max_connections=fewer)


def raise_file_limit() -> None:
    """Allow as many open files as the system lets this process have, and warn when that is few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        _LOGGER.warning(
            "only %d files may be open at once; clients with many samples in flight need more (ulimit -n %d)",
            soft,
            WANTED_FILES,
        )
