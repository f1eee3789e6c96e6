"""What may follow the ``?``, and the one body besides a new job's that clients send: a worker's progress."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tinker_jobs.errors import JobRequestError
from tinker_jobs.protocol import EventType, JobEvent
from tinker_jobs.requests import mistakes_of

_MOST = 2**31 - 1
_Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JobsQuery(_Wire):
    """Of the listing of jobs."""

    page: int = Field(default=1, ge=1, le=_MOST)
    page_size: int = Field(default=20, ge=1, le=100)
    status: Literal["pending", "queued", "running", "completed", "failed", "cancelled"] | None = None
    """No job is ever pending, but clients may ask."""
    backend: Literal["tinker", "ray"] | None = None
    trainer_type: Literal["sft", "rl"] | None = None
    project_ref: Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=4096)] | None = None


class LogsQuery(_Wire):
    """Of a job's log."""

    after: int = Field(default=0, ge=0, le=2**63 - 1)
    """Number of the last line that the client has."""


class CatalogQuery(_Wire):
    """Of the models that jobs can train."""

    limit: int = Field(default=20, ge=1, le=100)
    query: str | None = None
    """Part of a name, in any case."""
    family: str | None = None
    algorithm: Literal["sft", "importance_sampling", "ppo"] | None = None
    min_size_b: _Size | None = None
    """Billions of parameters."""
    max_size_b: _Size | None = None


class ProgressUpdate(_Wire):
    """What a worker outside of the server reports."""

    event_type: Literal[
        "training_start", "step_complete", "eval_complete", "checkpoint_saved", "training_error", "training_end"
    ]
    message: str | None = None
    level: Literal["debug", "info", "warning", "error"] = "info"
    metrics: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    artifacts: dict[str, Any] | None = None
    error: str | None = None

    @field_validator("metrics")
    @classmethod
    def _check_metrics(cls, metrics: dict[str, Any]) -> dict[str, Any]:
        for name, value in metrics.items():
            if isinstance(value, dict) or (isinstance(value, list) and not all(map(_is_number, value))):
                raise ValueError(f"{name!r} must be a number, a text or a list of numbers")
        return metrics

    def event(self) -> JobEvent:
        """The same as a job's own process would report it."""
        said = self.message or self.error or self.event_type.replace("_", " ")
        return JobEvent(
            event_type=EventType(self.event_type),
            message=said,
            level=self.level,
            metrics=self.metrics,
            data=self.data,
            artifacts=self.artifacts or {},
            error=self.error,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_progress(body: dict[str, object]) -> ProgressUpdate:
    """A worker's report; raises `JobRequestError` with all mistakes."""
    try:
        return ProgressUpdate.model_validate(body)
    except ValidationError as error:
        raise JobRequestError(mistakes_of(error, "body")) from error
