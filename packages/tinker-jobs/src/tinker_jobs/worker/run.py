"""One run of a job: what every trainer works with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import tinker
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tinker_jobs.errors import CancelledJobError, JobFailedError
from tinker_jobs.protocol import EventType, JobEvent, JobSpec, ResumePoint
from tinker_jobs.requests import CreateJobRequest, parse

CHECKPOINT_PATH = "tinker://"
ALPHA_KEY = "tinker_server.lora_alpha"
"""Of a model's user metadata: what divided by the rank scales its adapter."""
DEFAULT_RANK = 16


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
        self._last_state: str | None = None if spec.resume is None else spec.resume.state_path

    @property
    def first_step(self) -> int:
        """The optimizer step to do next, from 1."""
        return 1 if self.spec.resume is None else self.spec.resume.step + 1

    @cached_property
    def service(self) -> tinker.ServiceClient:
        """The client of the server."""
        return tinker.ServiceClient(base_url=self.spec.base_url, api_key=self.spec.api_key)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.spec.model_path)
        return tokenizer

    # --- reporting ----------------------------------------------------------------------------------------------------

    def emit(self, event_type: EventType, message: str, **fields: Any) -> None:  # noqa: ANN401 - fields of JobEvent
        """Report; ``fields`` are those of `JobEvent`."""
        self._send(JobEvent(event_type=event_type, message=message, **fields))

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
        if self.request.model.startswith(CHECKPOINT_PATH):
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

        The state before it is deleted: one is enough to go on from, and it is three times as large.
        """
        weights = client.save_weights_for_sampler(f"{name}").result().path
        state = client.save_state(f"resume-{name}", overwrite=True).result().path
        if weights not in self._checkpoints:
            self._checkpoints.append(weights)
        self.emit(
            EventType.CHECKPOINT_SAVED,
            f"saved {name} after step {step}",
            artifacts={"checkpoints": list(self._checkpoints), "latest_checkpoint": weights, "latest_state": state},
            data={"step": step, "path": weights},
            resume=ResumePoint(step=step, state_path=state, extra=dict(extra or {})),
        )
        if self._last_state is not None and self._last_state != state:
            self.service.create_rest_client().delete_checkpoint_from_tinker_path(self._last_state).result()
        self._last_state = state
        return weights
