"""Running the app: socket, uvicorn, the ready line, and a shutdown that ends long polls at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator

import attrs
import uvicorn
import uvloop

from tinker_core.engine import Engine, EngineConfig
from tinker_core.errors import ConfigurationError, TinkerError
from tinker_core.plugins import Plugins
from tinker_core.storage import ControlStore, database_url
from tinker_server.app import create_app
from tinker_server.config import ServerConfig, is_loopback
from tinker_server.life import ServerLife
from tinker_server.limits import Limits
from tinker_server.protocol import RefusalFilter, make_protocol
from tinker_server.services import PollGate
from tinker_server.supervision import Supervision

_LOGGER = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 120
"""Longer than any pause between two polls of a client, so that its connections live on."""
DRAIN_SECONDS = 10
"""How long answers in progress may take after the signal to stop."""
BACKLOG = 8192
"""Connections that wait to be accepted; the system may allow fewer. Many clients open hundreds at a time."""
WANTED_FILES = 65536
"""One client may hold thousands of long polls open, each with a connection of its own."""
FEW_FILES = 4096
OWN_FILES = 512
"""Files that the server itself may have open; connections must leave them."""


def serve(config: ServerConfig, engine_config: EngineConfig, plugins: Plugins, supervision: Supervision) -> int:
    """Serve until a signal stops it; the exit status. 0 is a clean stop, 1 a model that did not start."""
    raise_file_limit()
    logging.getLogger("uvicorn.error").addFilter(RefusalFilter())
    if supervision.listener is None and not is_loopback(config.host):
        require_keys(engine_config, config.host)
    listener = supervision.listener or open_socket(config.host, config.port)
    supervision.listening(listener, engine_config.grace_seconds, config.log_format)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, engine_config, plugins, listener, supervision))
    finally:
        listener.close()


def require_keys(config: EngineConfig, host: str) -> None:
    """Refuse, with `ConfigurationError`, to serve other machines before there is a key to demand of them.

    Keys are revoked but never removed, so a server that has begun to demand them goes on.
    """
    url, data_dir = config.database_url, config.data_dir
    known = url is not None or data_dir.is_dir()
    if not known or not asyncio.run(_has_keys(url or database_url(data_dir))):
        where = f"--data-dir {data_dir}" if url is None else "--database-url URL"
        raise ConfigurationError(
            f"--host {host} would let everyone who reaches this machine use it, for there are no API keys yet; "
            f"make one with 'tinker-server keys create {where} --owner NAME', or keep --host 127.0.0.1"
        )


async def _has_keys(url: str) -> bool:
    control = await ControlStore.open(url)
    try:
        return bool(await control.keys.list())
    finally:
        await control.close()


async def _serve(
    config: ServerConfig,
    engine_config: EngineConfig,
    plugins: Plugins,
    listener: socket.socket,
    supervision: Supervision,
) -> int:
    limits = within_file_limit(config.limits())
    life = ServerLife(restarts=supervision.restarts, since=supervision.since)
    stopper = Stopper(supervision)
    stopper.install()
    async with Engine(engine_config, plugins) as engine:
        app = create_app(
            engine,
            plugins=plugins,
            limits=limits,
            public_url=config.public_url,
            prices=config.prices(),
            jwt_auth=config.jwt_auth,
            flags=config.flags(),
            access_log=config.access_log,
            life=life,
            runs_engine=False,
            own_url=own_url_of(listener),
        )
        server = TinkerUvicorn(
            uvicorn.Config(
                app,
                http=make_protocol(limits),
                limit_concurrency=limits.max_connections + 1,
                backlog=BACKLOG,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=round(min(DRAIN_SECONDS, engine_config.grace_seconds)),
                server_header=False,
            ),
            engine=engine,
            gate=app.state.gate,
            announcement=Announcement(config, listener, supervision, life),
        )
        stopper.stops(server)
        await server.serve(sockets=[listener])
        if not server.exit_status:
            await finish_work(engine, engine_config.grace_seconds - server.seconds_since_stop())
        return server.exit_status


async def finish_work(engine: Engine, seconds: float) -> None:
    """Let accepted work go on for so long at most; what is left goes on after the next start."""
    if not await engine.drain(max(0.0, seconds)):
        _LOGGER.warning("accepted work is left after the grace period; it goes on after the next start")


class Announcement:
    """Tells people and the supervisor that the server has become ready."""

    def __init__(
        self, config: ServerConfig, listener: socket.socket, supervision: Supervision, life: ServerLife
    ) -> None:
        models = ", ".join(model.name for model in config.base_models)
        self._ready_line = f"tinker-server ready on {url_of(listener)} (models: {models})"
        if supervision.restarts:
            self._ready_line = f"tinker-server is back, ready again on {url_of(listener)} (models: {models})"
        self._as_log = config.log_format == "json"
        self._supervision = supervision
        self._life = life

    def accepting(self) -> None:
        """Requests are accepted, though no model may be ready."""
        self._life.note_accepting()
        self._supervision.accepting()

    def ready(self) -> None:
        """All models are ready."""
        self._life.note_ready()
        self._supervision.ready()
        if self._as_log:
            _LOGGER.info("%s", self._ready_line)
        else:
            sys.stderr.write(f"{self._ready_line}\n")
            sys.stderr.flush()


class Stopper:
    """What SIGTERM and SIGINT do: the first stops the server in order, a second ends it at once.

    Under a supervisor, which counts for itself, further ones mean nothing.
    """

    def __init__(self, supervision: Supervision) -> None:
        self._supervised = supervision.is_supervised
        self._server: TinkerUvicorn | None = None
        self._stopping = False

    def stops(self, server: TinkerUvicorn) -> None:
        """From now on there is a server to stop."""
        self._server = server
        server.should_exit = server.should_exit or self._stopping

    def install(self) -> None:
        """Take the signals of this process, until its event loop ends."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._signal)
        if not self._supervised:
            loop.add_signal_handler(signal.SIGINT, self._signal)

    def _signal(self) -> None:
        if self._stopping and not self._supervised:
            sys.stderr.write("tinker-server: stopping at once; accepted work goes on after the next start\n")
            sys.stderr.flush()
            os._exit(0)  # as after a crash, workers notice that their input ends
        self._stopping = True
        if self._server is not None:
            self._server.should_exit = True


