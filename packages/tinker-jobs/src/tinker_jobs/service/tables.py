"""Tables of training jobs in the control database."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from tinker_core.storage.columns import Text, UtcDateTime, json_column, named_metadata, number, ownership
from tinker_core.storage.schema import Schema

metadata = named_metadata()

SCHEMA = Schema(
    package="tinker-jobs",
    migrations=Path(__file__).parent / "migrations",
    version_table="jobs_alembic_version",
)

training_jobs = sa.Table(
    "training_jobs",
    metadata,
    number(),
    sa.Column("job_id", Text, nullable=False, unique=True),
    *ownership(),
    sa.Column("key_id", Text),
    sa.Column("server_id", Text, nullable=False, index=True),
    sa.Column("status", Text, nullable=False, index=True),
    # These three repeat what the request says, to be listed by.
    sa.Column("backend", Text, nullable=False),
    sa.Column("trainer_type", Text, nullable=False),
    sa.Column("project_ref", Text),
    json_column("request"),
    json_column("refs"),
    sa.Column("base_model", Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("started_at", UtcDateTime),
    sa.Column("completed_at", UtcDateTime),
    sa.Column("cancel_requested_at", UtcDateTime),
    sa.Column("error", Text),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("num_retries", sa.Integer, nullable=False),
    sa.Column("run_key_id", Text, index=True),
    json_column("metrics"),
    json_column("artifacts"),
    json_column("resume", nullable=True),
)

training_job_lines = sa.Table(
    "training_job_lines",
    metadata,
    number(),
    sa.Column("job_id", Text, nullable=False),
    *ownership(),
    sa.Column("timestamp", UtcDateTime, nullable=False),
    sa.Column("event_type", Text, nullable=False),
    sa.Column("level", Text, nullable=False),
    sa.Column("message", Text, nullable=False),
    json_column("data"),
    json_column("metrics"),
    sa.Column("resume_step", sa.Integer),
    sa.Index("ix_training_job_lines_job_id_number", "job_id", "number"),
)
"""The log of every job: only ever added to. What a running job has reported is the sum of its lines."""
