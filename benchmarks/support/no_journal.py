"""The same server without a journal and without snapshots, to measure what they cost.

Run as a script it takes the flags of ``tinker-server`` and serves; whatever dies with it is lost.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tinker_server.serving
from tinker_core.engine import Engine
from tinker_core.errors import JournalError
from tinker_core.storage.journal import AcceptedRow, JournalStats, ModelRow, Recovered, ResultRow
from tinker_server.cli import FOREGROUND
from tinker_server.commands.serve import run_serve
from tinker_server.supervision import Supervision

NEVER = str(10**9)
WITHOUT_SNAPSHOTS = ("--snapshot-steps", NEVER, "--snapshot-seconds", NEVER, "--snapshot-bytes", str(10**15))


class NoJournal:
    """Takes everything that a journal takes, at once, and keeps nothing."""

    def __init__(self) -> None:
        self._last = 0

    @classmethod
    async def open(cls, directory: Path, **bounds: Any) -> NoJournal:
        """Instead of `Journal.open`."""
        del directory, bounds
        return cls()

    async def close(self) -> None:
        """Nothing is open."""

    def next_number(self) -> int:
        """Unlike all numbers before it."""
        self._last += 1
        return self._last

    async def accept(self, row: AcceptedRow) -> bytes | None:
        """Every request is new."""
        del row
        return None

    def note_attempts(self, numbers: Sequence[int]) -> asyncio.Future[None]:
        """Done."""
        del numbers
        return _done()

    def resolve(self, rows: Sequence[ResultRow], models: Sequence[ModelRow] = ()) -> asyncio.Future[None]:
        """Done."""
        del rows, models
        return _done()

    def put_models(self, models: Sequence[ModelRow]) -> asyncio.Future[None]:
        """Done."""
        return self.resolve((), models)

    def forget_model(self, model_id: str) -> asyncio.Future[None]:
        """Done."""
        del model_id
        return _done()

    def forget_damaged(self) -> asyncio.Future[None]:
        """Done."""
        return _done()

    def forget_group(self, group: str) -> asyncio.Future[None]:
        """Done."""
        del group
        return _done()

    def delivered(self, number: int, keep_until: float) -> None:
        """Nothing is kept, and for no time."""

    async def prune(self, now: float) -> float | None:
        """Nothing is kept."""
        del now
        return None

    async def head(self, number: int) -> bytes | None:
        """Nothing is kept."""
        del number
        return None

    body = result = head

    async def answered(self, scope: str, places: range) -> list[bytes]:
        """Nothing is kept."""
        del scope, places
        return []

    async def recover(self) -> Recovered:
        """Nothing was left."""
        return Recovered(models=(), pending=(), replay=(), groups=(), damaged=(), damaged_models=frozenset())

    def stats(self) -> JournalStats:
        """Empty."""
        return JournalStats(
            body_bytes=0,
            result_bytes=0,
            max_bytes=1,
            file_bytes=0,
            pending=0,
            results=0,
            waiting=0,
            waiting_seconds=0.0,
            commits=0,
            appends=0,
            largest_batch=0,
            full=None,
            reserve_bytes=0,
        )

    async def wait_failed(self) -> JournalError:
        """It never fails."""
        await asyncio.Event().wait()
        raise AssertionError("unreachable")


def _done() -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future


def main() -> int:
    """Serve with the flags that were given."""
    without = partial(Engine, open_journal=NoJournal.open)  # type: ignore[arg-type]
    setattr(tinker_server.serving, "Engine", without)  # noqa: B010
    return run_serve([*sys.argv[1:], *WITHOUT_SNAPSHOTS, FOREGROUND], Supervision())


if __name__ == "__main__":
    sys.exit(main())
