"""One rank of a world that loads models and writes them again: ``python -m tests.megatron.weight_ranks RANK CASES``.

``CASES`` is a file of JSON: ``{"world_size", "rendezvous", "cases", "out"}``; each case has ``name``, ``model``,
``dtype``, ``options``, and may have ``bridge`` and ``lost``, a parameter that rank 1 does not have any more.
For each case rank 0 writes a model into ``out/name``, and each rank what it read into ``out/name.RANK.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tinker_backend_megatron import weights
from tinker_backend_megatron.bridges import NONE, choose_bridge
from tinker_backend_megatron.loading import choose_dtype, load_model
from tinker_backend_megatron.topology import Topology
from tinker_backend_megatron.weight_export import export_weights
from tinker_backend_megatron.world import MegatronWorld
from tinker_core.errors import TinkerError
from tinker_core.interfaces import RankContext
from tinker_core.training.model_files import copy_model_files
from tinker_core.training.weight_files import WeightFiles, save_tensors
from tinker_core.types import BaseModelSpec

SHARD_BYTES = 40_000
"""So small that tiny models have several files."""


class CountingFiles(WeightFiles):
    reads: list[int] = []  # noqa: RUF012 - of the whole process

    def read(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = super().read(*args, **kwargs)
        self.reads.append(found.nbytes)
        return found


def run_case(case: dict[str, Any], out: Path, rank: int, world_size: int, rendezvous: str) -> dict[str, Any]:
    context = RankContext(
        base_model=BaseModelSpec(name="tiny", path=case["model"]),
        rank=rank,
        world_size=world_size,
        rendezvous=rendezvous,
        device="cpu",
        dtype=case["dtype"],
    )
    CountingFiles.reads.clear()
    world = MegatronWorld(context, Topology.from_options(world_size, case["options"]))
    try:
        bridge = choose_bridge(case.get("bridge", NONE))
        loaded = load_model(case["model"], choose_dtype(case["dtype"]), world, read=bridge)
        target = out / case["name"]
        if rank == 0:
            target.mkdir()
            copy_model_files(loaded.directory, target, loaded.dtype)
        lost = case.get("lost") if rank == 1 else None
        held = [(name, parameter) for name, parameter in loaded.root.named_parameters() if name != lost]
        tensors = export_weights(held, loaded.model_map, world)
        save_tensors(tensors, target if rank == 0 else None, shard_bytes=SHARD_BYTES)
    except TinkerError as error:
        return {"error": str(error)}
    finally:
        world.close()
    return {"error": None, "reads": CountingFiles.reads, "held": sum(parameter.nbytes for _, parameter in held)}


def main() -> None:
    rank, plan = int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    weights.WeightFiles = CountingFiles  # type: ignore[misc]
    for number, case in enumerate(plan["cases"]):
        rendezvous = f"file://{plan['rendezvous']}-{number}"
        found = run_case(case, Path(plan["out"]), rank, plan["world_size"], rendezvous)
        Path(plan["out"], f"{case['name']}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
