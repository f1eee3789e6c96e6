"""Training, saving and sampling with the unmodified SDK on real workers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tinker
import torch
from peft import PeftModel
from tinker import types
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import (
    NewModel,
    Server,
    datum,
    forward_logprobs,
    sampler_logprobs,
    tokens,
    train,
)
from tinker_core.storage.checkpoints import safe_directory_name
from tinker_core.types import TinkerPath

PROBE = tokens(20, seed=99)


def test_the_loss_falls_and_the_answer_changes(new_model: NewModel) -> None:
    model = new_model(rank=8)
    tokenizer = model.get_tokenizer()
    sequence = tokenizer.encode("hello world, hello tinker", add_special_tokens=False)
    data = [datum(sequence)]
    prompt = types.ModelInput.from_ints(sequence[:5])
    params = types.SamplingParams(max_tokens=len(sequence) - 5, temperature=0.0, stop=[])
    before = model.save_weights_and_get_sampling_client().result().sample(prompt, 1, params).result()
    losses = []
    for _ in range(60):
        passed = model.forward_backward(data, "cross_entropy")
        model.optim_step(types.AdamParams(learning_rate=0.01)).result()
        losses.append(passed.result().metrics["loss:sum"])
    after = model.save_weights_and_get_sampling_client().result().sample(prompt, 1, params).result()
    assert losses[-1] < 0.05 * losses[0]
    assert before.sequences[0].tokens != after.sequences[0].tokens
    assert tokenizer.decode(after.sequences[0].tokens) == " world, hello tinker"


def test_sampled_logprobs_are_the_trainers_own(new_model: NewModel) -> None:
    model = new_model()
    train(model, 3)
    sampler = model.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=16, temperature=1.3, top_p=0.95, seed=5, stop=[])
    for sequence in sampler.sample(types.ModelInput.from_ints(PROBE), 2, params).result().sequences:
        trained = forward_logprobs(model, [*PROBE, *sequence.tokens])[len(PROBE) - 1 :]
        np.testing.assert_allclose(sequence.logprobs, trained, atol=1e-5)


def test_old_sampling_clients_keep_their_weights_and_sampling_changes_nothing(new_model: NewModel) -> None:
    model, twin = new_model(), new_model()
    train(model, 2)
    old = model.save_weights_and_get_sampling_client().result()
    before = sampler_logprobs(old, PROBE)
    np.testing.assert_allclose(before, forward_logprobs(model, PROBE), atol=1e-5)
    train(model, 10)
    new = model.save_weights_and_get_sampling_client().result()
    np.testing.assert_array_equal(sampler_logprobs(old, PROBE), before)
    assert np.abs(sampler_logprobs(new, PROBE) - before).max() > 1e-2
    train(twin, 12)  # the same steps without any sampling in between
    np.testing.assert_array_equal(forward_logprobs(twin, PROBE), forward_logprobs(model, PROBE))


def test_a_saved_sampler_works_from_another_session_after_the_model_is_gone(
    server: Server, other_service: tinker.ServiceClient
) -> None:
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        model = service.create_lora_training_client(base_model=server.qwen3, rank=4, seed=2).result()
        train(model, 3)
        path = model.save_weights_for_sampler("final").result().path
        expected = forward_logprobs(model, PROBE)
    client = other_service.create_sampling_client(model_path=path).result()
    np.testing.assert_allclose(sampler_logprobs(client, PROBE), expected, atol=1e-5)
    assert client.get_base_model() == server.qwen3


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning")  # tied, but only the unembedding is adapted
def test_exported_adapters_load_in_plain_peft(server: Server, new_model: NewModel) -> None:
    for base_model in (server.llama, server.qwen3):  # tied and untied
        model = new_model(base_model=base_model, rank=4)
        train(model, 3)
        path = model.save_weights_for_sampler("peft").result().path
        name = TinkerPath.parse(path).checkpoint_id
        (adapter,) = server.data_dir.glob(f"checkpoints/{safe_directory_name(model.model_id)}/versions/{name}/*")
        base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
        peft = PeftModel.from_pretrained(base, str(adapter)).eval()
        with torch.no_grad():
            logits = peft(torch.tensor([PROBE])).logits[0, :-1]
        reference = torch.log_softmax(logits, -1)[torch.arange(len(PROBE) - 1), torch.tensor(PROBE[1:])]
        np.testing.assert_allclose(forward_logprobs(model, PROBE), reference.numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*load_state:FutureWarning")  # deprecated by the SDK, still to be served
def test_state_loaded_with_the_optimizer_continues_bit_identically(
    service: tinker.ServiceClient, new_model: NewModel
) -> None:
    model = new_model()
    train(model, 4)
    path = model.save_state("half").result().path
    train(model, 4, seed=50)
    expected = forward_logprobs(model, PROBE)
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    train(resumed, 4, seed=50)
    np.testing.assert_array_equal(forward_logprobs(resumed, PROBE), expected)
    fresh = service.create_training_client_from_state(path).result()
    train(fresh, 4, seed=50)
    assert np.abs(forward_logprobs(fresh, PROBE) - expected).max() > 1e-4
    # Loaded in place, the very same.
    model.load_state_with_optimizer(path).result()
    train(model, 4, seed=50)
    np.testing.assert_array_equal(forward_logprobs(model, PROBE), expected)


def test_forward_equals_forward_backward_and_custom_losses_work(new_model: NewModel) -> None:
    model, twin = new_model(), new_model()
    data = [datum(PROBE)]
    forward = model.forward(data, "cross_entropy").result()
    backward = model.forward_backward(data, "cross_entropy").result()
    assert forward.loss_fn_outputs[0]["logprobs"].tolist() == backward.loss_fn_outputs[0]["logprobs"].tolist()
    assert forward.metrics["loss:sum"] == backward.metrics["loss:sum"]

    def negative_log_likelihood(
        _: list[types.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        loss = -sum(values.sum() for values in logprobs)
        assert isinstance(loss, torch.Tensor)
        return loss, {"nll": loss.item()}

    custom = twin.forward_backward_custom(data, negative_log_likelihood).result()
    assert abs(custom.metrics["nll"] - backward.metrics["loss:sum"]) < 1e-4
    adam = types.AdamParams(learning_rate=0.01)
    norms = [(client.optim_step(adam).result().metrics or {})["grad_norm"] for client in (model, twin)]
    assert abs(norms[0] - norms[1]) < 1e-5 * norms[0]


def test_six_models_trained_at_once_equal_their_solo_runs(
    server: Server, service: tinker.ServiceClient, other_service: tinker.ServiceClient
) -> None:
    def run(client: tinker.ServiceClient, rank: int) -> tuple[float, np.ndarray]:
        model = client.create_lora_training_client(base_model=server.llama, rank=rank, seed=rank).result()
        norms = train(model, 5, seed=rank)
        return norms[0], forward_logprobs(model, PROBE)

    jobs = [(client, rank) for client in (service, other_service) for rank in (4, 8, 32)]
    solo = [run(client, rank) for client, rank in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: run(*job), jobs))
    for (norm, logprobs), (expected_norm, expected) in zip(together, solo, strict=True):
        assert abs(norm - expected_norm) <= 1e-6 * expected_norm
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)
