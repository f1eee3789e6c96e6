"""Sessions as records: listings, search, and the project that they are in."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinker_server.services import Services, answer, page_of, wants_accessible
from tinker_server.tokens import urn_of
from tinker_server.wire.records import metadata_to_json, search_cursor_to_json, session_to_json
from tinker_server.wire.searching import read_search
from tinker_server.wire.sessions import read_text


class SessionRoutes:
    """What users look up about their sessions. No session is ever accessible to anybody but its owner."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._engine = services.engine

    def routes(self) -> list[BaseRoute]:
        """All routes of this noun."""
        return [
            Route("/api/v1/sessions", self.sessions, methods=["GET"]),
            Route("/api/v1/sessions/search", self.search, methods=["POST"]),
            Route("/api/v1/sessions/{session_id}", self.session, methods=["GET"]),
            Route("/api/v1/sessions/{session_id}/project", self.assign_project, methods=["PUT"]),
        ]

    async def sessions(self, request: Request) -> Response:
        """A page of session ids."""
        wants_accessible(request)
        limit, offset = page_of(request, 20)
        found, _ = await self._engine.sessions(self._services.owner(request), limit, offset)
        return answer({"sessions": [session.session_id for session in found]})

    async def session(self, request: Request) -> Response:
        """What was made in a session."""
        wants_accessible(request)
        owner = self._services.owner(request)
        session = await self._engine.session(request.path_params["session_id"], owner)
        contents = await self._engine.session_contents(session.session_id, owner)
        return answer(
            {
                "training_run_ids": list(contents.training_run_ids),
                "sampler_ids": list(contents.sampler_ids),
                "user_metadata": metadata_to_json(session.user_metadata),
                "display_name": session.display_name,
            }
        )

    async def search(self, request: Request) -> Response:
        """A page of the sessions that match."""
        wanted = await self._services.read(request, read_search)
        owner = self._services.owner(request)
        if wanted.owner_urns is not None and not {owner, urn_of(owner)} & set(wanted.owner_urns):
            return answer({"sessions": [], "next_cursor": None})
        found, more = await self._engine.catalogue.search(owner, wanted.search)
        cursor = search_cursor_to_json(found[-1]) if more else None
        return answer({"sessions": [session_to_json(summary) for summary in found], "next_cursor": cursor})

    async def assign_project(self, request: Request) -> Response:
        """Move a session, with all that belongs to it, into a project."""
        project_id = await self._services.read(request, lambda body: read_text(body, "project_id"))
        caller = self._services.caller(request)
        await self._engine.catalogue.assign_project(request.path_params["session_id"], project_id, caller)
        return answer({})
