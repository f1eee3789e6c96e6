"""One real server with a tiny model for all tests of jobs that train for real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from tests.e2e.conftest import run_server
from tests.jobs.hosting import JobsApi, serve_jobs
from tests.models import write_tiny_model


@attrs.frozen
class JobServer:
    """A ``tinker-server`` with the service ``jobs``."""

    url: str
    model: str
    """Name and path of its base model."""
    data_dir: Path


@pytest.fixture(scope="package")  # its workers are children of this process, which other tests count
def jobs_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobsApi]:
    """A server with fake models on which jobs stay queued."""
    with serve_jobs(tmp_path_factory.mktemp("jobs-api")) as api:
        yield api


@pytest.fixture(scope="session")
def job_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobServer]:
    root = tmp_path_factory.mktemp("jobs")
    model = write_tiny_model(root / "llama", "llama", tie=True, max_context=512)
    yield from _serve(root, model)


def _serve(root: Path, model: Path) -> Iterator[JobServer]:
    flags = ("--base-model", str(model), "--data-dir", str(root / "data"), "--backend", "fsdp")
    with run_server(*flags) as url:
        yield JobServer(url, str(model), root / "data")
