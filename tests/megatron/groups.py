"""Worker groups of the trainer megatron on tiny models."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.megatron import loaded_modules
from tests.models import Kind, write_tiny_model
from tinker_core.interfaces import OptionValue, WorkerGroupSpec
from tinker_core.testing import BlockingGroup, start_group
from tinker_core.testing.faults import FAULTS_PLUGIN
from tinker_core.types import BaseModelSpec


def megatron_spec(path: Path, num_ranks: int, options: Mapping[str, OptionValue], **settings: Any) -> WorkerGroupSpec:
    return WorkerGroupSpec(
        **{
            "base_model": BaseModelSpec(name="tiny", path=str(path)),
            "trainer": "megatron",
            "sampler": None,
            "plugins": ("core", "megatron", FAULTS_PLUGIN, "tests.fsdp.no_unpickling", loaded_modules.PLUGIN),
            "num_ranks": num_ranks,
            "device": "cpu",
            "dtype": "float32",
            "micro_batch_tokens": 24,
            "max_models": 5,
            "options": dict(options),
            "environment": {"OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path()},
            **settings,
        }
    )


def _python_path() -> str:
    """The repository, before whatever the tests themselves are run with."""
    root = str(Path(__file__).parents[2])
    return os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))


@contextmanager
def start_megatron(
    directory: Path,
    kind: Kind,
    num_ranks: int,
    options: Mapping[str, OptionValue],
    *,
    tie: bool = False,
    num_layers: int = 2,
    **settings: Any,
) -> Iterator[BlockingGroup]:
    path = write_tiny_model(directory, kind, tie=tie, num_layers=num_layers)
    with start_group(megatron_spec(path, num_ranks, options, **settings)) as group:
        yield group
