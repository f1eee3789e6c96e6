"""Where alembic begins."""

from __future__ import annotations

from tinker_core.storage.migrating import run_migrations
from tinker_jobs.service.tables import metadata

run_migrations(metadata)
