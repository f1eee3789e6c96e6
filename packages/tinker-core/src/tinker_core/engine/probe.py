"""Is a base model really able to train and sample? Asked once, before the server says that it is ready."""

from __future__ import annotations

import numpy as np

from tinker_core.errors import ConfigurationError
from tinker_core.executors.protocol import GroupCapabilities, ModelName
from tinker_core.interfaces import Sampler, WorkerGroup
from tinker_core.types import (
    AdamParams,
    Datum,
    LoraConfig,
    ModelInput,
    OptimizerConfig,
    PreparedModel,
    PreparedModelPass,
    PreparedModelPassBatch,
    PreparedOptimStep,
    PreparedSample,
    RequestError,
    SampleInput,
    SamplingParams,
    TensorData,
)

_MODEL_ID = "probe"
_LOSS, _OPTIMIZER = "cross_entropy", "adamw"


async def probe_training(group: WorkerGroup, capabilities: GroupCapabilities) -> None:
    """Create a model, run one pass of two tokens and one optimizer step, and unload it.

    A trainer without the loss or optimizer of the probe is only asked to create and unload.
    """
    trainer = capabilities.trainer
    model = PreparedModel(
        model_id=_MODEL_ID,
        lora_config=LoraConfig(rank=0 if trainer.full_parameter else 1, seed=0),
        optimizer_config=OptimizerConfig(type=_OPTIMIZER),
    )
    if _OPTIMIZER not in trainer.optimizers:
        return
    await group.call("create", model)
    if _LOSS in trainer.losses:
        tokens = np.array([0, min(1, trainer.vocab_size - 1)])
        datum = Datum(
            model_input=ModelInput.from_ints(tokens),
            loss_fn_inputs={"target_tokens": TensorData.from_numpy(tokens[::-1])},
        )
        request = PreparedModelPass(request_id=_MODEL_ID, model_id=_MODEL_ID, data=(datum,), loss_fn=_LOSS)
        (passed,) = await group.call("forward_backward", PreparedModelPassBatch(requests=(request,)))
        _require(passed.error)
        step = PreparedOptimStep(request_id=_MODEL_ID, model_id=_MODEL_ID, adam_params=AdamParams())
        (stepped,) = await group.call("optim_step", (step,))
        _require(stepped.error)
    await group.call("unload", ModelName(model_id=_MODEL_ID))


async def probe_sampling(sampler: Sampler) -> None:
    """Generate one token from the bare base model."""
    request = SampleInput(
        sampling_session_id=_MODEL_ID,
        seq_id=0,
        prompt=ModelInput.from_ints([0]),
        sampling_params=SamplingParams(max_tokens=1, temperature=0.0, seed=0),
    )
    await sampler.sample(PreparedSample(request_id=_MODEL_ID, revision=None, request=request))


def _require(error: RequestError | None) -> None:
    if error is not None:
        raise ConfigurationError(f"the base model loads but cannot train: {error.message}")
