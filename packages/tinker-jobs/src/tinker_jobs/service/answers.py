"""Jobs, log lines and what workers ask for, as clients see them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
from starlette.responses import Response

from tinker_jobs.records import JobRecord, LogRecord
from tinker_jobs.refs import FrozenDataset, FrozenRefs, FrozenTask, FrozenWorld
from tinker_jobs.service.tenancy import Tenancy

_FROM_REQUEST = ("name", "project_ref", "run_ref")
_FROM_CONFIG = ("world_manifest_id", "world_runtime_id", "world_agent_name", "world_goal")


def answer(value: object, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(value), status_code=status, media_type="application/json")


def describe_job(record: JobRecord, tenancy: Tenancy) -> dict[str, Any]:
    """A job as ``TrainingJob``."""
    config, refs = record.config, record.refs
    return {
        "id": record.job_id,
        "organization_id": tenancy.organization_id,
        "workspace_id": tenancy.workspace_id,
        "status": record.status.value,
        "backend": record.backend,
        "trainer_type": record.trainer_type,
        "algorithm": config.get("algorithm", "grpo" if record.backend == "ray" else None),
        "model": record.request["model"],
        **{name: record.request.get(name) for name in _FROM_REQUEST},
        **{name: config.get(name) for name in _FROM_CONFIG},
        **_resolved(refs),
        "capability": {
            "artifact_id": None,
            "name": refs.capability.name,
            "version": refs.capability.version,
            "runtime_digest": refs.capability.runtime_digest,
        },
        "config": config,
        "metrics": record.metrics,
        "artifacts": record.artifacts,
        "tags": record.request.get("tags", []),
        "error": record.error,
        "created_at": _time(record.created_at),
        "created_by": tenancy.user_id(record.owner),
        "created_by_email": tenancy.email_of(record.owner),
        "created_by_user": tenancy.identify(record.owner),
        "started_at": _time(record.started_at),
        "completed_at": _time(record.completed_at),
        "cancel_requested_at": _time(record.cancel_requested_at),
    }


def _resolved(refs: FrozenRefs) -> dict[str, Any]:
    return {
        "dataset_ref": _dataset(refs.dataset),
        "prompt_dataset_ref": _dataset(refs.prompt_dataset),
        "trajectory_dataset_refs": [_dataset(dataset) for dataset in refs.trajectory_datasets],
        "task_ref": None if refs.task is None else str(refs.task),
    }


def _dataset(dataset: FrozenDataset | None) -> dict[str, str] | None:
    return None if dataset is None else {"name": dataset.name, "version": dataset.version}


def describe_line(line: LogRecord) -> dict[str, Any]:
    """A line of a log as ``TrainingJobLogEntry``, with its number, what happened, and what was measured."""
    return {
        "number": line.number,
        "timestamp": _time(line.timestamp),
        "level": line.level,
        "message": line.message,
        "data": line.data,
        "event_type": line.event_type,
        "metrics": line.metrics,
    }


def describe_context(record: JobRecord) -> dict[str, Any]:
    """What a worker elsewhere needs, as ``TrainingRLContext``."""
    refs = record.refs
    recorded = refs.trajectory_datasets
    return {
        "capability_entry_prompt": refs.capability.prompt,
        "task": None if refs.task is None else _describe_task(refs.task),
        "world": None if refs.world is None else _describe_world(refs.world),
        "sampled_trajectory_dataset_ref": str(recorded[0]) if recorded else None,
        "reward_recipe": record.config.get("reward_recipe"),
    }


def _describe_task(task: FrozenTask) -> dict[str, Any]:
    return {
        "id": str(task),
        "reference": str(task),
        "name": task.name,
        "version": task.version,
        "instruction": task.instruction,
        "ports": _mapping(task.content, "ports"),
        "verification": task.verification,
        "solution": _mapping(task.content, "solution"),
        # There is no sandbox to run it in and no bucket that holds it.
        "sandbox_provider": "none",
        "s3_key": "",
    }


def _mapping(content: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    found = content.get(name)
    return found if isinstance(found, Mapping) else None


def _describe_world(world: FrozenWorld) -> dict[str, Any]:
    return {
        "id": world.manifest_id,
        "name": world.manifest_id,
        "manifest_backend_id": None,
        "server_url": world.server_url,
        "artifact_refs": {},
        "stats": {},
    }


def _time(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone(UTC).isoformat()
