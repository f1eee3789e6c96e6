"""Runs pieces of work on the workers of a base model and resolves their futures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import attrs

from tinker_core.engine.acceptance import sampling_session_id_of
from tinker_core.engine.base_model import BaseModel
from tinker_core.engine.checkpoints import Checkpoints
from tinker_core.engine.clock import Clock
from tinker_core.engine.external import finish_export, parse_recipients
from tinker_core.engine.registry import Registry
from tinker_core.errors import CheckpointMismatchError, InvalidRequestError, TinkerError, UnsupportedFeatureError
from tinker_core.executors.protocol import ModelName, StateCall
from tinker_core.executors.rank_loop import describe_error
from tinker_core.scheduler import QueuedRequest, Work, WorkKind
from tinker_core.types import (
    CheckpointRecord,
    CheckpointType,
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
    TrainingRunRecord,
    check_checkpoint_name,
)

log = logging.getLogger(__name__)


@attrs.frozen(kw_only=True)
class NewModel:
    """A model to create, with the checkpoint to fill it from if there is one."""

    run: TrainingRunRecord
    load: LoadWeightsInput | None = None
    checkpoint: CheckpointRecord | None = None


Payload = EngineRequest | NewModel


class Operations:
    """What the engine does for each kind of work."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        registry: Registry,
        clock: Clock,
        *,
        resolve: Callable[[str, EngineOutput], None],
    ) -> None:
        self._checkpoints = checkpoints
        self._registry = registry
        self._clock = clock
        self._payloads: dict[str, Payload] = {}
        self._resolve = resolve

    def prepare(self, request_id: str, payload: Payload) -> None:
        """Keep a request's body until its turn."""
        self._payloads[request_id] = payload

    def discard(self, request_id: str) -> None:
        """Forget the body of a request that has its result, whether or not it ran."""
        self._payloads.pop(request_id, None)

    async def execute(self, base: BaseModel, work: Work) -> None:
        """Run one piece of work; every future in it is resolved when this returns."""
        # A request that failed when it was accepted keeps its place in the order, without a body.
        requests = [request for request in work.requests if request.request_id in self._payloads]
        try:
            if not requests:
                return
            if work.kind is WorkKind.PASS:
                await self._run_pass(base, requests)
            elif work.kind is WorkKind.STEP:
                await self._run_steps(base, requests)
            else:
                self._resolve(requests[0].request_id, await self._run_single(base, requests[0]))
        except Exception as error:
            if not isinstance(error, TinkerError):
                log.exception("work failed: %s", work)
            for request in requests:
                self._resolve(request.request_id, describe_error(error))

    async def _run_pass(self, base: BaseModel, requests: list[QueuedRequest]) -> None:
        passes = []
        for request in requests:
            body = self._payloads[request.request_id]
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
        self._answer(
            requests, await base.group.call("forward_backward", PreparedModelPassBatch(requests=tuple(passes)))
        )

    async def _run_steps(self, base: BaseModel, requests: list[QueuedRequest]) -> None:
        steps = []
        for request in requests:
            body = self._payloads[request.request_id]
            assert isinstance(body, OptimStepInput)
            steps.append(
                PreparedOptimStep(
                    request_id=request.request_id,
                    model_id=body.model_id,
                    adam_params=body.adam_params,
                    optimizer_params=body.optimizer_params,
                )
            )
        self._answer(requests, await base.group.call("optim_step", tuple(steps)))

    def _answer(self, requests: list[QueuedRequest], results: Iterable[ModelPassResult | OptimStepResult]) -> None:
        """Resolve each request by its result; a trainer that leaves one out must not leave its client waiting."""
        by_id = {result.request_id: result.output or result.error for result in results}
        for request in requests:
            output = by_id.get(request.request_id)
            if output is None:
                output = RequestError(
                    category="server", code="MissingResult", message="the trainer returned no result for this request"
                )
            self._resolve(request.request_id, output)

    async def _run_single(self, base: BaseModel, request: QueuedRequest) -> EngineOutput:
        body = self._payloads[request.request_id]
        if isinstance(body, NewModel):
            return await self._create(base, body)
        if isinstance(body, LoadWeightsInput):
            return await self._load(base, body)
        if isinstance(body, SaveWeightsInput):
            return await self._save(base, body, request.request_id)
        if isinstance(body, SaveWeightsExternalInput):
            return await self._save_external(base, body, request.request_id)
        assert isinstance(body, SaveWeightsForSamplerInput)
        if body.path is not None:
            return await self._save_for_sampler(base, body, body.path, request.request_id)
        return await self._publish(base, body, request.request_id)

    # --- creating and loading -----------------------------------------------------------------------------------------

    async def _create(self, base: BaseModel, new: NewModel) -> EngineOutput:
        run = new.run
        try:
            await self._make(base, new)
        except BaseException:
            base.remove_model(run.model_id)
            raise
        self._registry.add_model(run)
        await self._registry.control.add_run(run)
        if new.load is not None:
            return LoadWeightsOutput(path=new.load.path, model_id=run.model_id)
        return CreateModelOutput(model_id=run.model_id)

    async def _make(self, base: BaseModel, new: NewModel) -> None:
        run = new.run
        model = PreparedModel(model_id=run.model_id, lora_config=run.lora_config, optimizer_config=run.optimizer_config)
        await base.group.call("create", model)
        base.resident_models.add(run.model_id)
        if new.load is None or new.checkpoint is None:
            return
        try:
            await self._restore(base, run.model_id, new.checkpoint, with_optimizer=new.load.optimizer)
        except BaseException:
            await base.group.call("unload", ModelName(model_id=run.model_id))
            raise

    async def _load(self, base: BaseModel, body: LoadWeightsInput) -> LoadWeightsOutput:
        assert body.model_id is not None
        run = self._registry.model(body.model_id)
        checkpoint = await self._checkpoints.get(
            body.path, run.owner, body.weights_access_token, purpose="load_weights"
        )
        if checkpoint.base_model != run.base_model:
            raise CheckpointMismatchError(
                f"checkpoint {body.path!r} is of base model {checkpoint.base_model!r}, the model of {run.base_model!r}"
            )
        await self._restore(base, body.model_id, checkpoint, with_optimizer=body.optimizer)
        return LoadWeightsOutput(path=body.path, model_id=body.model_id)

    async def _restore(
        self, base: BaseModel, model_id: str, checkpoint: CheckpointRecord, *, with_optimizer: bool
    ) -> None:
        require_training_checkpoint(checkpoint)
        directory = await self._checkpoints.directory(checkpoint)
        parts = SnapshotParts(optimizer=with_optimizer)
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
            await base.group.call("snapshot", StateCall(model_id=body.model_id, directory=str(directory)))
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
            await base.group.call("export", StateCall(model_id=body.model_id, directory=str(directory)))
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
            await base.group.call("export", StateCall(model_id=body.model_id, directory=str(directory)))
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
        if await self._registry.find_sampler(session_id) is not None:
            raise InvalidRequestError(
                f"sampling_session_seq_id={body.sampling_session_seq_id} has a sampling session already; count on"
            )
        revision = f"{body.model_id}@{request_id}"
        await self._publish_revision(base, body.model_id, revision)
        if body.kind is SamplerSaveKind.INFLIGHT:
            revision = await self._move_inflight(base, body.model_id, revision)
        await self._registry.add_sampler(session_id, run, revision=revision, now=self._clock.now())
        return SaveWeightsOutput(sampling_session_id=session_id)

    async def _publish_revision(self, base: BaseModel, model_id: str, revision: str) -> None:
        if not base.shares_process:
            raise UnsupportedFeatureError(
                "this sampler cannot take weights from memory yet; save under a name and sample from its path"
            )

        async def export(directory: Path) -> None:
            await base.group.call("export", StateCall(model_id=model_id, directory=str(directory)))

        await base.revisions.publish_live(revision, model_id, export)

    async def _move_inflight(self, base: BaseModel, model_id: str, revision: str) -> str:
        """Point the model's inflight target at new weights; sampling sessions keep the target's name."""
        old = self._registry.inflight.get(model_id)
        self._registry.inflight[model_id] = revision
        if old is not None:
            await base.revisions.drop(old)
        return inflight_name(model_id)


def inflight_name(model_id: str) -> str:
    """The revision name that stands for whatever a model's latest inflight save published."""
    return f"{model_id}@inflight"


def require_training_checkpoint(checkpoint: CheckpointRecord) -> None:
    """Raise `CheckpointMismatchError` for a checkpoint that holds no optimizer state."""
    if checkpoint.path.kind is not CheckpointType.TRAINING:
        kind = "sampler" if checkpoint.path.kind is CheckpointType.SAMPLER else "external"
        raise CheckpointMismatchError(
            f"{str(checkpoint.path)!r} holds {kind} weights; load a path of kind 'weights', as save_state makes it"
        )


def _new_path(model_id: str, kind: CheckpointType, name: str) -> TinkerPath:
    return TinkerPath(run_id=model_id, kind=kind, name=check_checkpoint_name(name))
