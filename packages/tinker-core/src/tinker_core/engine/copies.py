"""Copies of checkpoints: of one's own, of public ones, and of those that an access token opens."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Callable
from datetime import datetime

import attrs

from tinker_core.engine.acceptance import model_id_of
from tinker_core.engine.checkpoints import Checkpoints, check_ttl
from tinker_core.engine.clock import Clock
from tinker_core.engine.registry import Registry
from tinker_core.errors import InvalidRequestError
from tinker_core.types import (
    Caller,
    CheckpointRecord,
    CheckpointType,
    SessionRecord,
    TinkerPath,
    TrainingRunRecord,
    session_of_run,
)

MAX_PROJECT_ID = 255


def check_project_id(project_id: str) -> None:
    """Raise `InvalidRequestError` for an id that is empty or too long."""
    if not 1 <= len(project_id) <= MAX_PROJECT_ID:
        raise InvalidRequestError(f"a project id must have 1 to {MAX_PROJECT_ID} characters, got {len(project_id)}")


@attrs.frozen(kw_only=True)
class CopyWeightsInput:
    """A checkpoint to copy: into a run of a session (old clients), or into a project, with a session of its own."""

    source_path: str
    session_id: str | None = None
    model_seq_id: int | None = None
    destination_project_id: str | None = None
    ttl_seconds: int | None = None
    weights_access_token: str | None = attrs.field(default=None, repr=False)
    idempotency_key: str | None = None
    """The same for all attempts of one call."""

    def __attrs_post_init__(self) -> None:
        into_session = self.session_id is not None and self.model_seq_id is not None
        if (self.session_id is None) != (self.model_seq_id is None) or into_session == (
            self.destination_project_id is not None
        ):
            raise InvalidRequestError("send either destination_project_id, or session_id and model_seq_id")
        if self.destination_project_id is not None:
            check_project_id(self.destination_project_id)


Copied = Callable[[CheckpointRecord, CheckpointRecord], None]
"""Told of source and copy when a copy was made."""


class Copies:
    """Makes copies. A copy shares its files with the source where the file system can, and outlives it.

    ``is_taken(owner, model_id)`` says whether a model of this id is being made.
    """

    def __init__(
        self, checkpoints: Checkpoints, registry: Registry, clock: Clock, *, is_taken: Callable[[str, str], bool]
    ) -> None:
        self._checkpoints = checkpoints
        self._registry = registry
        self._clock = clock
        self._is_taken = is_taken
        self._running: dict[str, asyncio.Task[CheckpointRecord]] = {}

    async def copy(self, request: CopyWeightsInput, caller: Caller, copied: Copied) -> CheckpointRecord:
        """The copy, which belongs to the caller. The same call again, also after a restart, gets the same copy.

        The copy is of the source's kind and name, in a new training run that cannot be trained on.
        """
        identity = _identity(request, caller.owner)
        task = self._running.get(identity)
        if task is None:
            task = self._running[identity] = asyncio.create_task(self._copy(request, caller, identity, copied))
            task.add_done_callback(lambda _: self._running.pop(identity))
        await asyncio.wait([task])  # goes on when its caller leaves: the caller will ask again
        return task.result()

    async def close(self) -> None:
        """End what is being copied; nothing stays of it."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _copy(self, request: CopyWeightsInput, caller: Caller, identity: str, copied: Copied) -> CheckpointRecord:
        owner = caller.owner
        made = await self._checkpoints.finished_save(identity)
        if made is not None:
            copy = await self._checkpoints.get(str(made), owner)
            await self._register(copy)  # a crash may have come before
            return copy
        check_ttl(request.ttl_seconds)
        source = await self._checkpoints.get(request.source_path, owner, request.weights_access_token)
        if source.path.kind is CheckpointType.EXTERNAL:
            raise InvalidRequestError(
                f"{request.source_path!r} holds external weights, which are downloaded rather than copied; copy a path "
                "of kind 'weights' or 'sampler_weights'"
            )
        session = await self._session(request, owner)
        run = await self._run(source, session, request.model_seq_id or 0)
        path = TinkerPath(run_id=run.model_id, kind=source.path.kind, name=source.path.name)
        async with (
            self._checkpoints.save(
                path,
                run,
                identity,
                ttl_seconds=request.ttl_seconds,
                overwrite=False,
                user_metadata=source.user_metadata,
                limits=caller.limits,
            ) as directory,
            self._checkpoints.reading(source) as files,
        ):
            await self._checkpoints.store.link(files, directory)
        copy = await self._checkpoints.get(str(path), owner)
        await self._register(copy)
        copied(source, copy)
        return copy

    async def _register(self, copy: CheckpointRecord) -> None:
        """Make a copy's session and run, unless they are there."""
        control = self._registry.control
        session_id = session_of_run(copy.path.run_id)
        assert session_id is not None
        if await control.get_session(session_id) is None:
            await self._registry.add_session(_session_of_copy(session_id, copy.owner, copy.project_id, copy.created_at))
        if await control.get_run(copy.path.run_id) is None:
            await control.add_run(_run_of_copy(copy, copy.path.run_id, session_id, copy.owner, copy.project_id))

    async def _session(self, request: CopyWeightsInput, owner: str) -> SessionRecord:
        if request.session_id is not None:
            return await self._registry.require_open(request.session_id, owner)
        session_id = f"s-{secrets.token_urlsafe(16)}"
        return _session_of_copy(session_id, owner, request.destination_project_id, self._clock.now())

    async def _run(self, source: CheckpointRecord, session: SessionRecord, model_seq_id: int) -> TrainingRunRecord:
        model_id = model_id_of(session.session_id, model_seq_id)
        if self._is_taken(session.owner, model_id) or await self._registry.control.get_run(model_id) is not None:
            raise InvalidRequestError(f"model_seq_id={model_seq_id} of session {session.session_id!r} is in use")
        made = attrs.evolve(source, created_at=self._clock.now())
        return _run_of_copy(made, model_id, session.session_id, session.owner, session.project_id)


def _session_of_copy(session_id: str, owner: str, project_id: str | None, at: datetime) -> SessionRecord:
    return SessionRecord(
        session_id=session_id,
        created_at=at,
        owner=owner,
        project_id=project_id,
        finished_at=at,
        finish_reason="success",
        finish_detail="holds a copy made by copy_weights",
    )


def _run_of_copy(
    checkpoint: CheckpointRecord, model_id: str, session_id: str, owner: str, project_id: str | None
) -> TrainingRunRecord:
    return TrainingRunRecord(
        model_id=model_id,
        session_id=session_id,
        base_model=checkpoint.base_model,
        lora_config=checkpoint.lora_config,
        optimizer_config=checkpoint.optimizer_config,
        created_at=checkpoint.created_at,
        last_request_at=checkpoint.created_at,
        owner=owner,
        project_id=project_id,
    )


def _identity(request: CopyWeightsInput, owner: str) -> str:
    """What makes two calls the same; it becomes the copy's request id."""
    if request.idempotency_key is None:
        return f"copy-{secrets.token_urlsafe(16)}"
    wanted = [owner, request.idempotency_key, request.source_path]
    place = [request.session_id, request.model_seq_id, request.destination_project_id]
    return f"copy-{hashlib.sha256(json.dumps([*wanted, *place]).encode()).hexdigest()[:32]}"
