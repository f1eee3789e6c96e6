"""Context parallelism: ranks that share the tokens of a micro-batch find what one rank finds.

It is this backend's own and needs no shim; where other parallelism that needs it takes part, the test says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import attrs
import pytest

from tests.megatron.groups import megatron_spec, start_megatron
from tests.models import Kind, write_tiny_model
from tinker_core.interfaces import OptionValue
from tinker_core.testing import BlockingGroup, start_group
from tinker_core.testing.trainer_contract import TrainerContract
from tinker_core.testing.trainer_lab import (
    Arrays,
    TrainerLab,
    assert_close,
    assert_same_output,
    output_of,
    read_safetensors,
)
from tinker_core.types import ForwardBackwardOutput

TOLERANCE = 1e-5
BUDGET = 64
World = tuple[int, Kind, dict[str, OptionValue]]
WORLDS: dict[str, World] = {
    "two ranks": (2, "qwen3", {"context-parallel": 2}),
    "four ranks": (4, "qwen2", {"context-parallel": 4}),
    "with tensor parallelism": (4, "llama", {"context-parallel": 2, "tensor-parallel": 2}),
    "with data parallelism": (4, "llama", {"context-parallel": 2}),
    "with sequence parallelism (shim)": (
        4,
        "qwen3",
        {"context-parallel": 2, "tensor-parallel": 2, "sequence-parallel": True},
    ),
    "with a pipeline (shim)": (4, "qwen3", {"context-parallel": 2, "pipeline-parallel": 2}),
    "with experts on the same ranks (shim)": (2, "qwen3_moe", {"context-parallel": 2, "expert-parallel": 2}),
}
PACKS: dict[str, Sequence[int]] = {
    "one sequence in both halves of every rank": (61,),
    "sequences that end where a rank's chunk ends": (16, 16, 32),
    "sequences across the borders": (11, 23, 9, 20),
    "short sequences": (3, 1, 2, 4, 1, 5, 2, 2, 3, 1),
    "one token": (1,),
    "several micro-batches": (40, 33, 64, 2, 17, 50),
    "a sequence longer than a micro-batch": (100, 3),
}


pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module", params=WORLDS)
def groups(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[BlockingGroup, BlockingGroup]]:
    """One rank, and several, on the same model."""
    num_ranks, kind, options = WORLDS[request.param]
    path = write_tiny_model(tmp_path_factory.mktemp("model"), kind, tie=True)
    alone = megatron_spec(path, 1, {}, micro_batch_tokens=BUDGET)
    with start_group(alone) as one, start_group(attrs.evolve(alone, num_ranks=num_ranks, options=options)) as several:
        yield one, several


@attrs.frozen
class Found:
    """What a pass over two tenants' data and a step of each give."""

    outputs: list[ForwardBackwardOutput]
    gradients: list[Arrays]
    metrics: list[dict[str, float]]


def run_both(lab: TrainerLab, models: Sequence[str], lengths: Sequence[int]) -> Found:
    one, two = models
    results = lab.run(
        lab.request(one, lab.data(2, lengths)),
        lab.request(two, lab.data(3, lengths, policy=True), "importance_sampling"),
    )
    snapshots = [lab.snapshot(model, gradient=True) for model in models]
    return Found(
        [output_of(result) for result in results],
        [read_safetensors(directory / "gradient.safetensors") for directory in snapshots],
        [lab.step(model, learning_rate=0.0, grad_clip_norm=1.0) for model in models],
    )


@pytest.mark.parametrize("pack", PACKS)
def test_logprobs_losses_gradients_and_norms_of_two_tenants_are_those_of_one_rank(
    groups: tuple[BlockingGroup, BlockingGroup], tmp_path: Path, pack: str
) -> None:
    alone, together = (TrainerLab(group, tmp_path) for group in groups)
    settings = [{"rank": 4}, {"rank": 2, "train_unembed": False}]
    with closing(alone), closing(together):
        theirs = [alone.create(seed=seed, **each) for seed, each in enumerate(settings)]
        ours = [together.create(**each) for each in settings]
        for seed, (one, two) in enumerate(zip(theirs, ours, strict=True)):
            alone.train(one, seed)  # B begins with zeros
            together.restore(two, alone.snapshot(one))
        expected, found = run_both(alone, theirs, PACKS[pack]), run_both(together, ours, PACKS[pack])
    for at in range(2):
        assert_same_output(found.outputs[at], expected.outputs[at], TOLERANCE)
        assert_close(found.gradients[at], expected.gradients[at], TOLERANCE)
        assert found.metrics[at] == pytest.approx(expected.metrics[at], rel=TOLERANCE)


def test_two_ranks_keep_about_half_of_the_activations_each(tmp_path: Path) -> None:
    whole, *halves = _kept_bytes(write_tiny_model(tmp_path / "model", "llama"), tmp_path)
    # Gathered keys and values of every layer are all that is not shared out.
    assert max(halves) < 0.6 * whole, (whole, halves)


def _kept_bytes(model_path: Path, directory: Path) -> list[int]:
    """Of one rank alone, and of each of two."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = []
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        plan = {
            "rank": rank,
            "world_size": size,
            "context": size,
            "path": str(model_path),
            "rendezvous": f"file://{directory}/meet-{size}",
            "out": str(directory / f"{size}.{rank}"),
        }
        command = [sys.executable, "-m", "tests.megatron.activation_rank", json.dumps(plan)]
        running.append(subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2]))
    assert [process.wait(timeout=110) for process in running] == [0, 0, 0]
    return [int((directory / name).read_text()) for name in ("1.0", "2.0", "2.1")]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockingGroup]:
    options: dict[str, OptionValue] = {"context-parallel": 2}
    with start_megatron(tmp_path_factory.mktemp("contract"), "llama", 2, options) as group:
        yield group


class TestContextParallelTrainer(TrainerContract):
    tolerance = 5e-6  # in another pack a sequence is cut elsewhere, and its attention sums in another order
