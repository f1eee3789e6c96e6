"""Every command of the SDK's ``tinker`` command line that concerns models, runs, checkpoints and sessions."""

from __future__ import annotations

import inspect
import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import huggingface_hub
import numpy as np
import pytest
import tinker
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.command_line import TinkerCommand
from tests.e2e.conftest import API_KEY, NewModel, Server, forward_logprobs, tokens, train

SEQUENCE = tokens(16, seed=3)


@attrs.frozen
class Trained:
    """A run with two training checkpoints, one for sampling and one for others to use."""

    run_id: str
    state: str
    sampler: str
    external: str
    logprobs: np.ndarray


@pytest.fixture
def command(server: Server, tmp_path: Path) -> TinkerCommand:
    environment = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": API_KEY, "HOME": str(tmp_path), "COLUMNS": "300"}
    return TinkerCommand(environment=environment)


@pytest.fixture
def trained(new_model: NewModel, server: Server) -> Trained:
    model = new_model(base_model=server.qwen3, user_metadata={"colour": "blue"})
    train(model, 3)
    model.save_state("early").result()
    return Trained(
        model.model_id,
        model.save_state("final", user_metadata={"epoch": "2"}).result().path,
        model.save_weights_for_sampler("final").result().path,
        model.save_weights_external("final").result().path,
        forward_logprobs(model, SEQUENCE),
    )


def peft_logprobs(base_model: str, adapter: Path) -> np.ndarray:
    """What plain PEFT makes of downloaded files."""
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter))
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([SEQUENCE[:-1]])).logits[0].double(), -1)
    return logprobs[torch.arange(len(SEQUENCE) - 1), torch.tensor(SEQUENCE[1:])].numpy()


def checkpoints_of(command: TinkerCommand, run_id: str) -> dict[str, Any]:
    found = command.json("checkpoint", "list", "--run-id", run_id)
    assert found["run_id"] == run_id
    return {checkpoint["tinker_path"]: checkpoint for checkpoint in found["checkpoints"]}


def test_version(command: TinkerCommand) -> None:
    assert tinker.__version__ in command.text("version")


def test_model_list(command: TinkerCommand, server: Server) -> None:
    models = {model["model_name"]: model for model in command.json("model", "list")["models"]}
    assert set(models) == {server.llama, server.qwen3}
    assert models[server.llama]["max_context_length"] == 64
    assert models[server.llama]["trainable"]
    assert server.qwen3 in command.text("model", "list")
    (found,) = command.json("model", "list", "QWEN3")["models"]
    assert found["model_name"] == server.qwen3


def test_run_list_and_info(command: TinkerCommand, trained: Trained, server: Server) -> None:
    listed = command.json("run", "list", "--limit", "2")
    assert listed["runs"][0]["training_run_id"] == trained.run_id
    everything = command.json("run", "list", "--limit", "0")["runs"]
    assert trained.run_id in [run["training_run_id"] for run in everything]
    info = command.json("run", "info", trained.run_id)
    assert (info["base_model"], info["lora_rank"]) == (server.qwen3, 4)
    assert info["user_metadata"] == {"colour": "blue"}
    assert info["last_checkpoint"]["tinker_path"] == trained.state
    assert trained.run_id in command.text("run", "list")
    assert trained.run_id in command.text("run", "info", trained.run_id)
    assert "not found" in command.error("run", "info", "s-nobody:train:0")


def test_checkpoint_list_and_info(command: TinkerCommand, trained: Trained) -> None:
    kinds = {path: found["checkpoint_type"] for path, found in checkpoints_of(command, trained.run_id).items()}
    assert kinds[trained.state] == "training"
    assert kinds[trained.sampler] == "sampler"
    assert kinds[trained.external] == "external"
    newest = command.json("checkpoint", "list", "--limit", "3")["checkpoints"]
    assert newest[0]["tinker_path"] == trained.external
    assert len(newest) == 3
    assert len(command.json("checkpoint", "list", "--limit", "0")["checkpoints"]) >= 4
    info = command.json("checkpoint", "info", trained.state)
    assert (info["checkpoint_id"], info["lora_rank"], info["public"]) == ("weights/final", 4, False)
    assert info["size_bytes"] > 1000
    assert info["user_metadata"] == {"epoch": "2"}
    assert trained.state in command.text("checkpoint", "list", "--run-id", trained.run_id)
    assert trained.sampler in command.text("checkpoint", "info", trained.sampler)
    assert "not found" in command.error("checkpoint", "info", trained.state + "-never-saved")


def test_checkpoint_publish_and_unpublish(command: TinkerCommand, trained: Trained) -> None:
    command.text("checkpoint", "publish", trained.state)
    assert checkpoints_of(command, trained.run_id)[trained.state]["public"]
    command.text("checkpoint", "publish", trained.state)
    command.text("checkpoint", "unpublish", trained.state)
    assert not checkpoints_of(command, trained.run_id)[trained.state]["public"]
    assert "not found" in command.error("checkpoint", "publish", trained.state + "-never-saved")


