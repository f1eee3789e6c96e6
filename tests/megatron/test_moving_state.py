"""A model's state moves between topologies and backends through the checkpoint format that they share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from itertools import permutations
from pathlib import Path

import attrs
import pytest

from tests.megatron.groups import megatron_spec
from tests.models import Kind, write_tiny_model
from tinker_core.testing import start_group
from tinker_core.testing.faults import FAULTS_PLUGIN
from tinker_core.testing.trainer_lab import (
    Arrays,
    TrainerLab,
    assert_close,
    assert_same_output,
    optimizer_steps,
    read_safetensors,
)
from tinker_core.types import MANIFEST_FILE

VOCAB_SIZE = 113
"""Not divisible by any number of ranks here."""
TENSOR, PIPELINE, EXPERT = {"tensor-parallel": 2}, {"pipeline-parallel": 2}, {"expert-parallel": 2}


@attrs.frozen(kw_only=True)
class Setup:
    """A world that state may be in."""

    trainer: str = "megatron"
    num_ranks: int = 2
    options: Mapping[str, int | bool] = {}


WORLDS = {
    "fsdp": Setup(trainer="fsdp", num_ranks=1),
    "tensor parallel": Setup(options=TENSOR),
    "pipeline": Setup(options=PIPELINE),
    "one rank": Setup(num_ranks=1),
    "two fsdp ranks": Setup(trainer="fsdp"),
    "data parallel": Setup(),
    "tensor parallel pipeline": Setup(num_ranks=4, options=TENSOR | PIPELINE),
    "expert parallel": Setup(options=EXPERT),
    "tensor and expert parallel": Setup(options=TENSOR | EXPERT | {"sequence-parallel": True}),
}
EVERY_DAY = [("fsdp", "tensor parallel"), ("tensor parallel", "fsdp")]
ALSO = [
    ("tensor parallel", "pipeline"),
    ("fsdp", "pipeline"),
    ("pipeline", "fsdp"),
    ("pipeline", "tensor parallel"),
    *(
        (origin, target)
        for name in ("one rank", "two fsdp ranks", "data parallel", "tensor parallel pipeline")
        for origin, target in ((name, "fsdp"), ("fsdp", name), (name, "pipeline"), ("pipeline", name))
    ),
]
WITH_EXPERTS = [*permutations(("one rank", "expert parallel", "tensor and expert parallel", "pipeline"), 2)]
ROUTES = [
    *(pytest.param("qwen2", *route, id=" to ".join(route)) for route in EVERY_DAY),
    *(pytest.param("qwen2", *route, id=" to ".join(route), marks=pytest.mark.slow) for route in ALSO),
    *(
        pytest.param("qwen3_moe", *route, id=f"experts, {' to '.join(route)}", marks=pytest.mark.slow)
        for route in WITH_EXPERTS
    ),
]
Start = Callable[[Kind, str], TrainerLab]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Worlds that are started when they are asked for, on one base model of each kind; a few of them run at a time."""
    directory = tmp_path_factory.mktemp("moving")

    @cache
    def base_model(kind: Kind) -> Path:
        return write_tiny_model(directory / kind, kind, tie=True, vocab_size=VOCAB_SIZE)

    running: dict[tuple[Kind, str], tuple[TrainerLab, ExitStack]] = {}

    def lab(kind: Kind, world: str) -> TrainerLab:
        if (kind, world) in running:
            running[kind, world] = running.pop((kind, world))
        else:
            while len(running) > 3:
                running.pop(next(iter(running)))[1].close()
            setup, own = WORLDS[world], stack.enter_context(ExitStack())
            spec = megatron_spec(
                base_model(kind),
                setup.num_ranks,
                setup.options,
                trainer=setup.trainer,
                plugins=("core", setup.trainer, FAULTS_PLUGIN, "tests.fsdp.no_unpickling"),
            )
            group = own.enter_context(start_group(spec))
            running[kind, world] = TrainerLab(group, tmp_path_factory.mktemp("states")), own
        return running[kind, world][0]

    with ExitStack() as stack:
        yield lab


