"""Custom losses run by the server, and optimizer families of plugins, with the unmodified SDK on real workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import tinker
import torch
from tinker import types
from tinker.types.optimizer import OptimizerConfigBase, OptimParamsBase

from tests.e2e.conftest import API_KEY, NewModel, Server, datum, forward_logprobs, tokens, train
from tests.models import write_tiny_model
from tests.serving import serve_in_thread
from tinker_core.engine import Engine, EngineConfig
from tinker_core.plugins import Plugins
from tinker_core.testing.momentum import FAMILY, MOMENTUM_PLUGIN
from tinker_core.types import BaseModelSpec
from tinker_server.app import create_app

PROBE = tokens(20, seed=99)
RANKS = {"logprobs": 1, "old": 1, "advantages": 1}


def clipped(logprobs, old, advantages):
    ratio = torch.exp(logprobs - old)
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    spread = (logprobs - logprobs.mean()).square().mean()
    return 0.3 * spread - gain.sum(), {"custom/ratio:mean": ratio.mean(), "custom/gain:sum": gain.sum()}


def weighted(logprobs, weights, scale):
    loss = -(logprobs * weights).sum() * scale
    return loss, {"custom/loss:sum": loss}


def policy_data(num_data: int, seed: int) -> list[types.Datum]:
    random = np.random.default_rng(seed)
    data = []
    for index in range(num_data):
        sequence = tokens(12 + 3 * index, seed + index)
        length = len(sequence) - 1
        old = (-4.5 + random.normal(size=length)).astype(np.float32)
        data.append(datum(sequence, old=old, advantages=random.normal(size=length).astype(np.float32)))
    return data


def soft_data() -> list[types.Datum]:
    """Sparse ``[T, K]`` targets, and a scalar."""
    random = np.random.default_rng(0)
    data = []
    for length in (8, 5):
        targets = torch.zeros(length, 6, dtype=torch.int64)
        weights = torch.zeros(length, 6)
        targets[:, 0] = torch.from_numpy(random.integers(4, 100, length))
        weights[:, 0] = torch.from_numpy(random.normal(size=length))
        targets[2, 1], weights[2, 1] = 7, 0.5
        inputs = {"target_tokens": targets, "weights": weights, "scale": types.TensorData([0.5], "float32", [])}
        data.append(types.Datum(model_input=types.ModelInput.from_ints(tokens(length)), loss_fn_inputs=inputs))
    assert data[0].loss_fn_inputs["target_tokens"].sparse_crow_indices is not None
    return data


def step(model: tinker.TrainingClient) -> float:
    return (model.optim_step(types.AdamParams(learning_rate=0.02, eps=1e-4)).result().metrics or {})["grad_norm"]


def compare(handle, data: list[types.Datum], new_model: NewModel) -> None:
    """The server's pass beside the two passes that the SDK makes by itself, with the same handle."""
    served, client = new_model(), new_model()
    for model in (served, client):
        train(model, 2)
    found = served.forward_backward_custom(data, handle).result()
    expected = client.forward_backward_custom(data, dataclasses.replace(handle, loss_id=None)).result()
    wanted = {key: value for key, value in expected.metrics.items() if not key.startswith("surrogate_loss")}
    assert found.metrics == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    for ours, theirs in zip(found.loss_fn_outputs, expected.loss_fn_outputs, strict=True):
        np.testing.assert_allclose(ours["logprobs"].tolist(), theirs["logprobs"].tolist(), rtol=1e-6, atol=1e-6)
    assert step(served) == pytest.approx(step(client), rel=1e-6)
    np.testing.assert_allclose(forward_logprobs(served, PROBE), forward_logprobs(client, PROBE), atol=1e-5)


def test_the_server_runs_a_custom_loss_as_the_client_would(service: tinker.ServiceClient, new_model: NewModel) -> None:
    handle = service.create_custom_loss(clipped, RANKS).result()
    assert handle.loss_id is not None
    compare(handle, policy_data(5, 1), new_model)


