"""Every command of the SDK's ``tinker`` command line that concerns keys and usage."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import tinker
from tinker import types
from tinker.lib.credentials import ApiKeyDetails, GeneratedKey, JsonCredentialStore

from tests.command_line import TinkerCommand
from tests.server.tenants import Tenant, make_key, serve_tenants

ANN = "ann@example.org"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def ann(data_dir: Path) -> Iterator[Tenant]:
    with serve_tenants(data_dir, {ANN: None}, jwt_auth=True) as tenants:
        yield tenants[ANN]


def command_with(url: str, key: str | None, home: Path) -> TinkerCommand:
    return TinkerCommand(
        environment={"TINKER_BASE_URL": url, "TINKER_API_KEY": key, "HOME": str(home), "COLUMNS": "300"}
    )


@pytest.fixture
def command(ann: Tenant, tmp_path: Path) -> TinkerCommand:
    """With a key in the environment."""
    return command_with(ann.url, ann.key, tmp_path)


@pytest.fixture
def fresh(ann: Tenant, tmp_path: Path) -> TinkerCommand:
    """Without any credentials."""
    return command_with(ann.url, None, tmp_path)


@pytest.fixture(scope="module")
def session_id(ann: Tenant) -> str:
    """A session in which something was used."""
    with tinker.ServiceClient(base_url=ann.url, api_key=ann.key, user_metadata={"team": "blue"}) as service:
        model = service.create_lora_training_client(base_model="tiny", rank=4).result()
        inputs = {"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]}
        data = [types.Datum(model_input=types.ModelInput.from_ints([1, 2, 3]), loss_fn_inputs=inputs)]
        model.forward_backward(data, "cross_entropy").result()
        model.optim_step(types.AdamParams()).result()
        model.save_state("kept").result()
        sampler = model.save_weights_and_get_sampling_client().result()
        sampler.sample(types.ModelInput.from_ints([1, 2]), 1, types.SamplingParams(max_tokens=4, stop=[])).result()
    return str(model.model_id.split(":")[0])


def test_auth_whoami(command: TinkerCommand, ann: Tenant) -> None:
    shown = command.json("auth", "whoami")
    assert shown["email"] == ANN
    assert shown["user_urn"]
    assert shown["org_urn"]
    assert ANN in command.text("auth", "whoami")


def test_auth_status(command: TinkerCommand, fresh: TinkerCommand) -> None:
    assert "Tinker accessible: yes" in command.text("auth", "status")
    refused = fresh.run("auth", "status")
    assert "Credentials available: no" in refused.stdout
    assert refused.exception is not None


def test_a_revoked_key_has_no_access(ann: Tenant, tmp_path: Path) -> None:
    command = command_with(ann.url, "tml-of-nobody", tmp_path)
    assert "Authentication failed" in command.error("auth", "status")


def test_model_list_without_a_match_names_the_organization(command: TinkerCommand) -> None:
    org_urn = command.json("auth", "whoami")["org_urn"]
    assert org_urn in command.error("model", "list", "no-such-model")


def test_auth_login_and_logout(fresh: TinkerCommand, ann: Tenant, tmp_path: Path) -> None:
    assert "Could not validate the API key" in fresh.error("auth", "login", stdin="tml-of-nobody\n")
    assert f"Logged in as {ANN}" in fresh.text("auth", "login", stdin=f"{ann.key}\n")
    stored = json.loads((tmp_path / ".tinker" / "credentials.json").read_text())
    assert [record["key"] for record in stored["keys"].values()] == [ann.key]
    assert "Already logged in" in fresh.error("auth", "login", stdin=f"{ann.key}\n")
    assert fresh.json("auth", "whoami")["email"] == ANN
    assert "The API key is still active" in fresh.text("auth", "logout")
    assert "No default credential is stored" in fresh.error("auth", "logout")
    assert "Credentials available: no" in fresh.run("auth", "status").stdout


def test_auth_logout_revokes_a_key_that_was_made_for_the_command_line(
    fresh: TinkerCommand, ann: Tenant, data_dir: Path, tmp_path: Path
) -> None:
    key, key_id = make_key(data_dir, ANN)
    details = ApiKeyDetails.model_validate({"org_details": {"name": "o"}, "user_details": {"email": ANN}})
    store = JsonCredentialStore(tmp_path / ".tinker" / "credentials.json")
    store.add_key(key_id, GeneratedKey(key=key, name="of the machine", details=details))
    store.set_default(key_id)
    assert fresh.json("auth", "whoami")["email"] == ANN
    assert "deleted its API key on the server" in fresh.text("auth", "logout")
    assert "Authentication failed" in command_with(ann.url, key, tmp_path).error("auth", "status")


def test_billing_usage(command: TinkerCommand, session_id: str, tmp_path: Path) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    window = [(hour + timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%SZ") for hours in (-1, 2)]
    shown = command.json("billing", "usage", *window)
    used = {event["event_info"]["type"]: event for event in shown["data"] if event["session_id"] == session_id}
    assert used["training"]["event_info"]["token_count"] == 3
    assert used["sampling_sample"]["event_info"]["token_count"] == 4
    assert shown["sessions"][session_id]["user_metadata"] == {"team": "blue"}
    assert "hourly usage row" in command.text("billing", "usage", *window)
    rows = list(csv.DictReader(io.StringIO(command.text("billing", "usage", *window, "--csv", "-"))))
    assert {row["session_id"] for row in rows} >= {session_id}
    command.text("billing", "usage", *window, "--sessions-csv", str(tmp_path / "sessions.csv"))
    assert session_id in (tmp_path / "sessions.csv").read_text()
    assert "hour" in command.error("billing", "usage", "2026-01-01T00:30:00Z", "2026-01-02T00:00:00Z")


def test_billing_checkpoint_storage(command: TinkerCommand, session_id: str) -> None:
    shown = command.json("billing", "checkpoint-storage")
    assert shown["data"]
    assert command.json("billing", "checkpoint-storage", "--project-id", "no-such-project")["data"] == []
    rows = list(csv.DictReader(io.StringIO(command.text("billing", "checkpoint-storage", "--csv", "-"))))
    assert len(rows) == len(shown["data"])
    assert command.text("billing", "checkpoint-storage")
