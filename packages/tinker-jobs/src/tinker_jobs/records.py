"""A job as it is kept, and the rules by which its status changes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any

import attrs

from tinker_jobs.protocol import ResumePoint
from tinker_jobs.refs import FrozenRefs


class JobStatus(StrEnum):
    """Where a job is. Clients know ``pending`` too, which never occurs."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether the job goes on only when it is retried."""
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


FILTERS = ("pending", *JobStatus)
"""What a listing may be filtered by."""


@attrs.frozen(kw_only=True)
class JobRecord:
    """A training job. All datetimes are aware and in UTC."""

    job_id: str
    owner: str
    """Who submitted it; it does not exist for anybody else."""
    key_id: str | None
    """The API key that it was submitted with; None on a server without keys."""
    server_id: str
    """The server that runs it."""
    status: JobStatus
    request: Mapping[str, Any]
    """What the client sent, without what it left out."""
    refs: FrozenRefs
    base_model: str
    """The base model behind ``model``, by the server's name for it."""
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    cancel_requested_at: datetime | None = None
    error: str | None = None
    attempt: int = 0
    """Processes that were started for it."""
    num_retries: int = 0
    """Times that its owner had it run again from the beginning."""
    run_key_id: str | None = None
    """The short-lived API key that its process has."""
    metrics: Mapping[str, Any] = attrs.field(factory=dict)
    artifacts: Mapping[str, Any] = attrs.field(factory=dict)
    resume: ResumePoint | None = None
    project_id: str | None = None

    @property
    def backend(self) -> str:
        """``tinker`` or ``ray``."""
        return str(self.request["backend"])

    @property
    def trainer_type(self) -> str:
        """``sft`` or ``rl``."""
        return str(self.request["trainer_type"])

    @property
    def config(self) -> Mapping[str, Any]:
        """The trainer's settings as they were sent."""
        config: Mapping[str, Any] = self.request["config"]
        return config


@attrs.frozen(kw_only=True)
class LogRecord:
    """One line of a job's log."""

    number: int
    """Its place among all lines of all jobs; grows with time."""
    timestamp: datetime
    level: str
    message: str
    data: Mapping[str, Any]
    event_type: str = "log"
    """What happened, an `tinker_jobs.protocol.EventType`; or what the server did: ``queued``, ``started``, ``resumed``,
    ``retried``, ``cancel_requested``, or the status that it ended the job with."""
    metrics: Mapping[str, Any] = attrs.field(factory=dict)
    """What was measured, as the event had it; of an end only the numbers, for the whole series are the job's."""
    resume_step: int | None = None
    """Optimizer steps behind the job where this line saved a state, or went back to one."""
