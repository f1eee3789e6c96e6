"""Services and commands of plugins, hosted by a real server."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tests.server.conftest import Api, open_api
from tests.server.tenants import make_key
from tinker_core import Plugins, hookimpl
from tinker_core.engine import Engine, EngineConfig
from tinker_core.errors import AuthenticationError, ConfigurationError, PluginError
from tinker_core.extensions import CommandPlugin, RunningServer, ServiceContext, ServicePlugin
from tinker_core.interfaces import Option
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.types import BaseModelSpec
from tinker_server.app import create_app
from tinker_server.arguments import parse_arguments
from tinker_server.cli import main


class Notes:
    """A service: keeps what it is sent, and remembers what happened to it."""

    def __init__(self, context: ServiceContext) -> None:
        self.context = context
        self.server: RunningServer | None = None
        self.life: list[str] = []
        self.refusal: str | None = None
        self.more: list[Any] = []

    def routes(self) -> Sequence[Any]:
        return [
            Route("/api/v1/org/notes", self._notes, methods=["POST"]),
            Route("/api/v1/healthz", self._shadow, methods=["GET"]),
            *self.more,
        ]

    async def _notes(self, request: Request) -> Response:
        body = await self.context.read_body(request)
        return JSONResponse({"owner": self.context.caller_of(request).owner, "body": body.decode()})

    async def _shadow(self, request: Request) -> Response:
        del request
        return PlainTextResponse("not the server's own")

    async def start(self, server: RunningServer) -> None:
        self.server = server
        self.life.append("started")
        if self.refusal is not None:
            raise ConfigurationError(self.refusal)
        await server.database.write(lambda connection: connection.execute(sa.text("CREATE TABLE notes (body TEXT)")))

    async def close(self) -> None:
        self.life.append("closed")


class NotesPlugin:
    """Registers the service, and a command."""

    def __init__(self) -> None:
        self.built: list[Notes] = []
        self.prepare: Callable[[Notes], None] = lambda notes: None
        self.ran: list[list[str]] = []

    def _build(self, context: ServiceContext) -> Notes:
        self.built.append(Notes(context))
        self.prepare(self.built[-1])
        return self.built[-1]

    @hookimpl
    def tinker_register_service(self, register: Callable[[ServicePlugin], None]) -> None:
        options = (Option(name="notes-limit", type=int, default=7, help="notes that are kept"),)
        register(ServicePlugin(name="notes", build=self._build, options=options))

    @hookimpl
    def tinker_register_command(self, register: Callable[[CommandPlugin], None]) -> None:
        register(CommandPlugin(name="notes", help="look at notes", run=self._run, make_parser=argparse.ArgumentParser))

    def _run(self, arguments: Sequence[str]) -> int:
        self.ran.append(list(arguments))
        if "--fail" in arguments:
            raise ConfigurationError("there are no notes; write one")
        return 5


def make_app(data_dir: Path, plugin: NotesPlugin, own_url: str | None = "http://here") -> Any:
    plugins = Plugins.load("core", FAKE_PLUGIN)
    plugins.register(plugin, "notes")
    config = EngineConfig(
        base_models=(BaseModelSpec(name="tiny", path="tiny"),),
        data_dir=data_dir,
        backend="fake",
        sampler="fake",
        plugins=(FAKE_PLUGIN,),
    )
    return create_app(Engine(config, plugins), plugins=plugins, own_url=own_url)


@pytest.fixture
def plugin() -> NotesPlugin:
    return NotesPlugin()


def serve(data_dir: Path, plugin: NotesPlugin) -> Any:
    return open_api(data_dir, sampler=None, more_plugins={"notes": plugin}, own_url="http://here")


def test_a_service_answers_inside_the_api_but_shadows_nothing_of_it(tmp_path: Path, plugin: NotesPlugin) -> None:
    with serve(tmp_path, plugin) as api:
        answer = api.post("org/notes", {"text": "x"})
        assert answer.json() == {"owner": "local", "body": '{"text": "x"}'}
        assert api.get("healthz").json() == {"status": "ok"}
        assert api.get("org/other").status_code == 404


def test_bodies_for_a_service_have_the_limit_of_control_bodies(tmp_path: Path, plugin: NotesPlugin) -> None:
    with serve(tmp_path, plugin) as api:
        answer = api.post("org/notes", "x" * (8 * 1024 * 1024))
        assert answer.status_code == 413


def test_a_service_lives_as_long_as_the_server(tmp_path: Path, plugin: NotesPlugin) -> None:
    with serve(tmp_path, plugin) as api:
        notes = plugin.built[0]
        assert notes.life == ["started"]
        assert notes.server is not None
        assert notes.server.url == "http://here"
        assert notes.context.data_dir == tmp_path
        assert notes.context.options == {"notes-limit": 7}
        assert [model.name for model in notes.server.base_models] == ["tiny"]
        assert isinstance(api, Api)
    assert notes.life == ["started", "closed"]


def test_a_service_that_cannot_start_keeps_the_server_from_starting(tmp_path: Path, plugin: NotesPlugin) -> None:
    def refuse(notes: Notes) -> None:
        notes.refusal = "notes need a pen; buy one"

    plugin.prepare = refuse
    app = make_app(tmp_path, plugin)

    async def start() -> None:
        async with app.router.lifespan_context(app):
            pytest.fail("it started")

    with pytest.raises(ConfigurationError, match="buy one"):
        asyncio.run(start())
    assert plugin.built[0].life == ["started", "closed"]


def test_what_is_no_route_is_refused(tmp_path: Path, plugin: NotesPlugin) -> None:
    plugin.prepare = lambda notes: notes.more.append("/api/v1/text")
    with pytest.raises(PluginError, match="Starlette Route"):
        make_app(tmp_path, plugin)


def test_a_service_acts_for_the_holder_of_a_key_with_one_that_expires(tmp_path: Path, plugin: NotesPlugin) -> None:
    key, key_id = make_key(tmp_path, "ada")
    app = make_app(tmp_path, plugin)

    async def use() -> None:
        async with app.router.lifespan_context(app):
            server = plugin.built[0].server
            assert server is not None
            keys = app_engine_keys(server)
            soon = server.clock.now() + timedelta(hours=1)
            issued = await server.issue_key(key_id, "job 1", soon)
            assert issued is not None
            assert issued.key != key
            assert (await keys.caller_with_key(issued.key)).owner == "ada"
            await server.extend_key(issued.key_id, server.clock.now() - timedelta(seconds=1))
            with pytest.raises(AuthenticationError, match="expired"):
                await server.issue_key(issued.key_id, "job 2", soon)
            await server.extend_key(issued.key_id, soon)
            await server.check_key(issued.key_id)
            await server.revoke_key(issued.key_id)
            with pytest.raises(AuthenticationError, match="revoked"):
                await server.check_key(issued.key_id)
            assert await server.issue_key(None, "job 3", soon) is None

    asyncio.run(use())


def app_engine_keys(server: Any) -> Any:
    return server.engine.accounts.keys


def test_options_of_a_service_are_flags_of_the_server(plugin: NotesPlugin) -> None:
    plugins = Plugins.load("core", FAKE_PLUGIN)
    plugins.register(plugin, "notes")
    flags = ["--base-model", "tiny=org/tiny", "--backend", "fake", "--sampler", "fake"]
    assert parse_arguments(flags, plugins).options["notes-limit"] == 7
    assert parse_arguments([*flags, "--notes-limit", "3"], plugins).options["notes-limit"] == 3


def test_a_command_of_a_plugin_is_run_with_its_arguments(
    plugin: NotesPlugin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plugins = Plugins.load("core")
    plugins.register(plugin, "notes")
    monkeypatch.setattr(Plugins, "load", lambda *names: plugins)
    assert main(["notes", "list", "--all"]) == 5
    assert plugin.ran == [["list", "--all"]]
    assert main(["notes", "--fail"]) == 2
    assert "tinker-server: there are no notes; write one" in capsys.readouterr().err
    assert main(["nots"]) == 2
    assert (
        "'nots' is not a command of tinker-server; commands: database, doctor, keys, notes" in capsys.readouterr().err
    )
