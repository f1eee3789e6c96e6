"""What a request must find on this server before it becomes a job: its model, its reward, Ray, and its references."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator

import attrs

from tinker_core.errors import InvalidTinkerPathError, UnknownCheckpointError
from tinker_core.extensions import RunningServer
from tinker_core.plugins import Plugins
from tinker_core.types import Caller, CheckpointType
from tinker_jobs.errors import JobRequestError, Mistake
from tinker_jobs.grpo.settings import find_mistakes
from tinker_jobs.library.library import Library
from tinker_jobs.refs import FrozenRefs, FrozenTask
from tinker_jobs.requests import (
    CHECKPOINT_SCHEME,
    CreateJobRequest,
    CreateRayGRPOJobRequest,
    CreateTinkerRLJobRequest,
    CreateTinkerSFTJobRequest,
)
from tinker_jobs.service.reward_checks import recipe_mistakes, turn_mistakes
from tinker_jobs.worlds.checking import world_mistakes


@attrs.frozen(kw_only=True)
class Accepted:
    """A request that this server can run."""

    refs: FrozenRefs
    base_model: str
    """The base model behind ``model``, by the server's name for it."""


async def check_submission(
    request: CreateJobRequest, caller: Caller, *, server: RunningServer, plugins: Plugins, library: Library
) -> Accepted:
    """Resolve and freeze everything that a request refers to; raises `JobRequestError` with all mistakes at once."""
    mistakes = list(_check_backend(request))
    base_model, refs = None, None
    try:
        base_model = await _find_base_model(request, caller, server)
    except JobRequestError as error:
        mistakes += error.mistakes
    try:
        refs = await asyncio.to_thread(library.resolve, request)
    except JobRequestError as error:
        mistakes += error.mistakes
    mistakes += _check_config(request, None if refs is None else refs.task, plugins)
    if base_model is None or refs is None or mistakes:
        raise JobRequestError(mistakes)
    return Accepted(refs=refs, base_model=base_model)


def _check_config(request: CreateJobRequest, task: FrozenTask | None, plugins: Plugins) -> Iterator[Mistake]:
    if isinstance(request, CreateTinkerRLJobRequest):
        yield from world_mistakes(request.config)
        yield from turn_mistakes(request.config)
    if isinstance(request, CreateRayGRPOJobRequest):
        yield from find_mistakes(request.config, task)
    if not isinstance(request, CreateTinkerSFTJobRequest):
        yield from recipe_mistakes(request, task, plugins)


def ray_is_installed() -> bool:
    """Whether this server can run jobs on Ray, which is an extra."""
    return importlib.util.find_spec("ray") is not None


def _check_backend(request: CreateJobRequest) -> Iterator[Mistake]:
    if request.backend == "ray" and not ray_is_installed():
        message = "backend ray is not installed on this server; install it with: pip install 'tinker-jobs[ray]'"
        yield Mistake.in_body(message, "backend")


# --- models -----------------------------------------------------------------------------------------------------------


def usable_models(server: RunningServer, *, for_rl: bool) -> list[str]:
    """Names of the base models that a job can train, and for reinforcement learning sample from as well."""
    ready = {model.model_name: model for model in server.ready_models()}
    found = []
    for spec in server.base_models:
        # A model that is ready knows also whether there is any sampler.
        sampleable = ready[spec.name].sampleable if spec.name in ready else spec.sampleable
        if spec.trainable and (sampleable or not for_rl):
            found.append(spec.name)
    return found


async def _find_base_model(request: CreateJobRequest, caller: Caller, server: RunningServer) -> str:
    model = request.model
    usable = usable_models(server, for_rl=request.trainer_type == "rl")
    if model.startswith(CHECKPOINT_SCHEME):
        base_model = await _base_of_checkpoint(request, caller, server)
        if base_model not in usable:
            raise _model_error(f"the base model {base_model!r} of {_show(model)} is not one of {_listed(usable)}")
        return base_model
    if model in usable:
        return model
    if any(spec.name == model for spec in server.base_models):
        what = "trained and sampled from" if request.trainer_type == "rl" else "trained"
        raise _model_error(f"model {_show(model)} cannot be {what} here; known models: {_listed(usable)}")
    raise _model_error(f"unknown model: {_show(model)}; known models: {_listed(usable)}")


async def _base_of_checkpoint(request: CreateJobRequest, caller: Caller, server: RunningServer) -> str:
    try:
        record = await server.find_checkpoint(request.model, caller.owner)
    except (UnknownCheckpointError, InvalidTinkerPathError) as error:
        raise _model_error(str(error)) from error
    if record.path.kind is CheckpointType.EXTERNAL:
        raise _model_error(f"{_show(request.model)} was saved for use elsewhere; no training can start from it")
    wanted, has = getattr(request.config, "lora_rank", None), record.lora_config.rank
    if wanted not in (None, has):
        message = f"{_show(request.model)} has LoRA rank {has}; leave lora_rank out or set it to that"
        raise JobRequestError([Mistake.in_config(message, "lora_rank")])
    return record.base_model


def _model_error(message: str) -> JobRequestError:
    return JobRequestError([Mistake.in_body(message, "model")])


def _show(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
