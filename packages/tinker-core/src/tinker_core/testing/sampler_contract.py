"""What every sampler must do, as a suite of tests.

Subclass `SamplerContract` in a test module that has a fixture ``bench``: a `SamplerBench` of the sampler under test, of
module scope, with at least four model slots and room for eight revisions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from tinker_core.errors import InvalidRequestError, StorageError, TinkerError, UnsupportedFeatureError
from tinker_core.testing.sampler_bench import SamplerBench
from tinker_core.types import (
    ImageChunk,
    LoraConfig,
    ModelInput,
    PreparedSample,
    SampleInput,
    SampleOutput,
    SamplingParams,
    StopCondition,
    StopReason,
    TensorData,
    TensorDType,
)

NEVER = StopCondition(at_eos=False)
PROMPT = [5, 9, 14, 22, 31, 7, 40, 12]
EMPTY_CELL = -99999.0


class SampleLab:
    """Sends samples with short arguments."""

    def __init__(self, bench: SamplerBench) -> None:
        self.bench = bench
        self._ids = itertools.count()

    def request(self, revision: str | None, prompt: list[int] = PROMPT, **fields: Any) -> PreparedSample:  # noqa: ANN401
        """A sample of 8 tokens with seed 1; fields of `SamplingParams` and of `SampleInput` both go by name."""
        names = {field.name for field in attrs.fields(SamplingParams)}
        params: dict[str, Any] = {"max_tokens": 8, "seed": 1, "stop": NEVER}
        params |= {name: fields.pop(name) for name in list(fields) if name in names}
        body = {"prompt": ModelInput.from_ints(prompt), **fields}
        sample = SampleInput(sampling_session_id="contract", seq_id=0, sampling_params=SamplingParams(**params), **body)
        return PreparedSample(request_id=f"sample-{next(self._ids)}", revision=revision, request=sample)

    def run(self, revision: str | None, prompt: list[int] = PROMPT, **fields: Any) -> SampleOutput:  # noqa: ANN401
        """One sample from beginning to end."""
        return self.bench.sample(self.request(revision, prompt, **fields)).result(timeout=120)

    def prompt_logprobs(self, revision: str | None, prompt: list[int] = PROMPT) -> np.ndarray[Any, Any]:
        """Logprobs of ``prompt[1:]``."""
        output = self.run(revision, prompt, prompt_logprobs=True, max_tokens=1)
        assert output.prompt_logprobs is not None
        return output.prompt_logprobs.data[1:]


class SamplerContract:
    """Tests in order of what they are about: weights, drawing, stopping, questions about prompts, bad requests."""

    tolerance = 1e-5
    """Allowed difference of logprobs between sampler and trainer."""

    @pytest.fixture
    def lab(self, bench: SamplerBench) -> SampleLab:
        return SampleLab(bench)

    @pytest.fixture
    def model(self, bench: SamplerBench) -> Iterator[str]:
        """A trained model and a revision of the same name."""
        bench.create_model("model", LoraConfig(rank=4, seed=3))
        bench.train("model", 3)
        bench.publish("model", "model")
        yield "model"
        bench.retire("model")
        bench.unload_model("model")

    # --- weights ------------------------------------------------------------------------------------------------------

    def test_sampled_and_prompt_logprobs_are_the_trainers_own(self, lab: SampleLab, model: str) -> None:
        output = lab.run(model, num_samples=2, temperature=1.4, top_p=0.9, top_k=40, prompt_logprobs=True)
        assert output.prompt_logprobs is not None
        assert np.isnan(output.prompt_logprobs.data[0])
        for sequence in output.sequences:
            expected = lab.bench.forward_logprobs(model, [*PROMPT, *sequence.tokens])
            prompt = len(PROMPT) - 1
            np.testing.assert_allclose(output.prompt_logprobs.data[1:], expected[:prompt], atol=self.tolerance)
            np.testing.assert_allclose(sequence.logprobs, expected[prompt:], atol=self.tolerance)

    def test_a_revision_never_changes(self, lab: SampleLab, model: str) -> None:
        before, drawn = lab.prompt_logprobs(model), lab.run(model)
        for index in range(3):
            lab.bench.train(model, 4)
            lab.bench.publish(f"newer-{index}", model)
        newer = lab.prompt_logprobs("newer-2")
        np.testing.assert_array_equal(lab.prompt_logprobs(model), before)
        assert lab.run(model).sequences == drawn.sequences
        assert np.abs(newer - before).max() > max(10 * self.tolerance, 1e-3)
        np.testing.assert_allclose(newer, lab.bench.forward_logprobs(model, PROMPT), atol=self.tolerance)
        for index in range(3):
            lab.bench.retire(f"newer-{index}")

    def test_publishing_under_a_resident_name_changes_nothing(self, lab: SampleLab, model: str) -> None:
        before = lab.prompt_logprobs(model)
        lab.bench.train(model, 2)
        lab.bench.publish(model, model)
        np.testing.assert_array_equal(lab.prompt_logprobs(model), before)

    def test_base_and_several_adapters_mix_in_one_batch(self, lab: SampleLab) -> None:
        models = [f"mixed-{rank}" for rank in (2, 4, 8)]
        for model_id, rank in zip(models, (2, 4, 8), strict=True):
            lab.bench.create_model(model_id, LoraConfig(rank=rank, seed=rank))
            lab.bench.train(model_id, 3)
            lab.bench.publish(model_id, model_id)
        revisions = [None, *models] * 2
        prompts = [PROMPT[: 3 + index % 5] for index in range(len(revisions))]
        requests = [
            lab.request(r, p, seed=i, max_tokens=6) for i, (r, p) in enumerate(zip(revisions, prompts, strict=True))
        ]
        together = [future.result(timeout=120) for future in [lab.bench.sample(request) for request in requests]]
        for request, output in zip(requests, together, strict=True):
            alone = lab.bench.sample(attrs.evolve(request, request_id=f"{request.request_id}-alone")).result(
                timeout=120
            )
            assert alone.sequences[0].tokens == output.sequences[0].tokens
            np.testing.assert_allclose(alone.sequences[0].logprobs, output.sequences[0].logprobs, atol=self.tolerance)
        for model_id in models:
            lab.bench.retire(model_id)
            lab.bench.unload_model(model_id)

    def test_written_weights_stay_resident_and_come_back_the_same(
        self, lab: SampleLab, model: str, tmp_path: Path
    ) -> None:
        lab.bench.publish("kept", model)
        before = lab.prompt_logprobs("kept")
        lab.bench.train(model, 2)
        lab.bench.save_revision("kept", str(tmp_path))
        np.testing.assert_array_equal(lab.prompt_logprobs("kept"), before)
        lab.bench.retire("kept")
        with pytest.raises(TinkerError, match="kept"):
            lab.run("kept")
        lab.bench.publish_files("kept", str(tmp_path))
        np.testing.assert_array_equal(lab.prompt_logprobs("kept"), before)
        lab.bench.retire("kept")

    def test_weights_that_cannot_be_written_are_reported_and_stay(
        self, lab: SampleLab, model: str, tmp_path: Path
    ) -> None:
        before = lab.prompt_logprobs(model)
        with pytest.raises(StorageError):
            lab.bench.save_revision(model, str(tmp_path / "missing"))
        with pytest.raises(TinkerError, match="nobody"):
            lab.bench.save_revision("nobody", str(tmp_path))
        np.testing.assert_array_equal(lab.prompt_logprobs(model), before)

    def test_sampling_does_not_touch_training(self, lab: SampleLab, model: str) -> None:
        before = lab.bench.forward_logprobs(model, PROMPT)
        lab.run(model, num_samples=4)
        np.testing.assert_array_equal(lab.bench.forward_logprobs(model, PROMPT), before)

    # --- drawing ------------------------------------------------------------------------------------------------------

    def test_a_seed_decides_the_tokens_whoever_else_is_sampling(self, lab: SampleLab) -> None:
        alone = lab.run(None, num_samples=3, seed=-(2**40))
        assert len({sequence.tokens for sequence in alone.sequences}) == 3
        requests = [lab.request(None, PROMPT[:4], seed=index, max_tokens=12) for index in range(5)]
        requests.insert(2, lab.request(None, num_samples=3, seed=-(2**40)))
        outputs = [future.result(timeout=120) for future in [lab.bench.sample(request) for request in requests]]
        assert [s.tokens for s in outputs[2].sequences] == [s.tokens for s in alone.sequences]
        assert lab.run(None, seed=7).sequences != lab.run(None, seed=8).sequences

    def test_temperature_zero_and_top_k_one_take_the_likeliest_token(self, lab: SampleLab) -> None:
        greedy = lab.run(None, temperature=0.0, topk_sample_logprobs=2).sequences[0]
        assert greedy.topk_logprobs is not None
        best = greedy.topk_logprobs.token_ids.to_numpy()[:, 0]
        assert best.tolist() == list(greedy.tokens)
        np.testing.assert_allclose(greedy.topk_logprobs.logprobs.to_numpy()[:, 0], greedy.logprobs, atol=self.tolerance)
        assert lab.run(None, top_k=1, seed=3).sequences[0].tokens == greedy.tokens
        assert lab.run(None, top_p=1e-9, seed=4).sequences[0].tokens == greedy.tokens

    def test_top_k_and_top_p_bound_what_can_be_drawn(self, lab: SampleLab) -> None:
        output = lab.run(None, num_samples=32, max_tokens=1, top_k=3, temperature=5.0, topk_sample_logprobs=3)
        table = output.sequences[0].topk_logprobs
        assert table is not None
        allowed = set(table.token_ids.to_numpy()[0].tolist())
        assert {sequence.tokens[0] for sequence in output.sequences} <= allowed
        assert len({sequence.tokens[0] for sequence in output.sequences}) > 1

    def test_frequencies_follow_the_temperature(self, lab: SampleLab) -> None:
        count = 400
        output = lab.run(None, num_samples=count, max_tokens=1, temperature=0.7, topk_sample_logprobs=2)
        table = output.sequences[0].topk_logprobs
        assert table is not None
        tokens = [sequence.tokens[0] for sequence in output.sequences]
        first, second = table.token_ids.to_numpy()[0].tolist()
        ratio = np.exp(np.diff(-table.logprobs.to_numpy()[0])[0] / 0.7)
        expected = ratio / (1 + ratio)
        pair = [token for token in tokens if token in (first, second)]
        share = pair.count(first) / len(pair)
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / len(pair))

    # --- stopping -----------------------------------------------------------------------------------------------------

    def test_max_tokens_ends_a_sequence_and_without_it_the_context_does(self, lab: SampleLab) -> None:
        sequence = lab.run(None, max_tokens=5).sequences[0]
        assert (len(sequence.tokens), sequence.stop_reason) == (5, StopReason.LENGTH)
        endless = lab.run(None, max_tokens=None).sequences[0]
        assert len(PROMPT) + len(endless.tokens) == lab.bench.capabilities.max_context_length
        assert endless.stop_reason is StopReason.LENGTH

    def test_a_stop_token_ends_a_sequence_and_is_its_last_element(self, lab: SampleLab) -> None:
        free = lab.run(None, max_tokens=16).sequences[0]
        stop = free.tokens[6]
        cut = free.tokens[: free.tokens.index(stop) + 1]
        stopped = lab.run(None, max_tokens=16, stop=StopCondition(at_eos=False, tokens=(stop,))).sequences[0]
        assert (stopped.tokens, stopped.stop_reason) == (cut, StopReason.STOP)
        np.testing.assert_allclose(stopped.logprobs, free.logprobs[: len(cut)], atol=self.tolerance)

    def test_the_end_of_sequence_token_stops_only_where_stop_is_left_out(self, lab: SampleLab) -> None:
        outputs = [
            lab.run(None, num_samples=64, max_tokens=24, temperature=3.0, stop=stop)
            for stop in (StopCondition(), NEVER)
        ]
        stopped = [sequence for sequence in outputs[0].sequences if sequence.stop_reason is StopReason.STOP]
        assert stopped
        ends = {sequence.tokens[-1] for sequence in stopped}
        for sequence in stopped:
            assert not ends & set(sequence.tokens[:-1])
        assert all(sequence.stop_reason is StopReason.LENGTH for sequence in outputs[1].sequences)
        assert any(ends & set(sequence.tokens[:-1]) for sequence in outputs[1].sequences)

    # --- questions about prompts --------------------------------------------------------------------------------------

    def test_prompt_logprobs_of_the_last_n_leave_the_others_out(self, lab: SampleLab) -> None:
        full = lab.prompt_logprobs(None)
        output = lab.run(None, prompt_logprobs=True, prompt_logprobs_last_n=3, max_tokens=1)
        assert output.prompt_logprobs is not None
        values = output.prompt_logprobs.data
        assert np.isnan(values[:-3]).all()
        np.testing.assert_allclose(values[-3:], full[-3:], atol=self.tolerance)

    def test_top_k_of_the_prompt_holds_the_prompts_own_token_or_likelier_ones(self, lab: SampleLab) -> None:
        own = lab.prompt_logprobs(None)
        output = lab.run(None, topk_prompt_logprobs=5, max_tokens=1)
        assert output.topk_prompt_logprobs is not None
        ids = output.topk_prompt_logprobs.token_ids.to_numpy()
        values = output.topk_prompt_logprobs.logprobs.to_numpy()
        assert ids.shape == values.shape == (len(PROMPT), 5)
        assert (ids[0] == 0).all()
        assert (values[0] == np.float32(EMPTY_CELL)).all()
        assert (np.diff(values[1:], axis=1) <= 0).all()
        for position in range(1, len(PROMPT)):
            found = np.flatnonzero(ids[position] == PROMPT[position])
            if found.size:
                assert abs(values[position][found[0]] - own[position - 1]) < self.tolerance
            else:
                assert values[position][-1] >= own[position - 1] - self.tolerance

    def test_alternative_tokens_are_draws_at_every_position(self, lab: SampleLab) -> None:
        drawn = lab.run(None, prompt_alt_tokens_k=16, max_tokens=1).prompt_alt_tokens
        assert drawn is not None
        tokens = drawn.tokens.to_numpy()
        assert tokens.shape == (len(PROMPT) - 1, 16)
        assert len(np.unique(tokens)) > 16
        scored = lab.run(None, target_prompt_logprobs=drawn.tokens, max_tokens=1).target_prompt_logprobs
        assert scored is not None
        np.testing.assert_allclose(drawn.logprobs.to_numpy(), scored.to_numpy(), atol=self.tolerance)
        greedy = lab.run(None, prompt_alt_tokens_k=2, topk_prompt_logprobs=1, max_tokens=1, temperature=0.0)
        assert greedy.prompt_alt_tokens is not None
        assert greedy.topk_prompt_logprobs is not None
        best = greedy.topk_prompt_logprobs.token_ids.to_numpy()[1:]
        np.testing.assert_array_equal(greedy.prompt_alt_tokens.tokens.to_numpy(), np.repeat(best, 2, axis=1))

    def test_logprobs_of_chosen_targets_dense_and_sparse(self, lab: SampleLab) -> None:
        own = lab.prompt_logprobs(None)
        rows = len(PROMPT) - 1
        dense = np.full((rows, 2), -1, np.int64)
        dense[:, 0] = PROMPT[1:]
        dense[2, 0] = -1
        output = lab.run(None, target_prompt_logprobs=TensorData.from_numpy(dense), max_tokens=1)
        assert output.target_prompt_logprobs is not None
        values = output.target_prompt_logprobs.to_numpy()
        expected = np.where(dense >= 0, np.stack([own, own], axis=1), 0.0)
        np.testing.assert_allclose(values, expected, atol=self.tolerance)
        sparse = TensorData(
            dtype=TensorDType.INT64,
            shape=(rows, 6),
            data=np.array(PROMPT[1:], np.int64),
            crow_indices=np.arange(rows + 1),
            col_indices=np.arange(rows) % 6,
        )
        output = lab.run(None, target_prompt_logprobs=sparse, max_tokens=1)
        assert output.target_prompt_logprobs is not None
        assert output.target_prompt_logprobs.is_sparse
        np.testing.assert_allclose(output.target_prompt_logprobs.data, own, atol=self.tolerance)

    # --- requests that end early --------------------------------------------------------------------------------------

    def test_a_cancelled_sample_frees_its_place(self, lab: SampleLab) -> None:
        endless = [lab.request(None, max_tokens=None, num_samples=8, seed=index) for index in range(4)]
        futures = [lab.bench.sample(request) for request in endless]
        for request in endless:
            lab.bench.cancel(request.request_id)
        assert len(lab.run(None).sequences) == 1
        for future in futures:
            future.cancel()

    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"max_tokens": 0}, "max_tokens"),
            ({"temperature": -0.5}, "temperature"),
            ({"temperature": float("nan")}, "temperature"),
            ({"top_p": 0.0}, "top_p"),
            ({"top_p": 1.1}, "top_p"),
            ({"top_k": 0}, "top_k"),
            ({"top_k": -2}, "top_k"),
            ({"prompt": []}, "prompt"),
            ({"prompt": [1, 10_000]}, "10000"),
            ({"prompt": [1, -3]}, "-3"),
            ({"prompt": [5] * 100_000}, "prompt"),
            ({"prompt_logprobs": True, "prompt_logprobs_last_n": 100}, "prompt_logprobs_last_n"),
            ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs"),
            ({"stop": StopCondition(at_eos=False, tokens=(10_000,))}, "stop"),
            ({"target_prompt_logprobs": TensorData.from_numpy(np.zeros((2, 2), np.int64))}, "target_prompt_logprobs"),
        ],
    )
    def test_a_bad_request_fails_alone_and_names_the_field(
        self, lab: SampleLab, fields: dict[str, Any], named: str
    ) -> None:
        neighbour = lab.bench.sample(lab.request(None))
        with pytest.raises(InvalidRequestError, match=named):
            lab.run(None, **fields)
        assert len(neighbour.result(timeout=120).sequences[0].tokens) == 8

    def test_images_are_refused(self, lab: SampleLab) -> None:
        request = lab.request(None)
        image = ModelInput(chunks=(ImageChunk(data=b"", format="png"),))
        with pytest.raises(UnsupportedFeatureError):
            lab.bench.sample(attrs.evolve(request, request=attrs.evolve(request.request, prompt=image))).result(120)

    def test_an_unknown_revision_is_refused(self, lab: SampleLab) -> None:
        with pytest.raises(TinkerError, match="nobody"):
            lab.run("nobody")
