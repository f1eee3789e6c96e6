"""The unmodified tinker SDK against the whole server, with fake models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.server.conftest import Api


@pytest.fixture
def rest(api: Api, service: tinker.ServiceClient) -> tinker.RestClient:
    return tinker.RestClient(base_url=api.url)


@pytest.fixture
def service(api: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[tinker.ServiceClient]:
    monkeypatch.setenv("TINKER_API_KEY", "tml-dummy")
    with tinker.ServiceClient(base_url=api.url) as client:
        yield client


def datum(tokens: list[int], targets: list[int]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={"target_tokens": targets, "weights": [1.0] * len(targets)},  # type: ignore[dict-item]
    )


def new_model(service: tinker.ServiceClient, **kwargs: Any) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model="tiny", rank=4, seed=1, **kwargs).result()


def test_training_lowers_the_loss(service: tinker.ServiceClient) -> None:
    model = new_model(service)
    data = [datum([3, 4, 5, 6], [4, 5, 6, 7]), datum([9, 8], [8, 7])]
    losses = []
    for _ in range(4):
        passed = model.forward_backward(data, "cross_entropy")
        stepped = model.optim_step(types.AdamParams(learning_rate=0.1))
        losses.append(passed.result().metrics["loss:sum"])
        assert "grad_norm" in (stepped.result().metrics or {})
    outputs = passed.result().loss_fn_outputs
    assert [output["logprobs"].shape for output in outputs] == [[4], [2]]
    assert losses[-1] < losses[0] - 1


def test_a_call_in_many_chunks_equals_one_call(service: tinker.ServiceClient) -> None:
    model = new_model(service)
    data = [datum([3 + i % 40, 4], [4, 5]) for i in range(2100)]
    chunked = model.forward(data, "cross_entropy").result()
    assert len(chunked.loss_fn_outputs) == 2100
    first = model.forward(data[:10], "cross_entropy").result()
    np.testing.assert_allclose(
        [output["logprobs"].tolist() for output in chunked.loss_fn_outputs[:10]],
        [output["logprobs"].tolist() for output in first.loss_fn_outputs],
        rtol=1e-6,
    )
    total = -sum(sum(output["logprobs"].tolist()) for output in chunked.loss_fn_outputs)
    assert chunked.metrics["loss:sum"] == pytest.approx(total, rel=1e-4)


def test_custom_loss_of_the_client(service: tinker.ServiceClient) -> None:
    pytest.importorskip("torch", reason="the SDK computes custom losses with torch")

    def loss(data: list[types.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        return sum((-part).sum() for part in logprobs), {"seen:sum": float(len(data))}

    model = new_model(service)
    result = model.forward_backward_custom([datum([3, 4], [4, 5])], loss).result()
    assert result.metrics["loss:sum"] > 0
    assert (model.optim_step(types.AdamParams()).result().metrics or {})["grad_norm"] > 0


def test_sampling_from_saved_and_ephemeral_weights(service: tinker.ServiceClient) -> None:
    model = new_model(service)
    prompt = types.ModelInput.from_ints([3, 4, 5])
    params = types.SamplingParams(max_tokens=5, temperature=0.0)
    ephemeral = model.save_weights_and_get_sampling_client().result()
    answer = ephemeral.sample(prompt, 2, params).result()
    assert len(answer.sequences) == 2
    for sequence in answer.sequences:
        assert len(sequence.logprobs or []) == len(sequence.tokens)
        assert sequence.stop_reason in ("stop", "length")
    path = model.save_weights_for_sampler("first").result().path
    saved = service.create_sampling_client(model_path=path).result()
    assert saved.get_base_model() == "tiny"
    assert saved.sample(prompt, 1, params).result().sequences[0].tokens == answer.sequences[0].tokens
    named = service.create_sampling_client(model_path=path, base_model="tiny").result()
    assert named.sample(prompt, 1, params).result().sequences[0].tokens == answer.sequences[0].tokens


def test_logprobs_of_the_prompt(service: tinker.ServiceClient) -> None:
    client = service.create_sampling_client(base_model="tiny").result()
    logprobs = client.compute_logprobs(types.ModelInput.from_ints([3, 4, 5])).result()
    assert logprobs[0] is None
    assert all(value is not None and value < 0 for value in logprobs[1:])


def test_state_can_be_saved_loaded_and_continued(service: tinker.ServiceClient) -> None:
    model = new_model(service)
    data = [datum([3, 4], [4, 5])]
    model.forward_backward(data, "cross_entropy").result()
    model.optim_step(types.AdamParams(learning_rate=0.1)).result()
    path = model.save_state("step-1").result().path
    trained = model.forward(data, "cross_entropy").result().metrics["loss:sum"]
    again = service.create_training_client_from_state_with_optimizer(path).result()
    assert again.forward(data, "cross_entropy").result().metrics["loss:sum"] == pytest.approx(trained)
    assert again.get_info().model_data.model_name == "tiny"


def test_checkpoints_can_be_listed_aged_and_deleted(service: tinker.ServiceClient, rest: tinker.RestClient) -> None:
    model = new_model(service, user_metadata={"purpose": "test"})
    path = model.save_state("keep").result().path
    run = rest.get_training_run_by_tinker_path(path).result()
    assert run.base_model == "tiny"
    assert run.user_metadata == {"purpose": "test"}
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == path
    listed = rest.list_checkpoints(run.training_run_id).result()
    assert [item.tinker_path for item in listed.checkpoints] == [path]
    assert path in [item.tinker_path for item in rest.list_user_checkpoints().result().checkpoints]
    assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 4
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    assert rest.list_checkpoints(run.training_run_id).result().checkpoints[0].expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert rest.list_checkpoints(run.training_run_id).result().checkpoints[0].expires_at is None
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert rest.list_checkpoints(run.training_run_id).result().checkpoints == []
    runs = rest.list_training_runs(limit=100).result()
    assert run.training_run_id in [item.training_run_id for item in runs.training_runs]
    session_id = run.training_run_id.split(":")[0]
    assert run.training_run_id in rest.get_session(session_id).result().training_run_ids
    assert session_id in rest.list_sessions(limit=100).result().sessions


def test_capabilities(rest: tinker.RestClient) -> None:
    (model,) = rest.get_server_capabilities().result().supported_models
    assert (model.model_name, model.trainable, model.sampleable) == ("tiny", True, True)


def test_bad_requests_fail_alone(service: tinker.ServiceClient) -> None:
    model = new_model(service)
    bad = model.forward_backward([datum([3, 4], [4, 5, 6])], "cross_entropy")
    unknown = model.forward_backward([datum([3, 4], [4, 5])], "no_such_loss")  # type: ignore[arg-type]
    good = model.forward_backward([datum([3, 4], [4, 5])], "cross_entropy")
    with pytest.raises(tinker.RequestFailedError) as failed:
        bad.result()
    assert failed.value.category == types.RequestErrorCategory.User
    with pytest.raises(tinker.RequestFailedError, match="no_such_loss"):
        unknown.result()
    assert good.result().metrics["loss:sum"] > 0


def test_alpha_and_target_modules_travel_in_metadata(service: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.RequestFailedError, match=r"tinker_server\.lora_alpha"):
        new_model(service, user_metadata={"tinker_server.lora_beta": "3"})
    new_model(service, user_metadata={"tinker_server.lora_alpha": "8"})
