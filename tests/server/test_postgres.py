"""A server with its control records in Postgres, through the unmodified SDK."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from tests.postgres import Postgres
from tests.server.test_command import FAKE, running
from tests.storage.test_database import own_postgres
from tinker_server.cli import main

__all__ = ["own_postgres"]

SECRET = "s3cr3t"
BATCH = [
    types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": np.array([2, 3, 4], np.int64), "weights": np.ones(3, np.float32)},  # type: ignore[dict-item]
    )
]


def train(model: tinker.TrainingClient) -> None:
    passed = model.forward_backward(BATCH, "cross_entropy")
    model.optim_step(types.AdamParams(learning_rate=0.01)).result()
    passed.result()


@pytest.fixture
def url(own_postgres: Postgres) -> str:
    """With a password, which the server of the tests does not ask for."""
    return own_postgres.database().replace("tester@", f"tester:{SECRET}@")


@pytest.fixture
def key(url: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["keys", "create", "--database-url", url, "--owner", "ann", "--format", "json"]) == 0
    return str(json.loads(capsys.readouterr().out)[0]["key"])


@pytest.fixture
def flags(tmp_path: Path, url: str) -> tuple[str, ...]:
    """The URL comes from a file, which only its owner can read; everybody can see a process's flags."""
    config = tmp_path / "server.toml"
    config.write_text(f"database-url = {json.dumps(url)}\n")
    return (*FAKE, "--port", "0", "--data-dir", str(tmp_path / "data"), "--config", str(config))


def test_training_goes_on_while_the_database_is_away_and_records_are_there_when_it_is_back(
    own_postgres: Postgres, flags: tuple[str, ...], key: str, tmp_path: Path
) -> None:
    assert own_postgres.server is not None
    with running(*flags) as (process, base):
        with tinker.ServiceClient(base_url=base, api_key=key) as service:
            model = service.create_lora_training_client(base_model="tiny", rank=4).result()
            train(model)
            first = model.save_state("first").result().path
            own_postgres.server.stop()
            train(model)
            with pytest.raises(tinker.RequestFailedError, match="cannot be reached"):
                model.save_state("second").result()
            assert httpx.get(f"{base}/api/v1/checkpoints", headers={"x-api-key": key}).status_code == 503
            own_postgres.server.start()
            train(model)
            third = model.save_state("third").result().path
            rest = tinker.RestClient(base_url=base, api_key=key)
            listed = rest.list_user_checkpoints().result().checkpoints
            assert {checkpoint.tinker_path for checkpoint in listed} == {first, third}
        metrics = httpx.get(f"{base}/metrics", headers={"x-api-key": key}).text
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = process.stderr.read()
        assert process.wait() == 0
    assert "cannot be reached" in log
    assert SECRET not in log + metrics
    assert not list((tmp_path / "data").glob("control.sqlite*"))
    with running(*flags) as (process, base):
        with tinker.ServiceClient(base_url=base, api_key=key) as service:
            service.create_training_client_from_state_with_optimizer(third).result()
        own_postgres.server.stop()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
