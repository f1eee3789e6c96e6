"""Usage, storage and audit log, as the SDK reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from tests.server.tenants import ShiftedClock, Tenant, serve_tenants
from tests.server.test_sdk_flow import datum
from tinker_core.engine.usage import storage_of
from tinker_core.types import CheckpointRecord, CheckpointType, LoraConfig, OptimizerConfig, TinkerPath, UsageKind
from tinker_server.prices import Prices
from tinker_server.wire.billing import usage_events_to_json

PRICES = Prices(price_training=3.0, price_prefill=0.5, price_storage=720.0)
DATA = [datum([3, 4, 5, 6], [4, 5, 6, 7]), datum([9, 8], [8, 7])]


@pytest.fixture(scope="module")
def clock(database_url: str | None) -> ShiftedClock:
    """It is ten past ten, so that no hour and no day ends meanwhile."""
    clock = ShiftedClock()
    tomorrow = (clock.now() + timedelta(days=1)).replace(hour=10, minute=10)
    clock.shift = (tomorrow - clock.now()).total_seconds()
    return clock


@pytest.fixture(scope="module")
def tenants(
    tmp_path_factory: pytest.TempPathFactory, clock: ShiftedClock, database_url: str | None
) -> Iterator[dict[str, Tenant]]:
    data_dir, engine = tmp_path_factory.mktemp("data"), {"database_url": database_url}
    with serve_tenants(data_dir, {"ann": None, "ben": None}, prices=PRICES, clock=clock, engine=engine) as tenants:
        yield tenants


def usage(tenant: Tenant, clock: ShiftedClock) -> types.BillingUsageResponse:
    hour = clock.now().replace(minute=0, second=0, microsecond=0)
    admin = tinker.AdminClient(base_url=tenant.url, api_key=tenant.key)
    return admin.get_billing_usage(hour - timedelta(hours=1), hour + timedelta(hours=2)).result()


def quantities(response: types.BillingUsageResponse) -> Counter[str]:
    """Tokens and counts by kind."""
    totals: Counter[str] = Counter()
    for event in response.data:
        info: Any = event.event_info
        kind = f"{info.type} cached" if getattr(info, "cached", False) else info.type
        totals[kind] += getattr(info, "token_count", None) or getattr(info, "count", 0)
    return +totals


def test_each_request_is_counted_once_for_its_owner(tenants: dict[str, Tenant], clock: ShiftedClock) -> None:
    ann, ben = tenants["ann"], tenants["ben"]
    with tinker.ServiceClient(
        base_url=ann.url, api_key=ann.key, project_id="thesis", user_metadata={"note": "x"}
    ) as service:
        model = service.create_lora_training_client(base_model="tiny", rank=4).result()
        model.forward_backward(DATA, "cross_entropy").result()
        model.forward(DATA, "cross_entropy").result()
        model.optim_step(types.AdamParams()).result()
        model.save_state("a").result()
        sampler = model.save_weights_and_get_sampling_client().result()
        prompt = types.ModelInput.from_ints([3, 4, 5])
        sampled = sampler.sample(prompt, 2, types.SamplingParams(max_tokens=4)).result()
        with pytest.raises(tinker.RequestFailedError):
            model.forward_backward([datum([3], [4, 5])], "cross_entropy").result()
    found = usage(ann, clock)
    generated = sum(len(sequence.tokens) for sequence in sampled.sequences)
    counted = quantities(found)
    assert counted.pop("sampling_prefill") + counted.pop("sampling_prefill cached", 0) == 3
    assert counted == {"training": 12, "sampling_sample": generated, "checkpoint": 1}
    assert {event.project_id for event in found.data} == {"thesis"}
    assert {event.base_model for event in found.data} == {"tiny"}
    assert {event.user_id for event in found.data} == {"tml:organization_user:ann"}
    (session_id,) = found.sessions
    assert found.sessions[session_id].user_metadata == {"note": "x"}
    training = next(event for event in found.data if event.event_info.type == "training")
    assert training.effective_rate_usd_per_million_tokens == 3.0
    assert training.estimated_cost_usd == pytest.approx(12 * 3.0 / 1e6)
    sampling = next(event for event in found.data if event.event_info.type == "sampling_sample")
    assert (sampling.estimated_cost_usd, sampling.effective_rate_usd_per_million_tokens) == (None, None)
    assert usage(ben, clock).data == []


def test_storage_is_told_by_project_and_follows_moved_sessions(tenants: dict[str, Tenant], clock: ShiftedClock) -> None:
    ben = tenants["ben"]
    admin = tinker.AdminClient(base_url=ben.url, api_key=ben.key)
    rest = tinker.RestClient(base_url=ben.url, api_key=ben.key)
    with tinker.ServiceClient(base_url=ben.url, api_key=ben.key) as service:
        model = service.create_lora_training_client(base_model="tiny", rank=4).result()
        path = model.save_state("kept").result().path
        gone = model.save_state("gone").result().path
    rest.delete_checkpoint_from_tinker_path(gone).result()
    (stored,) = admin.get_current_checkpoint_storage_usage().result().data
    (size,) = (item.size_bytes for item in rest.list_user_checkpoints().result().checkpoints)
    assert (stored.checkpoint_count, stored.size_bytes, stored.project_id) == (1, size, None)
    assert (stored.user_name, stored.user_email) == ("ben", None)
    assert stored.estimated_monthly_cost_usd == pytest.approx(size / 1e9 * 720.0)
    session_id = path.removeprefix("tinker://").partition(":")[0]
    rest.assign_session_project(session_id, "moved").result()
    (stored,) = admin.get_current_checkpoint_storage_usage(project_id="moved").result().data
    assert stored.project_id == "moved"
    assert admin.get_current_checkpoint_storage_usage(project_id="other").result().data == []
    clock.shift += 1800
    found = usage(ben, clock)
    assert {event.project_id for event in found.data} == {"moved"}
    hours = sum(e.event_info.gigabyte_hours for e in found.data if isinstance(e.event_info, types.StorageBillingEvent))
    assert hours == pytest.approx(size / 1e9 / 2, rel=0.1)


def test_the_audit_log_tells_what_was_done(tenants: dict[str, Tenant], clock: ShiftedClock) -> None:
    ann = tenants["ann"]
    admin = tinker.AdminClient(base_url=ann.url, api_key=ann.key)
    rest = tinker.RestClient(base_url=ann.url, api_key=ann.key)
    (checkpoint,) = rest.list_user_checkpoints().result().checkpoints
    path = checkpoint.tinker_path
    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    rest.delete_checkpoint_from_tinker_path(path).result()
    entries = admin.get_audit_log("checkpoints").result().entries
    assert [entry.event for entry in entries][-3:] == [
        "checkpoint_published",
        "checkpoint_ttl_set",
        "checkpoint_deleted",
    ]
    assert entries[0].event == "checkpoint_saved"
    assert all(entry.tinker_path == path for entry in entries)
    assert {entry.event_details["key_id"] for entry in entries[1:]} == {ann.key_id}
    assert admin.get_audit_log("teams").result().entries == []
    yesterday = clock.now().date() - timedelta(days=1)
    assert admin.get_audit_log("all", day=yesterday).result().entries == []
    others = tinker.AdminClient(base_url=ann.url, api_key=tenants["ben"].key).get_audit_log().result().entries
    assert not any(path in str(entry) for entry in others)


@pytest.mark.parametrize(
    "query",
    [
        "billing/usage/events",
        "billing/usage/events?starting_on=2026-01-01T00:00:00Z",
        "billing/usage/events?starting_on=2026-01-01T00:30:00Z&ending_before=2026-01-02T00:00:00Z",
        "billing/usage/events?starting_on=2026-01-02T00:00:00Z&ending_before=2026-01-01T00:00:00Z",
        "billing/usage/events?starting_on=2026-01-01T00:00:00Z&ending_before=2026-02-01T00:00:00Z",
        "billing/usage/events?starting_on=9999-12-31T23:00:00Z&ending_before=9999-12-31T23:00:00Z",
        "billing/usage/events?starting_on=0001-01-01T00:00:00%2B14:00&ending_before=2026-02-01T00:00:00Z",
        "billing/usage/events?starting_on=soon&ending_before=later",
        "audit?event_type=nonsense",
        "audit?day=soon",
        "audit?day=9999-12-31",
    ],
)
def test_windows_that_cannot_be_are_refused(tenants: dict[str, Tenant], query: str) -> None:
    refused: httpx.Response = tenants["ann"].get(query)
    assert refused.status_code == 400, refused.text
    assert set(refused.json()) == {"detail"}


def test_stored_bytes_are_spread_over_the_hours_of_the_window() -> None:
    start = datetime(2026, 1, 1, 10, 30, tzinfo=UTC)
    record = CheckpointRecord(
        path=TinkerPath(run_id="copy", kind=CheckpointType.TRAINING, name="a"),
        base_model="tiny",
        lora_config=LoraConfig(rank=4),
        optimizer_config=OptimizerConfig(),
        created_at=start,
        size_bytes=2_000_000_000,
        request_id="r",
        project_id="p",
    )
    stored = storage_of(record, start + timedelta(hours=3))
    assert stored.kind is UsageKind.STORAGE
    window = datetime(2026, 1, 1, 11, tzinfo=UTC), datetime(2026, 1, 1, 20, tzinfo=UTC)
    events: Any = usage_events_to_json([stored, stored], {}, "ann", *window, PRICES)["data"]
    assert [event["event_info"]["gigabyte_hours"] for event in events] == [4.0, 4.0, 2.0]
    assert [event["estimated_cost_usd"] for event in events] == [4.0, 4.0, 2.0]
    assert [event["bucket_start"][11:16] for event in events] == ["11:00", "12:00", "13:00"]
    assert {(event["session_id"], event["project_id"]) for event in events} == {(None, "p")}
