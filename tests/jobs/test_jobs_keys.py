"""The keys that jobs' processes have, and in whose name they act."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.jobs.hosting import JOBS, JobsApi
from tests.jobs.scripted import entries, finished, open_gate, serve_scripted, starts, submit, wait_for
from tests.server.tenants import make_key
from tinker_core.engine.clock import SystemClock
from tinker_core.storage import ControlStore, database_url
from tinker_core.types import ApiKeyRecord
from tinker_jobs.service.keys import EXTEND_SECONDS, LIFE


class MovableClock(SystemClock):
    """The machine's clock, which a test puts forward from its own thread; who waits notices."""

    def __init__(self) -> None:
        self.shift = 0.0
        self._waiting: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    def monotonic(self) -> float:
        return super().monotonic() + self.shift

    def now(self) -> datetime:
        return super().now() + timedelta(seconds=self.shift)

    async def wait(self, event: asyncio.Event, deadline: float | None) -> None:
        while not event.is_set() and (deadline is None or self.monotonic() < deadline):
            moved = asyncio.Event()
            self._waiting[moved] = asyncio.get_running_loop()
            either = [asyncio.ensure_future(one.wait()) for one in (event, moved)]
            left = None if deadline is None else max(0.0, deadline - self.monotonic())
            try:
                await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            finally:
                del self._waiting[moved]
                for task in either:
                    task.cancel()

    def advance(self, seconds: float) -> None:
        self.shift += seconds
        for moved, loop in list(self._waiting.items()):
            loop.call_soon_threadsafe(moved.set)


@attrs.frozen(kw_only=True)
class Place:
    """A server with keys, on which one job runs at once."""

    api: JobsApi
    """Sends ann's key."""
    clock: MovableClock
    ann: str
    """Her key."""
    ben: str

    def status_with(self, key: str) -> int:
        """What the server answers to a key."""
        return self.api.http.get("/api/v1/audit", headers={"x-api-key": key}).status_code

    def quantities(self, key: str) -> dict[str, int]:
        """Tokens that the holder of a key has used, by kind."""
        hour = self.clock.now().replace(minute=0, second=0, microsecond=0)
        window = {
            "starting_on": (hour - timedelta(hours=2)).isoformat(),
            "ending_before": (hour + timedelta(hours=2)).isoformat(),
        }
        answer = self.api.http.get("/api/v1/billing/usage/events", params=window, headers={"x-api-key": key})
        events = [event["event_info"] for event in answer.json()["data"]]
        return {event["type"]: event["token_count"] for event in events if event.get("token_count")}


def records(data_dir: Path) -> dict[str, ApiKeyRecord]:
    """All keys by their names."""

    async def read() -> list[ApiKeyRecord]:
        control = await ControlStore.open(database_url(data_dir))
        try:
            return await control.keys.list()
        finally:
            await control.close()

    return {record.name: record for record in asyncio.run(read())}


def revoke(data_dir: Path, key_id: str) -> None:
    """As ``tinker-server keys revoke`` does it beside the server."""

    async def write() -> None:
        control = await ControlStore.open(database_url(data_dir))
        try:
            await control.keys.revoke(key_id, datetime.now(UTC))
        finally:
            await control.close()

    asyncio.run(write())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    data_dir, clock = tmp_path_factory.mktemp("keys"), MovableClock()
    keys = {owner: make_key(data_dir, owner)[0] for owner in ("ann", "ben")}
    with serve_scripted(data_dir, max_running=1, key=keys["ann"], clock=clock) as api:
        yield Place(api=api, clock=clock, **keys)


def start_of(place: Place, job_id: str) -> dict[str, Any]:
    (start,) = starts(place.api, job_id)
    return start


