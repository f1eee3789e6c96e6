"""The servers that share a database, and what belongs to which."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_OWNED = ("sessions", "checkpoints", "loose_files")


def upgrade() -> None:
    """Create the table and the columns; what is there already belongs to whichever server asks."""
    op.create_table(
        "servers",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("server_id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("store", sa.String(), nullable=True),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_servers"),
        sa.UniqueConstraint("server_id", name="uq_servers_server_id"),
    )
    for column in ("owner", "project_id"):
        op.create_index(f"ix_servers_{column}", "servers", [column])
    for table in _OWNED:
        op.add_column(table, sa.Column("server_id", sa.String(), nullable=True))


def downgrade() -> None:
    """Drop them."""
    for table in _OWNED:
        op.drop_column(table, "server_id")
    op.drop_table("servers")
