"""Tables of the control database. Every one has ``owner`` and ``project_id``; none has room for a request body."""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa


class UtcDateTime(sa.TypeDecorator[datetime]):
    """An aware datetime, stored in UTC also by databases that keep no time zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """To UTC; raises `ValueError` for a naive datetime, which could mean any time zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"datetime {value!r} has no time zone; control records use aware UTC datetimes")
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Aware, in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
"""Constraints have names, so that a later migration can address them on every database."""


def _json(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.JSON(none_as_null=True), nullable=nullable)


def _number() -> sa.Column[int]:
    """Order of insertion: breaks ties between equal timestamps, so that pages never overlap."""
    return sa.Column("number", sa.Integer, primary_key=True, autoincrement=True)


def _ownership() -> tuple[sa.Column[str], sa.Column[str]]:
    return sa.Column("owner", sa.String, nullable=False, index=True), sa.Column("project_id", sa.String, index=True)


sessions = sa.Table(
    "sessions",
    metadata,
    _number(),
    sa.Column("session_id", sa.String, nullable=False, unique=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    *_ownership(),
    _json("tags"),
    _json("user_metadata", nullable=True),
    sa.Column("sdk_version", sa.String, nullable=False),
    sa.Column("display_name", sa.String),
    sa.Column("finished_at", UtcDateTime),
    sa.Column("finish_reason", sa.String),
    sa.Column("finish_detail", sa.String),
)

training_runs = sa.Table(
    "training_runs",
    metadata,
    _number(),
    sa.Column("model_id", sa.String, nullable=False, unique=True),
    sa.Column("session_id", sa.String, nullable=False, index=True),
    sa.Column("base_model", sa.String, nullable=False),
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
    sa.Column("path", sa.String, nullable=False, unique=True),
    sa.Column("run_id", sa.String, nullable=False, index=True),
    sa.Column("base_model", sa.String, nullable=False),
    _json("lora_config"),
    _json("optimizer_config"),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("request_id", sa.String, nullable=False, index=True),
    *_ownership(),
    _json("user_metadata", nullable=True),
    sa.Column("expires_at", UtcDateTime, index=True),
    sa.Column("public", sa.Boolean, nullable=False),
)

samplers = sa.Table(
    "samplers",
    metadata,
    _number(),
    sa.Column("sampling_session_id", sa.String, nullable=False, unique=True),
    sa.Column("session_id", sa.String, nullable=False, index=True),
    sa.Column("base_model", sa.String, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("model_path", sa.String),
    sa.Column("revision", sa.String),
    sa.Column("num_clones", sa.Integer, nullable=False, server_default="0"),
    *_ownership(),
)

access_tokens = sa.Table(
    "access_tokens",
    metadata,
    _number(),
    sa.Column("token_id", sa.String, nullable=False, unique=True),
    sa.Column("token_hash", sa.String, nullable=False, unique=True),
    sa.Column("path", sa.String, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    *_ownership(),
    sa.Column("expires_at", UtcDateTime),
    sa.Column("revoked_at", UtcDateTime),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    _number(),
    sa.Column("key_id", sa.String, nullable=False, unique=True),
    sa.Column("key_hash", sa.String, nullable=False, unique=True),
    sa.Column("last_four", sa.String, nullable=False),
    sa.Column("name", sa.String, nullable=False),
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
    sa.Column("usage_key", sa.String, nullable=False, unique=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("key_id", sa.String, index=True),
    sa.Column("session_id", sa.String, index=True),
    sa.Column("run_id", sa.String, index=True),
    sa.Column("base_model", sa.String, nullable=False),
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
    sa.Column("category", sa.String, nullable=False, index=True),
    sa.Column("event", sa.String, nullable=False),
    _json("details"),
    *_ownership(),
)
