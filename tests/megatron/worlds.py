"""Runs plays in worlds of several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from tests.megatron.plays import Scene

ROOT = Path(__file__).parents[2]


@attrs.frozen(kw_only=True)
class WorldOptions:
    """How many ranks, and how they share a model."""

    num_ranks: int
    options: dict[str, Any] = attrs.field(factory=dict)


WORLDS = {
    "one-rank": WorldOptions(num_ranks=1),
    "tensor": WorldOptions(num_ranks=2, options={"tensor-parallel": 2}),
    "data": WorldOptions(num_ranks=2),
    "pipeline": WorldOptions(num_ranks=2, options={"pipeline-parallel": 2}),
    "sequence": WorldOptions(num_ranks=2, options={"tensor-parallel": 2, "sequence-parallel": True}),
    "tensor-and-data": WorldOptions(num_ranks=4, options={"tensor-parallel": 2}),
    "tensor-and-pipeline": WorldOptions(num_ranks=4, options={"tensor-parallel": 2, "pipeline-parallel": 2}),
}
"""Worlds of dense models."""


def perform(world: WorldOptions, scenes: Sequence[Scene], directory: Path) -> Path:
    """Play scenes one after the other in processes of their own; returns where each has a directory."""
    out = directory / "out"
    out.mkdir(parents=True)
    plan = {
        "num_ranks": world.num_ranks,
        "options": world.options,
        "scenes": [attrs.asdict(scene) for scene in scenes],
        "out": str(out),
        "rendezvous": str(directory / "rendezvous"),
    }
    file = directory / "plan.json"
    file.write_text(json.dumps(plan))
    ranks = [_start(rank, file, directory / f"rank-{rank}.log") for rank in range(world.num_ranks)]
    try:
        codes = [rank.wait(timeout=280) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    logs = [(directory / f"rank-{rank}.log").read_text() for rank in range(world.num_ranks)]
    assert codes == [0] * world.num_ranks, "\n".join(logs)
    return out


def _start(rank: int, plan: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.megatron.plays", str(rank), str(plan)]
    with log.open("wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=subprocess.STDOUT
        )
