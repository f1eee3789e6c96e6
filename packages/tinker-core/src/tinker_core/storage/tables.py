"""Tables of the control database. Every one has ``owner`` and ``project_id``; none has room for a request body."""

from __future__ import annotations

import sqlalchemy as sa

from tinker_core.storage.columns import Text, UtcDateTime, json_column, named_metadata, number, ownership

metadata = named_metadata()

sessions = sa.Table(
    "sessions",
    metadata,
    number(),
    sa.Column("session_id", Text, nullable=False, unique=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    *ownership(),
    json_column("tags"),
    json_column("user_metadata", nullable=True),
    sa.Column("sdk_version", Text, nullable=False),
    sa.Column("display_name", Text),
    sa.Column("finished_at", UtcDateTime),
    sa.Column("finish_reason", Text),
    sa.Column("finish_detail", Text),
    sa.Column("server_id", Text),
)

training_runs = sa.Table(
    "training_runs",
    metadata,
    number(),
    sa.Column("model_id", Text, nullable=False, unique=True),
    sa.Column("session_id", Text, nullable=False, index=True),
    sa.Column("base_model", Text, nullable=False),
    json_column("lora_config"),
    json_column("optimizer_config"),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("last_request_at", UtcDateTime, nullable=False),
    *ownership(),
    json_column("user_metadata", nullable=True),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    number(),
    sa.Column("path", Text, nullable=False, unique=True),
    sa.Column("run_id", Text, nullable=False, index=True),
    sa.Column("base_model", Text, nullable=False),
    json_column("lora_config"),
    json_column("optimizer_config"),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("request_id", Text, nullable=False, index=True),
    *ownership(),
    json_column("user_metadata", nullable=True),
    sa.Column("expires_at", UtcDateTime, index=True),
    sa.Column("public", sa.Boolean, nullable=False),
    sa.Column("version", Text),
    sa.Column("server_id", Text),
)

finished_saves = sa.Table(
    "finished_saves",
    metadata,
    number(),
    sa.Column("request_id", Text, nullable=False, unique=True),
    sa.Column("path", Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False, index=True),
    *ownership(),
)

loose_files = sa.Table(
    "loose_files",
    metadata,
    number(),
    sa.Column("location", Text, nullable=False, unique=True),
    sa.Column("writer", Text, index=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    *ownership(),
    sa.Column("server_id", Text),
)

samplers = sa.Table(
    "samplers",
    metadata,
    number(),
    sa.Column("sampling_session_id", Text, nullable=False, unique=True),
    sa.Column("session_id", Text, nullable=False, index=True),
    sa.Column("base_model", Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("model_path", Text),
    sa.Column("revision", Text),
    sa.Column("num_clones", sa.Integer, nullable=False, server_default="0"),
    *ownership(),
)

access_tokens = sa.Table(
    "access_tokens",
    metadata,
    number(),
    sa.Column("token_id", Text, nullable=False, unique=True),
    sa.Column("token_hash", Text, nullable=False, unique=True),
    sa.Column("path", Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    *ownership(),
    sa.Column("expires_at", UtcDateTime),
    sa.Column("revoked_at", UtcDateTime),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    number(),
    sa.Column("key_id", Text, nullable=False, unique=True),
    sa.Column("key_hash", Text, nullable=False, unique=True),
    sa.Column("last_four", Text, nullable=False),
    sa.Column("name", Text, nullable=False),
    json_column("limits"),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime),
    sa.Column("revoked_at", UtcDateTime),
    *ownership(),
)

usage = sa.Table(
    "usage",
    metadata,
    number(),
    sa.Column("usage_key", Text, nullable=False, unique=True),
    sa.Column("kind", Text, nullable=False),
    sa.Column("key_id", Text, index=True),
    sa.Column("session_id", Text, index=True),
    sa.Column("run_id", Text, index=True),
    sa.Column("base_model", Text, nullable=False),
    sa.Column("starts_at", UtcDateTime, nullable=False, index=True),
    sa.Column("ends_at", UtcDateTime, nullable=False, index=True),
    sa.Column("quantity", sa.BigInteger, nullable=False),
    *ownership(),
)

audit_log = sa.Table(
    "audit_log",
    metadata,
    number(),
    sa.Column("recorded_at", UtcDateTime, nullable=False, index=True),
    sa.Column("category", Text, nullable=False, index=True),
    sa.Column("event", Text, nullable=False),
    json_column("details"),
    *ownership(),
)

servers = sa.Table(
    "servers",
    metadata,
    number(),
    sa.Column("server_id", Text, nullable=False, unique=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("store", Text),
    *ownership(),
)