def test_checkpoint_set_ttl(command: TinkerCommand, trained: Trained) -> None:
    command.text("checkpoint", "set-ttl", trained.sampler, "--ttl", "7200")
    expires = datetime.fromisoformat(checkpoints_of(command, trained.run_id)[trained.sampler]["expires_at"])
    assert timedelta(seconds=7000) < expires - datetime.now(UTC) <= timedelta(seconds=7200)
    command.text("checkpoint", "set-ttl", trained.sampler, "--remove")
    assert checkpoints_of(command, trained.run_id)[trained.sampler]["expires_at"] is None
    assert "3600" in command.error("checkpoint", "set-ttl", trained.sampler, "--ttl", "1")


def test_checkpoint_delete(command: TinkerCommand, trained: Trained) -> None:
    assert command.json("checkpoint", "delete", "-y", trained.sampler, trained.external) == {
        "deleted_count": 2,
        "failed": [],
    }
    early = trained.state.replace("final", "early")
    assert set(checkpoints_of(command, trained.run_id)) == {trained.state, early}
    run = ("--run-id", trained.run_id)
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    assert "No checkpoints" in command.text("checkpoint", "delete", "-y", *run, "--after", tomorrow)
    assert "No checkpoints" in command.text("checkpoint", "delete", "-y", *run, "--type", "sampler_weights")
    declined = command.text("checkpoint", "delete", *run, "--before", tomorrow, stdin="n\n")
    assert "cancelled" in declined
    assert trained.state in declined
    assert "Deleted 2" in command.text(
        "checkpoint", "delete", *run, "--type", "weights", "--before", tomorrow, stdin="y\n"
    )
    assert checkpoints_of(command, trained.run_id) == {}
    (failure,) = command.json("checkpoint", "delete", "-y", trained.sampler)["failed"]
    assert failure["tinker_path"] == trained.sampler


@pytest.mark.parametrize("kind", ["external", "state"])
def test_checkpoint_download(
    command: TinkerCommand, trained: Trained, server: Server, tmp_path: Path, kind: str
) -> None:
    path = getattr(trained, kind)
    before = checkpoints_of(command, trained.run_id)
    shown = command.json("checkpoint", "download", path, "-o", str(tmp_path))
    directory = Path(shown["destination"])
    assert directory.parent == tmp_path
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in directory.iterdir()}
    assert shown["file_size_bytes"] == sum(file.stat().st_size for file in directory.iterdir())
    np.testing.assert_allclose(peft_logprobs(server.qwen3, directory), trained.logprobs, atol=1e-4)
    assert "already exists" in command.error("checkpoint", "download", path, "-o", str(tmp_path))
    assert str(directory) in command.text("checkpoint", "download", path, "-o", str(tmp_path), "--force")
    assert checkpoints_of(command, trained.run_id) == before
    newest = command.json("checkpoint", "list", "--limit", "1")["checkpoints"]
    assert newest[0]["tinker_path"] == trained.external  # the temporary export is gone


def test_checkpoint_download_refuses_samplers_as_the_client_does(command: TinkerCommand, trained: Trained) -> None:
    assert "cannot be downloaded" in command.error("checkpoint", "download", trained.sampler)


@pytest.mark.parametrize("kind", ["external", "state"])
def test_checkpoint_push_hf(
    command: TinkerCommand,
    trained: Trained,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Everything up to the hub, which is played here."""
    uploads, upload = [], inspect.signature(huggingface_hub.HfApi.upload_folder)

    class Hub:
        def whoami(self) -> dict[str, str]:
            return {"name": "somebody"}

        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            assert private
            assert exist_ok

        def upload_folder(self, **arguments: Any) -> None:
            upload.bind(self, **arguments)
            uploads.append(arguments)
            shutil.copytree(arguments["folder_path"], tmp_path / "uploaded")

    def nothing_there(**_: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", nothing_there)
    shown = command.json("checkpoint", "push-hf", getattr(trained, kind), "--repo", "somebody/adapter")
    assert shown["repo_id"] == "somebody/adapter"
    assert [arguments["repo_id"] for arguments in uploads] == ["somebody/adapter"]
    config = json.loads((tmp_path / "uploaded" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == server.qwen3
    assert server.qwen3 in (tmp_path / "uploaded" / "README.md").read_text()
    np.testing.assert_allclose(peft_logprobs(server.qwen3, tmp_path / "uploaded"), trained.logprobs, atol=1e-4)


def test_session_export_trace(command: TinkerCommand, trained: Trained, tmp_path: Path) -> None:
    session_id = trained.run_id.split(":")[0]
    shown = command.json("session", "export-trace", session_id, "-o", str(tmp_path / "trace.pftrace"))
    trace = (tmp_path / "trace.pftrace").read_bytes()
    assert shown["file_size_bytes"] == len(trace) > 100
    url = command.text("session", "export-trace", session_id, "--url-only").strip()
    assert url.startswith("http://127.0.0.1")
    assert "not found" in command.error("session", "export-trace", "s-nobody")


def test_auth_status(command: TinkerCommand) -> None:
    assert "Tinker accessible: yes" in command.text("auth", "status")
