"""Saved weights through the unmodified SDK's REST client, with fake models."""

from __future__ import annotations

import datetime as dt
import io
import json
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pyrage  # type: ignore[import-untyped]
import pytest
import tinker
from tinker import types

from tests.server.conftest import Api


@pytest.fixture
def service(api: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[tinker.ServiceClient]:
    monkeypatch.setenv("TINKER_API_KEY", "tml-dummy")
    with tinker.ServiceClient(base_url=api.url) as client:
        yield client


@pytest.fixture
def rest(api: Api, service: tinker.ServiceClient) -> tinker.RestClient:
    return tinker.RestClient(base_url=api.url)


@pytest.fixture
def model(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client(base_model="tiny", rank=4, seed=1).result()


def paths_of(rest: tinker.RestClient, model: tinker.TrainingClient) -> dict[str, types.Checkpoint]:
    listed = rest.list_checkpoints(model.model_id).result().checkpoints
    return {checkpoint.tinker_path: checkpoint for checkpoint in listed}


def get(url: str, **headers: str) -> Any:
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=120)


def refused(url: str) -> int:
    with pytest.raises(urllib.error.HTTPError) as error:
        get(url)
    error.value.read()
    error.value.close()
    return error.value.code


# --- external weights -------------------------------------------------------------------------------------------------


def test_external_weights_are_downloaded_by_plain_get(rest: tinker.RestClient, model: tinker.TrainingClient) -> None:
    path = model.save_weights_external("final", ttl_seconds=7200).result().path
    assert path == f"tinker://{model.model_id}/external_weights/final"
    record = paths_of(rest, model)[path]
    assert record.checkpoint_type == "external"
    assert record.expires_at is not None
    found = rest.get_external_weights_urls(path).result()
    remaining = found.expires - dt.datetime.now(dt.UTC)
    assert dt.timedelta(minutes=50) < remaining <= dt.timedelta(hours=1)
    assert "tinker.json" not in found.urls
    total = 0
    for url in found.urls.values():
        with get(url) as response:
            content = response.read()
            assert int(response.headers["content-length"]) == len(content)
        with get(url, range="bytes=1-4") as response:
            assert (response.status, response.read()) == (206, content[1:5])
        total += len(content)
    assert total == record.size_bytes


def test_external_weights_encrypted_with_age(rest: tinker.RestClient, model: tinker.TrainingClient) -> None:
    mine, other = pyrage.x25519.Identity.generate(), pyrage.x25519.Identity.generate()
    recipients = [str(mine.to_public()), str(other.to_public())]
    path = model.save_weights_external("secret", age_encryption_recipients=recipients).result().path
    plain = model.save_weights_external("plain").result().path
    urls = rest.get_external_weights_urls(path).result().urls
    plain_urls = rest.get_external_weights_urls(plain).result().urls
    assert sorted(urls) == sorted(f"{name}.age" for name in plain_urls)
    for name, url in urls.items():
        with get(url) as encrypted, get(plain_urls[name.removesuffix(".age")]) as expected:
            content = encrypted.read()
            assert {pyrage.decrypt(content, [key]) for key in (mine, other)} == {expected.read()}


@pytest.mark.parametrize(
    ("recipients", "said"), [(["age1nonsense"], "age_encryption_recipients"), (["x"] * 11, "at most 10")]
)
def test_recipients_that_are_none_fail_the_save(
    rest: tinker.RestClient, model: tinker.TrainingClient, recipients: list[str], said: str
) -> None:
    with pytest.raises(tinker.RequestFailedError, match=said):
        model.save_weights_external("bad", age_encryption_recipients=recipients).result()
    assert paths_of(rest, model) == {}


def test_forged_and_expired_links_open_nothing(rest: tinker.RestClient, model: tinker.TrainingClient) -> None:
    path = model.save_weights_external("final").result().path
    url = next(iter(rest.get_external_weights_urls(path).result().urls.values()))
    base, _, query = url.partition("?")
    parts = dict(part.split("=") for part in query.split("&"))
    forged = [
        base,
        f"{base}/../../x?{query}",
        f"{base}x?{query}",
        f"{base}?{query.replace('expires=', 'expires=9')}",
        f"{base}?version={parts['version']}&expires={parts['expires']}&signature={'0' * 64}",
        f"{base}?version=&expires={parts['expires']}&signature={parts['signature']}",
    ]
    assert [refused(link) for link in forged] == [403] * len(forged)
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert refused(url) == 404


def test_links_are_made_for_hosts_only(api: Api, model: tinker.TrainingClient) -> None:
    model.save_weights_external("final").result()
    target = f"training_runs/{model.model_id}/checkpoints/external_weights/final/external_weights_urls"
    good = api.get(target, headers={"host": "tinker.example:8443"})
    assert all(url.startswith("http://tinker.example:8443/download/") for url in good.json()["urls"].values())
    for host in ("a b", "evil/path", "user@host", 'x"y'):
        assert api.get(target, headers={"host": host}).status_code == 400


# --- archives of old clients ------------------------------------------------------------------------------------------


def test_archive_is_a_tar_of_the_files(api: Api, model: tinker.TrainingClient) -> None:
    model.save_state("step-1").result()
    target = f"training_runs/{model.model_id}/checkpoints/weights/step-1/archive"
    redirect = api.get(target, headers={"accept": "application/gzip"})
    assert redirect.status_code == 302
    assert redirect.headers["expires"].endswith("GMT")
    described = api.get(target).json()
    assert dt.datetime.fromisoformat(described["expires"]).tzinfo is not None
    for url in (redirect.headers["location"], described["url"]):
        with get(url) as response:
            content = response.read()
            assert int(response.headers["content-length"]) == len(content)
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            files = {member.name: member.size for member in archive.getmembers()}
            manifest = archive.extractfile("tinker.json")
            assert manifest is not None
            assert json.load(manifest)["base_model"] == "tiny"
    assert sum(files.values()) == api.get("checkpoints").json()["checkpoints"][0]["size_bytes"]


# --- traces -----------------------------------------------------------------------------------------------------------


def test_trace_of_a_session_tells_when_its_requests_ran(
    service: tinker.ServiceClient, rest: tinker.RestClient, model: tinker.TrainingClient
) -> None:
    sampler = model.save_weights_and_get_sampling_client().result()
    sampler.sample(types.ModelInput.from_ints([3, 4]), 1, types.SamplingParams(max_tokens=2)).result()
    session_id = model.model_id.partition(":")[0]
    with get(rest.export_session_trace(session_id).result()) as response:
        trace = json.loads(response.read())
    assert trace["otherData"] == {"session_id": session_id, "requests": 3, "older_requests_dropped": 0}
    events = trace["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert tracks == {model.model_id, f"{session_id}:sample:0"}
    begins = [event["cat"] for event in events if event["ph"] == "b" and event["name"] == event["cat"]]
    assert begins == ["create_model", "save_weights_for_sampler", "sample"]
    for event in events:
        if event["ph"] == "e":
            (begin,) = (b for b in events if b["ph"] == "b" and (b["id"], b["name"]) == (event["id"], event["name"]))
            assert event["ts"] >= begin["ts"] >= 0


# --- administration ---------------------------------------------------------------------------------------------------


def test_publishing_a_checkpoint_again_is_no_error(rest: tinker.RestClient, model: tinker.TrainingClient) -> None:
    path = model.save_state("step-1", user_metadata={"note": "first"}).result().path
    for _ in range(2):
        rest.publish_checkpoint_from_tinker_path(path).result()
    record = paths_of(rest, model)[path]
    assert record.public
    assert record.user_metadata == {"note": "first"}
    for _ in range(2):
        rest.unpublish_checkpoint_from_tinker_path(path).result()
    assert not paths_of(rest, model)[path].public
    with pytest.raises(tinker.NotFoundError):
        rest.publish_checkpoint_from_tinker_path(f"{path}x").result()


def test_lifetimes_are_set_and_lifted(rest: tinker.RestClient, model: tinker.TrainingClient) -> None:
    path = model.save_state("step-1", ttl_seconds=3600).result().path
    first = paths_of(rest, model)[path].expires_at
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    second = paths_of(rest, model)[path].expires_at
    assert first is not None
    assert second is not None
    assert second > first
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert paths_of(rest, model)[path].expires_at is None
    with pytest.raises(tinker.BadRequestError):
        rest.set_checkpoint_ttl_from_tinker_path(path, 60).result()


def test_listings_are_paged_newest_first(api: Api, rest: tinker.RestClient, model: tinker.TrainingClient) -> None:
    saved = [model.save_state(f"step-{step}").result().path for step in range(3)]
    page = rest.list_user_checkpoints(limit=2, offset=1).result()
    assert [item.tinker_path for item in page.checkpoints] == saved[1::-1]
    assert page.cursor is not None
    assert page.cursor.total_count >= 3
    old = api.get(f"models/{model.model_id}/checkpoints").json()
    assert [item["tinker_path"] for item in old["checkpoints"]] == saved[::-1]
    run = rest.get_training_run_by_tinker_path(saved[0], access_scope="accessible").result()
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == saved[-1]
    runs = rest.list_training_runs(access_scope="accessible", limit=1).result()
    assert runs.training_runs[0].training_run_id == model.model_id
    assert api.get("training_runs", params={"access_scope": "all"}).status_code == 400


def test_weights_info_tells_what_a_new_model_needs(rest: tinker.RestClient, service: tinker.ServiceClient) -> None:
    model = service.create_lora_training_client(base_model="tiny", rank=8, train_mlp=False).result()
    info = rest.get_weights_info_by_tinker_path(model.save_state("a").result().path).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == ("tiny", True, 8)
    assert (info.train_mlp, info.train_attn, info.train_unembed) == (False, True, True)
    assert info.optimizer_config is not None
    assert model.get_info().lora_rank == 8


def test_a_copy_lands_in_its_project_and_trains_on_in_a_new_model(
    api: Api, service: tinker.ServiceClient, rest: tinker.RestClient, model: tinker.TrainingClient
) -> None:
    path = model.save_state("step-1").result().path
    copy = rest.copy_weights(path, "archive", ttl_seconds=3600).result()
    assert copy != path
    assert copy.endswith("/weights/step-1")
    (run,) = rest.list_training_runs(project_id="archive").result().training_runs
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == copy
    assert run.last_checkpoint.expires_at is not None
    rest.delete_checkpoint_from_tinker_path(path).result()
    loaded = service.create_training_client_from_state_with_optimizer(copy).result()
    assert loaded.get_info().lora_rank == 4
    with pytest.raises(tinker.NotFoundError):
        rest.copy_weights(path, "archive").result()
    old = {"source_path": copy, "session_id": model.model_id.partition(":")[0], "model_seq_id": 9}
    answers = [api.post("copy_weights", old, headers={"x-idempotency-key": "one"}).json() for _ in range(2)]
    expected = copy.replace(run.training_run_id, f"{old['session_id']}:train:9")
    assert answers == [{"tinker_path": expected}] * 2


def test_unloading_a_model_of_old_clients(api: Api, model: tinker.TrainingClient) -> None:
    result = api.run("unload_model", {"model_id": model.model_id, "type": "unload_model"})
    assert result == {"type": "unload_model", "model_id": model.model_id}
    gone = api.run("optim_step", {"model_id": model.model_id, "seq_id": 1, "adam_params": {}})
    assert gone["category"] == "user"
