"""Removes what is to go: checkpoints whose time is over or that are too many, and files that belong to none."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta

from tinker_core.engine.checkpoints import Checkpoints
from tinker_core.engine.clock import Clock
from tinker_core.errors import StorageError
from tinker_core.storage.checkpoints import location_of_record
from tinker_core.storage.control import ControlStore

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
"""How long to wait after storage failed."""
REMEMBERED = timedelta(days=30)
"""How long finished saves are remembered; requests are repeated within minutes of a crash."""


class Housekeeping:
    """Works behind everybody's backs. ``keep_last`` is how many training checkpoints a run keeps; None keeps all."""

    def __init__(self, checkpoints: Checkpoints, control: ControlStore, clock: Clock, keep_last: int | None) -> None:
        self._checkpoints = checkpoints
        self._control = control
        self._clock = clock
        self._keep_last = keep_last

    async def run(self) -> None:
        """Sleep until there is something to remove, remove it, and so on for ever.

        Whoever saves or ends a checkpoint, or changes how long it lives, wakes this up to look again.
        """
        while True:
            self._checkpoints.untidy.clear()
            try:
                next_expiry = await self.tidy()
            except StorageError as error:
                log.error("checkpoints could not be removed: %s; trying again in a minute", error)
                deadline: float | None = self._clock.monotonic() + RETRY_SECONDS
            else:
                remaining = None if next_expiry is None else (next_expiry - self._clock.now()).total_seconds()
                deadline = None if remaining is None else self._clock.monotonic() + max(0.0, remaining)
            await self._clock.wait(self._checkpoints.untidy, deadline)

    async def tidy(self) -> datetime | None:
        """Remove all that is to go now; returns when the next checkpoint's time is over. Raises `StorageError`."""
        now = self._clock.now()
        for record in await self._control.list_expired_checkpoints(now):
            await self._checkpoints.end(record, "checkpoint_expired")
        while self._checkpoints.saved_runs:
            run_id = self._checkpoints.saved_runs.pop()
            try:
                await self._end_surplus(run_id)
            except StorageError:
                self._checkpoints.saved_runs.add(run_id)
                raise
        await self._control.checkpoint_saves.forget_finished(now - REMEMBERED)
        next_expiry = await self._control.checkpoint_queries.next_expiry()
        await self._remove_loose()  # last: it alone depends on where the files are
        return next_expiry

    async def _end_surplus(self, run_id: str) -> None:
        if self._keep_last is None:
            return
        for record in await self._control.checkpoint_queries.surplus(run_id, self._keep_last):
            if not self._checkpoints.store.is_read(location_of_record(record)):
                await self._checkpoints.end(record, "checkpoint_retired", keep_last=self._keep_last)

    async def _remove_loose(self) -> None:
        store, awaited = self._checkpoints.store, self._checkpoints.awaited
        for location in await self._control.checkpoint_saves.loose():
            if store.is_read(location):
                awaited.add(location)
                continue
            await store.remove(location)
            await self._control.checkpoint_saves.removed(location)
            awaited.discard(location)
