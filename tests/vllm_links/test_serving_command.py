"""``tinker-sampler-vllm``: what its flags say, and how it keeps an engine running."""

from __future__ import annotations

import asyncio
import stat

import pytest

from tests.vllm_links.engines import run
from tests.vllm_links.places import until
from tinker_core.errors import ConfigurationError, WorkerLostError
from tinker_sampler_vllm.addresses import check_address
from tinker_sampler_vllm.cli import main, make_parser, read_served_engine
from tinker_sampler_vllm.restarts import Restarts
from tinker_sampler_vllm.serving_command import keep_running


class FakeProcess:
    def __init__(self):
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.done: list[str] = []

    async def wait(self):
        return await asyncio.shield(self.ended)

    async def stop(self):
        self.done.append("stop")

    async def kill(self):
        self.done.append("kill")


class Starts:
    """Starts fake processes, or fails as told."""

    def __init__(self, *failures: Exception | None):
        self.processes: list[FakeProcess] = []
        self._failures = list(failures)

    async def __call__(self):
        failure = self._failures.pop(0) if self._failures else None
        if failure is not None:
            raise failure
        self.processes.append(FakeProcess())
        return self.processes[-1]


def test_an_engine_that_ends_is_started_again_and_each_one_is_announced_when_it_is_ready(capsys):
    async def scenario():
        start = Starts(None, WorkerLostError("it ended"), RuntimeError("a defect"))
        keeping = asyncio.create_task(keep_running(start, "ready: here", Restarts((0.0,))))
        await until(lambda: start.processes)
        start.processes[0].ended.set_result(-9)
        await until(lambda: len(start.processes) == 2)
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping
        assert [process.done for process in start.processes] == [["kill"], ["stop"]]

    run(scenario())
    assert capsys.readouterr().out == "ready: here\n" * 2


def test_the_reason_why_the_first_engine_does_not_start_is_raised(capsys):
    with pytest.raises(ConfigurationError, match="no such model"):
        run(keep_running(Starts(ConfigurationError("no such model")), "ready", Restarts((0.0,))))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:7100", "tcp://[::]:7100", "tcp://*:65535"])
def test_addresses_of_engines(address):
    assert check_address(address) == address


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("0.0.0.0:7100", "use tcp://HOST:PORT"),
        ("http://here:7100", "use tcp://HOST:PORT"),
        ("ipc:///tmp/engine", "use tcp://HOST:PORT"),
        ("tcp://:7100", "use tcp://HOST:PORT"),
        ("tcp://here", "use tcp://HOST:PORT"),
        ("tcp://here:0", "port from 1 to 65535"),
        ("tcp://here:70000", "port from 1 to 65535"),
        ("tcp://here:x", "port from 1 to 65535"),
    ],
)
def test_what_is_no_address_is_refused(address, message):
    with pytest.raises(ConfigurationError, match=message):
        check_address(address)


def served_by(tmp_path, *more, base_model=None):
    main(["secret", str(tmp_path / "secret")])
    given = ["serve", "--base-model", base_model or f"org/tiny={tmp_path}", "--listen", "tcp://127.0.0.1:7100"]
    given += ["--secret-file", str(tmp_path / "secret"), *more]
    return read_served_engine(vars(make_parser().parse_args(given)))


def test_every_flag_reaches_the_engine(tmp_path):
    flags = "--device cpu --dtype bfloat16 --max-revisions 5 --max-lora-rank 16 --max-context-length 128 "
    flags += "--max-decode-batch 9 --deterministic --tensor-parallel 2 --memory-share 0.5 --kv-cache-mib 3 "
    flags += "--lora-slots 4 --eager"
    served = served_by(tmp_path, *flags.split())
    settings = served.settings
    assert (settings.base_model.name, settings.base_model.path) == ("org/tiny", str(tmp_path))
    assert (settings.device, settings.dtype, settings.deterministic, settings.eager) == ("cpu", "bfloat16", True, True)
    assert (settings.max_revisions, settings.max_lora_rank, settings.lora_slots) == (5, 16, 4)
    assert (settings.max_context_length, settings.max_decode_batch, settings.tensor_parallel) == (128, 9, 2)
    assert (settings.memory_share, settings.kv_cache_bytes) == (0.5, 3 * 1024**2)
    assert served.address == "tcp://127.0.0.1:7100"
    assert served.secret not in repr(served)


def test_without_flags_vllm_decides(tmp_path):
    settings = served_by(tmp_path).settings
    assert (settings.memory_share, settings.kv_cache_bytes, settings.eager) == (None, None, None)


def test_a_hub_name_is_left_to_the_cache(tmp_path):
    assert served_by(tmp_path, base_model="name=org/model").settings.base_model.path == "org/model"


@pytest.mark.parametrize(
    ("base_model", "message"),
    [("tiny", "must be NAME=PATH"), ("=path", "must be NAME=PATH"), ("tiny=/no/such", "is no directory")],
)
def test_base_models_that_cannot_be_are_refused(tmp_path, base_model, message):
    with pytest.raises(ConfigurationError, match=message):
        served_by(tmp_path, base_model=base_model)


@pytest.mark.parametrize("flag", ["--max-revisions=0", "--lora-slots=-1", "--memory-share=1.5", "--memory-share=0"])
def test_values_out_of_range_are_refused(tmp_path, flag, capsys):
    with pytest.raises(SystemExit):
        served_by(tmp_path, flag)
    assert "must be" in capsys.readouterr().err


def test_mistakes_are_one_line_and_an_exit_status(tmp_path, capsys):
    assert main(["secret", str(tmp_path / "secret")]) == 0
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert main(["secret", str(tmp_path / "secret")]) == 2
    assert capsys.readouterr().err == f"tinker-sampler-vllm: cannot make {tmp_path}/secret: File exists\n"
