"""Control records as the SDK's REST types."""

from __future__ import annotations

import json
from datetime import datetime

from tinker_core.types import (
    AuditRecord,
    CheckpointRecord,
    CheckpointType,
    JsonObject,
    LoraConfig,
    ModelMetadata,
    SamplerRecord,
    SessionSummary,
    TrainingRunRecord,
)

_CHECKPOINT_TYPES = {
    CheckpointType.TRAINING: "training",
    CheckpointType.SAMPLER: "sampler",
    CheckpointType.EXTERNAL: "external",
}


def _time(moment: datetime) -> str:
    return moment.isoformat()


def metadata_to_json(values: JsonObject | None) -> dict[str, str] | None:
    """Clients read texts only; anything else that they sent is shown as JSON."""
    if values is None:
        return None
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def checkpoint_to_json(record: CheckpointRecord) -> JsonObject:
    """SDK ``Checkpoint``."""
    return {
        "checkpoint_id": record.path.checkpoint_id,
        "checkpoint_type": _CHECKPOINT_TYPES[record.path.kind],
        "time": _time(record.created_at),
        "tinker_path": str(record.path),
        "size_bytes": record.size_bytes,
        "public": record.public,
        "user_metadata": metadata_to_json(record.user_metadata),
        "expires_at": None if record.expires_at is None else _time(record.expires_at),
    }


def _kind_to_json(config: LoraConfig) -> JsonObject:
    """Rank 0 means all parameters."""
    return {"is_lora": config.rank > 0, "lora_rank": config.rank or None}


def training_run_to_json(record: TrainingRunRecord, checkpoints: list[CheckpointRecord]) -> JsonObject:
    """SDK ``TrainingRun``; ``checkpoints`` are the run's own, newest first."""
    newest: dict[CheckpointType, JsonObject] = {}
    for checkpoint in checkpoints:
        newest.setdefault(checkpoint.path.kind, checkpoint_to_json(checkpoint))
    return {
        "training_run_id": record.model_id,
        "base_model": record.base_model,
        "model_owner": record.owner,
        **_kind_to_json(record.lora_config),
        "corrupted": False,
        "last_request_time": _time(record.last_request_at),
        "last_checkpoint": newest.get(CheckpointType.TRAINING),
        "last_sampler_checkpoint": newest.get(CheckpointType.SAMPLER),
        "user_metadata": metadata_to_json(record.user_metadata),
    }


def model_info_to_json(record: TrainingRunRecord, architecture: str) -> JsonObject:
    """SDK ``GetInfoResponse``. Without a tokenizer id clients load the tokenizer of the base model's name."""
    return {
        "type": "get_info",
        "model_id": record.model_id,
        "model_name": record.base_model,
        **_kind_to_json(record.lora_config),
        "optimizer_config": {"type": record.optimizer_config.type, **record.optimizer_config.settings},
        "model_data": {"arch": architecture, "model_name": record.base_model, "tokenizer_id": None},
    }


def weights_info_to_json(record: CheckpointRecord) -> JsonObject:
    """SDK ``WeightsInfoResponse``."""
    lora = record.lora_config
    return {
        "base_model": record.base_model,
        **_kind_to_json(lora),
        "train_attn": lora.train_attn,
        "train_mlp": lora.train_mlp,
        "train_unembed": lora.train_unembed,
        "optimizer_config": {"type": record.optimizer_config.type, **record.optimizer_config.settings},
    }


def session_to_json(summary: SessionSummary) -> JsonObject:
    """SDK ``SessionSummary``, which has no word for "no project"."""
    session = summary.session
    return {
        "session_id": session.session_id,
        "created_at": _time(session.created_at),
        "owner": session.owner,
        "project_id": session.project_id or "",
        "status": _status_to_json(summary),
        "checkpoints_count": summary.checkpoints_count,
        "display_name": session.display_name,
        "user_metadata": metadata_to_json(session.user_metadata),
        "checkpoint_storage_bytes": summary.checkpoint_storage_bytes,
    }


def _status_to_json(summary: SessionSummary) -> JsonObject | None:
    if summary.status != "client_finished":
        return None if summary.status is None else {"type": summary.status}
    session = summary.session
    reason = {"type": session.finish_reason or "success"}
    return {"type": "client_finished", "reason": reason, "detail": session.finish_detail}


def search_cursor_to_json(last: SessionSummary) -> JsonObject:
    """SDK ``SessionSearchCursor``."""
    return {"last_created_at": _time(last.session.created_at), "last_session_id": last.session.session_id}


def sampler_to_json(record: SamplerRecord) -> JsonObject:
    """SDK ``GetSamplerResponse``."""
    return {
        "sampler_id": record.sampling_session_id,
        "base_model": record.base_model,
        "model_path": record.model_path,
    }


def model_to_json(model: ModelMetadata) -> JsonObject:
    """SDK ``SupportedModel``."""
    return {
        "model_name": model.model_name,
        "max_context_length": model.max_context_length,
        "trainable": model.trainable,
        "sampleable": model.sampleable,
    }


def cursor_to_json(offset: int, limit: int, total: int) -> JsonObject:
    """SDK ``Cursor``."""
    return {"offset": offset, "limit": limit, "total_count": total}


def audit_entry_to_json(entry: AuditRecord) -> JsonObject:
    """SDK ``AuditLogEntry``; the last three are for clients that do not read the details yet."""
    return {
        "timestamp": _time(entry.recorded_at),
        "event": entry.event,
        "event_details": entry.details,
        "model_id": entry.details.get("model_id"),
        "tinker_path": entry.details.get("tinker_path"),
        "purpose": entry.details.get("purpose"),
    }
