"""What was used and what was done: the billing endpoints and the audit log."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tinker_core.engine.audit import CATEGORIES
from tinker_core.errors import InvalidRequestError
from tinker_core.types import session_of_run
from tinker_server.services import Services, answer
from tinker_server.wire.billing import HOUR, project_of_checkpoint, storage_to_json, usage_events_to_json
from tinker_server.wire.records import audit_entry_to_json

LONGEST_WINDOW = timedelta(days=14)


class BillingRoutes:
    """Usage by hour, storage as it is now, and the audit log, all of the caller's own."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._engine = services.engine

    def routes(self) -> list[BaseRoute]:
        """All routes of this noun."""
        return [
            Route("/api/v1/billing/usage/events", self.events, methods=["GET"]),
            Route("/api/v1/billing/usage/checkpoints/current", self.storage, methods=["GET"]),
            Route("/api/v1/audit", self.audit, methods=["GET"]),
        ]

    async def events(self, request: Request) -> Response:
        """Usage by hour."""
        owner, accounts = self._services.owner(request), self._engine.accounts
        starting_on, ending_before = _hour_of(request, "starting_on"), _hour_of(request, "ending_before")
        if not starting_on < ending_before <= starting_on + LONGEST_WINDOW:
            raise InvalidRequestError("ending_before must lie after starting_on, and at most 14 days after it")
        records = await accounts.used(owner, starting_on, ending_before)
        sessions = await accounts.sessions({record.session_id for record in records if record.session_id is not None})
        return answer(usage_events_to_json(records, sessions, owner, starting_on, ending_before, self._services.prices))

    async def storage(self, request: Request) -> Response:
        """Checkpoints that exist now, of one project if it is named."""
        owner, accounts = self._services.owner(request), self._engine.accounts
        project_id = request.query_params.get("project_id")
        checkpoints = await accounts.stored(owner)
        made_in = {session_of_run(checkpoint.path.run_id) for checkpoint in checkpoints}
        sessions = await accounts.sessions({session_id for session_id in made_in if session_id is not None})
        if project_id is not None:
            checkpoints = [found for found in checkpoints if project_of_checkpoint(found, sessions) == project_id]
        return answer(storage_to_json(checkpoints, sessions, owner, self._services.prices))

    async def audit(self, request: Request) -> Response:
        """One day's entries, today's without a day."""
        event_type = request.query_params.get("event_type", "all")
        if event_type not in ("all", *CATEGORIES):
            raise InvalidRequestError(f"event_type must be one of all, {', '.join(CATEGORIES)}, got {event_type!r}")
        day = _day_of(request, self._engine.now().date())
        category = None if event_type == "all" else event_type
        owner = self._services.owner(request)
        entries = await self._engine.accounts.audit.entries(owner, day, day + timedelta(days=1), category)
        return answer({"entries": [audit_entry_to_json(entry) for entry in entries]})


def _hour_of(request: Request, name: str) -> datetime:
    text = request.query_params.get(name)
    if text is None:
        raise InvalidRequestError(f"{name} is required, for example 2026-01-31T09:00:00Z")
    try:
        moment = datetime.fromisoformat(text)
        moment = moment.astimezone(UTC) if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        moment + LONGEST_WINDOW + HOUR
    except (ValueError, OverflowError) as error:
        raise InvalidRequestError(f"{name} must be a time such as 2026-01-31T09:00:00Z, got {text!r}") from error
    if moment != moment.replace(minute=0, second=0, microsecond=0):
        raise InvalidRequestError(f"{name} must be the beginning of an hour in UTC, got {text!r}")
    return moment


def _day_of(request: Request, default: date) -> datetime:
    text = request.query_params.get("day")
    try:
        day = default if text is None else date.fromisoformat(text)
        midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
        midnight + timedelta(days=1)
    except (ValueError, OverflowError) as error:
        raise InvalidRequestError(f"day must be a date such as 2026-01-31, got {text!r}") from error
    return midnight
