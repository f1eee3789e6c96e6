"""Sampling clients on real weights, while these change."""

from __future__ import annotations

from typing import Any

import numpy as np
import tinker
from tinker import types

from tests.e2e.conftest import NewModel, datum, tokens

LONG = types.SamplingParams(max_tokens=40, stop=[])


def test_inflight_clients_move_with_their_target_and_snapshots_do_not(new_model: NewModel) -> None:
    training = new_model(rank=8)
    sequence = tokens(20)
    prompt = types.ModelInput.from_ints(sequence)

    def ask(client: tinker.SamplingClient) -> Any:
        return np.array(client.compute_logprobs(prompt).result()[1:], np.float32)

    def trained_logprobs() -> Any:
        passed = training.forward([datum(sequence)], "cross_entropy").result()
        return passed.loss_fn_outputs[0]["logprobs"].to_numpy()

    save = training.save_weights_and_get_sampling_client
    first, frozen = save(kind="inflight").result(), save(kind="snapshot").result()
    untrained = ask(first)
    np.testing.assert_allclose(untrained, trained_logprobs(), atol=1e-4)
    running = [first.sample(prompt, 4, LONG) for _ in range(4)]  # these may span the update
    for _ in range(3):
        training.forward_backward([datum(sequence)], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=0.05)).result()
    np.testing.assert_allclose(ask(first), untrained, atol=1e-5)
    second = save(kind="inflight").result()
    moved = ask(first)
    assert np.abs(moved - untrained).max() > 0.1
    np.testing.assert_allclose(moved, trained_logprobs(), atol=1e-4)
    np.testing.assert_allclose(ask(second), moved, atol=1e-5)
    np.testing.assert_allclose(ask(frozen), untrained, atol=1e-5)  # other weights saw the same prompt meanwhile
    for future in running:
        assert [len(each.tokens) for each in future.result().sequences] == [40] * 4


def test_a_client_goes_on_after_it_gave_samples_up(new_model: NewModel) -> None:
    client = new_model().save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(tokens(8))
    wanted = types.SamplingParams(max_tokens=8, stop=[], seed=3)
    expected = client.sample(prompt, 2, wanted).result()
    given_up = [client.sample(prompt, 32, LONG) for _ in range(8)]  # four times as many as the sampler has slots
    kept = client.sample(prompt, 2, wanted)
    for future in given_up:
        future.future().cancel()
    assert [each.tokens for each in kept.result().sequences] == [each.tokens for each in expected.sequences]
