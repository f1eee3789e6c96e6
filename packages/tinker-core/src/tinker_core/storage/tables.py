"""Tables of the control database. Every one has ``owner`` and ``project_id``; none has room for a request body."""

from __future__ import annotations

import sqlalchemy as sa

from tinker_core.storage.columns import Text, UtcDateTime

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
"""Constraints have names, so that a later migration can address them on every database."""


_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
"""SQLite numbers rows only by a column of exactly this type, which has 64 bits there."""


def _json(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.JSON(none_as_null=True), nullable=nullable)


def _number() -> sa.Column[int]:
    """Order of insertion: breaks ties between equal timestamps, so that pages never overlap."""
    return sa.Column("number", _NUMBER, primary_key=True, autoincrement=True)


def _ownership() -> tuple[sa.Column[str], sa.Column[str]]:
    return sa.Column("owner", Text, nullable=False, index=True), sa.Column("project_id", Text, index=True)


sessions = sa.Table(
    "sessions",
    metadata,
    _number(),
    sa.Column("session_id", Text, nullable=False, unique=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    *_ownership(),
    _json("tags"),
    _json("user_metadata", nullable=True),
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
    _number(),
    sa.Column("model_id", Text, nullable=False, unique=True),
    sa.Column("session_id", Text, nullable=False, index=True),
    sa.Column("base_model", Text, nullable=False),
    _json("lora_config"),
    _json("optimizer_config"),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("last_request_at", UtcDateTime, nullable=False),
    *_ownership(),
    _json("user_metadata", nullable=True),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    _number(),
    sa.Column("path", Text, nullable=False, unique=True),
    sa.Column("run_id", Text, nullable=False, index=True),
    sa.Column("base_model", Text, nullable=False),
    _json("lora_config"),
    _json("optimizer_config"),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("request_id", Text, nullable=False, index=True),
    *_ownership(),
    _json("user_metadata", nullable=True),
    sa.Column("expires_at", UtcDateTime, index=True),
    sa.Column("public", sa.Boolean, nullable=False),
    sa.Column("version", Text),
    sa.Column("server_id", Text),
)

finished_saves = sa.Table(
    "finished_saves",
    metadata,
    _number(),
    sa.Column("request_id", Text, nullable=False, unique=True),
    sa.Column("path", Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False, index=True),
    *_ownership(),
)

loose_files = sa.Table(
    "loose_files",
    metadata,
    _number(),
    sa.Column("location", Text, nullable=False, unique=True),
    sa.Column("writer", Text, index=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    *_ownership(),
    sa.Column("server_id", Text),
)

samplers = sa.Table(
    "samplers",
    metadata,
    _number(),
    sa.Column("sampling_session_id", Text, nullable=False, unique=True),
    sa.Column("session_id", Text, nullable=False, index=True),
    sa.Column("base_model", Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("model_path", Text),
    sa.Column("revision", Text),
    sa.Column("num_clones", sa.Integer, nullable=False, server_default="0"),
    *_ownership(),
)

access_tokens = sa.Table(
    "access_tokens",
    metadata,
    _number(),
    sa.Column("token_id", Text, nullable=False, unique=True),
    sa.Column("token_hash", Text, nullable=False, unique=True),
    sa.Column("path", Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    *_ownership(),
    sa.Column("expires_at", UtcDateTime),
    sa.Column("revoked_at", UtcDateTime),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    _number(),
    sa.Column("key_id", Text, nullable=False, unique=True),
    sa.Column("key_hash", Text, nullable=False, unique=True),
    sa.Column("last_four", Text, nullable=False),
    sa.Column("name", Text, nullable=False),
    _json("limits"),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime),
    sa.Column("revoked_at", UtcDateTime),
    *_ownership(),
)

usage = sa.Table(
    "usage",
    metadata,
    _number(),
    sa.Column("usage_key", Text, nullable=False, unique=True),
    sa.Column("kind", Text, nullable=False),
    sa.Column("key_id", Text, index=True),
    sa.Column("session_id", Text, index=True),
    sa.Column("run_id", Text, index=True),
    sa.Column("base_model", Text, nullable=False),
    sa.Column("starts_at", UtcDateTime, nullable=False, index=True),
    sa.Column("ends_at", UtcDateTime, nullable=False, index=True),
    sa.Column("quantity", sa.BigInteger, nullable=False),
    *_ownership(),
)

audit_log = sa.Table(
    "audit_log",
    metadata,
    _number(),
    sa.Column("recorded_at", UtcDateTime, nullable=False, index=True),
    sa.Column("category", Text, nullable=False, index=True),
    sa.Column("event", Text, nullable=False),
    _json("details"),
    *_ownership(),
)

servers = sa.Table(
    "servers",
    metadata,
    _number(),
    sa.Column("server_id", Text, nullable=False, unique=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("store", Text),
    *_ownership(),
)
