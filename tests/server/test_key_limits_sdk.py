"""The limits of a key as the real SDK meets them: readable errors, quiet waiting, neighbours that notice nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.held_sampler import HOLD, HeldSampler, prompt_json
from tests.server.tenants import Tenant, serve_tenants
from tests.server.test_routes import pass_body
from tests.server.test_sdk_flow import datum
from tinker_core.types import KeyLimits

PROMPT = types.ModelInput.from_ints([3, 4, 5])
DATA = [datum([3, 4, 5, 6], [4, 5, 6, 7]), datum([9, 8], [8, 7])]

OWNERS = {
    "few models": KeyLimits(max_models=1, max_rank=8),
    "few tokens": KeyLimits(max_tokens_in_flight=20),
    "few bytes": KeyLimits(max_stored_bytes=3000),
    "few requests": KeyLimits(max_requests_per_second=0.01),
    "a few requests": KeyLimits(max_requests_per_second=8.0),
    "neighbour": None,
}


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Tenant]]:
    with serve_tenants(tmp_path_factory.mktemp("data"), OWNERS) as tenants:
        yield tenants


def service_of(tenant: Tenant) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=tenant.url, api_key=tenant.key)


def new_model(service: tinker.ServiceClient, rank: int = 4) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model="tiny", rank=rank).result()


def works(tenant: Tenant) -> None:
    """Everything at once, for a neighbour without limits."""
    with service_of(tenant) as service:
        model = new_model(service, rank=16)
        passed = [model.forward_backward(DATA, "cross_entropy") for _ in range(3)]
        model.save_state("a").result()
        sampler = model.save_weights_and_get_sampling_client().result()
        samples = [sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=4)) for _ in range(8)]
        assert all(future.result() for future in [*passed, *samples])


def test_models_and_ranks(tenants: dict[str, Tenant]) -> None:
    tenant = tenants["few models"]
    with service_of(tenant) as service:
        with pytest.raises(tinker.RequestFailedError, match="rank 16 is above 8"):
            new_model(service, rank=16)
        model = new_model(service)
        with pytest.raises(tinker.RequestFailedError, match="1 models at a time"):
            new_model(service)
        path = model.save_state("a").result().path
        with pytest.raises(tinker.RequestFailedError, match="1 models at a time"):
            service.create_training_client_from_state(path).result()
    with service_of(tenant) as service:
        assert service.create_training_client_from_state(path).result().model_id


def test_stored_bytes(tenants: dict[str, Tenant]) -> None:
    tenant = tenants["few bytes"]
    rest = tinker.RestClient(base_url=tenant.url, api_key=tenant.key)
    with service_of(tenant) as service:
        model = new_model(service)
        first = model.save_state("first").result().path
        (kept,) = rest.list_user_checkpoints().result().checkpoints
        assert kept.size_bytes is not None
        rest_of_room = range(1, 3000 // kept.size_bytes)
        saved = [first, *(model.save_state(f"more-{number}").result().path for number in rest_of_room)]
        with pytest.raises(tinker.RequestFailedError, match=r"exceed the 3000 bytes.*delete checkpoints"):
            model.save_state("too-much").result()
        listed = {item.tinker_path for item in rest.list_user_checkpoints().result().checkpoints}
        assert listed == set(saved), "a save that was refused must leave nothing"
        with pytest.raises(tinker.BadRequestError, match="exceed the 3000 bytes"):
            rest.copy_weights(first, "other").result()
        rest.delete_checkpoint_from_tinker_path(first).result()
        assert model.save_state("again").result().path


def test_samples_over_the_tokens_in_flight_wait_in_the_client(tenants: dict[str, Tenant]) -> None:
    with service_of(tenants["few tokens"]) as service:
        sampler = service.create_sampling_client(base_model="tiny").result()
        params = types.SamplingParams(max_tokens=14)
        samples = [sampler.sample(PROMPT, 1, params) for _ in range(2)]
        works(tenants["neighbour"])
        assert all(sample.result().sequences for sample in samples)
        with pytest.raises(tinker.BadRequestError, match=r"31 tokens.*20 in flight"):
            sampler.sample(PROMPT, 2, params).result()


def test_training_over_the_tokens_in_flight_is_late_and_complete(tenants: dict[str, Tenant]) -> None:
    """A call in two parts, each far over the limit, in the order in which clients send them: 2, 1."""
    with service_of(tenants["few tokens"]) as service:
        model = new_model(service)
        passed = [model.forward([datum([3 + i % 40, 4], [4, 5]) for i in range(1030)], "cross_entropy")]
        passed += [model.forward_backward(DATA, "cross_entropy") for _ in range(4)]
        assert [len(future.result().loss_fn_outputs) for future in passed] == [1030, 2, 2, 2, 2]


def test_listings_and_samples_over_the_rate_are_told_to_wait(tenants: dict[str, Tenant]) -> None:
    tenant = tenants["few requests"]
    session = tenant.session()
    for refused in (
        tenant.get("checkpoints"),
        tenant.get("sessions"),
        tenant.post("create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0}),
    ):
        assert refused.status_code == 429
        assert 90 < int(refused.headers["retry-after"]) <= 100
        assert "0.01 requests per second" in refused.json()["detail"]
    for _ in range(5):
        assert tenant.post("session_heartbeat", {"session_id": session}).status_code == 200
        assert tenant.post("telemetry", {"events": []}).status_code == 200
        assert tenant.post("client/config", {}).status_code == 200
        assert tenant.post("retrieve_future", {"request_id": "req-none"}).status_code == 404
        assert tenant.post("cancel_future", {"request_id": "req-none"}).status_code == 404
    assert tenant.post(f"sessions/{session}/finish", {}).status_code == 200
    assert tenants["neighbour"].get("checkpoints").status_code == 200


def test_the_sdk_waits_as_long_as_it_is_told_and_then_succeeds(tenants: dict[str, Tenant]) -> None:
    tenant = tenants["a few requests"]
    rest = tinker.RestClient(base_url=tenant.url, api_key=tenant.key)
    futures = [rest.list_sessions() for _ in range(12)]
    assert all(future.result().sessions == [] for future in futures)


def test_training_over_the_rate_is_accepted_late(tenants: dict[str, Tenant]) -> None:
    tenant = tenants["a few requests"]
    with service_of(tenant) as service:
        model = new_model(service)
        steps = [model.forward_backward(DATA, "cross_entropy") for _ in range(8)]
        assert all(step.result() for step in steps)
        unreadable = pass_body(model.model_id, 9) | {"forward_backward_input": 3}
        assert "error" in tenant.run("forward_backward", unreadable)


def test_a_key_that_is_full_does_not_fill_its_neighbours(tmp_path: Path) -> None:
    held = HeldSampler(slots=8)
    owners = {"ann": KeyLimits(max_tokens_in_flight=20), "ben": KeyLimits(max_tokens_in_flight=20)}
    with serve_tenants(tmp_path, owners, sampler=held) as tenants:
        bodies = {}
        for name, tenant in tenants.items():
            opened = {"session_id": tenant.session(), "sampling_session_seq_id": 0, "base_model": "tiny"}
            sampler = tenant.post("create_sampling_session", opened).json()["sampling_session_id"]
            bodies[name] = {
                "sampling_session_id": sampler,
                "prompt": prompt_json(HOLD),
                "sampling_params": {"max_tokens": 9},
            }
        receipts = [tenants[name].post("asample", {**bodies[name], "seq_id": 0}) for name in ("ann", "ben")]
        held.wait_started()
        again = tenants["ann"].post("asample", {**bodies["ann"], "seq_id": 0})
        assert again.json() == receipts[0].json(), "a repeat is no new sample"
        refused = tenants["ann"].post("asample", {**bodies["ann"], "seq_id": 1})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "20 tokens in flight" in refused.json()["detail"]
        held.release()
        for name, receipt in zip(("ann", "ben"), receipts, strict=True):
            assert tenants[name].retrieve(receipt.json()["request_id"], "application/x-protobuf").status_code == 200
        assert tenants["ann"].post("asample", {**bodies["ann"], "seq_id": 1}).status_code == 200
