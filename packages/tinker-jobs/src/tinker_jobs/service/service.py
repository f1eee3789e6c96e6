"""The service ``jobs``: its parts, put together."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import BaseRoute

from tinker_core.errors import ConfigurationError
from tinker_core.extensions import RunningServer, ServiceContext
from tinker_jobs.library.library import Library
from tinker_jobs.service.jobs import Jobs
from tinker_jobs.service.routes import JobRoutes
from tinker_jobs.service.store import JobStore


class JobService:
    """Queues training jobs, runs them in processes of their own, and answers for them."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._library = Library(context.data_dir, str(context.options["jobs-organization"]))
        self._jobs: Jobs | None = None
        self._server: RunningServer | None = None
        self._routes = JobRoutes(context, self._library, self.jobs, self.server)

    def jobs(self) -> Jobs:
        """The jobs; there once the service has started."""
        if self._jobs is None:
            raise RuntimeError("the service 'jobs' has not started")
        return self._jobs

    def server(self) -> RunningServer:
        """The server around it; there once the service has started."""
        if self._server is None:
            raise RuntimeError("the service 'jobs' has not started")
        return self._server

    def routes(self) -> Sequence[BaseRoute]:
        """The API of training jobs."""
        return self._routes.routes()

    async def start(self, server: RunningServer) -> None:
        """Open the tables, take up what was left unfinished, and begin to run what is queued."""
        if server.url is None:
            raise ConfigurationError("the service 'jobs' must know where this server is reached; pass own_url")
        self._server = server
        store = await JobStore.open(server.database)
        self._jobs = Jobs(store, server, self._context, url=server.url)
        await self._jobs.start()

    async def close(self) -> None:
        """End the processes; their jobs go on after the next start."""
        if self._jobs is not None:
            await self._jobs.close()
