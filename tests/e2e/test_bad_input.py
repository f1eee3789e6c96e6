"""Wrong requests get a clear user error, where the caller looks for it, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from tests.e2e.conftest import API_KEY, NewModel, Server, datum, forward_logprobs, tokens, train

GOOD = tokens(10)
PG = {
    "logprobs": np.full(len(GOOD) - 1, -1.0, np.float32),
    "advantages": np.ones(len(GOOD) - 1, np.float32),
}


def policy_datum(**extra: Any) -> types.Datum:
    example = datum(GOOD)
    inputs = {"target_tokens": example.loss_fn_inputs["target_tokens"], **PG, **extra}
    return types.Datum(model_input=example.model_input, loss_fn_inputs=inputs)


def with_nan(name: str, value: float) -> dict[str, np.ndarray]:
    array = PG[name].copy()
    array[3] = value
    return {name: array}


BAD_PASSES: dict[str, tuple[list[types.Datum], str, dict[str, Any] | None, str]] = {
    "target outside the vocabulary": (
        [datum(GOOD, target_tokens=np.full(len(GOOD) - 1, 5000))],
        "cross_entropy",
        None,
        "target_tokens",
    ),
    "negative target": (
        [datum(GOOD, target_tokens=np.full(len(GOOD) - 1, -1))],
        "cross_entropy",
        None,
        "target_tokens",
    ),
    "input token outside the vocabulary": ([datum([4, 5, 4000, 6])], "cross_entropy", None, "4000"),
    "negative input token": ([datum([4, -5, 4, 6])], "cross_entropy", None, "-5"),
    "lengths that differ": ([datum(GOOD, weights=np.ones(3, np.float32))], "cross_entropy", None, "weights"),
    "NaN advantage": ([policy_datum(**with_nan("advantages", np.nan))], "importance_sampling", None, "advantages"),
    "infinite advantage": ([policy_datum(**with_nan("advantages", np.inf))], "ppo", None, "advantages"),
    "infinite logprob": ([policy_datum(**with_nan("logprobs", -np.inf))], "ppo", None, "logprobs"),
    "unknown loss": ([datum(GOOD)], "mean_squared_error", None, "cross_entropy"),
    "KL term without provenance": ([policy_datum()], "stable_reinforce", {"kl_coeff": 0.1}, "with_provenance"),
    "negative KL term": ([policy_datum()], "stable_reinforce", {"kl_coeff": -0.1}, "kl_coeff"),
    "custom loss that was never created": ([policy_datum()], "custom", {"loss_id": "loss-1"}, "'loss-1'"),
    "custom loss without its id": ([policy_datum()], "custom", None, "loss_id"),
    "unknown loss config": ([policy_datum()], "ppo", {"clip": 0.2}, "clip"),
    "mistyped loss config": ([policy_datum()], "ppo", {"clip_low_threshold": "low"}, "clip_low_threshold"),
    "missing loss config": ([policy_datum()], "dro", None, "beta"),
    "unknown loss input": ([datum(GOOD, bonus=np.ones(len(GOOD) - 1, np.float32))], "cross_entropy", None, "bonus"),
    "missing loss input": ([datum(GOOD)], "importance_sampling", None, "data[1]"),
    "too long for the context": ([datum(tokens(80))], "cross_entropy", None, "64"),
}


@pytest.mark.parametrize("case", BAD_PASSES)
def test_a_bad_pass_fails_alone(case: str, new_model: NewModel) -> None:
    data, loss_fn, config, named = BAD_PASSES[case]
    healthy = datum(GOOD) if loss_fn == "cross_entropy" else policy_datum()
    model, neighbour = new_model(), new_model()
    passed = neighbour.forward_backward([datum(GOOD)], "cross_entropy")
    with pytest.raises(tinker.RequestFailedError) as caught:
        model.forward_backward([healthy, *data], loss_fn, config).result()
    assert caught.value.category == types.RequestErrorCategory.User
    assert named in str(caught.value)
    # Nothing was accumulated, the model goes on, and so does its neighbour.
    norm = (model.optim_step(types.AdamParams()).result().metrics or {})["grad_norm"]
    assert norm == 0
    np.testing.assert_allclose(
        passed.result().loss_fn_outputs[0]["logprobs"].tolist(), forward_logprobs(model, GOOD), atol=1e-6
    )


@pytest.fixture
def post(server: Server) -> Callable[[str, dict[str, Any]], httpx.Response]:
    def send(path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{server.url}/api/v1/{path}", json=body, headers={"X-API-Key": API_KEY}, timeout=60)

    return send


Post = Callable[[str, dict[str, Any]], httpx.Response]


def result(post: Post, response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    future = post("retrieve_future", {"request_id": response.json()["request_id"]})
    assert future.status_code == 200
    body: dict[str, Any] = future.json()
    return body


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -4}, "rank"),
        ({"rank": 100_000}, "rank"),
        ({"rank": 8, "train_attn": False, "train_mlp": False, "train_unembed": False}, "train_"),
    ],
)
def test_a_lora_config_that_cannot_be_is_refused(post: Post, server: Server, lora: dict[str, Any], named: str) -> None:
    session = post("create_session", {"tags": [], "sdk_version": "0.38.0"}).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": server.llama, "lora_config": lora}
    failed = result(post, post("create_model", body))
    assert failed["category"] == "user"
    assert named in failed["error"]


def test_empty_data_is_refused(post: Post, server: Server) -> None:
    session = post("create_session", {"tags": [], "sdk_version": "0.38.0"}).json()["session_id"]
    create = {"session_id": session, "model_seq_id": 0, "base_model": server.llama, "lora_config": {"rank": 4}}
    model_id = result(post, post("create_model", create))["model_id"]
    body = {"model_id": model_id, "seq_id": 1, "forward_backward_input": {"data": [], "loss_fn": "cross_entropy"}}
    failed = result(post, post("forward_backward", body))
    assert failed["category"] == "user"
    assert "data" in failed["error"]


def test_an_unknown_base_model_is_refused(service: tinker.ServiceClient, server: Server) -> None:
    with pytest.raises(tinker.RequestFailedError, match=r"Qwen/Qwen3-8B.*serves") as caught:
        service.create_lora_training_client(base_model="Qwen/Qwen3-8B", rank=4).result()
    assert caught.value.category == types.RequestErrorCategory.User
    with pytest.raises(tinker.NotFoundError, match="serves"):
        service.create_sampling_client(base_model="Qwen/Qwen3-8B").result()


def test_wrong_paths_are_refused(service: tinker.ServiceClient, new_model: NewModel) -> None:
    model = new_model()
    run_id = model.model_id
    for path in (f"tinker://{run_id}/weights/none", "tinker://nobody:train:0/weights/x", "tinker://a/b"):
        with pytest.raises((tinker.RequestFailedError, tinker.BadRequestError, ValueError)):
            service.create_training_client_from_state(path).result()
    with pytest.raises((tinker.NotFoundError, tinker.BadRequestError)):
        service.create_sampling_client(model_path=f"tinker://{run_id}/sampler_weights/none").result()
    for name in ("..", "a..b", ".hidden", ""):
        with pytest.raises((tinker.RequestFailedError, ValueError)):
            model.save_state(name).result()
    train(model, 1)


@pytest.mark.filterwarnings("ignore:.*load_state:FutureWarning")
def test_checkpoints_that_do_not_fit_change_nothing(server: Server, new_model: NewModel) -> None:
    model = new_model(rank=4)
    train(model, 2)
    path = model.save_state("once").result().path
    with pytest.raises(tinker.RequestFailedError, match="overwrite"):
        model.save_state("once").result()
    model.save_state("once", overwrite=True).result()
    before = forward_logprobs(model, GOOD)
    for other in (new_model(rank=8), new_model(rank=4, base_model=server.qwen3)):
        untouched = forward_logprobs(other, GOOD)
        with pytest.raises(tinker.RequestFailedError) as caught:
            other.load_state_with_optimizer(path).result()
        assert caught.value.category == types.RequestErrorCategory.User
        np.testing.assert_array_equal(forward_logprobs(other, GOOD), untouched)
    np.testing.assert_array_equal(forward_logprobs(model, GOOD), before)


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4, "temperature": -1.0}, "temperature"),
        ({"max_tokens": 4, "top_p": 1.5}, "top_p"),
        ({"max_tokens": 4, "top_k": 0}, "top_k"),
        ({"max_tokens": 4, "min_p": 0.1}, "min_p"),
    ],
)
def test_sampling_parameters_out_of_range_are_refused(
    post: Post, server: Server, params: dict[str, Any], named: str
) -> None:
    session = post("create_session", {"tags": [], "sdk_version": "0.38.0"}).json()["session_id"]
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": server.llama}
    sampler = post("create_sampling_session", body).json()["sampling_session_id"]
    sample = {
        "sampling_session_id": sampler,
        "seq_id": 0,
        "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "sampling_params": params,
    }
    failed = result(post, post("asample", sample))
    assert failed["category"] == "user"
    assert named in failed["error"]


def test_unknown_ids_are_404_with_detail(post: Post) -> None:
    calls = {
        "get_info": {"model_id": "s-none:train:0"},
        "retrieve_future": {"request_id": "req-none"},
        "session_heartbeat": {"session_id": "s-none"},
        "create_sampling_session": {"session_id": "s-none", "sampling_session_seq_id": 0, "base_model": "x"},
        "weights_info": {"tinker_path": "tinker://s-none:train:0/weights/x"},
    }
    for path, body in calls.items():
        response = post(path, body)
        assert response.status_code == 404, path
        assert response.json()["detail"]
    assert post("weights_info", {"tinker_path": "tinker://x"}).status_code == 400
