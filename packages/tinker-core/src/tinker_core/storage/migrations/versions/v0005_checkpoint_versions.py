"""Versions of checkpoints, the saves that are finished, and the files that belong to no checkpoint."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _create(table: str, unique: str, indexed: tuple[str, ...], *columns: sa.Column[str]) -> None:
    op.create_table(
        table,
        sa.Column("number", _NUMBER, autoincrement=True, nullable=False),
        *columns,
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("number", name=f"pk_{table}"),
        sa.UniqueConstraint(unique, name=f"uq_{table}_{unique}"),
    )
    for column in ("owner", "project_id", *indexed):
        op.create_index(f"ix_{table}_{column}", table, [column])


def upgrade() -> None:
    """Create the tables and the column; checkpoints of older releases have no version."""
    op.add_column("checkpoints", sa.Column("version", sa.String(), nullable=True))
    _create(
        "finished_saves",
        "request_id",
        ("created_at",),
        sa.Column("request_id", sa.String(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
    )
    _create(
        "loose_files",
        "location",
        ("writer",),
        sa.Column("location", sa.String(), nullable=False),
        sa.Column("writer", sa.String(), nullable=True),
    )


def downgrade() -> None:
    """Drop them."""
    op.drop_table("loose_files")
    op.drop_table("finished_saves")
    op.drop_column("checkpoints", "version")