def test_soft_and_sparse_targets_too(service: tinker.ServiceClient, new_model: NewModel) -> None:
    handle = service.create_custom_loss(weighted, {"logprobs": 2, "weights": 2, "scale": 0}).result()
    compare(handle, soft_data(), new_model)


def test_a_custom_loss_is_of_its_session_only(
    server: Server, service: tinker.ServiceClient, other_service: tinker.ServiceClient
) -> None:
    handle = service.create_custom_loss(clipped, RANKS).result()
    other = other_service.create_lora_training_client(base_model=server.llama, rank=4).result()
    with pytest.raises(tinker.RequestFailedError, match="unknown custom loss"):
        other.forward_backward(policy_data(2, 1), "custom", {"loss_id": handle.loss_id or ""}).result()
    other.optim_step(types.AdamParams()).result()  # and the model goes on


def test_a_refused_loss_is_an_error_of_its_creation(service: tinker.ServiceClient) -> None:
    def noisy(logprobs):
        loss = (logprobs * torch.rand_like(logprobs)).sum()
        return loss, {}

    with pytest.raises(tinker.RequestFailedError, match="rand_like"):
        service.create_custom_loss(noisy, {"logprobs": 1}).result()


def test_stable_reinforce_runs_with_the_defaults_of_recipes(service: tinker.ServiceClient, new_model: NewModel) -> None:
    model = new_model()
    sampler = model.save_weights_and_get_sampling_client(record_stability_info=True).result()
    prompt = tokens(6)
    sampling = types.SamplingParams(max_tokens=8, seed=1, stop=[])
    data = []
    for sequence, advantage in zip(
        sampler.sample(types.ModelInput.from_ints(prompt), 2, sampling).result().sequences, (1.0, -1.0), strict=True
    ):
        count, before = len(sequence.tokens), len(prompt) - 1
        inputs = {
            "target_tokens": np.array([0] * before + sequence.tokens, np.int64),
            "logprobs": np.array([0.0] * before + (sequence.logprobs or []), np.float32),
            "advantages": np.array([0.0] * before + [advantage] * count, np.float32),
        }
        plain = types.Datum(
            model_input=types.ModelInput.from_ints([*prompt, *sequence.tokens[:-1]]), loss_fn_inputs=inputs
        )
        prompt_span, sampled_span = types.PromptProvenanceSpan, types.SampledProvenanceSpan
        data.append(
            plain.with_provenance(
                model_input=[
                    prompt_span(sequence_id=sequence.sequence_id, length=len(prompt)),
                    sampled_span(sequence_id=sequence.sequence_id, length=count - 1),
                ],
                loss_fn_inputs=[
                    prompt_span(sequence_id=sequence.sequence_id, offset=1, length=before),
                    sampled_span(sequence_id=sequence.sequence_id, length=count),
                ],
            )
        )
    on_policy = -sum(
        float((datum.loss_fn_inputs["advantages"].to_numpy() * datum.loss_fn_inputs["logprobs"].to_numpy()).sum())
        for datum in data
    )
    for config in (None, {"kl_coeff": 0.5}):  # on policy the KL term is 0
        loss = model.forward_backward(data, "stable_reinforce", config).result().metrics["loss:sum"]
        assert loss == pytest.approx(on_policy, abs=1e-4)
    assert step(model) > 0


# --- optimizers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sgd_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tinker.ServiceClient]:
    directory = tmp_path_factory.mktemp("sgd")
    path = write_tiny_model(directory / "model")
    plugins = ("core", "fsdp", MOMENTUM_PLUGIN)
    config = EngineConfig(
        base_models=(BaseModelSpec(name="tiny", path=str(path)),),
        data_dir=directory / "data",
        backend="fsdp",
        sampler=None,
        plugins=plugins,
        worker_environment={"OMP_NUM_THREADS": "1"},
    )
    loaded = Plugins.load(*plugins)
    app = create_app(Engine(config, loaded), plugins=loaded)
    with serve_in_thread(app) as url, tinker.ServiceClient(base_url=url, api_key=API_KEY) as service:
        yield service


