"""Saving, loading, downloading, copying and deleting weights."""

from __future__ import annotations

import inspect
import io
import json
import tarfile
from datetime import UTC, datetime
from typing import Any

import httpx
from operations.bridge import (
    BASE_MODEL,
    RANK,
    Client,
    close,
    differs,
    done,
    model_logprobs,
    needs,
    operation,
    refused,
    sampler_logprobs,
    step,
)

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}


def saved(client: Client, path: str) -> Any:
    """The checkpoint as the training run lists it; None if it does not."""
    found = done(client.rest.list_checkpoints(client.model_id)).checkpoints
    return next((checkpoint for checkpoint in found if checkpoint.tinker_path == path), None)


def check_adapter_config(data: bytes) -> None:
    """The file is what PEFT reads."""
    config = json.loads(data)
    assert config["r"] == RANK
    assert config["peft_type"] == "LORA"


@operation("save_state")
def save_state(client: Client) -> None:
    client.saved = model_logprobs(client.model)
    client.state_path = done(client.model.save_state("first")).path
    assert client.state_path == f"tinker://{client.model_id}/weights/first"


@operation("save_state(ttl_seconds)")
def save_state_ttl(client: Client) -> None:
    path = done(needs(client.model, "save_state", "ttl_seconds")("short", ttl_seconds=7200)).path
    assert saved(client, path) is not None


@operation("save_state(overwrite)")
def save_state_overwrite(client: Client) -> None:
    save = needs(client.model, "save_state", "overwrite")
    path = done(save("twice")).path
    refused(lambda: done(save("twice")), "twice")
    assert done(save("twice", overwrite=True)).path == path


@operation("save_state(user_metadata)")
def save_state_metadata(client: Client) -> None:
    path = done(needs(client.model, "save_state", "user_metadata")("noted", user_metadata={"epoch": "3"})).path
    assert saved(client, path).user_metadata == {"epoch": "3"}


@operation("load_state")
def load_state(client: Client) -> None:
    step(client.model, learning_rate=0.05)
    differs(model_logprobs(client.model), client.saved)
    done(client.model.load_state(client.state_path))
    close(model_logprobs(client.model), client.saved)


@operation("load_state_with_optimizer")
def load_state_with_optimizer(client: Client) -> None:
    load = needs(client.model, "load_state_with_optimizer")
    step(client.model)
    path = done(client.model.save_state("with-optimizer")).path
    step(client.model)
    client.next_step = model_logprobs(client.model)
    done(load(path))
    client.optimizer_path = path
    step(client.model)
    close(model_logprobs(client.model), client.next_step)


@operation("create_training_client_from_state")
def client_from_state(client: Client) -> None:
    model = done(client.service.create_training_client_from_state(client.state_path))
    assert str(model.model_id) != client.model_id
    close(model_logprobs(model), client.saved)
    step(model)
    differs(model_logprobs(model), client.saved)


@operation("create_training_client_from_state_with_optimizer")
def client_from_state_with_optimizer(client: Client) -> None:
    create = needs(client.service, "create_training_client_from_state_with_optimizer")
    model = done(create(client.optimizer_path))
    step(model)
    close(model_logprobs(model), client.next_step)


@operation("save_weights_for_sampler")
def save_weights_for_sampler(client: Client) -> None:
    client.saved = model_logprobs(client.model)
    client.sampler_path = done(client.model.save_weights_for_sampler("named")).path
    assert client.sampler_path == f"tinker://{client.model_id}/sampler_weights/named"


@operation("list_checkpoints")
def list_checkpoints(client: Client) -> None:
    assert saved(client, client.state_path).checkpoint_type == "training"
    checkpoint = saved(client, client.sampler_path)
    assert (checkpoint.checkpoint_type, checkpoint.checkpoint_id) == ("sampler", "sampler_weights/named")
    assert (datetime.now(UTC) - checkpoint.time).total_seconds() < 600


