"""What the engine itself can tell about a training request before it queues it, and the custom losses that it keeps."""

from __future__ import annotations

import logging
from collections import defaultdict

import attrs

from tinker_core.custom_losses.check import check_custom_loss
from tinker_core.engine.base_model import BaseModel
from tinker_core.errors import (
    CapacityError,
    InvalidLoraConfigError,
    InvalidLossConfigError,
    UnknownCustomLossError,
    UnsupportedFeatureError,
)
from tinker_core.lora_targets import target_names
from tinker_core.optimizer_families import check_step_family, require_family
from tinker_core.types import (
    CUSTOM_LOSS,
    CreateCustomLossInput,
    CreateCustomLossOutput,
    CustomLoss,
    EngineRequest,
    ForwardBackwardInput,
    LoraConfig,
    OptimStepInput,
    SamplerCapabilities,
    TrainerCapabilities,
    TrainingRunRecord,
)

log = logging.getLogger(__name__)

MAX_LOSSES = 64
"""Custom losses of one session."""
_OWN_OBJECTIVE = "stable_reinforce"


class Admission:
    """Checks requests against their model and its trainer. Everything here is kept by session, and goes with it."""

    def __init__(self) -> None:
        self._losses: defaultdict[str, dict[str, CustomLoss]] = defaultdict(dict)
        self._told: defaultdict[str, set[str]] = defaultdict(set)
        """Models, by session, of which the log says already that their objective is this server's own."""

    def forget(self, session_id: str) -> None:
        """Drop what belongs to a finished session."""
        self._losses.pop(session_id, None)
        self._told.pop(session_id, None)

    def create_custom_loss(self, request: CreateCustomLossInput) -> CreateCustomLossOutput:
        """Keep a loss for its session, under the id that was drawn for it.

        Raises `InvalidCustomLossError`, or `CapacityError` when the session has too many.
        """
        check_custom_loss(request.loss)
        losses = self._losses[request.session_id]
        if len(losses) >= MAX_LOSSES:
            raise CapacityError(f"this session has {MAX_LOSSES} custom losses; reuse them, or open another session")
        assert request.loss_id is not None
        losses[request.loss_id] = request.loss
        return CreateCustomLossOutput(loss_id=request.loss_id)

    def check_model(self, run: TrainingRunRecord, base: BaseModel) -> None:
        """Raise `UnsupportedFeatureError` for an optimizer that the trainer does not have, and `InvalidLoraConfigError`
        for an adapter that the sampler could not serve."""
        trainer = _trainer(base)
        if trainer is not None:
            require_family(run.optimizer_config.type, trainer.optimizers)
        if base.has_sampler:
            check_servable(run.lora_config, base.sampler.capabilities())

    def admit(self, request: EngineRequest, run: TrainingRunRecord, base: BaseModel) -> EngineRequest:
        """The request, complete. Raises the `UserError` that its future is to report."""
        if isinstance(request, OptimStepInput):
            check_step_family(run.optimizer_config.type, request.adam_params, request.optimizer_params)
        elif isinstance(request, ForwardBackwardInput):
            if request.loss_fn == CUSTOM_LOSS:
                return attrs.evolve(request, custom_loss=self._custom_loss(request, run, base))
            if request.loss_fn == _OWN_OBJECTIVE:
                self._tell_once(run)
        return request

    def _custom_loss(self, request: ForwardBackwardInput, run: TrainingRunRecord, base: BaseModel) -> CustomLoss:
        loss_id = request.loss_fn_config.get("loss_id")
        if not isinstance(loss_id, str) or not loss_id:
            raise InvalidLossConfigError(
                "loss_fn 'custom' needs loss_fn_config['loss_id'], as create_custom_loss gave it"
            )
        # A session has one owner, and so have its losses.
        found = self._losses.get(run.session_id, {}).get(loss_id)
        if found is None:
            raise UnknownCustomLossError(loss_id[:80])
        trainer = _trainer(base)
        if trainer is not None and CUSTOM_LOSS not in trainer.losses:
            raise UnsupportedFeatureError(
                "loss_fn 'custom' is not offered by this server's trainer; give a plain function to "
                "forward_backward_custom, which then runs it in the client"
            )
        return found

    def _tell_once(self, run: TrainingRunRecord) -> None:
        told = self._told[run.session_id]
        if run.model_id not in told:
            told.add(run.model_id)
            log.warning(
                "model %s trains with stable_reinforce: this server's own objective, not that of the hosted service, "
                "which is not public; its formula is in docs/reference/losses.md",
                run.model_id,
            )


def check_servable(config: LoraConfig, sampler: SamplerCapabilities) -> None:
    """Raise `InvalidLoraConfigError` for an adapter that could be trained and not be sampled from.

    Rank 0, all parameters, is no adapter.
    """
    if config.rank == 0:
        return
    if sampler.max_lora_rank is not None and config.rank > sampler.max_lora_rank:
        raise InvalidLoraConfigError(
            f"lora_config.rank is {config.rank}, and the sampler of this server serves up to {sampler.max_lora_rank}"
        )
    if sampler.lora_targets is None:
        return
    missing = sorted(set(target_names(config)) - set(sampler.lora_targets))
    if missing:
        raise InvalidLoraConfigError(
            f"lora_config adapts {', '.join(missing)}, which the sampler of this server cannot serve; it can adapt "
            f"{', '.join(sorted(sampler.lora_targets))}: choose train_attn, train_mlp, train_unembed or target_modules "
            "accordingly"
        )


def offers_custom_losses(base: BaseModel) -> bool:
    """Whether the trainer of a base model is known to run custom losses."""
    trainer = _trainer(base)
    return trainer is not None and CUSTOM_LOSS in trainer.losses


def _trainer(base: BaseModel) -> TrainerCapabilities | None:
    """What the trainer offers; None while it starts, when it will say so itself."""
    return base.capabilities.trainer if base.state == "ready" else None
