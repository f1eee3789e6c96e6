"""What runs where."""

from __future__ import annotations

import os
from pathlib import Path

import tinker

from tests.e2e.conftest import NewModel, Server, train
from tests.processes import children_of, ranks_of


def loads_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_torch_is_loaded_by_the_ranks_and_never_by_the_server(server: Server, new_model: NewModel) -> None:
    train(new_model(), 1)
    [supervisor] = [pid for pid, args in children_of(os.getpid()).items() if str(server.data_dir) in args]
    [pid] = children_of(supervisor)
    assert not loads_torch(supervisor)
    assert not loads_torch(pid)
    ranks = ranks_of(pid)
    assert len(ranks) == 2  # one for each base model
    assert all(loads_torch(rank) for rank in ranks)


def test_the_control_database_never_sees_a_body(server: Server, service: tinker.ServiceClient) -> None:
    secret = "a-name-that-only-this-test-uses"
    model = service.create_lora_training_client(
        base_model=server.llama, rank=4, user_metadata={"note": secret}
    ).result()
    norms = train(model, 2)
    assert len(norms) == 2
    files = [path.read_bytes() for path in server.data_dir.glob("control.sqlite*")]
    assert any(secret.encode() in content for content in files)  # metadata is a record, so the search works
    assert not any(b"target_tokens" in content or b"loss_fn_inputs" in content for content in files)
