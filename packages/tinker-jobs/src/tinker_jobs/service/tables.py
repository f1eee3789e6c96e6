"""Tables of training jobs in the control database."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from tinker_core.storage.columns import Text, UtcDateTime
from tinker_core.storage.schema import Schema

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

SCHEMA = Schema(
    package="tinker-jobs",
    migrations=Path(__file__).parent / "migrations",
    version_table="jobs_alembic_version",
)

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
"""SQLite numbers rows only by a column of exactly this type, which has 64 bits there."""


def _json(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.JSON(none_as_null=True), nullable=nullable)


def _number() -> sa.Column[int]:
    return sa.Column("number", _NUMBER, primary_key=True, autoincrement=True)


def _ownership() -> tuple[sa.Column[str], sa.Column[str]]:
    return sa.Column("owner", Text, nullable=False, index=True), sa.Column("project_id", Text, index=True)


training_jobs = sa.Table(
    "training_jobs",
    metadata,
    _number(),
    sa.Column("job_id", Text, nullable=False, unique=True),
    *_ownership(),
    sa.Column("key_id", Text),
    sa.Column("server_id", Text, nullable=False, index=True),
    sa.Column("status", Text, nullable=False, index=True),
    # These three repeat what the request says, to be listed by.
    sa.Column("backend", Text, nullable=False),
    sa.Column("trainer_type", Text, nullable=False),
    sa.Column("project_ref", Text),
    _json("request"),
    _json("refs"),
    sa.Column("base_model", Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("started_at", UtcDateTime),
    sa.Column("completed_at", UtcDateTime),
    sa.Column("cancel_requested_at", UtcDateTime),
    sa.Column("error", Text),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("num_retries", sa.Integer, nullable=False),
    sa.Column("run_key_id", Text, index=True),
    _json("metrics"),
    _json("artifacts"),
    _json("resume", nullable=True),
)

training_job_lines = sa.Table(
    "training_job_lines",
    metadata,
    _number(),
    sa.Column("job_id", Text, nullable=False),
    *_ownership(),
    sa.Column("timestamp", UtcDateTime, nullable=False),
    sa.Column("event_type", Text, nullable=False),
    sa.Column("level", Text, nullable=False),
    sa.Column("message", Text, nullable=False),
    _json("data"),
    _json("metrics"),
    sa.Column("resume_step", sa.Integer),
    sa.Index("ix_training_job_lines_job_id_number", "job_id", "number"),
)
"""The log of every job: only ever added to. What a running job has reported is the sum of its lines."""