@operation("list_user_checkpoints")
def list_user_checkpoints(client: Client) -> None:
    found = done(needs(client.rest, "list_user_checkpoints")(limit=100)).checkpoints
    assert client.sampler_path in [checkpoint.tinker_path for checkpoint in found]
    (first,) = done(client.rest.list_user_checkpoints(limit=1)).checkpoints
    assert first.time >= saved(client, client.sampler_path).time


@operation("get_weights_info_by_tinker_path")
def weights_info(client: Client) -> None:
    info = done(needs(client.rest, "get_weights_info_by_tinker_path")(client.state_path))
    assert (info.base_model, info.is_lora, info.lora_rank) == (BASE_MODEL, True, RANK)


@operation("publish and unpublish")
def publish(client: Client) -> None:
    done(needs(client.rest, "publish_checkpoint_from_tinker_path")(client.sampler_path))
    assert saved(client, client.sampler_path).public
    done(needs(client.rest, "unpublish_checkpoint_from_tinker_path")(client.sampler_path))
    assert not saved(client, client.sampler_path).public


@operation("set_checkpoint_ttl_from_tinker_path")
def set_ttl(client: Client) -> None:
    set_it = needs(client.rest, "set_checkpoint_ttl_from_tinker_path")
    done(set_it(client.state_path, 7200))
    left = saved(client, client.state_path).expires_at - datetime.now(UTC)
    assert 7000 < left.total_seconds() <= 7200
    done(set_it(client.state_path, None))
    assert saved(client, client.state_path).expires_at is None


@operation("get_checkpoint_archive_url_from_tinker_path")
def archive_url(client: Client) -> None:
    found = done(needs(client.rest, "get_checkpoint_archive_url_from_tinker_path")(client.sampler_path))
    # The older releases read the HTTP date without its time zone.
    assert found.expires.replace(tzinfo=UTC) > datetime.now(UTC)
    answer = httpx.get(found.url)
    answer.raise_for_status()
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        files = {name.split("/")[-1]: name for name in archive.getnames()}
        assert files.keys() >= ADAPTER_FILES
        check_adapter_config(archive.extractfile(files["adapter_config.json"]).read())


@operation("save_weights_external and get_external_weights_urls")
def external_weights(client: Client) -> None:
    path = done(needs(client.model, "save_weights_external")("exported", ttl_seconds=3600)).path
    assert path == f"tinker://{client.model_id}/external_weights/exported"
    get = needs(client.rest, "get_external_weights_urls")
    by_path = "tinker_path" in inspect.signature(get).parameters
    found = done(get(path) if by_path else get(client.model_id, "external_weights/exported"))
    assert found.urls.keys() >= ADAPTER_FILES
    assert found.expires > datetime.now(UTC)
    for name, url in found.urls.items():
        answer = httpx.get(url)
        answer.raise_for_status()
        if name == "adapter_config.json":
            check_adapter_config(answer.content)


@operation("copy_weights")
def copy_weights(client: Client) -> None:
    if hasattr(client.rest, "copy_weights"):
        path = done(client.rest.copy_weights(client.sampler_path, "project-of-the-copy"))
    else:
        path = done(needs(client.service, "copy_weights")(client.sampler_path))
    assert path != client.sampler_path
    sampler = done(client.service.create_sampling_client(model_path=path))
    close(sampler_logprobs(sampler), client.saved)


@operation("delete_checkpoint")
def delete_checkpoint(client: Client) -> None:
    by_id = done(client.model.save_state("by-id")).path
    by_path = done(client.model.save_weights_for_sampler("by-path")).path
    done(client.rest.delete_checkpoint(client.model_id, "weights/by-id"))
    done(client.rest.delete_checkpoint_from_tinker_path(by_path))
    assert saved(client, by_id) is None
    assert saved(client, by_path) is None
    assert saved(client, client.state_path) is not None