class TinkerUvicorn(uvicorn.Server):
    """A uvicorn server that says when the engine is ready and stops when it cannot become so."""

    def __init__(self, config: uvicorn.Config, *, engine: Engine, gate: PollGate, announcement: Announcement) -> None:
        super().__init__(config)
        self.exit_status = 0
        self._engine = engine
        self._gate = gate
        self._announcement = announcement
        self._watches: list[asyncio.Task[None]] = []
        self._stopped_at: float | None = None

    def seconds_since_stop(self) -> float:
        """How long ago it began to stop."""
        return 0.0 if self._stopped_at is None else time.monotonic() - self._stopped_at

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start serving, then wait for the engine in the background."""
        await super().startup(sockets)
        self._announcement.accepting()
        self._watches = [asyncio.create_task(self._wait_ready()), asyncio.create_task(self._wait_failed())]

    async def _wait_ready(self) -> None:
        try:
            await self._engine.wait_ready()
        except TinkerError as error:
            self._fail(str(error))
        except Exception as error:
            _LOGGER.exception("the engine did not start")
            self._fail(f"the engine did not start: {type(error).__name__}: {error}")
        else:
            self._announcement.ready()

    async def _wait_failed(self) -> None:
        self._fail(str(await self._engine.wait_failed()))

    def _fail(self, reason: str) -> None:
        sys.stderr.write(f"tinker-server: {reason}\n")
        self.exit_status = 1
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new connections, end long polls, and finish the answers in progress; the engine works on."""
        self._stopped_at = time.monotonic()
        _LOGGER.info("stopping; what was accepted may go on for the grace period")
        self._gate.close()
        await super().shutdown(sockets)
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the `Stopper`, which was there before and stays longer."""
        yield


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


def own_url_of(listener: socket.socket) -> str:
    """The base URL for programs of this machine, also where the server listens on every address."""
    host, port = listener.getsockname()[:2]
    return {"0.0.0.0": f"http://127.0.0.1:{port}", "::": f"http://[::1]:{port}"}.get(host, url_of(listener))


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
