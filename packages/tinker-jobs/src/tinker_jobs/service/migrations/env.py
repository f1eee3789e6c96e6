"""Runs migrations on the connection that `tinker_core.storage.schema.Schema` hands over."""

from __future__ import annotations

from alembic import context

from tinker_jobs.service.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
