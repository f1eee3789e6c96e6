"""API keys, the usage ledger and the audit log."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _text(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.String(), nullable=nullable)


def _time(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _create(table: str, unique: tuple[str, ...], indexed: tuple[str, ...], *columns: sa.Column[Any]) -> None:
    op.create_table(
        table,
        sa.Column("number", _NUMBER, autoincrement=True, nullable=False),
        *columns,
        _text("owner"),
        _text("project_id", nullable=True),
        sa.PrimaryKeyConstraint("number", name=f"pk_{table}"),
        *(sa.UniqueConstraint(column, name=f"uq_{table}_{column}") for column in unique),
    )
    for column in ("owner", "project_id", *indexed):
        op.create_index(f"ix_{table}_{column}", table, [column])


def upgrade() -> None:
    """Create the three tables."""
    _create(
        "api_keys",
        ("key_id", "key_hash"),
        (),
        _text("key_id"),
        _text("key_hash"),
        _text("last_four"),
        _text("name"),
        sa.Column("limits", sa.JSON(), nullable=False),
        _time("created_at"),
        _time("expires_at", nullable=True),
        _time("revoked_at", nullable=True),
    )
    _create(
        "usage",
        ("usage_key",),
        ("key_id", "session_id", "run_id", "starts_at", "ends_at"),
        _text("usage_key"),
        _text("kind"),
        _text("key_id", nullable=True),
        _text("session_id", nullable=True),
        _text("run_id", nullable=True),
        _text("base_model"),
        _time("starts_at"),
        _time("ends_at"),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
    )
    _create(
        "audit_log",
        (),
        ("category", "recorded_at"),
        _time("recorded_at"),
        _text("category"),
        _text("event"),
        sa.Column("details", sa.JSON(), nullable=False),
    )


def downgrade() -> None:
    """Drop the three tables."""
    for table in ("audit_log", "usage", "api_keys"):
        op.drop_table(table)
