"""``tinker-server keys`` and ``tinker-server usage``, alone and beside a running server."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

from tests.server.tenants import serve_tenants
from tests.server.test_command import FAKE, run, running
from tests.server.test_routes import pass_body
from tinker_server.cli import main


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str, status: int = 0) -> str:
        assert main([*arguments, "--data-dir", str(tmp_path / "data")]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    return call


def test_a_key_is_shown_once_and_listed_without_itself(command: Any) -> None:
    limits = ("--max-models", "2", "--max-rank", "16", "--max-tokens-in-flight", "5", "--max-stored-bytes", "7")
    flags = (*limits, "--max-requests-per-second", "0.5", "--expires-in", "30d", "--name", "laptop")
    (created,) = json.loads(command("keys", "create", "--owner", "ann@example.org", *flags, "--format", "json"))
    key = created.pop("key")
    assert re.fullmatch(r"tml-[A-Za-z0-9_-]{43}", key)
    listed = command("keys", "list", "--format", "json")
    assert json.loads(listed) == [created]
    assert key not in listed
    assert created["limits"] == {
        "max_models": 2,
        "max_rank": 16,
        "max_tokens_in_flight": 5,
        "max_stored_bytes": 7,
        "max_requests_per_second": 0.5,
    }
    assert (created["state"], created["ends_in"], created["name"]) == ("active", key[-4:], "laptop")
    life = datetime.fromisoformat(created["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=29) < life <= timedelta(days=30)
    table = command("keys", "list")
    assert table.splitlines()[0].split()[:3] == ["KEY", "ID", "OWNER"]
    assert "max_models=2" in table
    assert key not in table


def test_a_revoked_key_stays_listed(command: Any) -> None:
    text = command("keys", "create", "--owner", "ann")
    assert text.startswith("tml-")
    assert "only time" in text
    (listed,) = json.loads(command("keys", "list", "--format", "json"))
    for _ in range(2):
        assert listed["key_id"] in command("keys", "revoke", listed["key_id"])
    (listed,) = json.loads(command("keys", "list", "--format", "json"))
    assert listed["state"] == "revoked"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["keys", "list"], "there is no data directory"),
        (["keys", "revoke", "key-none"], "there is no data directory"),
        (["usage"], "there is no data directory"),
        (["keys", "create"], "--owner"),
        (["keys", "create", "--owner", "a b"], "'a b'"),
        (["keys", "create", "--owner", ""], "--owner"),
        (["keys", "create", "--owner", "a", "--max-models", "0"], "--max-models"),
        (["keys", "create", "--owner", "a", "--max-requests-per-second", "nan"], "--max-requests-per-second"),
        (["keys", "create", "--owner", "a", "--expires-in", "soon"], "such as 30d"),
        (["keys", "create", "--owner", "a", "--expires-in", "999999999d"], "--expires-in"),
        (["keys", "forget"], "forget"),
        (["usage", "--last", "7"], "such as 30d"),
    ],
)
def test_mistakes_are_named(command: Any, arguments: list[str], said: str) -> None:
    assert said in command(*arguments, status=2)


def test_an_unknown_key_cannot_be_revoked(command: Any) -> None:
    command("keys", "create", "--owner", "ann")
    assert "unknown API key 'key-none'" in command("keys", "revoke", "key-none", status=2)


def test_usage_by_owner_key_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve_tenants(tmp_path, {"ann": None, "ben": None}) as tenants:
        ann = tenants["ann"]
        model = ann.model(ann.session())
        ann.run("forward_backward", pass_body(model, 1))
        ann.run("save_weights", {"model_id": model, "seq_id": 2, "path": "a"})
    assert main(["usage", "--data-dir", str(tmp_path), "--format", "json"]) == 0
    rows = {row["kind"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == {"training", "checkpoint", "storage"}
    training = rows["training"]
    assert (training["owner"], training["key_id"], training["run_id"]) == ("ann", ann.key_id, model)
    assert (training["amount"], training["unit"]) == (2, "tokens")
    assert main(["usage", "--data-dir", str(tmp_path), "--owner", "ben"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_other_machines_are_served_only_once_there_is_a_key(tmp_path: Path, command: Any) -> None:
    data = ("--data-dir", str(tmp_path / "data"))
    refused = run(*FAKE, *data, "--host", "0.0.0.0", "--port", "0")
    assert refused.returncode == 2
    assert "tinker-server keys create" in refused.stderr
    (first,) = json.loads(command("keys", "create", "--owner", "ann", "--format", "json"))
    with running(*FAKE, *data, "--host", "0.0.0.0", "--port", "0") as (_, url):
        port = httpx.URL(url).port
        url = f"http://127.0.0.1:{port}"
        with tinker.ServiceClient(base_url=url, api_key=first["key"]) as service:
            assert service.create_lora_training_client(base_model="tiny", rank=4).result().model_id
        with pytest.raises(tinker.AuthenticationError, match="not known"):
            tinker.RestClient(base_url=url, api_key="tml-wrong").list_training_runs().result()
        (second,) = json.loads(command("keys", "create", "--owner", "ben", "--format", "json"))
        ben = tinker.RestClient(base_url=url, api_key=second["key"])
        assert ben.list_training_runs().result().training_runs == []
        listed = json.loads(command("keys", "list", "--format", "json"))
        assert [row["owner"] for row in listed] == ["ann", "ben"]
