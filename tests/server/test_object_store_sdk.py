"""Checkpoints in S3 through the unmodified SDK, with fake models and a real S3 server."""

from __future__ import annotations

import io
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker

from tests.object_store import BUCKET, S3Server, serve_s3
from tests.server.conftest import Api, open_api


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def api(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TINKER_API_KEY", "tml-dummy")
    with open_api(tmp_path / "data", engine={"checkpoint_store": f"s3://{BUCKET}/a/prefix"}) as api:
        yield api


def download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=120) as response:
        content: bytes = response.read()
        assert int(response.headers["content-length"]) == len(content)
    return content


def test_saving_loading_sampling_downloading_and_deleting(api: Api, server: S3Server, tmp_path: Path) -> None:
    with tinker.ServiceClient(base_url=api.url) as service:
        model = service.create_lora_training_client(base_model="tiny", rank=4, seed=1).result()
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints([1, 2, 3]),
            loss_fn_inputs={"target_tokens": tinker.TensorData(data=[2, 3, 4], dtype="int64", shape=[3])},
        )
        model.forward_backward([datum], "cross_entropy").result()
        model.optim_step(tinker.AdamParams(learning_rate=0.1)).result()
        state = model.save_state("step-1").result().path
        sampler = model.save_weights_for_sampler("sampler").result().path
        external = model.save_weights_external("out").result().path
        assert not list((tmp_path / "data").glob("checkpoints/*"))
        assert len({file.parent for file in server.bucket.rglob("*.npz")}) == 3

        again = service.create_training_client_from_state_with_optimizer(state).result()
        assert again.model_id != model.model_id
        client = service.create_sampling_client(model_path=sampler).result()
        params = tinker.SamplingParams(max_tokens=2, seed=1)
        (sequence,) = client.sample(tinker.ModelInput.from_ints([1]), 1, params).result().sequences
        assert len(sequence.tokens) <= 2

        rest = tinker.RestClient(base_url=api.url)
        listed = {item.tinker_path: item for item in rest.list_checkpoints(model.model_id).result().checkpoints}
        assert set(listed) == {state, sampler, external}
        run = model.model_id
        link = api.get(f"training_runs/{run}/checkpoints/weights/step-1/archive").json()["url"]
        with tarfile.open(fileobj=io.BytesIO(download(link))) as archive:
            members = {member.name: member.size for member in archive.getmembers()}
        assert set(members) == {"tinker.json", "weights.npz", "optimizer.npz"}
        assert sum(members.values()) == listed[state].size_bytes
        urls = rest.get_external_weights_urls(external).result().urls
        assert sum(len(download(url)) for url in urls.values()) == listed[external].size_bytes

        rest.delete_checkpoint_from_tinker_path(state).result()
        assert state not in {item.tinker_path for item in rest.list_checkpoints(run).result().checkpoints}
        with pytest.raises(tinker.NotFoundError, match="no checkpoint"):
            rest.get_weights_info_by_tinker_path(state).result()
