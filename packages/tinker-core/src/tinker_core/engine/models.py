"""Birth and death of models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime

from tinker_core.engine.acceptance import model_of
from tinker_core.engine.base_model import BaseModel
from tinker_core.engine.checkpoints import Checkpoints
from tinker_core.engine.futures import FutureTable, PendingResult
from tinker_core.engine.payloads import NewModel
from tinker_core.engine.registry import Registry
from tinker_core.errors import CheckpointMismatchError, InvalidRequestError
from tinker_core.types import (
    CheckpointRecord,
    CheckpointType,
    CreateModelInput,
    LoadWeightsInput,
    OptimizerConfig,
    RequestType,
    SessionRecord,
    TrainingRunRecord,
)

FindSession = Callable[[str, str], Awaitable[SessionRecord]]
FindRun = Callable[[str], Awaitable[TrainingRunRecord | None]]


def require_training_checkpoint(checkpoint: CheckpointRecord) -> None:
    """Raise `CheckpointMismatchError` for a checkpoint that holds no optimizer state."""
    if checkpoint.path.kind is not CheckpointType.TRAINING:
        kind = "sampler" if checkpoint.path.kind is CheckpointType.SAMPLER else "external"
        raise CheckpointMismatchError(
            f"{str(checkpoint.path)!r} holds {kind} weights; load a path of kind 'weights', as save_state makes it"
        )


async def new_model(
    request: CreateModelInput | LoadWeightsInput,
    entry: PendingResult,
    *,
    session: FindSession,
    find_run: FindRun,
    checkpoints: Checkpoints,
    now: datetime,
) -> NewModel:
    """What a request to create a model, from nothing or from a checkpoint, asks to be made."""
    model_id = model_of(request)
    assert model_id is not None
    if await find_run(model_id) is not None:
        raise InvalidRequestError(f"model {model_id!r} exists already; count model_seq_id on")
    owner = entry.owner
    if isinstance(request, CreateModelInput):
        record = await session(request.session_id, owner)
        run = TrainingRunRecord(
            model_id=model_id,
            session_id=record.session_id,
            base_model=request.base_model,
            lora_config=request.lora_config,
            optimizer_config=request.optimizer_config,
            created_at=now,
            last_request_at=now,
            owner=owner,
            project_id=record.project_id,
            user_metadata=request.user_metadata,
        )
        return NewModel(run=run)
    return await _from_checkpoint(request, model_id, owner, session=session, checkpoints=checkpoints, now=now)


async def _from_checkpoint(
    request: LoadWeightsInput,
    model_id: str,
    owner: str,
    *,
    session: FindSession,
    checkpoints: Checkpoints,
    now: datetime,
) -> NewModel:
    record = await session(request.session_id or "", owner)
    checkpoint = await checkpoints.get(request.path, owner, request.weights_access_token, purpose="load_weights")
    require_training_checkpoint(checkpoint)
    if request.base_model not in (None, checkpoint.base_model):
        raise CheckpointMismatchError(
            f"checkpoint {request.path!r} is of base model {checkpoint.base_model!r}, not {request.base_model!r}"
        )
    if request.optimizer and request.optimizer_config not in (None, checkpoint.optimizer_config):
        raise InvalidRequestError(
            f"optimizer_config: the saved optimizer state is of type {checkpoint.optimizer_config.type!r}; "
            "load without the optimizer to choose another"
        )
    run = TrainingRunRecord(
        model_id=model_id,
        session_id=record.session_id,
        base_model=checkpoint.base_model,
        lora_config=checkpoint.lora_config,
        optimizer_config=checkpoint.optimizer_config
        if request.optimizer
        else request.optimizer_config or OptimizerConfig(),
        created_at=now,
        last_request_at=now,
        owner=owner,
        project_id=record.project_id,
        user_metadata=request.user_metadata,
    )
    return NewModel(run=run, load=request, checkpoint=checkpoint)


async def release_models(
    session_id: str, registry: Registry, bases: Mapping[str, BaseModel], futures: FutureTable
) -> None:
    """Unload the models of a finished session, each after the work that was accepted for it."""
    for run in registry.models_of(session_id):
        await release_model(run, registry, bases[run.base_model], futures, keep_weights=False)


async def release_model(
    run: TrainingRunRecord, registry: Registry, base: BaseModel, futures: FutureTable, *, keep_weights: bool
) -> None:
    """Unload a model after the work that was accepted for it; those who sample from it may keep its weights."""
    waiting = [
        entry.done
        for entry in futures.pending(lambda entry: entry.accepted.model_id == run.model_id)
        if entry.accepted.request_type is not RequestType.UNLOAD_MODEL
    ]
    if waiting:
        await asyncio.wait(waiting)
    if keep_weights:
        await base.revisions.secure(run.model_id)
    await base.remove_model(run.model_id, keep_weights=keep_weights)
    await registry.remove_model(run.model_id)
