"""What a client calls before and around its real work: configuration, sessions, health."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinker_core.engine import NewSession
from tinker_core.errors import SessionFinishedError
from tinker_core.logs import note_in_log
from tinker_server.errors import detail
from tinker_server.services import Services, answer
from tinker_server.wire.records import model_to_json
from tinker_server.wire.sessions import read_client_config, read_create_session, read_finish, read_text


class BootstrapRoutes:
    """Configuration, sessions, telemetry, health and capabilities."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._engine = services.engine

    def routes(self) -> list[BaseRoute]:
        """All routes of this noun."""
        return [
            Route("/api/v1/client/config", self.client_config, methods=["POST"]),
            Route("/api/v1/client/dynamic_config", self.client_dynamic_config, methods=["POST"]),
            Route("/api/v1/create_session", self.create_session, methods=["POST"]),
            Route("/api/v1/session_heartbeat", self.heartbeat, methods=["POST"]),
            Route("/api/v1/sessions/{session_id}/finish", self.finish, methods=["POST"]),
            Route("/api/v1/telemetry", self.telemetry, methods=["POST"]),
            Route("/api/v1/get_server_capabilities", self.capabilities, methods=["GET"]),
            Route("/api/v1/healthz", self.health, methods=["GET"]),
            Route("/healthz", self.health, methods=["GET"]),
            Route("/api/v1/readyz", self.ready, methods=["GET"]),
            Route("/readyz", self.ready, methods=["GET"]),
        ]

    async def client_config(self, request: Request) -> Response:
        """How clients are to use this server; fetched once by each."""
        sdk_version = await self._services.read(request, read_client_config)
        flags = self._services.flags
        runs_losses = self._engine.offers_custom_losses()
        return answer(flags.config(sdk_version, issues_tokens=self._services.jwt_auth, runs_losses=runs_losses))

    async def client_dynamic_config(self, request: Request) -> Response:
        """The part that living clients fetch again now and then."""
        await self._services.read(request, read_client_config)
        return answer(self._services.flags.dynamic_config())

    async def create_session(self, request: Request) -> Response:
        """Open a session."""
        owner = self._services.owner(request)
        wanted = await self._services.read(request, read_create_session)
        session = await self._engine.create_session(
            NewSession(
                owner=owner,
                tags=wanted.tags,
                user_metadata=wanted.user_metadata,
                sdk_version=wanted.sdk_version,
                project_id=wanted.project_id,
                display_name=wanted.display_name,
            )
        )
        note_in_log(session_id=session.session_id)
        return answer({"type": "create_session", "session_id": session.session_id})

    async def heartbeat(self, request: Request) -> Response:
        """Note that a session's client is alive; 410 tells it to stop."""
        session_id = await self._services.read(request, lambda body: read_text(body, "session_id"))
        try:
            await self._engine.heartbeat(session_id, self._services.owner(request))
        except SessionFinishedError as error:
            return detail(str(error), 410)
        return answer({"type": "session_heartbeat"})

    async def finish(self, request: Request) -> Response:
        """Finish a session; the first reason given is kept."""
        finish = await self._services.read(request, read_finish)
        owner = self._services.owner(request)
        await self._engine.finish_session(request.path_params["session_id"], finish.reason, finish.detail, owner)
        return answer({})

    async def telemetry(self, request: Request) -> Response:
        """Accept and drop: nothing about a user's work leaves or is kept."""
        await self._services.read(request, lambda _: None)
        return answer({"status": "accepted"})

    async def capabilities(self, request: Request) -> Response:
        """The base models that are served."""
        return answer({"supported_models": [model_to_json(model) for model in self._engine.supported_models()]})

    async def health(self, request: Request) -> Response:
        """The process is alive."""
        return answer({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 once every base model can really train and sample, 503 before."""
        readiness = self._engine.readiness()
        return answer({"ready": readiness.ready, "models": readiness.models}, 200 if readiness.ready else 503)
