"""One run of a job: what every trainer works with."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import tinker
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tinker_jobs.errors import CancelledJobError, JobFailedError
from tinker_jobs.protocol import FILES, EventType, JobEvent, JobSpec, ResumePoint
from tinker_jobs.requests import CHECKPOINT_SCHEME, CreateJobRequest, parse

ALPHA_KEY = "tinker_server.lora_alpha"
"""Of a model's user metadata: what divided by the rank scales its adapter."""
DEFAULT_RANK = 16


def checkpoint_name(step: int, interval: int | None, num_steps: int) -> str | None:
    """``checkpoint-{k}-step{n}`` every ``interval`` steps; None after others and after the last, saved as ``final``."""
    if interval is None or step % interval or step >= num_steps:
        return None
    return f"checkpoint-{step // interval}-step{step}"


class JobRun:
    """What a trainer is given: the request, a client of the server, and the way to report.

    A trainer is a function of it that returns when the job is complete. It calls `check_cancelled` between optimizer
    steps, reports every step with `emit`, and saves with `save_checkpoint`. It raises `JobFailedError` for what the
    submitter can mend. After a crash another process runs the same trainer with ``spec.resume`` set.
    """

    def __init__(self, spec: JobSpec, send: Callable[[JobEvent], None], cancelled: threading.Event) -> None:
        self.spec = spec
        self.refs = spec.refs
        self.request: CreateJobRequest = parse(spec.request)
        self._send = send
        self._cancelled = cancelled
        self._checkpoints: list[str] = list(spec.artifacts.get("checkpoints", ()))
        self._states: list[str] = [] if spec.resume is None else [spec.resume.state_path]
        self._last_saved_step: int | None = None

    @property
    def first_step(self) -> int:
        """The optimizer step to do next, from 1."""
        return 1 if self.spec.resume is None else self.spec.resume.step + 1

    @cached_property
    def service(self) -> tinker.ServiceClient:
        """The client of the server."""
        return tinker.ServiceClient(base_url=self.spec.base_url, api_key=self.spec.api_key)

    @cached_property
    def rest(self) -> tinker.RestClient:
        """The client of the server's records."""
        return tinker.RestClient(base_url=self.spec.base_url, api_key=self.spec.api_key)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.spec.model_path)
        return tokenizer

    @cached_property
    def context_length(self) -> int | None:
        """Tokens that the server lets a sequence of the base model have; None when it does not say."""
        models = self.rest.get_server_capabilities().result().supported_models
        return next((one.max_context_length for one in models if one.model_name == self.spec.base_model), None)

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Paths of the weights saved so far, by this process and those before it."""
        return tuple(self._checkpoints)

    # --- reporting ----------------------------------------------------------------------------------------------------

    def emit(self, event_type: EventType, message: str, **fields: Any) -> None:  # noqa: ANN401 - fields of JobEvent
        """Report; ``fields`` are those of `JobEvent`. The end of training brings the plots of its metrics along."""
        if event_type is EventType.TRAINING_END:
            self._keep_states(1)
            plots = self.publish_plot(fields.get("metrics", {}))
            fields["artifacts"] = {**fields.get("artifacts", {}), **plots}
        self._send(JobEvent(event_type=event_type, message=message, **fields))

    def publish_plot(self, metrics: Mapping[str, Any]) -> dict[str, list[str]]:
        """Draw the curve of metrics into the job's ``files/``; the artifact that names the files, if there is a curve.

        A picture that cannot be written is reported and does not end the job, which has done its work.
        """
        from tinker_jobs.plots import FORMATS, curve_of, draw

        curve, files = curve_of(metrics), self.spec.directory / FILES
        if curve is None:
            return {}
        names = [f"{curve}.{ending}" for ending in FORMATS]
        try:
            files.mkdir(parents=True, exist_ok=True)
            for name in names:
                draw(metrics, files / name)
        except OSError as error:
            self.log(f"the plot of the {curve} could not be written: {error}", level="warning")
            return {}
        return {"plots": names}

    def log(self, message: str, level: str = "info", **data: object) -> None:
        """Write a line to the job's log."""
        self.emit(EventType.LOG, message, level=level, data=data)

    def check_cancelled(self) -> None:
        """Raise `CancelledJobError` once the job was asked to stop."""
        if self._cancelled.is_set():
            raise CancelledJobError

    # --- training -----------------------------------------------------------------------------------------------------

    def open_training_client(
        self, *, rank: int | None, alpha: int | None = None, seed: int = 0
    ) -> tinker.TrainingClient:
        """The model to train: new, from the checkpoint that ``model`` names, or as it was at the resumption point.

        Raises `JobFailedError` for a rank or an alpha that a checkpoint cannot have.
        """
        metadata = {"tinker_jobs.job_id": self.spec.job_id}
        if alpha is not None:
            metadata[ALPHA_KEY] = str(alpha)
        if self.spec.resume is not None:
            return self.service.create_training_client_from_state_with_optimizer(
                self.spec.resume.state_path, user_metadata={"tinker_jobs.job_id": self.spec.job_id}
            ).result()
        if self.request.model.startswith(CHECKPOINT_SCHEME):
            client = self.service.create_training_client_from_state(self.request.model, user_metadata=metadata).result()
            has = client.get_info().lora_rank
            if rank is not None and has != rank:
                raise JobFailedError(f"{self.request.model} has LoRA rank {has}; leave lora_rank out or set it to that")
            return client
        return self.service.create_lora_training_client(
            base_model=self.request.model, rank=rank or DEFAULT_RANK, seed=seed, user_metadata=metadata
        ).result()

    def save_checkpoint(
        self, client: tinker.TrainingClient, name: str, step: int, extra: Mapping[str, Any] | None = None
    ) -> str:
        """Save weights for sampling and, to resume from, the whole state; the path of the former.

        The state before the last is deleted: they are three times as large as the weights, and the last but one is
        there until it is certain that the server has noted the last. Two names for one step share a state.
        """
        weights = client.save_weights_for_sampler(name).result().path
        if self._last_saved_step != step:
            self._states.append(client.save_state(f"resume-{name}", overwrite=True).result().path)
        state, self._last_saved_step = self._states[-1], step
        if weights not in self._checkpoints:
            self._checkpoints.append(weights)
        self.emit(
            EventType.CHECKPOINT_SAVED,
            f"saved {name} after step {step}",
            artifacts={"checkpoints": list(self._checkpoints), "latest_checkpoint": weights, "latest_state": state},
            data={"step": step, "path": weights},
            resume=ResumePoint(step=step, state_path=state, extra=dict(extra or {})),
        )
        self._keep_states(2)
        return weights

    def _keep_states(self, count: int) -> None:
        while len(self._states) > count:
            with contextlib.suppress(tinker.NotFoundError):  # its owner has deleted it already
                self.rest.delete_checkpoint_from_tinker_path(self._states.pop(0)).result()
