"""Access tokens, and checkpoints found by the request that wrote them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table and the index."""
    op.create_table(
        "access_tokens",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("token_id", sa.String(), nullable=False),
        sa.Column("token_hash", sa.String(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_access_tokens"),
        sa.UniqueConstraint("token_id", name="uq_access_tokens_token_id"),
        sa.UniqueConstraint("token_hash", name="uq_access_tokens_token_hash"),
    )
    for column in ("owner", "project_id"):
        op.create_index(f"ix_access_tokens_{column}", "access_tokens", [column])
    op.create_index("ix_checkpoints_request_id", "checkpoints", ["request_id"])


def downgrade() -> None:
    """Drop the index and the table."""
    op.drop_index("ix_checkpoints_request_id", "checkpoints")
    op.drop_table("access_tokens")
