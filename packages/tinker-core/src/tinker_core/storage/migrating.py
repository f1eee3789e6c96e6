"""What every ``env.py`` of migrations does; imports alembic, which is slow."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context


def run_migrations(tables: sa.MetaData) -> None:
    """Run migrations on the connection that `tinker_core.storage.schema.Schema` hands over."""
    handed = context.config.attributes
    context.configure(
        connection=handed["connection"],
        version_table=handed["version_table"],
        target_metadata=tables,
        render_as_batch=True,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()