class Sgd(OptimizerConfigBase, frozen=True):
    type: str = FAMILY
    momentum: float = 0.9


class SgdParams(OptimParamsBase, frozen=True):
    type: str = FAMILY
    learning_rate: float = 0.05


def new_sgd(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model="tiny", rank=4, seed=1, optimizer=Sgd()).result()


def sgd_steps(model: tinker.TrainingClient, *seeds: int) -> None:
    for seed in seeds:
        model.forward_backward([datum(tokens(12, seed))], "cross_entropy").result()
        model.optim_step(SgdParams()).result()


def test_a_family_of_a_plugin_trains_and_resumes_bit_identically(sgd_service: tinker.ServiceClient) -> None:
    model = new_sgd(sgd_service)
    sgd_steps(model, 1, 2)
    path = model.save_state("half").result().path
    sgd_steps(model, 3, 4)
    resumed = sgd_service.create_training_client_from_state_with_optimizer(path).result()
    assert resumed.get_info().optimizer_config.type == FAMILY
    sgd_steps(resumed, 3, 4)
    np.testing.assert_array_equal(forward_logprobs(resumed, PROBE), forward_logprobs(model, PROBE))
    fresh = sgd_service.create_training_client_from_state(path, optimizer=Sgd()).result()
    sgd_steps(fresh, 3, 4)  # without the velocity
    assert np.abs(forward_logprobs(fresh, PROBE) - forward_logprobs(model, PROBE)).max() > 1e-5


def test_parameters_of_another_family_are_told_apart(sgd_service: tinker.ServiceClient) -> None:
    model = new_sgd(sgd_service)
    for params, reason in (
        (types.AdamParams(), "send optimizer_params of type 'sgd'"),
        (types.DimuonParams(learning_rate=0.1), "must be 'sgd', got 'dimuon'"),
        (SgdParams(beta=0.5), "'beta'"),
    ):
        with pytest.raises(tinker.RequestFailedError, match=reason):
            model.optim_step(params).result()
    model.optim_step(SgdParams(beta=0.0)).result()
    adam = sgd_service.create_lora_training_client(base_model="tiny", rank=4).result()
    with pytest.raises(tinker.RequestFailedError, match="send adam_params"):
        adam.optim_step(SgdParams()).result()


def test_a_family_that_is_not_installed_is_refused_at_creation(sgd_service: tinker.ServiceClient) -> None:
    model = new_sgd(sgd_service)
    path = model.save_state("new").result().path
    dimuon = types.DimuonOptimizerConfig()
    with pytest.raises(tinker.RequestFailedError, match="'dimuon' is not installed; installed optimizers: adamw, sgd"):
        sgd_service.create_lora_training_client(base_model="tiny", rank=4, optimizer=dimuon).result()
    with pytest.raises(tinker.RequestFailedError, match="'dimuon' is not installed; installed optimizers: adamw, sgd"):
        sgd_service.create_training_client_from_state(path, optimizer=dimuon).result()
    with pytest.raises(tinker.RequestFailedError, match="momentom"):
        sgd_service.create_lora_training_client(base_model="tiny", rank=4, optimizer=Sgd(momentom=0.5)).result()


def test_weights_alone_load_into_adamw_unless_another_family_is_named(sgd_service: tinker.ServiceClient) -> None:
    model = new_sgd(sgd_service)
    sgd_steps(model, 1)
    path = model.save_state("sgd").result().path
    adam = sgd_service.create_training_client_from_state(path).result()
    assert adam.get_info().optimizer_config.type == "adamw"
    assert (adam.optim_step(types.AdamParams()).result().metrics or {})["grad_norm"] == 0
