"""Access tokens and public checkpoints between two users with keys of their own, through the SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import tinker

from tests.serving import serve_in_thread
from tinker_core.engine import Engine, EngineConfig
from tinker_core.plugins import Plugins
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.types import BaseModelSpec
from tinker_server.app import create_app
from tinker_server.cli import main


@attrs.frozen
class Place:
    """A server whose data directory the commands work on, and two users' keys."""

    url: str
    data_dir: Path
    keys: dict[str, str]
    capture: Any
    database: str

    def command(self, *arguments: str) -> Any:
        self.capture.readouterr()
        assert main([*arguments, "--database-url", self.database, "--format", "json"]) == 0
        return json.loads(self.capture.readouterr().out)

    def service(self, user: str) -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=self.url, api_key=self.keys[user])


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str], database: str) -> Iterator[Place]:
    plugins = Plugins.load("core", FAKE_PLUGIN)
    data_dir = tmp_path / "data"
    config = EngineConfig(
        base_models=(BaseModelSpec(name="tiny", path="tiny"),),
        data_dir=data_dir,
        backend="fake",
        sampler="fake",
        plugins=(FAKE_PLUGIN,),
        database_url=database,
    )
    before = Place("", data_dir, {}, capsys, database)
    keys = {user: before.command("keys", "create", "--owner", user)[0]["key"] for user in ("ann", "bob")}
    with serve_in_thread(create_app(Engine(config, plugins), plugins=plugins, poll_seconds=5.0)) as url:
        yield Place(url, data_dir, keys, capsys, database)


def test_a_token_from_the_command_line_opens_one_checkpoint(place: Place) -> None:
    with place.service("ann") as ann, place.service("bob") as bob:
        model = ann.create_lora_training_client(base_model="tiny", rank=4).result()
        path, other = (model.save_state(name).result().path for name in ("shared", "other"))
        (made,) = place.command("tokens", "create", path, "--expires-in", "1h")
        token = made["token"]
        loaded = bob.create_training_client_from_state(path, weights_access_token=token).result()
        with pytest.warns(FutureWarning, match="load_state"):
            loaded.load_state(path, weights_access_token=token).result()
        rest = tinker.RestClient(base_url=place.url, api_key=place.keys["bob"])
        copy = rest.copy_weights(path, "mine", weights_access_token=token).result()
        assert [item.tinker_path for item in rest.list_user_checkpoints().result().checkpoints] == [copy]
        for closed, held in ((other, token), (path, None), (path, "tml-access-wrong")):
            with pytest.raises(tinker.RequestFailedError, match="no checkpoint"):
                bob.create_training_client_from_state(closed, weights_access_token=held).result()
        with pytest.raises(tinker.NotFoundError):
            rest.copy_weights(other, "mine", weights_access_token=token).result()
        assert place.command("tokens", "revoke", made["token_id"])[0]["state"] == "revoked"
        with pytest.raises(tinker.RequestFailedError, match="no checkpoint"):
            bob.create_training_client_from_state(path, weights_access_token=token).result()
    for file in place.data_dir.parent.glob("control.sqlite*"):
        assert token.encode() not in file.read_bytes()
    (listed,) = place.command("tokens", "list")
    assert (listed["path"], listed["owner"]) == (path, "ann")
    assert "token" not in listed


def test_public_weights_are_read_by_others_and_changed_by_none(place: Place) -> None:
    with place.service("ann") as ann, place.service("bob") as bob:
        mine = tinker.RestClient(base_url=place.url, api_key=place.keys["ann"])
        theirs = tinker.RestClient(base_url=place.url, api_key=place.keys["bob"])
        model = ann.create_lora_training_client(base_model="tiny", rank=4).result()
        path = model.save_weights_for_sampler("final").result().path
        private = model.save_state("private").result().path
        with pytest.raises(tinker.NotFoundError):
            theirs.get_training_run_by_tinker_path(path, access_scope="accessible").result()
        mine.publish_checkpoint_from_tinker_path(path).result()
        assert theirs.get_weights_info_by_tinker_path(path).result().lora_rank == 4
        assert bob.create_sampling_client(model_path=path).result().get_base_model() == "tiny"
        run = theirs.get_training_run_by_tinker_path(path, access_scope="accessible").result()
        assert run.last_checkpoint is None
        assert run.last_sampler_checkpoint is not None
        seen = theirs.list_checkpoints(model.model_id).result().checkpoints
        assert [item.tinker_path for item in seen] == [path]
        assert theirs.copy_weights(path, "mine").result().endswith("/sampler_weights/final")
        for refused in (
            lambda: theirs.get_training_run(model.model_id),
            lambda: theirs.delete_checkpoint_from_tinker_path(path),
            lambda: theirs.set_checkpoint_ttl_from_tinker_path(path, 3600),
            lambda: theirs.unpublish_checkpoint_from_tinker_path(path),
            lambda: theirs.get_weights_info_by_tinker_path(private),
            lambda: theirs.export_session_trace(model.model_id.partition(":")[0]),
            lambda: theirs.assign_session_project(model.model_id.partition(":")[0], "mine"),
        ):
            with pytest.raises(tinker.NotFoundError):
                refused().result()


def test_the_tokens_command_says_what_is_wrong(place: Place) -> None:
    for wrong, said in (
        (["create", "tinker://nobody"], "unknown model"),
        (["create", "weights"], "malformed tinker path"),
        (["create", "tinker://a/weights/b", "--expires-in", "soon"], "30d"),
        (["revoke", "at-none"], "unknown access token"),
    ):
        assert main(["tokens", *wrong, "--data-dir", str(place.data_dir)]) == 2
        assert said in place.capture.readouterr().err
