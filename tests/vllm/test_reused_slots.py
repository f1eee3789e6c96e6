"""Adapters that follow each other in one slot: nothing of one may be left for the next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import attrs
import numpy as np
import pytest
import torch

from tests.models import write_tiny_model
from tests.vllm.conftest import HIDDEN_SIZE
from tests.vllm.reference import LoneSampler, lone_sampler, reference_logprobs, write_adapter
from tinker_sampler_vllm.engine import cpu_slots

TOLERANCE = 1e-5
PROMPT = list(range(4, 40))
SHAPES = {
    "rank-16": (16, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")),
    "rank-2": (2, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")),
    "attention": (4, ("q_proj", "v_proj", "o_proj")),
    "head": (8, ("lm_head",)),
    "down": (16, ("down_proj", "gate_proj")),
}


@attrs.frozen
class Lab:
    lone: LoneSampler
    model: Path
    adapters: dict[str, Path]

    def check(self, name: str) -> None:
        expected = reference_logprobs(self.model, self.adapters[name], PROMPT)
        found = self.lone.prompt_logprobs(name, PROMPT)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("slots")
    model = write_tiny_model(directory / "model", "llama", hidden_size=HIDDEN_SIZE, max_context=512)
    adapters = {
        name: write_adapter(model, directory / name, rank=rank, seed=seed, targets=targets)
        for seed, (name, (rank, targets)) in enumerate(SHAPES.items())
    }
    with lone_sampler(model, options={"vllm-lora-slots": 1}) as lone:
        yield Lab(lone, model, adapters)


@pytest.mark.slow
def test_each_adapter_of_one_slot_is_alone_in_it_whatever_was_there_before(lab):
    for name, directory in lab.adapters.items():
        lab.lone.publish(name, directory)
        lab.check(name)
    for name in [*reversed(lab.adapters), *lab.adapters]:
        lab.check(name)
    for before in lab.adapters:
        for name in lab.adapters:
            lab.check(before)
            lab.check(name)


def test_a_slot_that_could_not_be_filled_entirely_is_cleared_of_what_came_in():
    layer = SimpleNamespace(lora_a_stacked=(torch.zeros(2, 1, 8, 4),), lora_b_stacked=(torch.zeros(2, 1, 4, 8),))

    def fill(layer, index, lora_a, lora_b):
        cpu_slots.reset_linear(layer, index)
        layer.lora_a_stacked[0][index, 0, : lora_a.shape[0]] = lora_a
        layer.lora_b_stacked[0][index, 0, :, : lora_b.shape[1]] = lora_b  # raises for another shape

    fill_and_note = cpu_slots.noting(fill)
    fill_and_note(layer, 0, torch.ones(3, 4), torch.ones(4, 3))
    with pytest.raises(RuntimeError):
        fill_and_note(layer, 1, torch.ones(5, 4), torch.ones(7, 5))
    cpu_slots.reset_linear(layer, 1)
    assert not layer.lora_a_stacked[0][1].any()
    assert layer.lora_a_stacked[0][0, 0, :3].all()
    assert layer.lora_b_stacked[0][0, 0, :, :3].all()
    cpu_slots.reset_linear(layer, 0)
    assert not layer.lora_a_stacked[0].any()
    assert not layer.lora_b_stacked[0].any()