def files(directory: Path) -> dict[str, bytes]:
    """All that a checkpoint holds, but for the name and seed of the model that it was made from."""
    found = {path.name: path.read_bytes() for path in directory.iterdir() if path.name != MANIFEST_FILE}
    manifest = json.loads((directory / MANIFEST_FILE).read_text())
    manifest["lora_config"].pop("seed")
    return {**found, MANIFEST_FILE: json.dumps(manifest, sort_keys=True).encode()}


def tensors(directory: Path, stem: str) -> Arrays:
    return read_safetensors(directory / f"{stem}.safetensors")


def assert_same_files(found: Path, expected: Path) -> None:
    left, right = files(found), files(expected)
    assert left.keys() == right.keys()
    for name, content in right.items():
        assert left[name] == content, name


def train_both(here: TrainerLab, there: TrainerLab, rank: int) -> tuple[str, str]:
    """A model here with moments and a gradient in progress, and one there of which nothing may remain."""
    stays, moves = here.create(rank=rank, seed=1), there.create(rank=rank, seed=2)
    here.train(stays, 0, 1)
    here.run_one(here.request(stays, here.data(2)))
    there.train(moves, 7)
    there.run_one(there.request(moves, there.data(8)))
    return stays, moves


@pytest.mark.parametrize(("kind", "origin", "target"), ROUTES)
def test_a_moved_model_is_the_same_to_the_last_bit_and_goes_on_as_if_it_had_stayed(
    start: Start, kind: Kind, origin: str, target: str
) -> None:
    here, there = start(kind, origin), start(kind, target)
    # A multiple of 16 makes every row one: torch's AdamW for CPUs rounds the last elements of other rows differently.
    stays, moves = train_both(here, there, rank=16)
    pair = ((here, stays), (there, moves))

    saved = here.snapshot(stays, gradient=True)
    assert optimizer_steps(saved) == 2
    assert len(tensors(saved, "optimizer")) == 2 * len(tensors(saved, "gradient")) > 0
    there.restore(moves, saved, gradient=True)
    assert_same_files(there.snapshot(moves, gradient=True), saved)

    # The gradient that came along is stepped with the moments that came along.
    for lab, model_id in pair:
        lab.step(model_id, learning_rate=0.01, weight_decay=0.1)
    after = here.snapshot(stays, gradient=True)
    assert_same_files(there.snapshot(moves, gradient=True), after)
    assert (after / "adapter_model.safetensors").read_bytes() != (saved / "adapter_model.safetensors").read_bytes()

    # What comes next is computed in another order there.
    stayed, moved = (lab.run_one(lab.request(model_id, lab.data(3))) for lab, model_id in pair)
    assert_same_output(moved, stayed, 1e-5)
    stayed_gradient, moved_gradient = (
        tensors(lab.snapshot(model_id, gradient=True), "gradient") for lab, model_id in pair
    )
    assert_close(moved_gradient, stayed_gradient, 1e-5)
    norm, moved_norm = (lab.step(name, learning_rate=0.01, grad_clip_norm=0.1)["grad_norm"] for lab, name in pair)
    assert norm > 0.1
    assert moved_norm == pytest.approx(norm, rel=1e-5)
    stayed_weights, moved_weights = (tensors(lab.export(model_id), "adapter_model") for lab, model_id in pair)
    assert_close(moved_weights, stayed_weights, 1e-5)
    for lab, model_id in pair:
        lab.unload(model_id)


@pytest.mark.parametrize(("origin", "target"), [pytest.param(*one, id=" to ".join(one)) for one in EVERY_DAY])
def test_a_rank_that_divides_nothing_moves_too(start: Start, origin: str, target: str) -> None:
    here, there = start("qwen2", origin), start("qwen2", target)
    stays, moves = train_both(here, there, rank=3)
    saved = here.snapshot(stays, gradient=True)
    there.restore(moves, saved, gradient=True)
    assert_same_files(there.snapshot(moves, gradient=True), saved)
    here.unload(stays)
    there.unload(moves)
