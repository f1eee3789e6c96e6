"""Checkpoints without an engine around them, and a way to let the process that saves them die at any step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.core.conftest import ManualClock
from tinker_core.engine.accounts import Accounts
from tinker_core.engine.backlog import LoadBounds
from tinker_core.engine.checkpoints import Checkpoints
from tinker_core.engine.housekeeping import Housekeeping
from tinker_core.storage import ControlStore, remote_checkpoints
from tinker_core.storage.checkpoints import open_checkpoint_store
from tinker_core.types import (
    LOCAL_OWNER,
    CheckpointRecord,
    CheckpointType,
    LoraConfig,
    OptimizerConfig,
    TinkerPath,
    TrainingRunRecord,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
RUN = TrainingRunRecord(
    model_id="s:train:0",
    session_id="s",
    base_model="tiny",
    lora_config=LoraConfig(rank=4),
    optimizer_config=OptimizerConfig(),
    created_at=NOON,
    last_request_at=NOON,
)


def path_of(name: str, kind: CheckpointType = CheckpointType.TRAINING) -> TinkerPath:
    return TinkerPath(run_id=RUN.model_id, kind=kind, name=name)


class Death(BaseException):
    """The process ends here: nothing after it happens, not even clearing up."""


@attrs.define(eq=False)
class Fuse:
    """Lets the process die before some call that is made through it, or after the last one."""

    steps: int
    dead: bool = False

    def burn(self) -> None:
        if self.dead or self.steps == 0:
            self.dead = True
            raise Death
        self.steps -= 1

    def through(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def guarded(*args: Any, **kwargs: Any) -> Any:
            self.burn()
            return await call(*args, **kwargs)

        return guarded

    def attach(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have everything that lasts go through the fuse."""
        store, saves = lab.checkpoints.store, lab.control.checkpoint_saves
        for owner, names in (
            (store, ("begin", "seal", "publish", "end", "remove")),
            (saves, ("begin", "finish", "give_up", "remove", "removed")),
            (remote_checkpoints.obstore, ("put_async", "delete_async")),
        ):
            for name in names:
                monkeypatch.setattr(owner, name, self.through(getattr(owner, name)))


@attrs.define(eq=False)
class Lab:
    """What a server has of checkpoints."""

    control: ControlStore
    checkpoints: Checkpoints
    housekeeping: Housekeeping
    clock: ManualClock

    async def save(self, name: str, text: str, request_id: str, **options: Any) -> None:
        given: dict[str, Any] = {"ttl_seconds": None, "overwrite": True, "user_metadata": None}
        path, parts = path_of(name, options.pop("kind", CheckpointType.TRAINING)), options.pop("parts", ("a", "b"))
        async with self.checkpoints.save(path, RUN, request_id, **{**given, **options}) as directory:
            for part in parts:
                (directory / f"{part}.safetensors").write_text(text)

    async def record(self, name: str) -> CheckpointRecord | None:
        return await self.checkpoints.find(path_of(name))

    async def read(self, name: str) -> str | None:
        record = await self.record(name)
        if record is None:
            return None
        async with self.checkpoints.reading(record) as directory:
            texts = {(directory / f"{part}.safetensors").read_text() for part in ("a", "b")}
        (text,) = texts
        return text

    async def names(self) -> list[str]:
        """Names of the training checkpoints that exist, oldest first."""
        records, _ = await self.control.list_checkpoints(LOCAL_OWNER)
        return [record.path.name for record in reversed(records)]


@asynccontextmanager
async def open_lab(
    data_dir: Path,
    *,
    url: str | None = None,
    keep_last: int | None = None,
    writer: str = "me",
    database: str = "",
    server_id: str | None = None,
) -> AsyncIterator[Lab]:
    await asyncio.to_thread(data_dir.mkdir, exist_ok=True)
    clock = ManualClock()
    control = await ControlStore.open(database or f"sqlite:///{data_dir / 'control.sqlite'}", server_id)
    try:
        async with Accounts(control, clock, lambda _: True, LoadBounds()) as accounts:
            store = open_checkpoint_store(url, data_dir, 1024**3, writer)
            checkpoints = Checkpoints(store, control, clock, accounts, writer=writer)
            await checkpoints.open()
            yield Lab(control, checkpoints, Housekeeping(checkpoints, control, clock, keep_last), clock)
    finally:
        await asyncio.shield(control.close())
