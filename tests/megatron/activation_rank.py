"""One rank that counts what autograd keeps in a pass: ``python -m tests.megatron.activation_rank JSON``.

``JSON`` has ``path``, ``rank``, ``world_size``, ``rendezvous`` and ``context``; the bytes kept for backward go to the
file ``out``, each tensor's memory counted once and without the model's parameters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.fsdp.in_process import PARTS, create, random_data, request, run_one
from tinker_backend_megatron.trainer import MegatronTrainer
from tinker_core.interfaces import RankContext
from tinker_core.types import BaseModelSpec

LENGTHS = (150, 30, 70, 6)


@contextmanager
def counted(kept: dict[int, int]) -> Iterator[None]:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def main() -> None:
    plan = json.loads(sys.argv[1])
    context = RankContext(
        base_model=BaseModelSpec(name="tiny", path=plan["path"]),
        rank=plan["rank"],
        world_size=plan["world_size"],
        rendezvous=plan["rendezvous"],
        device="cpu",
        dtype="float32",
        micro_batch_tokens=sum(LENGTHS),
        options={"context-parallel": plan["context"]},
    )
    trainer = MegatronTrainer(context, PARTS)
    create(trainer, "model")  # type: ignore[arg-type]
    kept: dict[int, int] = {}
    with counted(kept):
        run_one(trainer, request("model", random_data(0, LENGTHS)))  # type: ignore[arg-type]
    Path(plan["out"]).write_text(str(sum(kept.values())))
    trainer.close()


if __name__ == "__main__":
    main()
