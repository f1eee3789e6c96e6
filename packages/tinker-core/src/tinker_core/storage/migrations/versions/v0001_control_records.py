"""Sessions, training runs, checkpoints and samplers.

The columns are spelled out rather than taken from `tinker_core.storage.tables`: a migration must go on meaning what it
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


def _create(table: str, unique: str, indexed: tuple[str, ...], *columns: sa.Column[Any]) -> None:
    op.create_table(
        table,
        sa.Column("number", _NUMBER, autoincrement=True, nullable=False),
        *columns,
        _text("owner"),
        _text("project_id", nullable=True),
        sa.PrimaryKeyConstraint("number", name=f"pk_{table}"),
        sa.UniqueConstraint(unique, name=f"uq_{table}_{unique}"),
    )
    for column in ("owner", "project_id", *indexed):
        op.create_index(f"ix_{table}_{column}", table, [column])


def upgrade() -> None:
    """Create the four tables."""
    _create_sessions_and_runs()
    _create_checkpoints_and_samplers()


def _create_sessions_and_runs() -> None:
    _create(
        "sessions",
        "session_id",
        (),
        _text("session_id"),
        _time("created_at"),
        _json("tags"),
        _json("user_metadata", nullable=True),
        _text("sdk_version"),
        _text("display_name", nullable=True),
        _time("finished_at", nullable=True),
        _text("finish_reason", nullable=True),
        _text("finish_detail", nullable=True),
    )
    _create(
        "training_runs",
        "model_id",
        ("session_id",),
        _text("model_id"),
        _text("session_id"),
        _text("base_model"),
        _json("lora_config"),
        _json("optimizer_config"),
        _time("created_at"),
        _time("last_request_at"),
        _json("user_metadata", nullable=True),
    )


def _create_checkpoints_and_samplers() -> None:
    _create(
        "checkpoints",
        "path",
        ("run_id", "expires_at"),
        _text("path"),
        _text("run_id"),
        _text("base_model"),
        _json("lora_config"),
        _json("optimizer_config"),
        _time("created_at"),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        _text("request_id"),
        _json("user_metadata", nullable=True),
        _time("expires_at", nullable=True),
        sa.Column("public", sa.Boolean(), nullable=False),
    )
    _create(
        "samplers",
        "sampling_session_id",
        ("session_id",),
        _text("sampling_session_id"),
        _text("session_id"),
        _text("base_model"),
        _time("created_at"),
        _text("model_path", nullable=True),
        _text("revision", nullable=True),
    )


def downgrade() -> None:
    """Drop the four tables."""
    for table in ("samplers", "checkpoints", "training_runs", "sessions"):
        op.drop_table(table)
