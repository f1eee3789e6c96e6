from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.conftest import EngineFactory, forward_backward
from tests.processes import ranks_of
from tinker_core.errors import ConfigurationError, InvalidLoraConfigError, PluginError, StorageError, TinkerError
from tinker_core.executors.local import start_local
from tinker_core.executors.protocol import StateCall
from tinker_core.interfaces import WorkerGroupSpec
from tinker_core.testing import start_group
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.testing.trainer_lab import TrainerLab
from tinker_core.types import (
    MANIFEST_FILE,
    BaseModelSpec,
    ForwardBackwardOutput,
    LoraConfig,
    OptimizerConfig,
    PreparedModel,
)

ROOT = Path(__file__).parents[2]


def spec(num_ranks: int = 1, trainer: str = "fake") -> WorkerGroupSpec:
    return WorkerGroupSpec(
        base_model=BaseModelSpec(name="tiny", path="tiny"),
        trainer=trainer,
        sampler="fake",
        plugins=(FAKE_PLUGIN,),
        num_ranks=num_ranks,
        device="cpu",
        dtype="float32",
    )


def model() -> PreparedModel:
    return PreparedModel(model_id="m", lora_config=LoraConfig(rank=2, seed=1), optimizer_config=OptimizerConfig())


def children() -> dict[int, int]:
    """Rank processes of this process, by rank."""
    return {rank: pid for pid, rank in ranks_of(os.getpid()).items()}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_group_runs_commands_and_reports_errors_by_their_class(num_ranks: int) -> None:
    with start_group(spec(num_ranks)) as group:
        assert group.call("capabilities").trainer.architecture == "fake"
        bad = PreparedModel(model_id="m", lora_config=LoraConfig(rank=999), optimizer_config=OptimizerConfig())
        with pytest.raises(InvalidLoraConfigError, match="999"):
            group.call("create", bad)
        assert sorted(children()) == list(range(num_ranks))
    assert children() == {}


def test_ranks_leave_an_interrupt_from_the_terminal_to_the_server() -> None:
    with start_group(spec(2)) as group:
        for pid in children().values():
            os.kill(pid, signal.SIGINT)
        assert group.call("capabilities").trainer.architecture == "fake"


def test_a_group_that_cannot_be_built_raises_the_ranks_own_error() -> None:
    async def body() -> None:
        with pytest.raises(PluginError, match=r"'other'.*known: fake"):
            await start_local(spec(trainer="other"))

    asyncio.run(body())
    assert children() == {}


def test_ranks_end_when_their_parent_dies() -> None:
    script = (
        "import asyncio, os\n"
        "from tests.core.test_executor_local import children, spec\n"
        "from tinker_core.executors.local import start_local\n"
        "async def main():\n"
        "    group = await start_local(spec(2))\n"
        "    print(*children().values(), flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert parent.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in parent.stdout.split()]
    assert len(pids) == 2
    for pid in pids:
        wait_until_gone(pid)


def test_a_rank_that_hangs_without_its_peer_ends_when_the_engine_dies(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    script = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "import attrs\n"
        "from tests.core.test_executor_local import ROOT, children, model, spec, wait_until_gone\n"
        "from tinker_core.executors.local import start_local\n"
        "async def main():\n"
        "    stuck = attrs.evolve(spec(2, 'stuck'), plugins=('tests.core.stuck_trainer',), sampler=None,\n"
        "                         options={'pipe': sys.argv[1]}, environment={'PYTHONPATH': str(ROOT)})\n"
        "    group = await start_local(stuck)\n"
        "    ranks = children()\n"
        "    asyncio.ensure_future(group.call('create', model()))\n"
        "    await asyncio.sleep(0)\n"
        "    assert Path(sys.argv[1]).read_text() == 'stuck'\n"  # from here on the engine's loop stands still
        "    os.kill(ranks[0], 9)\n"
        "    wait_until_gone(ranks[0])\n"
        "    print(ranks[1], flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.run(
        [sys.executable, "-c", script, str(pipe)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    wait_until_gone(int(parent.stdout))


def test_a_full_disk_fails_a_snapshot_and_leaves_the_group_as_it_was(tmp_path: Path) -> None:
    with start_group(spec(2)) as group:
        lab = TrainerLab(group, tmp_path)
        model_id = lab.create()
        lab.train(model_id, 0)
        _, hard = resource.prlimit(children()[0], resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        _, failed = lab.begin_snapshot(model_id)
        with pytest.raises(StorageError, match="File too large"):
            failed.result(timeout=60)
        resource.prlimit(children()[0], resource.RLIMIT_FSIZE, (hard, hard))
        directory, written = lab.begin_snapshot(model_id)
        lab.train(model_id, 1)
        written.result(timeout=60)
        lab.restore(model_id, directory, gradient=True)


def test_a_group_that_is_closed_finishes_what_it_writes(tmp_path: Path) -> None:
    async def body() -> None:
        group = await start_local(spec())
        await group.call("create", model())
        os.mkfifo(tmp_path / MANIFEST_FILE)
        call = StateCall(model_id=model().model_id, directory=str(tmp_path), background=True)
        snapshot = asyncio.create_task(group.call("snapshot", call))
        await asyncio.sleep(0)  # until it is sent
        await group.call("optim_step", ())  # runs after the state was copied
        closing = asyncio.create_task(group.close())
        await asyncio.sleep(0)
        reader = os.open(tmp_path / MANIFEST_FILE, os.O_RDONLY | os.O_NONBLOCK)
        await snapshot
        await closing
        assert b"optimizer_steps" in os.read(reader, 10_000)
        os.close(reader)
        assert [process.returncode for process in group._processes] == [0]

    asyncio.run(body())


def wait_until_gone(pid: int) -> None:
    """Wait on a process that is not our child; its pidfd becomes readable when it ends."""
    import select

    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], 20.0)[0], f"process {pid} outlived its parent"
    finally:
        os.close(descriptor)


def test_a_dead_worker_costs_its_requests_only_time(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create(0)
            os.kill(children()[0], signal.SIGKILL)
            for seq_id in (1, 2):
                assert isinstance(await client.run(forward_backward(model_id, seq_id)), ForwardBackwardOutput)
            fresh = await client.create(1)
            assert isinstance(await client.run(forward_backward(fresh, 1)), ForwardBackwardOutput)

    asyncio.run(body())


def test_a_data_directory_belongs_to_one_engine(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine():
            with pytest.raises(ConfigurationError, match="--data-dir"):
                async with open_engine():
                    pass

    asyncio.run(body())


def test_a_base_model_that_cannot_train_never_becomes_ready(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine(max_lora_rank=0) as client:
            with pytest.raises(TinkerError, match="lora rank 1 must be"):
                await client.engine.wait_ready()
            readiness = client.engine.readiness()
            assert not readiness.ready
            assert readiness.models["tiny"].startswith("failed")

    asyncio.run(body())
