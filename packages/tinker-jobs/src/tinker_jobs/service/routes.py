"""HTTP: what clients of training jobs call, under the organization and the workspace of the server's settings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from tinker_core.errors import InvalidRequestError
from tinker_core.extensions import RunningServer, ServiceContext
from tinker_core.types import Caller
from tinker_jobs.errors import JobRequestError, JobStateError, Mistake, UnknownJobError
from tinker_jobs.library.library import Library
from tinker_jobs.records import JobRecord
from tinker_jobs.requests import CreateJobRequest, parse
from tinker_jobs.service.answers import answer, describe_context, describe_job, describe_line
from tinker_jobs.service.catalog import browse
from tinker_jobs.service.checks import check_submission
from tinker_jobs.service.files import send_file
from tinker_jobs.service.jobs import Jobs
from tinker_jobs.service.queries import CatalogQuery, JobsQuery, LogsQuery, ProgressUpdate, read_progress
from tinker_jobs.service.refusals import Endpoint, read_json, read_query, refusing
from tinker_jobs.service.streaming import EVENT_STREAM, HEADERS, Following, last_event
from tinker_jobs.service.tenancy import DEFAULT_PROJECT, Tenancy

_API = "/api/v1"
_ORGANIZATION = f"{_API}/org/{{organization}}"
_WORKSPACE = f"{_ORGANIZATION}/ws/{{workspace}}"
_JOBS = f"{_WORKSPACE}/training/jobs"
_JOB = f"{_JOBS}/{{job_id}}"
_MAX_ID = 64


class JobRoutes:
    """The API of training jobs, and what their clients ask about the server before they begin."""

    def __init__(
        self,
        context: ServiceContext,
        library: Library,
        jobs: Callable[[], Jobs],
        server: Callable[[], RunningServer],
    ) -> None:
        """Raises `ConfigurationError` for names of organization or workspace that clients would refuse."""
        self._context = context
        self._library = library
        self._jobs = jobs
        self._server = server
        self._tenancy = Tenancy.of(context.options)

    def routes(self) -> Sequence[BaseRoute]:
        """All routes."""
        return [
            _route("POST", _JOBS, self._create),
            _route("GET", _JOBS, self._list),
            _route("GET", _JOB, self._get),
            _route("POST", f"{_JOB}/cancel", self._cancel),
            _route("POST", f"{_JOB}/retry", self._retry),
            _route("GET", f"{_JOB}/logs", self._logs),
            _route("GET", f"{_JOB}/logs/stream", self._stream),
            _route("GET", f"{_JOB}/artifacts", self._artifacts),
            _route("GET", f"{_JOB}/files/{{name}}", self._file),
            _route("GET", f"{_JOB}/rl-context", self._context_of),
            _route("POST", f"{_JOB}/progress", self._progress),
            _route("GET", f"{_API}/training/catalog", self._catalog),
            _route("GET", f"{_API}/user", self._user),
            _route("GET", _ORGANIZATION, self._organization),
            _route("GET", f"{_ORGANIZATION}/ws", self._workspaces),
            _route("GET", _WORKSPACE, self._workspace),
            _route("GET", f"{_WORKSPACE}/projects", self._projects),
            _route("GET", f"{_WORKSPACE}/projects/{{project}}", self._project),
        ]

    # --- jobs ---------------------------------------------------------------------------------------------------------

    async def _create(self, request: Request) -> Response:
        caller = self._enter(request)
        wanted = await asyncio.to_thread(_parse, await self._context.read_body(request))
        accepted = await check_submission(
            wanted, caller, server=self._server(), plugins=self._context.plugins, library=self._library
        )
        record = await self._jobs().submit(wanted, accepted.refs, accepted.base_model, caller)
        return self._answer(record, 201)

    async def _list(self, request: Request) -> Response:
        caller = self._enter(request)
        query = read_query(JobsQuery, request)
        found, total = await self._jobs().list(caller.owner, **query.model_dump())
        items = [describe_job(record, self._tenancy) for record in found]
        return answer({"items": items, "total": total, "page": query.page, "page_size": query.page_size})

    async def _get(self, request: Request) -> Response:
        return self._answer(await self._find(request))

    async def _cancel(self, request: Request) -> Response:
        caller = self._enter(request)
        return self._answer(await self._jobs().cancel(_job_id(request), caller.owner))

    async def _retry(self, request: Request) -> Response:
        caller = self._enter(request)
        return self._answer(await self._jobs().retry(_job_id(request), caller.owner))

    async def _artifacts(self, request: Request) -> Response:
        return answer({"artifacts": (await self._find(request)).artifacts})

    async def _file(self, request: Request) -> Response:
        record = await self._find(request)
        return await asyncio.to_thread(send_file, self._jobs().directory(record.job_id), request.path_params["name"])

    async def _find(self, request: Request) -> JobRecord:
        caller = self._enter(request)
        return await self._jobs().get(_job_id(request), caller.owner)

    # --- logs ---------------------------------------------------------------------------------------------------------

    async def _logs(self, request: Request) -> Response:
        caller = self._enter(request)
        after = read_query(LogsQuery, request).after
        lines = await self._jobs().logs(_job_id(request), caller.owner, after)
        return answer({"items": [describe_line(line) for line in lines]})

    async def _stream(self, request: Request) -> Response:
        record = await self._find(request)
        after = last_event(request.headers, read_query(LogsQuery, request).after)
        if request.method == "HEAD":  # which would wait for the job and send nothing
            return Response(media_type=EVENT_STREAM, headers=HEADERS)
        if record.server_id != self._server().server_id and not record.status.is_final:
            raise JobStateError(f"the job runs at another server ({record.server_id}); follow its log there")
        following = Following(
            clock=self._server().clock, tenancy=self._tenancy, until_stopping=self._context.until_stopping
        )
        events = following.events(self._jobs().follow(record.job_id, record.owner, after))
        return StreamingResponse(events, media_type=EVENT_STREAM, headers=HEADERS)

    # --- workers ------------------------------------------------------------------------------------------------------

    async def _context_of(self, request: Request) -> Response:
        return answer(describe_context(await self._find(request)))

    async def _progress(self, request: Request) -> Response:
        caller = self._enter(request)
        update = await asyncio.to_thread(_read_progress, await self._context.read_body(request))
        try:
            record = await self._jobs().apply_progress(_job_id(request), caller.owner, update.event())
        except InvalidRequestError as error:
            raise JobRequestError([Mistake.in_body(str(error), "metrics")]) from error
        return self._answer(record)

    # --- around jobs --------------------------------------------------------------------------------------------------

    async def _catalog(self, request: Request) -> Response:
        return answer(await browse(self._server(), read_query(CatalogQuery, request)))

    async def _user(self, request: Request) -> Response:
        return answer(self._tenancy.describe_user(self._context.caller_of(request).owner))

    async def _organization(self, request: Request) -> Response:
        self._enter(request)
        return answer(self._tenancy.describe_organization())

    async def _workspaces(self, request: Request) -> Response:
        self._enter(request)
        return answer([self._tenancy.describe_workspace()])

    async def _workspace(self, request: Request) -> Response:
        self._enter(request)
        return answer(self._tenancy.describe_workspace())

    async def _projects(self, request: Request) -> Response:
        self._enter(request)
        return answer([self._tenancy.describe_project(DEFAULT_PROJECT)])

    async def _project(self, request: Request) -> Response:
        self._enter(request)
        return answer(self._tenancy.describe_project(request.path_params["project"]))

    # --- shared -------------------------------------------------------------------------------------------------------

    def _enter(self, request: Request) -> Caller:
        self._tenancy.check(request.path_params["organization"], request.path_params.get("workspace"))
        return self._context.caller_of(request)

    def _answer(self, record: JobRecord, status: int = 200) -> Response:
        return answer(describe_job(record, self._tenancy), status)


def _route(method: str, path: str, endpoint: Endpoint) -> Route:
    return Route(path, refusing(endpoint), methods=[method])


def _parse(data: bytes) -> CreateJobRequest:
    return parse(read_json(data))


def _read_progress(data: bytes) -> ProgressUpdate:
    return read_progress(read_json(data))


def _job_id(request: Request) -> str:
    job_id = str(request.path_params["job_id"])
    if len(job_id) > _MAX_ID or not job_id.isprintable():
        raise UnknownJobError
    return job_id
