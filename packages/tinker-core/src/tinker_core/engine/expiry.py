"""Removes checkpoints when their time is over."""

from __future__ import annotations

import logging

from tinker_core.engine.checkpoints import Checkpoints
from tinker_core.engine.clock import Clock
from tinker_core.errors import StorageError

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
"""How long to wait after storage failed."""


async def remove_as_they_expire(checkpoints: Checkpoints, clock: Clock) -> None:
    """Sleep until the next checkpoint's time is over, remove it, and so on for ever.

    Whoever saves a checkpoint or changes its lifetime wakes this up to look again.
    """
    while True:
        checkpoints.expiries_changed.clear()
        try:
            expires_at = await checkpoints.remove_expired()
        except StorageError as error:
            log.error("expired checkpoints could not be removed: %s; trying again in a minute", error)
            deadline: float | None = clock.monotonic() + RETRY_SECONDS
        else:
            remaining = None if expires_at is None else (expires_at - clock.now()).total_seconds()
            deadline = None if remaining is None else clock.monotonic() + max(0.0, remaining)
        await clock.wait(checkpoints.expiries_changed, deadline)
