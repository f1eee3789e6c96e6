from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.conftest import EngineFactory, forward_backward
from tests.core.test_engine_sampling import PROMPT, ephemeral, logprobs
from tests.processes import children_of
from tinker_core.errors import ConfigurationError, InvalidLoraConfigError, PluginError, TinkerError
from tinker_core.executors.local import start_local
from tinker_core.interfaces import WorkerGroupSpec
from tinker_core.testing import start_group
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.types import (
    BaseModelSpec,
    ForwardBackwardOutput,
    LoraConfig,
    OptimizerConfig,
    PreparedModel,
    RequestError,
    SampleInput,
    SamplingParams,
)


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


def children() -> dict[int, int]:
    """Rank processes of this process, by rank."""
    ranks = {pid: args for pid, args in children_of(os.getpid()).items() if "tinker_core.executors.rank" in args}
    return {int(args[-1]): pid for pid, args in ranks.items()}


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
    root = Path(__file__).parents[2]
    parent = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=False)
    assert parent.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in parent.stdout.split()]
    assert len(pids) == 2
    for pid in pids:
        _wait_until_gone(pid)


def _wait_until_gone(pid: int) -> None:
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


def test_a_dead_worker_fails_its_requests_and_new_models_work_afterwards(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create(0)
            os.kill(children()[0], signal.SIGKILL)
            outputs = [await client.run(forward_backward(model_id, seq_id)) for seq_id in (1, 2)]
            for output in outputs:
                assert isinstance(output, RequestError)
                assert (output.category, output.code) == ("server", "WorkerLostError")
            fresh = await client.create(1)
            assert isinstance(await client.run(forward_backward(fresh, 1)), ForwardBackwardOutput)

    asyncio.run(body())


def test_ephemeral_weights_that_died_with_their_process_are_reported_as_gone(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine() as client:
            model_id = await client.create(0)
            sampler = await ephemeral(client, model_id, 1, 0)
            await logprobs(client, sampler, 0)
            os.kill(children()[0], signal.SIGKILL)
            await client.run(forward_backward(model_id, 2))
            await client.create(1)  # the workers run again
            request = SampleInput(
                sampling_session_id=sampler, seq_id=1, prompt=PROMPT, sampling_params=SamplingParams(max_tokens=1)
            )
            output = await client.run(request)
            assert isinstance(output, RequestError)
            assert output.code == "LostWeightsError"

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
        async with open_engine(max_models=0) as client:
            with pytest.raises(TinkerError, match="slots"):
                await client.engine.wait_ready()
            readiness = client.engine.readiness()
            assert not readiness.ready
            assert readiness.models["tiny"].startswith("failed")

    asyncio.run(body())
