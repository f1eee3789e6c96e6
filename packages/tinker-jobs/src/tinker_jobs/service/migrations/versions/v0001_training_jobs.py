"""Training jobs and their logs.

The columns are spelled out rather than taken from `tinker_jobs.service.tables`: a migration must go on meaning what it
meant when it was written.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _text(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.String(), nullable=nullable)


def _time(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _json(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.JSON(), nullable=nullable)


def _integer(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.Integer(), nullable=nullable)


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "training_jobs",
        sa.Column("number", _NUMBER, autoincrement=True, nullable=False),
        _text("job_id"),
        _text("owner"),
        _text("project_id", nullable=True),
        _text("key_id", nullable=True),
        _text("server_id"),
        _text("status"),
        _text("backend"),
        _text("trainer_type"),
        _text("project_ref", nullable=True),
        _json("request"),
        _json("refs"),
        _text("base_model"),
        _time("created_at"),
        _time("started_at", nullable=True),
        _time("completed_at", nullable=True),
        _time("cancel_requested_at", nullable=True),
        _text("error", nullable=True),
        _integer("attempt"),
        _integer("num_retries"),
        _text("run_key_id", nullable=True),
        _json("metrics"),
        _json("artifacts"),
        _json("resume", nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_training_jobs"),
        sa.UniqueConstraint("job_id", name="uq_training_jobs_job_id"),
    )
    op.create_table(
        "training_job_lines",
        sa.Column("number", _NUMBER, autoincrement=True, nullable=False),
        _text("job_id"),
        _text("owner"),
        _text("project_id", nullable=True),
        _time("timestamp"),
        _text("event_type"),
        _text("level"),
        _text("message"),
        _json("data"),
        _json("metrics"),
        _integer("resume_step", nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_training_job_lines"),
    )
    for column in ("owner", "project_id", "server_id", "status", "run_key_id"):
        op.create_index(f"ix_training_jobs_{column}", "training_jobs", [column])
    for column in ("owner", "project_id"):
        op.create_index(f"ix_training_job_lines_{column}", "training_job_lines", [column])
    op.create_index("ix_training_job_lines_job_id_number", "training_job_lines", ["job_id", "number"])


def downgrade() -> None:
    """Drop both tables."""
    op.drop_table("training_job_lines")
    op.drop_table("training_jobs")
