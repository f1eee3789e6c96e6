"""What passes between the server and a job's process: one JSON line in, then JSON lines out.

The server writes a `JobSpec` to the process's standard input, and later at most one line more, ``cancel``. The end of
input means that the server is gone, and so must the process go. Events come on standard output; standard error is kept
as a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import attrs
import cattrs
import orjson

from tinker_jobs.refs import FrozenRefs

FILES = "files"
"""Folder of a job's directory with what clients may fetch; everything else in there is the server's."""
STEPS, EVAL_STEPS = "steps", "eval/steps"
"""Metrics that hold the optimizer steps of the series beside them."""
CANCEL = b"cancel\n"
"""The line that asks a job's process to stop at the next step."""


class EventType(StrEnum):
    """What happened in a job's process."""

    TRAINING_START = "training_start"
    STEP_COMPLETE = "step_complete"
    EVAL_COMPLETE = "eval_complete"
    CHECKPOINT_SAVED = "checkpoint_saved"
    TRAINING_ERROR = "training_error"
    TRAINING_END = "training_end"
    CANCELLED = "cancelled"
    """The process has stopped because it was asked to."""
    LOG = "log"


@attrs.frozen(kw_only=True)
class JobEvent:
    """One line of a job's process, and one line of its log."""

    event_type: EventType
    message: str
    level: str = "info"
    """``debug``, ``info``, ``warning`` or ``error``."""
    metrics: Mapping[str, Any] = attrs.field(factory=dict)
    """Numbers, and lists of numbers. Lists are appended to the job's, numbers take the place of its own. Lists of one
    event that belong together have their steps beside them, under `STEPS` or `EVAL_STEPS`."""
    data: Mapping[str, Any] = attrs.field(factory=dict)
    """More for the log."""
    artifacts: Mapping[str, Any] = attrs.field(factory=dict)
    """Merged into the job's."""
    error: str | None = None
    resume: ResumePoint | None = None
    """Where a later process can go on; with ``checkpoint_saved`` only."""


@attrs.frozen(kw_only=True)
class ResumePoint:
    """A saved state of a job."""

    step: int
    """Optimizer steps that it has behind it."""
    state_path: str
    """``tinker://…/weights/…``."""
    extra: Mapping[str, Any] = attrs.field(factory=dict)
    """Whatever else a trainer needs to go on where it was, such as the samples that it has used."""


@attrs.frozen(kw_only=True)
class JobSpec:
    """Everything that a job's process is told."""

    job_id: str
    attempt: int
    """1 for the first process of a job; each resumption and each retry is one more."""
    request: Mapping[str, Any]
    """As the client sent it; `tinker_jobs.requests.parse` knows it."""
    refs: FrozenRefs
    base_model: str
    """The base model behind ``model``, by the server's name for it."""
    model_path: str
    """Directory or hub name of that, for its tokenizer."""
    base_url: str
    api_key: str = attrs.field(repr=False)
    directory: Path
    """The job's own files; `tinker-server` serves those in ``files/`` as artifacts."""
    plugins: tuple[str, ...] = ("*",)
    """Plugins to load for recipes and environments."""
    options: Mapping[str, Any] = attrs.field(factory=dict)
    """Settings of the service, such as Ray's address."""
    resume: ResumePoint | None = None
    metrics: Mapping[str, Any] = attrs.field(factory=dict)
    """What the job has reported so far, up to the point of resumption."""
    artifacts: Mapping[str, Any] = attrs.field(factory=dict)


def make_converter() -> cattrs.Converter:
    """Records to JSON and back; unknown keys are refused."""
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=False)
    converter.register_unstructure_hook(Path, str)
    converter.register_structure_hook(Path, lambda value, _: Path(value))
    return converter


CONVERTER = make_converter()


def encode(record: JobSpec | JobEvent) -> bytes:
    """A record as one line."""
    return orjson.dumps(CONVERTER.unstructure(record)) + b"\n"


def decode_event(line: bytes) -> JobEvent:
    """An event; raises `ValueError` for a line that is none."""
    try:
        return CONVERTER.structure(orjson.loads(line), JobEvent)
    except (TypeError, KeyError, ValueError, cattrs.BaseValidationError) as error:
        raise ValueError(f"not an event: {line[:200]!r}: {error}") from error


def decode_spec(line: bytes) -> JobSpec:
    """What a process is to do."""
    return CONVERTER.structure(orjson.loads(line), JobSpec)
