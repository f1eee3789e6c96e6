"""The short-lived API keys of jobs' processes, with which they act for whoever submitted the job."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from datetime import timedelta

from tinker_core.errors import AuthenticationError, StorageError, UnknownKeyError
from tinker_core.extensions import IssuedKey, RunningServer
from tinker_jobs.records import JobRecord

log = logging.getLogger(__name__)

NO_KEY = "tml-local"
"""What a client sends to a server without keys; it refuses to send nothing."""
LIFE = timedelta(minutes=15)
"""How long a key lasts that nobody extends any more, such as that of a server that died."""
EXTEND_SECONDS = 300.0
"""Time between two extensions, each of which asks first whether the submitter may still train."""


class RunKeys:
    """Issues, extends and revokes keys for the time that a process runs."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server

    @contextlib.asynccontextmanager
    async def issued(self, record: JobRecord) -> AsyncIterator[IssuedKey | None]:
        """A key for the length of a block; None on a server without keys.

        Raises `AuthenticationError` when the key that the job was submitted with opens nothing any more.
        """
        expires_at = self._server.clock.now() + LIFE
        key = await self._server.issue_key(record.key_id, f"training job {record.job_id}", expires_at)
        try:
            yield key
        finally:
            if key is not None:
                await self.revoke(key.key_id)

    async def keep(self, record: JobRecord, key: IssuedKey, done: asyncio.Event) -> str | None:
        """Extend a key until something is done; why it could not be, if the submitter's key opens nothing any more."""
        assert record.key_id is not None
        clock = self._server.clock
        while True:
            await clock.wait(done, clock.monotonic() + EXTEND_SECONDS)
            if done.is_set():
                return None
            try:
                await self._server.check_key(record.key_id)
                await self._server.extend_key(key.key_id, clock.now() + LIFE)
            except (AuthenticationError, UnknownKeyError) as error:
                return str(error)
            except StorageError as error:
                log.warning("the API key of job %s cannot be extended now: %s", record.job_id, error)

    async def revoke(self, key_id: str) -> None:
        """Make a process's key useless."""
        try:
            await self._server.revoke_key(key_id)
        except UnknownKeyError:
            log.warning("API key %s of a training job's process is gone already", key_id)
        except StorageError as error:
            log.warning("API key %s of a training job's process expires by itself, for: %s", key_id, error)
