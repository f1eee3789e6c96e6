"""What deterministic mode promises: equal requests from equal state give equal bits, in any company and any process.

Subclass `DeterminismContract` in a test module that has a fixture ``groups``: two `BlockingGroup` of equal spec, with
``deterministic=True``, so that each has processes of its own; best of module scope, with at least four model slots and
the losses cross_entropy and importance_sampling. Sampling is looked at where the groups have a sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from tinker_core.executors.protocol import GroupCapabilities, PublishCall, RetireCall
from tinker_core.testing.group import BlockingGroup
from tinker_core.testing.trainer_lab import (
    Arrays,
    TrainerLab,
    assert_identical,
    logprobs_of,
    optimizer_steps,
    output_of,
    read_safetensors,
)
from tinker_core.types import (
    ForwardBackwardOutput,
    ModelInput,
    PreparedModelPass,
    PreparedModelPassBatch,
    PreparedSample,
    SampleInput,
    SampleOutput,
    SamplingParams,
    StopCondition,
    Transport,
    WeightsRef,
)

RunPass = Callable[[PreparedModelPass], ForwardBackwardOutput]
"""Runs a request, alone or in company."""

PROMPT = (5, 9, 14, 22, 31, 7, 40, 12, 3, 3, 18)
SAMPLES: tuple[dict[str, Any], ...] = (
    {"max_tokens": 24, "seed": 1},
    {"max_tokens": 9, "seed": 2, "num_samples": 3, "temperature": 1.3},
    {"max_tokens": 6, "seed": 3, "temperature": 0.0, "prompt_logprobs": True},
    {"max_tokens": 30, "seed": 1, "num_samples": 2},
)
"""Samples that are drawn alone in one process and together in the other."""


class DeterminismContract:
    """Run by subclassing; see the module."""

    def read_state(self, directory: Path) -> Arrays:
        """All arrays in a snapshot, by names that tell their file."""
        return {
            f"{path.name}: {name}": array
            for path in directory.glob("*.safetensors")
            for name, array in read_safetensors(path).items()
        }

    @pytest.fixture
    def labs(self, groups: Sequence[BlockingGroup], tmp_path: Path) -> Iterator[tuple[TrainerLab, TrainerLab]]:
        """A lab over each group."""
        alone, crowded = (TrainerLab(group, tmp_path) for group in groups)
        yield alone, crowded
        alone.close()
        crowded.close()

    def _state(self, lab: TrainerLab, model_id: str) -> Arrays:
        directory = lab.snapshot(model_id, gradient=True)
        return {**self.read_state(directory), "steps": np.array(optimizer_steps(directory))}

    def _train(self, lab: TrainerLab, model_id: str, steps: range, run: RunPass) -> Arrays:
        """Two passes and a step each time; returns all logprobs and losses."""
        seen: Arrays = {}
        for index in steps:
            requests = (
                lab.request(model_id, lab.data(index, (9, 31, 4, 17))),
                lab.request(model_id, lab.data(100 + index, policy=True), "importance_sampling"),
            )
            for number, request in enumerate(requests):
                output = run(request)
                seen[f"{index}.{number}"] = np.concatenate(logprobs_of(output))
                seen[f"{index}.{number}.loss"] = np.array(output.metrics["loss:sum"])
            lab.step(model_id, learning_rate=0.01, weight_decay=0.01, grad_clip_norm=0.5)
        return seen

    # --- training -----------------------------------------------------------------------------------------------------

    def test_training_gives_the_same_bits_in_another_process_and_among_other_tenants(
        self, labs: tuple[TrainerLab, TrainerLab]
    ) -> None:
        alone, crowded = labs
        lonely = alone.create(seed=4)
        expected = self._train(alone, lonely, range(4), alone.run_one)
        tenants = [crowded.create(rank=rank, seed=rank) for rank in (2, 8)]
        crowded.train(tenants[0], 50, 51)
        model_id = crowded.create(seed=4)

        def in_company(request: PreparedModelPass) -> ForwardBackwardOutput:
            others = [crowded.request(name, crowded.data(60, (3, 12))) for name in tenants]
            return output_of(crowded.run(others[0], request, others[1])[1])

        found = self._train(crowded, model_id, range(2), in_company)
        crowded.unload(tenants[0])
        found |= self._train(crowded, model_id, range(2, 4), crowded.run_one)
        assert_identical(found, expected)
        assert_identical(self._state(crowded, model_id), self._state(alone, lonely))

    def test_training_gives_the_same_bits_after_a_snapshot_was_restored_in_another_process(
        self, labs: tuple[TrainerLab, TrainerLab]
    ) -> None:
        first, second = labs
        model_id, copy = first.create(seed=4), second.create(seed=9)
        self._train(first, model_id, range(2), first.run_one)
        first.run_one(first.request(model_id, first.data(70)))
        directory, written = first.begin_snapshot(model_id)
        written.result(timeout=120)
        expected = self._train(first, model_id, range(2, 4), first.run_one)
        second.train(copy, 80)
        second.restore(copy, directory, gradient=True)
        assert_identical(self._train(second, copy, range(2, 4), second.run_one), expected)
        assert_identical(self._state(second, copy), self._state(first, model_id))

    # --- sampling -----------------------------------------------------------------------------------------------------

    def test_samples_have_the_same_bits_whatever_else_is_sampled_and_trained(
        self, labs: tuple[TrainerLab, TrainerLab]
    ) -> None:
        alone, crowded = labs
        capabilities: GroupCapabilities = alone.group.call("capabilities")
        if capabilities.sampler is None:
            pytest.skip("no sampler in the ranks")
        for lab in labs:
            model_id = lab.create(seed=4)
            lab.train(model_id, 0, 1, 2)
            ref = WeightsRef(transport=Transport.IN_PROCESS, model_id=model_id)
            lab.group.call("publish", PublishCall(revision="determinism", ref=ref))
        expected = [_sample(alone, index).result(timeout=120) for index in range(len(SAMPLES))]
        trained = crowded.create(rank=2)
        passes = [
            crowded.group.start(
                "forward_backward",
                PreparedModelPassBatch(requests=(crowded.request(trained, crowded.data(seed)),)),
            )
            for seed in range(3)
        ]
        for order in ([0, 1, 2, 3], [3, 2, 1, 0, 1, 2, 3]):
            tenant = _sample(crowded, 1, name=f"other-{len(order)}", revision=None)
            drawn = [_sample(crowded, index, name=f"{place}-{len(order)}") for place, index in enumerate(order)]
            for index, future in zip(order, drawn, strict=True):
                _assert_same_sample(future.result(timeout=120), expected[index])
            tenant.result(timeout=120)
        for future in passes:
            future.result(timeout=120)
        for lab in labs:
            lab.group.call("retire", RetireCall(revision="determinism"))


def _sample(
    lab: TrainerLab, index: int, *, name: str = "alone", revision: str | None = "determinism"
) -> Future[SampleOutput]:
    known = {field.name for field in attrs.fields(SamplingParams)}
    params = {key: value for key, value in SAMPLES[index].items() if key in known}
    extras = {key: value for key, value in SAMPLES[index].items() if key not in known}
    sample = SampleInput(
        sampling_session_id="contract",
        seq_id=0,
        prompt=ModelInput.from_ints(PROMPT[: 11 - 2 * index]),
        sampling_params=SamplingParams(stop=StopCondition(at_eos=False), **params),
        **extras,
    )
    prepared = PreparedSample(request_id=f"{name}-{index}", revision=revision, request=sample)
    return lab.group.start("sample", prepared)


def _assert_same_sample(found: SampleOutput, expected: SampleOutput) -> None:
    assert [sequence.tokens for sequence in found.sequences] == [sequence.tokens for sequence in expected.sequences]
    assert [sequence.logprobs for sequence in found.sequences] == [sequence.logprobs for sequence in expected.sequences]
    if expected.prompt_logprobs is not None:
        assert found.prompt_logprobs is not None
        np.testing.assert_array_equal(found.prompt_logprobs.to_numpy(), expected.prompt_logprobs.to_numpy())