def test_a_job_has_a_key_of_its_own_until_its_process_ends(place: Place) -> None:
    job_id = submit(place.api, "start", "gate g", "end")
    wait_for(place.api, job_id, "at gate g")
    key = start_of(place, job_id)["key"]
    assert key not in (place.ann, place.ben)
    assert place.status_with(key) == 200
    expires_at = records(place.api.data_dir)[f"training job {job_id}"].expires_at
    assert expires_at is not None
    assert expires_at - place.clock.now() <= LIFE
    open_gate(place.api, job_id)
    finished(place.api, job_id)
    # The next job starts once the place is free, which it is when the key is revoked.
    finished(place.api, submit(place.api, "end"))
    assert place.status_with(key) == 401


def test_what_a_job_uses_is_its_submitters(place: Place) -> None:
    job_id = submit(place.api, "start", "train", "end", **{"x-api-key": place.ben})
    job = finished(place.api, job_id, **{"x-api-key": place.ben})
    assert job["status"] == "completed"
    assert place.quantities(place.ben) == {"training": 3}
    assert place.quantities(place.ann) == {}
    assert place.api.get(job_id).status_code == 404


def test_a_key_lasts_as_long_as_the_job_runs(place: Place) -> None:
    job_id = submit(place.api, "start", "gate g", "end")
    wait_for(place.api, job_id, "at gate g")
    name = f"training job {job_id}"
    first = records(place.api.data_dir)[name].expires_at
    place.clock.advance(EXTEND_SECONDS + 1)
    while records(place.api.data_dir)[name].expires_at == first:
        pass
    place.clock.advance(LIFE.total_seconds() - EXTEND_SECONDS)
    assert first is not None
    assert place.clock.now() > first
    assert place.status_with(start_of(place, job_id)["key"]) == 200
    open_gate(place.api, job_id)
    assert finished(place.api, job_id)["status"] == "completed"


def test_a_job_stops_and_another_does_not_start_when_their_submitters_key_is_revoked(place: Place) -> None:
    key, key_id = make_key(place.api.data_dir, "cleo")
    other, _ = make_key(place.api.data_dir, "cleo")
    running = submit(place.api, "start", "gate g", "end", **{"x-api-key": key})
    waiting = submit(place.api, "start", "end", **{"x-api-key": key})
    wait_for(place.api, running, "at gate g", **{"x-api-key": key})
    revoke(place.api.data_dir, key_id)
    place.clock.advance(EXTEND_SECONDS + 1)
    stopped = finished(place.api, running, **{"x-api-key": other})
    assert stopped["status"] == "failed"
    assert "cannot be used any more: this API key is revoked" in stopped["error"]
    refused = finished(place.api, waiting, **{"x-api-key": other})
    assert refused["status"] == "failed"
    assert "cannot be used: this API key is revoked" in refused["error"]
    assert refused["started_at"] is None


def test_owners_take_turns(place: Place) -> None:
    first = submit(place.api, "gate g", "end")
    wait_for(place.api, first, "at gate g")
    mine = [submit(place.api, "end") for _ in range(2)]
    his = submit(place.api, "end", **{"x-api-key": place.ben})
    open_gate(place.api, first)
    jobs = [finished(place.api, job_id) for job_id in mine]
    his_job = finished(place.api, his, **{"x-api-key": place.ben})
    assert his_job["started_at"] < jobs[0]["started_at"] < jobs[1]["started_at"]


def test_nobody_else_can_do_anything_with_a_job(place: Place) -> None:
    job_id = submit(place.api, "end")
    finished(place.api, job_id)
    ben = {"x-api-key": place.ben}
    for method, path in (
        ("GET", ""),
        ("GET", "/logs"),
        ("GET", "/logs/stream"),
        ("POST", "/cancel"),
        ("POST", "/retry"),
    ):
        assert place.api.http.request(method, f"{JOBS}/{job_id}{path}", headers=ben).status_code == 404
    assert all(job["id"] != job_id for job in place.api.http.get(JOBS, headers=ben).json()["items"])
    assert entries(place.api, job_id)
