"""Runs pieces of work on the workers of a base model and resolves their futures."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from tinker_core.engine.acceptance import sampling_session_id_of
from tinker_core.engine.admission import check_servable
from tinker_core.engine.base_model import BaseModel
from tinker_core.engine.checkpoints import Checkpoints
from tinker_core.engine.clock import Clock
from tinker_core.engine.external import finish_export, parse_recipients
from tinker_core.engine.live_weights import export_weights, live_weights
from tinker_core.engine.model_state import model_row
from tinker_core.engine.models import require_training_checkpoint
from tinker_core.engine.payloads import NewModel, Payload, Payloads
from tinker_core.engine.registry import Registry
from tinker_core.errors import (
    CheckpointMismatchError,
    InvalidRequestError,
    JournalError,
    StorageError,
    TinkerError,
    UnsupportedFeatureError,
    WorkerLostError,
)
from tinker_core.executors.protocol import StateCall
from tinker_core.executors.rank_loop import describe_error
from tinker_core.scheduler import QueuedRequest, Work, WorkKind
from tinker_core.storage.journal import ModelRow
from tinker_core.types import (
    CheckpointRecord,
    CheckpointType,
    CreateModelInput,
    CreateModelOutput,
    EngineOutput,
    EngineRequest,
    ForwardBackwardInput,
    LoadWeightsInput,
    LoadWeightsOutput,
    ModelPassResult,
    OptimStepInput,
    OptimStepResult,
    PreparedModel,
    PreparedModelPass,
    PreparedModelPassBatch,
    PreparedOptimStep,
    RequestError,
    SamplerSaveKind,
    SaveWeightsExternalInput,
    SaveWeightsForSamplerInput,
    SaveWeightsInput,
    SaveWeightsOutput,
    SnapshotParts,
    TinkerPath,
    check_checkpoint_name,
)

log = logging.getLogger(__name__)


class Resolve(Protocol):
    """Gives a request its result, together with what the journal shall know of its model from then on."""

    def __call__(self, request_id: str, output: EngineOutput, cover: ModelRow | None = None) -> None:
        """The result counts, and is delivered, once both are durable."""


class Operations:
    """What the engine does for each kind of work."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        registry: Registry,
        clock: Clock,
        payloads: Payloads,
        *,
        resolve: Resolve,
        complete: Callable[[BaseModel, EngineRequest], EngineRequest],
    ) -> None:
        self._checkpoints = checkpoints
        self._registry = registry
        self._clock = clock
        self._payloads = payloads
        self._resolve = resolve
        self._complete = complete
        """What admission makes of a request out of the journal."""

    async def execute(self, base: BaseModel, work: Work) -> None:
        """Run one piece of work that was prepared; every future in it is settled when this returns.

        Raises `WorkerLostError`, and then nothing is settled that depends on the workers.
        """
        requests = list(work.requests)
        try:
            requests = await self._recall(base, requests)
            if not requests:
                return
            if work.kind is WorkKind.PASS:
                await self._run_pass(base, requests)
            elif work.kind is WorkKind.STEP:
                await self._run_steps(base, requests)
            else:
                await self._run_single(base, requests[0])
        except (WorkerLostError, JournalError):
            raise
        except Exception as error:
            if not isinstance(error, TinkerError):
                log.exception("work failed: %s", work)
            for request in requests:
                self._settle(base, request, describe_error(error))

    async def _recall(self, base: BaseModel, requests: list[QueuedRequest]) -> list[QueuedRequest]:
        """Read what only the journal has; a request that cannot be read fails, or takes its model with it."""
        present = []
        for request in requests:
            try:
                if self._payloads.is_recalled(request.request_id):
                    await self._read(base, request)
                present.append(request)
            except TinkerError as error:
                self._settle(base, request, describe_error(error))
        return present

    async def _read(self, base: BaseModel, request: QueuedRequest) -> None:
        body = await self._payloads.read(request.request_id)
        payload: Payload
        if isinstance(body, CreateModelInput):
            payload = NewModel(run=self._registry.model(request.model_id))
        else:
            payload = self._complete(base, body)
        self._payloads.keep(request.request_id, payload)

    def _settle(
        self, base: BaseModel, request: QueuedRequest, output: EngineOutput, cover: ModelRow | None = None
    ) -> None:
        """Give a request its result. A repeated one has it already, and must not come to another end."""
        if self._payloads.is_replay(request.request_id):
            self._payloads.discard(request.request_id)
            base.residence.note_repeated(request.model_id)
            if isinstance(output, RequestError):
                reason = f"repeating request {request.seq_id} failed, which had succeeded before: {output.message}"
                base.residence.lose(request.model_id, StorageError(reason))
            return
        self._resolve(request.request_id, output, cover)

    async def _run_pass(self, base: BaseModel, requests: list[QueuedRequest]) -> None:
        passes = []
        for request in requests:
            body = self._payloads.get(request.request_id)
            assert isinstance(body, ForwardBackwardInput)
            passes.append(
                PreparedModelPass(
                    request_id=request.request_id,
                    model_id=body.model_id,
                    data=body.data,
                    loss_fn=body.loss_fn,
                    loss_fn_config=body.loss_fn_config,
                    forward_only=body.forward_only,
                    custom_loss=body.custom_loss,
                )
            )
        results = await base.group.call("forward_backward", PreparedModelPassBatch(requests=tuple(passes)))
        self._answer(base, requests, results)

    async def _run_steps(self, base: BaseModel, requests: list[QueuedRequest]) -> None:
        steps = []
        for request in requests:
            body = self._payloads.get(request.request_id)
            assert isinstance(body, OptimStepInput)
            steps.append(
                PreparedOptimStep(
                    request_id=request.request_id,
                    model_id=body.model_id,
                    adam_params=body.adam_params,
                    optimizer_params=body.optimizer_params,
                )
            )
        self._answer(base, requests, await base.group.call("optim_step", tuple(steps)))

    def _answer(
        self, base: BaseModel, requests: list[QueuedRequest], results: Iterable[ModelPassResult | OptimStepResult]
    ) -> None:
        """Resolve each request by its result; a trainer that leaves one out must not leave its client waiting."""
        by_id = {result.request_id: result.output or result.error for result in results}
        for request in requests:
            output = by_id.get(request.request_id)
            if output is None:
                output = RequestError(
                    category="server", code="MissingResult", message="the trainer returned no result for this request"
                )
            self._settle(base, request, output)

    async def _run_single(self, base: BaseModel, request: QueuedRequest) -> None:
        body = self._payloads.get(request.request_id)
        cover = None
        if isinstance(body, NewModel):
            output, cover = await self._create(base, body)
        elif isinstance(body, LoadWeightsInput):
            output, cover = await self._load(base, body)
        else:
            output = await self._save_any(base, body, request.request_id)
        self._settle(base, request, output, cover)

    async def _save_any(self, base: BaseModel, body: Payload, request_id: str) -> SaveWeightsOutput:
        if isinstance(body, SaveWeightsForSamplerInput) and body.path is None:
            return await self._publish(base, body, request_id)  # it writes no checkpoint that could be finished
        finished = await self._checkpoints.finished_save(request_id)
        if finished is not None:  # before a crash; what became of the checkpoint since is not this request's business
            return SaveWeightsOutput(path=str(finished))
        if isinstance(body, SaveWeightsInput):
            return await self._save(base, body, request_id)
        if isinstance(body, SaveWeightsExternalInput):
            return await self._save_external(base, body, request_id)
        assert isinstance(body, SaveWeightsForSamplerInput)
        assert body.path is not None
        return await self._save_for_sampler(base, body, body.path, request_id)

    # --- creating and loading -----------------------------------------------------------------------------------------

    async def _create(self, base: BaseModel, new: NewModel) -> tuple[EngineOutput, ModelRow]:
        run = new.run
        try:
            await self._make(base, new)
            if new.load is None:
                cover = model_row(run.model_id, 0, snapshot=None, inflight=None)
            else:
                # The checkpoint may be gone when the model has to come back.
                cover = await base.residence.snapshot(run.model_id, 1)
            if await self._registry.control.get_run(run.model_id) is None:
                await self._registry.control.add_run(run)
        except (WorkerLostError, asyncio.CancelledError):
            raise  # it will be made again
        except BaseException:
            await base.remove_model(run.model_id)
            raise
        if not self._registry.is_live(run.model_id):
            self._registry.add_model(run)
        if new.load is not None:
            return LoadWeightsOutput(path=new.load.path, model_id=run.model_id), cover
        return CreateModelOutput(model_id=run.model_id), cover

    async def _make(self, base: BaseModel, new: NewModel) -> None:
        run = new.run
        if base.has_sampler:
            check_servable(run.lora_config, base.sampler.capabilities())
        model = PreparedModel(model_id=run.model_id, lora_config=run.lora_config, optimizer_config=run.optimizer_config)
        await base.group.call("create", model)
        base.residence.arrived(run.model_id)
        if new.load is not None and new.checkpoint is not None:
            await self._restore(base, run.model_id, new.checkpoint, with_optimizer=new.load.optimizer)

    async def _load(self, base: BaseModel, body: LoadWeightsInput) -> tuple[EngineOutput, ModelRow]:
        assert body.model_id is not None
        assert body.seq_id is not None
        run = self._registry.model(body.model_id)
        checkpoint = await self._checkpoints.get(
            body.path, run.owner, body.weights_access_token, purpose="load_weights"
        )
        if checkpoint.base_model != run.base_model:
            raise CheckpointMismatchError(
                f"checkpoint {body.path!r} is of base model {checkpoint.base_model!r}, the model of {run.base_model!r}"
            )
        try:
            await self._restore(base, body.model_id, checkpoint, with_optimizer=body.optimizer)
            cover = await base.residence.snapshot(body.model_id, body.seq_id + 1)
        except TinkerError:
            base.residence.revert(body.model_id)
            raise
        return LoadWeightsOutput(path=body.path, model_id=body.model_id), cover

    async def _restore(
        self, base: BaseModel, model_id: str, checkpoint: CheckpointRecord, *, with_optimizer: bool
    ) -> None:
        require_training_checkpoint(checkpoint)
        parts = SnapshotParts(optimizer=with_optimizer)
        async with self._checkpoints.reading(checkpoint) as directory:
            await base.group.call("restore", StateCall(model_id=model_id, directory=str(directory), parts=parts))

    # --- saving -------------------------------------------------------------------------------------------------------

    async def _save(self, base: BaseModel, body: SaveWeightsInput, request_id: str) -> SaveWeightsOutput:
        run = self._registry.model(body.model_id)
        path = _new_path(body.model_id, CheckpointType.TRAINING, body.path)
        async with self._checkpoints.save(
            path,
            run,
            request_id,
            ttl_seconds=body.ttl_seconds,
            overwrite=body.overwrite,
            user_metadata=body.user_metadata,
        ) as directory:
            await base.group.call(
                "snapshot", StateCall(model_id=body.model_id, directory=str(directory), background=True)
            )
        return SaveWeightsOutput(path=str(path))

    async def _save_for_sampler(
        self, base: BaseModel, body: SaveWeightsForSamplerInput, name: str, request_id: str
    ) -> SaveWeightsOutput:
        run = self._registry.model(body.model_id)
        path = _new_path(body.model_id, CheckpointType.SAMPLER, name)
        async with self._checkpoints.save(
            path,
            run,
            request_id,
            ttl_seconds=body.ttl_seconds,
            overwrite=False,
            user_metadata=body.user_metadata,
        ) as directory:
            await base.group.call(
                "export", StateCall(model_id=body.model_id, directory=str(directory), background=True)
            )
        return SaveWeightsOutput(path=str(path))

    async def _save_external(
        self, base: BaseModel, body: SaveWeightsExternalInput, request_id: str
    ) -> SaveWeightsOutput:
        run = self._registry.model(body.model_id)
        path = _new_path(body.model_id, CheckpointType.EXTERNAL, body.path)
        recipients = parse_recipients(body.age_encryption_recipients)
        async with self._checkpoints.save(
            path,
            run,
            request_id,
            ttl_seconds=body.ttl_seconds,
            overwrite=False,
            user_metadata=None,
        ) as directory:
            await base.group.call(
                "export", StateCall(model_id=body.model_id, directory=str(directory), background=True)
            )
            await finish_export(directory, recipients)
        return SaveWeightsOutput(path=str(path))

    async def _publish(self, base: BaseModel, body: SaveWeightsForSamplerInput, request_id: str) -> SaveWeightsOutput:
        """An ephemeral save: weights for one sampling session, which it opens."""
        if body.sampling_session_seq_id is None:
            raise InvalidRequestError("save_weights_for_sampler needs a path, or a sampling_session_seq_id without one")
        if body.ttl_seconds is not None:
            raise InvalidRequestError("ttl_seconds applies to named saves; an ephemeral save lives with its session")
        run = self._registry.model(body.model_id)
        session_id = sampling_session_id_of(run.session_id, body.sampling_session_seq_id)
        existing = await self._registry.find_sampler(session_id)
        if existing is not None and not self._payloads.is_again(request_id):
            raise InvalidRequestError(
                f"sampling_session_seq_id={body.sampling_session_seq_id} has a sampling session already; count on"
            )
        revision = f"{body.model_id}@{request_id}"
        if existing is None or self._is_wanted(body, revision):
            await self._publish_revision(base, body.model_id, revision)
        else:
            await base.revisions.drop(revision)
        if existing is not None:
            return SaveWeightsOutput(sampling_session_id=session_id)
        if body.kind is SamplerSaveKind.INFLIGHT:
            revision = await self._move_inflight(base, body.model_id, revision)
        await self._registry.add_sampler(session_id, run, revision=revision, now=self._clock.now())
        return SaveWeightsOutput(sampling_session_id=session_id)

    def _is_wanted(self, body: SaveWeightsForSamplerInput, revision: str) -> bool:
        """Whether weights that were published before are sampled from: not those that an inflight save replaced."""
        return body.kind is not SamplerSaveKind.INFLIGHT or self._registry.inflight.get(body.model_id) == revision

    async def _publish_revision(self, base: BaseModel, model_id: str, revision: str) -> None:
        transport = base.live_transport
        if not base.sampler.capabilities().transports:
            raise UnsupportedFeatureError(
                "the sampler of this server serves bare base models only: models can be trained and saved here, "
                "not sampled from"
            )
        if transport is None:
            raise UnsupportedFeatureError(
                "this sampler cannot take weights from memory; save under a name and sample from its path"
            )

        export = partial(export_weights, base.group, model_id)
        live = partial(live_weights, base.group, model_id, transport, base.handoff)
        await base.revisions.publish_live(revision, export, live)

    async def _move_inflight(self, base: BaseModel, model_id: str, revision: str) -> str:
        """Point the model's inflight target at new weights; sampling sessions keep the target's name."""
        old = self._registry.inflight.get(model_id)
        self._registry.inflight[model_id] = revision
        if old is not None and old != revision:
            await base.revisions.drop(old)
        return inflight_name(model_id)


def inflight_name(model_id: str) -> str:
    """The revision name that stands for whatever a model's latest inflight save published."""
    return f"{model_id}@inflight"


def _new_path(model_id: str, kind: CheckpointType, name: str) -> TinkerPath:
    return TinkerPath(run_id=model_id, kind=kind, name=check_checkpoint_name(name))
